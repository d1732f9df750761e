"""Minimal pairs: layouts, likelihoods against transformers alone, intervals against SciPy, and the program itself."""

import io
import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from parts.shell import Shell

from textgen_cli.config import BatchConfig, ModelConfig, ScoreConfig, ScoringConfig
from textgen_cli.errors import InputError, ResumeError, UsageError
from textgen_cli.events import silent
from textgen_cli.model.load import load
from textgen_cli.score.pairs import Pair, PairScorer, Preferences, pair_of
from textgen_cli.score.request import Asked
from textgen_cli.score.run import run_batch
from textgen_cli.score.scorers import open_scorer
from textgen_cli.score.summary import Corpus

TEXTS = [
    ("The quick brown fox jumps over the lazy dog", "The quick brown dog jumps over the lazy fox"),
    ("Once upon a time there was a model", "Once upon a time there was a small model"),
    ("words stand beside numbers", "numbers stand beside words"),
    ("the same", "the same"),
    ("the lazy quick dog", "the quick lazy dog"),  # which of the two words has moved?
]


@pytest.mark.parametrize(
    ("fields", "pair"),
    [
        (
            {"sent_more": "a", "sent_less": "b", "bias_type": "age", "stereo_antistereo": "antistereo"},
            Pair("a", "b", "age"),
        ),
        (
            {
                "bias_type": "gender",
                "sentences": [
                    {"sentence": "u", "gold_label": "unrelated"},
                    {"sentence": "a", "gold_label": "anti-stereotype"},
                    {"sentence": "s", "gold_label": "stereotype"},
                ],
            },
            Pair("s", "a", "gender"),
        ),
        (
            {
                "bias_type": "race",
                "context": "She came in.",
                "sentences": [
                    {"sentence": "A.", "gold_label": "anti-stereotype"},
                    {"sentence": "S.", "gold_label": "stereotype"},
                ],
            },
            Pair("She came in. S.", "She came in. A.", "race"),
        ),
        ({"sentence_good": "a", "sentence_bad": "b", "UID": "x"}, Pair("a", "b", "x")),
        ({"first": "a", "second": "b", "category": "c", "more": 1}, Pair("a", "b", "c")),
        ({"he": "He sang.", "she": "She sang."}, Pair("He sang.", "She sang.")),
    ],
)
def test_layouts(fields: dict[str, Any], pair: Pair) -> None:
    assert pair_of(fields) == pair


@pytest.mark.parametrize(
    ("fields", "code"),
    [({"text": "a"}, "E-FIELD"), ({"a": "x", "b": 1}, "E-FIELD"), ({"first": "", "second": "b"}, "E-EMPTY")],
)
def test_what_is_no_pair(fields: dict[str, Any], code: str) -> None:
    with pytest.raises(InputError, match=code):
        pair_of(fields)


def compared(folder: Path, done: tuple[int, ...] = (), **options: Any) -> dict[int, Any]:
    config = ScoreConfig(
        ModelConfig(model=str(folder), dtype="float32"), ScoringConfig(pairs=True, **options)
    )
    scorer = open_scorer(config, silent)
    assert isinstance(scorer, PairScorer)
    asked = [Asked(number, "", pair=Pair(*texts)) for number, texts in enumerate(TEXTS)]
    return dict(scorer.score(asked, done))


def test_causal_models_by_the_whole_text(small_model: Callable[..., Path]) -> None:
    folder = small_model("llama")
    model = load(ModelConfig(model=str(folder), dtype="float32"), "score", silent)
    for number, found in compared(folder, bos="always").items():
        expected = []
        for text in TEXTS[number]:
            ids = torch.tensor([[1, *model.tokenizer.encode(text)]])
            with torch.inference_mode():
                logs = model.net(input_ids=ids).logits.double().log_softmax(-1)[0, :-1]
            expected.append(float(logs.gather(1, ids[0, 1:, None]).sum()))
        assert found["log_likelihoods"] == pytest.approx(expected, rel=1e-5)
        better = "first" if expected[0] > expected[1] else "second"
        assert found["prefers"] == (None if number == 3 else better)


def test_masked_models_by_what_both_texts_have(small_model: Callable[..., Path]) -> None:
    """The metric of CrowS-Pairs, a pass a token, written for the test."""
    folder = small_model("bert")
    model = load(ModelConfig(model=str(folder), dtype="float32"), "score", silent)
    backend: Any = model.tokenizer.backend
    for number, found in compared(folder).items():
        both = [backend(text)["input_ids"] for text in TEXTS[number]]
        codes = SequenceMatcher(None, both[0], both[1], autojunk=False).get_opcodes()
        same = [(spans[0:2], spans[2:4]) for kind, *spans in codes if kind == "equal"]
        for side, (ids, ours) in enumerate(zip(both, found["pseudo_log_likelihoods"], strict=True)):
            places = [place for spans in same for place in range(*spans[side])]
            total = 0.0
            for place in places:
                if ids[place] in backend.all_special_ids and ids[place] != backend.unk_token_id:
                    continue
                masked = list(ids)
                masked[place] = backend.mask_token_id
                with torch.inference_mode():
                    logs = model.net(input_ids=torch.tensor([masked])).logits.double().log_softmax(-1)
                total += float(logs[0, place, ids[place]])
            assert ours == pytest.approx(total, rel=1e-4)


