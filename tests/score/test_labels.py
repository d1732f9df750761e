"""Classifiers against transformers' own pipelines; long texts, batches, and what goes wrong."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from parts.models import MOODS, TEXT, build, byte_tokenizer
from seqeval.metrics.sequence_labeling import get_entities

from textgen_cli.config import ModelConfig, ScoringConfig
from textgen_cli.errors import InputError, ModelError, OutOfMemory, TextgenError
from textgen_cli.events import Event, silent
from textgen_cli.model.classifier import windows
from textgen_cli.model.load import Model, load
from textgen_cli.model.tokenizer import Tokenizer
from textgen_cli.score.labels import EntityScorer, LabelScorer
from textgen_cli.score.request import Asked
from textgen_cli.text.segments import segments

close = pytest.approx
SmallModel = Callable[..., Path]
WORDS = [*" ".join(TEXT).split(), "don't", "e-mail,", "(42)", "Zürich", "🙂", "👩‍👩‍👧", "qxz", "שלום", "..."]
LABELLERS = [
    "bert-classifier", "bert-multilabel", "bert-regression", "bert-regressions", "bert-grade", "gpt2-classifier",
    "bart-classifier",
]  # fmt: skip


def texts(count: int, seed: int = 0, longest: int = 16, words: Sequence[str] = WORDS) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(1, longest))) for _ in range(count)]


@pytest.fixture(scope="module")
def opened(small_model: SmallModel) -> Callable[[str], Model]:
    """opened("bert-tagger") -> Model; each is loaded once."""
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            config = ModelConfig(model=str(small_model(name)), dtype="float32", device="cpu")
            made[name] = load(config, "score", silent)
        return made[name]

    return get


Scorers = type[LabelScorer] | type[EntityScorer]


def score(
    scorer: Scorers, model: Model, asked: Sequence[Asked | str], rows: int | None = None, **config: Any
) -> Any:
    """Figures or error of each question, in order."""
    questions = [
        Asked(i, one) if isinstance(one, str) else replace(one, index=i) for i, one in enumerate(asked)
    ]
    found = list(scorer(ScoringConfig(**config), model, rows, silent).score(questions))
    assert sorted(index for index, _ in found) == list(range(len(asked)))
    for _, figures in found:
        assert isinstance(figures, TextgenError) or json.dumps(figures, allow_nan=False)
    return [figures for _, figures in sorted(found, key=lambda pair: pair[0])]


def label_pipeline(model: Model) -> Callable[[Any], list[dict[str, Any]]]:
    """transformers' own judgement of one text, or of {text, text_pair}."""
    net = transformers.AutoModelForSequenceClassification.from_pretrained(model.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.folder)
    judge: Any = transformers.pipeline(
        "text-classification", model=net, tokenizer=tokenizer, device="cpu", top_k=None
    )
    return lambda one: list(judge([one])[0])


def entity_pipeline(model: Model) -> Any:
    net = transformers.AutoModelForTokenClassification.from_pretrained(model.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.folder)
    return transformers.pipeline(
        "token-classification", model=net, tokenizer=tokenizer, device="cpu", aggregation_strategy="first"
    )


def by_name(figures: dict[str, Any], names: Sequence[str]) -> list[float]:
    if "value" in figures:
        return [figures["value"]]
    found = figures["values"] if "values" in figures else figures["labels"]
    assert list(found) == list(names)
    return list(found.values())


# --- sequence classification


@pytest.mark.parametrize("name", LABELLERS)
def test_labels_equal_the_pipeline(opened: Callable[[str], Model], name: str) -> None:
    model = opened(name)
    judge = label_pipeline(model)
    several = texts(12)
    names = list(model.net.config.id2label.values())
    seen = set()
    for text, ours in zip(several, score(LabelScorer, model, several), strict=True):
        theirs = {entry["label"]: entry["score"] for entry in judge(text)}
        # A value is a sum of widened weights: float32 itself strays by 1.5e-5 from float64 here, either side may.
        near = 5e-5 if "value" in ours or "values" in ours else 1e-5
        assert by_name(ours, names) == close([theirs[name] for name in names], abs=near, rel=1e-5)
        if name.endswith("-classifier"):
            assert ours["prediction"] == max(theirs, key=theirs.__getitem__)
            assert sum(ours["labels"].values()) == close(1)
        elif name == "bert-multilabel":
            assert ours["prediction"] == [name for name in names if theirs[name] >= 0.5]
        seen.add(str(ours.get("prediction")))
    assert len(seen) > 1 or not name.startswith("bert-") or "prediction" not in ours


@pytest.mark.parametrize("name", ["bert-classifier", "bart-classifier"])
def test_a_context_stands_before_the_text(opened: Callable[[str], Model], name: str) -> None:
    model = opened(name)
    judge = label_pipeline(model)
    premises, claims = texts(6, 1), texts(6, 2)
    asked = [Asked(0, claim, context=premise) for premise, claim in zip(premises, claims, strict=True)]
    for premise, claim, ours in zip(premises, claims, score(LabelScorer, model, asked), strict=True):
        theirs = {e["label"]: e["score"] for e in judge({"text": premise, "text_pair": claim})}
        assert ours["labels"] == close(theirs, abs=1e-5)
        swapped = {e["label"]: e["score"] for e in judge({"text": claim, "text_pair": premise})}
        assert ours["labels"] != close(swapped, abs=1e-5)


@pytest.mark.parametrize("name", [*LABELLERS, "bert-tagger", "bert-byte-tagger"])
def test_figures_do_not_depend_on_the_batch(opened: Callable[[str], Model], name: str) -> None:
    scorer: Scorers = EntityScorer if name.endswith("tagger") else LabelScorer
    several = [*texts(20, 3, 30), "the end <|end|> was not the end"]

    def numbers(figures: Any) -> list[float]:
        if scorer is EntityScorer:
            return [entity["score"] for entity in figures["entities"]]
        return by_name(figures, list(figures.get("labels") or figures.get("values") or []))

    alone = score(scorer, opened(name), several, 1)
    for rows in (3, 16, None):
        for one, together in zip(alone, score(scorer, opened(name), several, rows), strict=True):
            assert numbers(together) == close(numbers(one), abs=1e-4)
            assert together.keys() == one.keys() and together.get("tags") == one.get("tags")
    backward = score(scorer, opened(name), several[::-1], 3)[::-1]
    assert [numbers(figures) for figures in backward] == [
        close(numbers(figures), abs=1e-4) for figures in alone
    ]


@pytest.mark.parametrize("pair", [False, True])
def test_a_long_text_is_cut_only_where_asked(opened: Callable[[str], Model], pair: bool) -> None:
    model = opened("bert-classifier")
    long = Asked(0, " ".join(WORDS * 5), context="the premise" if pair else None)
    asked = [replace(long, text="short"), long]
    fine, refused = score(LabelScorer, model, asked)
    assert isinstance(refused, InputError) and refused.name == "E-CONTEXT"
    assert str(model.context) in refused.fact and "truncated" not in fine
    sides = {}
    for side in ("left", "right"):
        same, cut = score(LabelScorer, model, asked, 1, truncate=side)
        assert same.keys() == fine.keys() and same["labels"] == close(fine["labels"], abs=1e-5)
        assert cut["truncated"] is True and sum(cut["labels"].values()) == close(1)
        sides[side] = cut["labels"]
    assert sides["left"] != close(sides["right"], abs=1e-4)
    if not pair:
        backend: Any = model.tokenizer.backend
        ids = backend(long.text, truncation=False)["input_ids"]
        kept = {"left": [ids[0], *ids[-127:]], "right": [*ids[:127], ids[-1]]}
        for side, own in kept.items():
            with torch.inference_mode():
                [expected] = model.net(input_ids=torch.tensor([own])).logits.softmax(-1).tolist()
            assert list(sides[side].values()) == close(expected, abs=1e-5)


def test_a_text_that_just_fits_is_not_cut(opened: Callable[[str], Model]) -> None:
    model = opened("bert-classifier")
    assert model.context == 128
    fits, over = " ".join(["the"] * 126), " ".join(["the"] * 127)
    figures, refused = score(LabelScorer, model, [fits, over])
    assert set(figures) == {"prediction", "labels"}
    assert isinstance(refused, InputError)