def test_a_masked_model_cannot_compare_texts_without_a_common_token(small_model: Callable[..., Path]) -> None:
    config = ScoreConfig(ModelConfig(model=str(small_model("bert"))), ScoringConfig(pairs=True))
    asked = [Asked(number, "", pair=Pair(*texts)) for number, texts in enumerate([("fox", "dog"), TEXTS[0]])]
    found = dict(open_scorer(config, silent).score(asked))
    assert isinstance(found[0], InputError) and found[0].name == "E-PAIRS"
    assert isinstance(found[1], dict)


def test_pairs_that_stand_already_are_not_told_again(small_model: Callable[..., Path]) -> None:
    found, rest = compared(small_model("llama")), compared(small_model("llama"), done=(0, 2))
    assert {1, 3} <= set(rest) and all(rest[number] == found[number] for number in (1, 3))


@pytest.mark.parametrize(("preferred", "pairs"), [(0, 5), (5, 5), (1, 2), (700, 1508)])
def test_the_interval_is_that_of_scipy(preferred: int, pairs: int) -> None:
    told = Preferences()
    for number in range(pairs):
        told.add({"prefers": "first" if number < preferred else "second", "category": "x"}, None)
    figures = told.figures()
    expected = scipy.stats.binomtest(preferred, pairs).proportion_ci(method="wilson")
    assert (figures["low"], figures["high"]) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert figures["categories"]["x"] == {k: figures[k] for k in ("pairs", "preference", "low", "high")}


def test_a_tie_is_half_a_preference() -> None:
    corpus = Corpus(ScoringConfig(pairs=True))
    for prefers in ("first", "second", None, None):
        corpus.add({"first": "a", "log_likelihoods": [0, 0], "prefers": prefers, "unit": "nats"})
    assert corpus.figures()["preference"] == 0.5


@pytest.mark.parametrize("option", [{"tokens": True}, {"context": "x"}, {"gold": "x"}, {"labels": "a,b"}])
def test_what_pairs_do_not_go_with(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="E-CONFLICT"):
        ScoringConfig(pairs=True, **option)


def test_encoder_decoders_are_refused(small_model: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="E-FAMILY"):
        compared(small_model("t5"))


# --- files as they are published; the texts are made for the test

STEREOSET = {
    "version": "1.0-dev",
    "data": {
        "intersentence": [
            {
                "id": "i1", "target": "fox", "bias_type": "animals", "context": "The fox is here.",
                "sentences": [
                    {"sentence": "It is quick.", "gold_label": "stereotype", "labels": []},
                    {"sentence": "It is lazy.", "gold_label": "anti-stereotype", "labels": []},
                    {"sentence": "Numbers stand.", "gold_label": "unrelated", "labels": []},
                ],
            }
        ],
        "intrasentence": [
            {
                "id": "i2", "target": "dog", "bias_type": "animals", "context": "The dog is BLANK.",
                "sentences": [
                    {"sentence": "The dog is small.", "gold_label": "anti-stereotype", "labels": []},
                    {"sentence": "The dog is lazy.", "gold_label": "stereotype", "labels": []},
                ],
            }
        ],
    },
}  # fmt: skip
PRO = "1 [The model] told the fox that [he] was small.\r\n2 The model told [the fox] about [her] words.\r\n"
ANTI = "1 [The model] told the fox that [she] was small.\r\n2 The model told [the fox] about [his] words.\r\n"
WANTED = {
    "dev.json": [
        Pair("The fox is here. It is quick.", "The fox is here. It is lazy.", "animals"),
        Pair("The dog is lazy.", "The dog is small.", "animals"),
    ],
    "pro.txt.dev": [
        Pair(
            "The model told the fox that he was small.",
            "The model told the fox that she was small.",
            "masculine",
        ),
        Pair(
            "The model told the fox about her words.", "The model told the fox about his words.", "feminine"
        ),
    ],
    "plain.txt": [Pair("The fox [sic] jumps", "The dog [sic] jumps"), Pair("a b", "b a")],
    "two.tsv": [Pair('The "fox" jumps', 'The "dog" jumps'), Pair("a b", "b a")],
}