def test_the_empty_text(opened: Callable[[str], Model]) -> None:
    """[CLS][SEP] can be judged; where nothing is added there is nothing to judge."""
    model = opened("bert-classifier")
    [ours] = score(LabelScorer, model, [""])
    theirs = {e["label"]: e["score"] for e in label_pipeline(model)("")}
    assert ours["labels"] == close(theirs, abs=1e-5)
    [error, fine] = score(LabelScorer, opened("gpt2-classifier"), ["", "text"])
    assert isinstance(error, InputError) and error.name == "E-EMPTY"
    assert set(fine["labels"]) == set(MOODS.values())


def test_what_is_done_is_not_judged_again(opened: Callable[[str], Model]) -> None:
    for scorer, name in ((LabelScorer, "bert-classifier"), (EntityScorer, "bert-tagger")):
        model = opened(name)
        asked = [Asked(i, text) for i, text in enumerate(texts(6))]
        passes: list[int] = []
        handle = model.net.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        scorer_of_pairs = scorer(ScoringConfig(), model, 2, silent)
        assert {index for index, _ in scorer_of_pairs.score(asked)} == set(range(6))
        assert len(passes) == 3
        assert list(scorer_of_pairs.score(asked, range(6))) == []
        assert len(passes) == 3
        first = [index for index, _ in scorer_of_pairs.score(asked, range(5))]
        assert 5 in first and len(passes) == 4
        handle.remove()


# --- token classification


def check_entities(ours: dict[str, Any], theirs: Sequence[dict[str, Any]], text: str) -> None:
    places = [(e["type"], e["start"], e["end"]) for e in ours["entities"]]
    assert places == [(e["entity_group"], e["start"], e["end"]) for e in theirs]
    assert [e["score"] for e in ours["entities"]] == close([float(e["score"]) for e in theirs], abs=1e-5)
    assert all(e["text"] == text[e["start"] : e["end"]] for e in ours["entities"])
    assert len(ours["tags"]) == len(segments(text))


@pytest.mark.parametrize("name", ["bert-tagger", "bert-byte-tagger", "bert-io-tagger"])
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_entities_equal_the_pipeline(opened: Callable[[str], Model], name: str) -> None:
    model = opened(name)
    judge = entity_pipeline(model)
    several = texts(60, 4, words=_plain_words(model) if name == "bert-byte-tagger" else WORDS)
    if name != "bert-byte-tagger":
        several += ["  two  blanks\tand\nlines ", "你好 and 你好,", "a", "[SEP] as a word", "Ünï\u200bcode"]
    kinds = set()
    for text, ours in zip(several, score(EntityScorer, model, several), strict=True):
        check_entities(ours, judge(text), text)
        kinds |= {(entity["type"], " " in entity["text"]) for entity in ours["entities"]}
    assert {kind for kind, _ in kinds} == {"PER", "LOC"} and {several for _, several in kinds} == {
        True,
        False,
    }


def _plain_words(model: Model) -> list[str]:
    """Words for which the library's rule holds where a tokenizer marks no pieces: it knows no border but the blank, and
    takes a token of a blank alone for a word, as it does each byte of an emoji behind a blank.
    """
    backend = model.tokenizer.backend
    found = [word for word in WORDS if word[0].isascii() and backend.tokenize(f" {word}")[0] != "Ġ"]
    assert "fox" in found and "naïve," in found
    return found


@pytest.mark.parametrize("name", ["bert-tagger", "bert-byte-tagger"])
def test_a_word_has_the_tag_of_its_first_token(opened: Callable[[str], Model], name: str) -> None:
    """Tokens of blanks alone, between several blanks, do not decide."""
    model = opened(name)
    several = [*texts(20, 5), "the   quick\n\n brown \t fox", " Once upon  a time "]
    for text, ours in zip(several, score(EntityScorer, model, several), strict=True):
        encoded: Any = model.tokenizer.backend(text, return_offsets_mapping=True)
        with torch.inference_mode():
            best = model.net(input_ids=torch.tensor([encoded["input_ids"]])).logits[0].argmax(-1).tolist()
        first_at: dict[int, int] = {}
        for at, (start, end) in enumerate(encoded["offset_mapping"]):
            for place in range(start, end):
                first_at.setdefault(place, at)
        expected = [model.net.config.id2label[best[first_at[start]]] for start, _ in segments(text)]
        assert ours["tags"] == expected
        assert all(entity["text"] == entity["text"].strip() for entity in ours["entities"])