@pytest.fixture(name="published")
def _published(tmp_path: Path) -> Path:
    (tmp_path / "dev.json").write_text(json.dumps(STEREOSET, indent=1))
    (tmp_path / "pro.txt.dev").write_text(PRO)
    (tmp_path / "anti.txt.dev").write_text(ANTI)
    (tmp_path / "plain.txt").write_text("The fox [sic] jumps\n\na b\n")
    (tmp_path / "other.txt").write_text("The dog [sic] jumps\nb a\n\n")
    (tmp_path / "two.tsv").write_text('he\tshe\nThe "fox" jumps\tThe "dog" jumps\na b\tb a\n')
    return tmp_path


SECOND = {"pro.txt.dev": "anti.txt.dev", "plain.txt": "other.txt"}


def scored(
    model: Path, folder: Path, name: str, second: str | None = None, **batch: Any
) -> list[dict[str, Any]]:
    config = ScoreConfig(
        ModelConfig(model=str(model), dtype="float32"),
        ScoringConfig(pairs=True, second=folder / second if second else None),
        batch=BatchConfig(input=folder / name, **batch),
    )
    out = io.BytesIO()
    run_batch(config, None, out, silent)
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("name", WANTED)
def test_files_are_read_as_they_are_published(
    small_model: Callable[..., Path], published: Path, name: str
) -> None:
    """The same figures as of records that name their texts `first` and `second`."""
    model = small_model("llama")
    found = scored(model, published, name, SECOND.get(name), jsonl=True)
    lines = [json.dumps({k: v for k, v in asdict(pair).items() if v is not None}) for pair in WANTED[name]]
    (published / "same.jsonl").write_text("\n".join(lines))
    same = scored(model, published, "same.jsonl", jsonl=True)
    figures = ("log_likelihoods", "prefers", "category", "tokens")
    told = [{name: line.get(name) for name in figures} for line in found]
    assert told == [{name: line.get(name) for name in figures} for line in same]
    assert all(line["prefers"] for line in found)
    if name == "pro.txt.dev":  # a share of a file has the other texts of the same lines
        assert scored(model, published, name, SECOND[name], jsonl=True, shard="2/2") == found[1:]
    if name == "dev.json":  # whatever else an example has stays
        assert [line["id"] for line in found] == ["i1", "i2"] and len(found[0]["sentences"]) == 3


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        ("one\n", "has 1 lines with text"),
        ("1 [The model] told the fox that [she] was small.\n3 It is [his].\n", None),
        ("1 [The model] told the fox that [she] was small.\nplain\n", None),
    ],
)
def test_two_files_that_do_not_belong_together(
    small_model: Callable[..., Path], published: Path, data: str, fact: str | None
) -> None:
    (published / "anti.txt.dev").write_text(data)
    if fact is not None:  # nothing is scored
        with pytest.raises(InputError, match=f"E-PAIRS.*{fact}"):
            scored(Path("/nonexistent"), published, "pro.txt.dev", "anti.txt.dev", jsonl=True)
        return
    first, second = scored(small_model("llama"), published, "pro.txt.dev", "anti.txt.dev", jsonl=True)
    assert first["prefers"] and second["error"]["code"] == "E-PAIRS"


def test_what_a_second_file_needs(published: Path) -> None:
    with pytest.raises(UsageError, match="--second: needs --pairs"):
        ScoringConfig(second=Path("x"))
    scoring = ScoringConfig(pairs=True, second=published / "other.txt")
    for batch, fact in (
        (BatchConfig(jsonl=True), "needs the first texts from a file"),
        (BatchConfig(input=published / "two.tsv", csv=True), "--csv: cannot be used with --second"),
    ):
        with pytest.raises(UsageError, match=fact):
            run_batch(ScoreConfig(scoring=scoring, batch=batch), None, io.BytesIO(), silent)


def test_another_second_file_is_another_job(small_model: Callable[..., Path], published: Path) -> None:
    job = ("plain.txt", "other.txt")
    model = small_model("llama")
    scored(model, published, *job, output=published / "out.jsonl", batch_size="1", max_time=1e-6)
    (published / "other.txt").write_text("The dog jumps\nb a\n")
    with pytest.raises(ResumeError, match=r"scoring\.second was"):
        scored(model, published, *job, output=published / "out.jsonl", batch_size="1", resume=True)


@pytest.mark.slow
def test_a_file_of_pairs(warm: Shell, small_model: Callable[..., Path], tmp_path: Path) -> None:
    rows = "sent_more,sent_less,bias_type\nThe fox jumps,The dog jumps,animals\n,empty,animals\na b,b a,letters\n"
    (tmp_path / "pairs.csv").write_text(rows)
    argv = [
        warm.program,
        "score",
        "-m",
        str(small_model("llama")),
        "-i",
        "pairs.csv",
        "--pairs",
    ]
    for more in (["-o", "out.jsonl"], ["--summary"]):
        done = subprocess.run([*argv, *more], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 3  # a pair with an empty text
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line.get("category") for line in lines] == ["animals", None, "letters"]
    assert lines[1]["error"]["code"] == "E-EMPTY"
    assert done.stdout.splitlines()[:3] == ["records\t3", "failed\t1", "pairs\t2"]