def test_words_of_one_token_are_one(opened: Callable[[str], Model]) -> None:
    """A token may hold two characters of Chinese."""
    model = opened("bert-tagger")
    assert model.tokenizer.backend.tokenize("你好") == ["你好"]
    [ours] = score(EntityScorer, model, ["the 你好"])
    assert len(ours["tags"]) == 3 and ours["tags"][1] == ours["tags"][2]


def test_forms_with_ends_and_singles(opened: Callable[[str], Model]) -> None:
    """S- is an entity by itself and E- closes one, which transformers' aggregation does not know."""
    plain = [word for word in WORDS if word.isascii() and word.isalpha()]  # parted no further
    several = texts(40, 6, words=plain)
    seen: Counter[str] = Counter()
    for text, ours in zip(several, score(EntityScorer, opened("bert-bioes-tagger"), several), strict=True):
        words = segments(text)
        spans = [(words[first][0], words[last][1]) for _, first, last in get_entities(ours["tags"])]
        assert [(entity["start"], entity["end"]) for entity in ours["entities"]] == spans
        assert {entity["type"] for entity in ours["entities"]} <= {"PER"}
        seen.update(ours["tags"])
    assert len(seen) >= 4 and seen["S-PER"]


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_a_text_without_words(opened: Callable[[str], Model], text: str) -> None:
    for name in ("bert-tagger", "bert-byte-tagger"):
        [empty, fine] = score(EntityScorer, opened(name), [text, "the fox"])
        assert empty == {"entities": [], "tags": []}
        assert len(fine["tags"]) == 2


def test_a_tokenizer_that_strips_characters(tmp_path: Path) -> None:
    from tokenizers import normalizers

    folder = build("bert-tagger", tmp_path)
    settings = transformers.AutoTokenizer.from_pretrained(folder)
    settings.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    settings.save_pretrained(folder)
    model = load(ModelConfig(model=str(folder), dtype="float32", device="cpu"), "score", silent)
    nothing, some = score(EntityScorer, model, ["\u200b", "the \u200b fox"])
    assert nothing == {"entities": [], "tags": ["O"]}
    assert len(some["tags"]) == 3 and some["tags"][1] == "O"
    # A mark that the tokenizer strips makes a token shorter than its characters, and no part of the word before.
    words = EntityScorer(ScoringConfig(), model, None, silent)
    marked = "the e\u0301nd"
    text, _, _ = words._open(Asked(0, marked))
    assert [marked[word.start : word.end] for word in words._pieced_words(text)] == ["the", "e\u0301nd"]


# --- texts longer than the model


@given(st.integers(0, 3000), st.integers(1, 200))
def test_windows_judge_every_token_once_with_context_on_both_sides(count: int, room: int) -> None:
    found = windows(count, room)
    assert [token for w in found for token in range(w.first, w.last)] == list(range(count))
    for window in found:
        assert 0 <= window.start <= window.first < window.last <= window.end <= count
        assert window.end - window.start == min(room, count)
        assert window.start == 0 or window.first - window.start >= room // 4
        assert window.end == count or window.end - window.last >= room // 4


def test_a_long_text_is_judged_window_by_window(opened: Callable[[str], Model]) -> None:
    """What is decided in a window is what the model says of that window alone."""
    model = opened("bert-tagger")
    assert model.context == 128
    text = " ".join(random.Random(8).choices(WORDS, k=400))
    [ours] = score(EntityScorer, model, [text])
    backend: Any = model.tokenizer.backend
    encoded = backend(text, truncation=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"][1:-1], encoded["offset_mapping"][1:-1]
    assert len(ids) > 500
    label_at: dict[int, str] = {}
    for window in windows(len(ids), 126):
        row = [backend.cls_token_id, *ids[window.start : window.end], backend.sep_token_id]
        with torch.inference_mode():
            best = model.net(input_ids=torch.tensor([row])).logits[0].argmax(-1).tolist()
        for token in range(window.first, window.last):
            for place in range(*offsets[token]):
                label_at.setdefault(place, model.net.config.id2label[best[1 + token - window.start]])
    assert ours["tags"] == [label_at[start] for start, _ in segments(text)]
    assert all(entity["text"] == text[entity["start"] : entity["end"]] for entity in ours["entities"])
    together = score(EntityScorer, model, ["the fox", text, "a dog"])
    assert together[1]["tags"] == ours["tags"]


# --- what goes wrong


@contextmanager
def spoiled(model: Model, spoil: Callable[[torch.Tensor, Any], None]) -> Iterator[None]:
    """Let `spoil` change the logits (B, ...) of every pass, given its input ids."""

    def hook(module: Any, args: Any, inputs: Any, out: Any) -> None:
        spoil(out.logits, inputs["input_ids"])

    handle = model.net.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("scorer", "name"), [(LabelScorer, "bert-classifier"), (EntityScorer, "bert-tagger")]
)
def test_nan_fails_its_record_alone(opened: Callable[[str], Model], scorer: Scorers, name: str) -> None:
    model = opened(name)
    bad_token: Any = model.tokenizer.backend.convert_tokens_to_ids("quick")
    long = " ".join([*WORDS * 8, "quick", *WORDS * 3]) if scorer is EntityScorer else "so quick"
    asked = ["the fox", long, "the quick fox", "a dog"]

    def spoil(logits: torch.Tensor, ids: torch.Tensor) -> None:
        logits[torch.eq(ids, bad_token).any(-1)] = float("nan")

    with spoiled(model, spoil):
        found = score(scorer, model, asked)
    assert [isinstance(one, ModelError) and one.name == "E-NAN" for one in found] == [
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("scorer", "name"), [(LabelScorer, "bert-classifier"), (EntityScorer, "bert-tagger")]
)
def test_out_of_memory_halves_the_batch(opened: Callable[[str], Model], scorer: Scorers, name: str) -> None:
    model = opened(name)
    asked = texts(9, 9)
    expected = score(scorer, model, asked)
    sizes: list[int] = []

    def small_memory(logits: torch.Tensor, ids: torch.Tensor) -> None:
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("no memory")

    told: list[Event] = []
    with spoiled(model, small_memory):
        found = dict(
            scorer(ScoringConfig(), model, None, told.append).score(
                [Asked(i, t) for i, t in enumerate(asked)]
            )
        )
    assert max(sizes) == 9 and len(told) == sum(size > 2 for size in sizes)
    for index, one in enumerate(expected):
        ours: Any = found[index]
        assert ours.get("prediction") == one.get("prediction") and ours.get("tags") == one.get("tags")

    def no_memory(logits: torch.Tensor, ids: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no memory")

    with spoiled(model, no_memory):
        lost: list[TextgenError] = score(scorer, model, asked[:2])
    assert [type(error) for error in lost] == [OutOfMemory, OutOfMemory]


def test_another_failure_is_not_taken_for_lack_of_memory(opened: Callable[[str], Model]) -> None:
    def fail(logits: torch.Tensor, ids: torch.Tensor) -> None:
        raise RuntimeError("something else")

    with spoiled(opened("bert-classifier"), fail), pytest.raises(RuntimeError, match="something else"):
        score(LabelScorer, opened("bert-classifier"), ["text"])


def test_an_encoder_decoder_needs_an_end_to_judge_by(opened: Callable[[str], Model]) -> None:
    model = replace(opened("bart-classifier"), tokenizer=Tokenizer(byte_tokenizer(), "without an end"))
    with pytest.raises(ModelError, match="E-TOKENIZER"):
        score(LabelScorer, model, ["text"])


def test_a_tokenizer_without_offsets_finds_no_entities(opened: Callable[[str], Model]) -> None:
    model = opened("bert-tagger")
    tokenizer: Any = type("Slow", (), {"fast": None, "backend": None})()
    with pytest.raises(ModelError, match="E-TOKENIZER"):
        EntityScorer(ScoringConfig(), replace(model, tokenizer=tokenizer), None, silent)
