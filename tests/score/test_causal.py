"""Causal models: sums, windows and boundaries against the model's own logits and lm-evaluation-harness."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from parts.models import TEXT, byte_tokenizer

from textgen_cli.config import ModelConfig, ScoreConfig, ScoringConfig
from textgen_cli.errors import InputError, ModelError, TextgenError, UsageError
from textgen_cli.events import Event, Notice, silent
from textgen_cli.model.load import Model, load
from textgen_cli.score.causal import CausalScorer
from textgen_cli.score.request import Asked, Figures
from textgen_cli.score.scorers import open_scorer
from textgen_cli.score.windows import Convention, windows

close = pytest.approx
ModelOf = Callable[[str], Model]
BEGIN = 1  # the small models' token that begins a text

LONG = " ".join(TEXT * 3)  # some 300 tokens, where the small models take 128
TEXTS = [
    *TEXT,
    "a",
    "x y z",
    "\n\n tabs\tand blanks  ",
    "👨‍👩‍👧 שלום עולם مرحبا 你好",
    "e\u0301\u0327\u20dd",
    "a\0b",
    LONG,
]


def _vocabulary(**more: Any) -> dict[str, Any]:
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": BEGIN, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 128}
    return {**shape, "num_key_value_heads": 2, **ids, **more}


def _cohere(size: int) -> Any:
    return transformers.CohereConfig(vocab_size=size, logit_scale=0.25, **_vocabulary())


def _gemma2(size: int) -> Any:
    caps = {
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 5.0,
        "sliding_window": 16,
        "head_dim": 12,
    }
    return transformers.Gemma2Config(vocab_size=size, query_pre_attn_scalar=12, **_vocabulary(**caps))


def _granite(size: int) -> Any:
    scales = {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
    return transformers.GraniteConfig(vocab_size=size, **_vocabulary(**scales))


def _mistral(size: int) -> Any:
    return transformers.MistralConfig(vocab_size=size, sliding_window=16, **_vocabulary())


def _mamba(size: int) -> Any:
    ids: Any = {"bos_token_id": BEGIN, "eos_token_id": 0, "pad_token_id": 0}
    return transformers.MambaConfig(vocab_size=size, hidden_size=32, num_hidden_layers=2, state_size=8, **ids)


def _bloom(size: int) -> Any:
    ids: Any = {"bos_token_id": BEGIN, "eos_token_id": 0, "pad_token_id": 0}
    return transformers.BloomConfig(vocab_size=size, hidden_size=48, n_layer=2, n_head=4, **ids)


# Heads that scale and cap, windows of attention, states in place of keys, positions without numbers.
CONFIGS = {
    "cohere": _cohere, "gemma2": _gemma2, "granite": _granite, "mistral": _mistral, "mamba": _mamba, "bloom": _bloom,
}  # fmt: skip


def build(name: str, folder: Path, spread: float = 4.0) -> Path:
    tokenizer = byte_tokenizer()
    torch.manual_seed(5)
    net: Any = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](len(tokenizer)))
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if parameter.dim() > 1 and "A_log" not in key:
                parameter.mul_(spread)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def opened(folder: Path) -> Model:
    return load(ModelConfig(model=str(folder), dtype="float32", device="cpu"), "score", silent)


@pytest.fixture(scope="module")
def model_of(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> ModelOf:
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            folder = build(name, tmp_path_factory.mktemp(name)) if name in CONFIGS else small_model(name)
            made[name] = opened(folder)
        return made[name]

    return get


def score(
    model: Model,
    asked: Sequence[str | Asked],
    rows: int | None = None,
    against: Model | None = None,
    **options: Any,
) -> list[Figures | TextgenError]:
    questions = [one if isinstance(one, Asked) else Asked(at, one) for at, one in enumerate(asked)]
    found = dict(CausalScorer(ScoringConfig(**options), model, rows, silent, against).score(questions))
    assert sorted(found) == sorted(one.index for one in questions)
    for figures in found.values():
        assert isinstance(figures, TextgenError) or json.dumps(figures, allow_nan=False)
    return [found[one.index] for one in questions]


def figures(model: Model, asked: Sequence[str | Asked], **options: Any) -> list[Figures]:
    found = []
    for one in score(model, asked, **options):
        assert not isinstance(one, TextgenError), one
        found.append(one)
    return found


def pair(context: str, text: str, index: int = 0) -> Asked:
    return Asked(index, text, context)


def tokens_of(model: Model, text: str) -> list[int]:
    backend: Any = model.tokenizer.backend
    return list(backend(text, add_special_tokens=False)["input_ids"])


def log_probabilities(model: Model, ids: Sequence[int]) -> torch.Tensor:
    """The model's own, in float64: (T, V)."""
    with torch.no_grad():
        logits: torch.Tensor = model.net(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits.double().log_softmax(-1)


def own_sum(model: Model, before: Sequence[int], ids: Sequence[int]) -> float:
    """The log-likelihood of ids behind others, in one pass."""
    logs = log_probabilities(model, [*before, *ids])[len(before) - 1 : -1]
    return float(logs.gather(1, torch.tensor(ids)[:, None]).sum())


# --- sums


@pytest.mark.parametrize("name", ["gpt2", "llama", *CONFIGS])
def test_equals_the_models_own_logits(model_of: ModelOf, name: str) -> None:
    model = model_of(name)
    short = TEXTS[:-1]
    for text, found in zip(short, figures(model, short), strict=True):
        ids = tokens_of(model, text)
        want = own_sum(model, [BEGIN], ids)
        assert found["log_likelihood"] == close(want, rel=1e-5), text
        assert found["tokens"] == len(ids)
        assert found["perplexity"] == close(math.exp(-want / len(ids)), rel=1e-4)
        assert found["bits_per_byte"] == close(-want / math.log(2) / len(text.encode()), rel=1e-5)
        assert found["bits_per_character"] == close(-want / math.log(2) / len(text), rel=1e-5)
        assert (found["bytes"], found["characters"]) == (len(text.encode()), len(text))
        assert (found["bos"], found["unit"]) == (True, "nats")


@pytest.mark.slow
def test_the_real_model(default_model: Path) -> None:
    model = opened(default_model)
    asked = [*TEXT, "The capital of France is Paris.", "def f(x):\n    return x + 1\n"]
    for text, found in zip(asked, figures(model, asked), strict=True):
        want = own_sum(model, [model.tokenizer.backend.bos_token_id], tokens_of(model, text))
        assert found["log_likelihood"] == close(want, rel=1e-5), text
    alone = figures(model, TEXTS, rows=1)
    for rows in (3, 16):
        for one, other in zip(alone, figures(model, TEXTS, rows=rows), strict=True):
            assert one["log_likelihood"] == close(other["log_likelihood"], abs=1e-4 * one["tokens"])


@pytest.mark.parametrize("name", ["gpt2", "llama", *CONFIGS])
def test_batch_and_order_change_nothing(model_of: ModelOf, name: str) -> None:
    model = model_of(name)
    alone = figures(model, TEXTS, rows=1)
    backwards = [Asked(at, text) for at, text in reversed(list(enumerate(TEXTS)))]
    for found in (
        figures(model, TEXTS, rows=3),
        figures(model, TEXTS, rows=16),
        figures(model, backwards)[::-1],
    ):
        for one, other in zip(alone, found, strict=True):
            assert one["log_likelihood"] == close(other["log_likelihood"], abs=1e-4 * one["tokens"])


# --- windows


@st.composite
def conventions(draw: Any) -> tuple[int, Convention, int]:
    window = draw(st.integers(2, 40))
    start, each = draw(st.sampled_from([(None, True), (7, True), (7, False)]))
    rule = Convention(window, draw(st.integers(1, window)), start, each)
    count = draw(st.integers(1, 200))
    # What stands before the text fits a window, so that its first token has room.
    first = draw(st.integers(0, min(count - 1, window - 1 - (start is not None))))
    return count, rule, first


@given(conventions())
def test_every_token_is_scored_once_behind_context(case: tuple[int, Convention, int]) -> None:
    count, rule, first = case
    found = list(windows(count, rule, first))
    scored = [token for window in found for token in range(window.scored, window.end)]
    assert scored == list(range(max(first, rule.start is None), count))
    for at, window in enumerate(found):
        assert window.starts == (rule.start is not None and (rule.each or not at))
        assert window.end - 1 - window.shown + window.starts <= rule.window
        assert window.shown + (not window.starts) <= window.scored
        assert not at or window.end - window.scored <= rule.stride


@given(st.integers(2, 40), st.integers(1, 200))
def test_disjoint_windows_are_those_of_the_harness(window: int, count: int) -> None:
    from lm_eval.utils import get_rolling_token_windows

    tokens = list(range(100, 100 + count))
    rule = Convention(window, window, 7, each=False)
    found = [
        ([7] * one.starts + tokens[one.shown : one.end - 1], tokens[one.scored : one.end])
        for one in windows(count, rule)
    ]
    assert found == list(get_rolling_token_windows(tokens, 7, window, 1))


@pytest.mark.parametrize("bos", ["always", "never", "first"])
@pytest.mark.parametrize("stride", [1, 7, 32])
def test_long_texts_by_windows(model_of: ModelOf, bos: str, stride: int) -> None:
    """Every token by itself, behind all that its window shows."""
    model, window = model_of("gpt2"), 32
    ids = tokens_of(model, LONG)[:90]
    text = str(model.tokenizer.backend.decode(ids))
    assert tokens_of(model, text) == ids
    (found,) = figures(model, [text], bos=bos, window=window, stride=stride, tokens=True)
    rule = Convention(window, stride, None if bos == "never" else BEGIN, each=bos != "first")
    want: list[float | None] = [None] * (bos == "never")
    for one in windows(len(ids), rule):
        shown = [BEGIN] * one.starts + ids[one.shown : one.scored]
        logs = log_probabilities(model, [*shown, *ids[one.scored : one.end]])
        want += [logs[len(shown) - 1 + at, ids[one.scored + at]].item() for at in range(one.end - one.scored)]
    assert [one["log_probability"] for one in found["token_scores"]] == close(want, abs=1e-4)
    assert (found["window"], found["stride"], found["bos"]) == (window, stride, bos != "never")
    assert found["tokens"] == len(ids) - (bos == "never")


def test_windows_that_cannot_be(model_of: ModelOf) -> None:
    too_large: list[dict[str, Any]] = [{"window": 129}, {"stride": 129}]
    for options in too_large:
        with pytest.raises(UsageError, match="E-RANGE"):
            score(model_of("gpt2"), ["a b"], **options)
    with pytest.raises(UsageError, match="E-CONFLICT"):
        ScoringConfig(window=8, stride=9)


def test_without_beginning_the_first_token_is_not_scored(model_of: ModelOf) -> None:
    model = model_of("llama")
    first, only = score(model, [TEXT[0], "a"], bos="never", tokens=True, words=True)
    assert isinstance(first, dict) and isinstance(only, InputError)
    ids = tokens_of(model, TEXT[0])
    assert first["log_likelihood"] == close(own_sum(model, ids[:1], ids[1:]), rel=1e-5)
    silent_one = first["token_scores"][0]
    assert (silent_one["log_probability"], silent_one["rank"], silent_one["entropy"]) == (None, None, None)
    # What it stands for is no part of the text that rates are of.
    assert first["characters"] == len(TEXT[0]) - silent_one["end"]
    assert only.name == "E-EMPTY"


# --- what is told of tokens and words


def test_ranks_entropies_and_alternatives(model_of: ModelOf) -> None:
    model = model_of("llama")
    asked = [TEXT[2], "🙂 a", TEXT[0]]
    for text, found in zip(asked, figures(model, asked, tokens=True, top=5), strict=True):
        ids = tokens_of(model, text)
        logs = log_probabilities(model, [BEGIN, *ids])[:-1]
        for token, row, entry in zip(ids, logs, found["token_scores"], strict=True):
            assert entry["log_probability"] == close(float(row[token]), abs=1e-4)
            assert entry["rank"] == sorted(row.tolist(), reverse=True).index(float(row[token])) + 1
            assert entry["entropy"] == close(float(-(row.exp() * row).sum()), abs=1e-4)
            values, best = row.topk(5)
            assert [one["log_probability"] for one in entry["top"]] == close(values.tolist(), abs=1e-4)
            assert entry["top"][0]["token"] == model.tokenizer.spell(int(best[0]))
            assert 0 <= entry["start"] <= entry["end"] <= len(text)


def test_words_sum_to_the_whole(model_of: ModelOf) -> None:
    for text, found in zip(TEXTS, figures(model_of("llama"), TEXTS, words=True), strict=True):
        words = found["word_scores"]
        if text.strip():
            assert math.fsum(one["log_likelihood"] or 0 for one in words) == close(
                found["log_likelihood"], rel=1e-9
            )
            assert sum(one["tokens"] for one in words) == found["tokens"]
        assert [one["word"] for one in words] == [text[one["start"] : one["end"]] for one in words]


def test_bits(model_of: ModelOf) -> None:
    model = model_of("llama")
    nats, bits = (figures(model, [TEXT[0]], tokens=True, top=2, bits=told)[0] for told in (False, True))
    assert (nats["unit"], bits["unit"]) == ("nats", "bits")
    assert bits["log_likelihood"] * math.log(2) == close(nats["log_likelihood"])
    for name in ("perplexity", "bits_per_byte", "bits_per_character"):
        assert bits[name] == close(nats[name])
    for one, other in zip(nats["token_scores"], bits["token_scores"], strict=True):
        for name in ("log_probability", "entropy"):
            assert other[name] * math.log(2) == close(one[name])
        assert other["top"][1]["log_probability"] * math.log(2) == close(one["top"][1]["log_probability"])


# --- lm-evaluation-harness


def harness(folder: Path, **options: Any) -> Any:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1, **options)


def requests(kind: Any, arguments: Sequence[tuple[str, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=at) for at, one in enumerate(arguments)]


@pytest.fixture(name="beginning", scope="module")
def _beginning(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts a token before every text itself."""
    folder = tmp_path_factory.mktemp("beginning")
    net = transformers.AutoModelForCausalLM.from_pretrained(small_model("llama"))
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", BEGIN)]
    )
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


PAIRS = [
    ("Once upon a time", " there was a model"),
    ("Once upon a time ", "there was a model"),
    ("Once upon a time  \n", "there was"),
    ("Once upon a ti", "me there was one"),  # merges over the boundary
    ("The qui", "ck brown fox"),
    ("", "The quick brown fox"),
    ("", " blank"),
    ("你", "好 and 🙂"),
    ("x", "q"),
    ("a b\t", " c"),
    (" ".join(TEXT[:2])[:160], TEXT[2][:20]),
]


@pytest.mark.parametrize("name", ["gpt2", "beginning"])
def test_continuations_as_in_the_harness(small_model: Any, beginning: Path, name: str) -> None:
    folder = beginning if name == "beginning" else small_model(name)
    # The harness adds the tokenizer's own beginning where it is told to; textgen does what the tokenizer does.
    lm = harness(folder, add_bos_token=name == "beginning")
    want = [value for value, _ in lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)]
    asked = [pair(context, text, at) for at, (context, text) in enumerate(PAIRS)]
    found = figures(opened(folder), asked)
    assert [one["log_likelihood"] for one in found] == close(want, rel=1e-5, abs=1e-4)
    assert [one["bos"] for one in found] == [name == "beginning" or not context for context, _ in PAIRS]


@pytest.mark.parametrize("name", ["gpt2", "llama", "beginning"])
def test_rolling_as_in_the_harness(small_model: Any, beginning: Path, name: str) -> None:
    folder = beginning if name == "beginning" else small_model(name)
    lm = harness(folder, max_length=64, **({"add_bos_token": False} if name == "beginning" else {}))
    want = lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", [(text,) for text in TEXTS]), disable_tqdm=True
    )
    found = figures(opened(folder), TEXTS, bos="first", window=64, stride=64)
    assert [one["log_likelihood"] for one in found] == close(want, rel=1e-5)
    words = [max(1, len(text.split())) for text in TEXTS]
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity

    sizes = [len(text.encode()) for text in TEXTS]
    total = sum(one["log_likelihood"] for one in found)
    assert math.exp(-total / sum(words)) == close(
        weighted_perplexity(list(zip(want, words, strict=True))), rel=1e-4
    )
    assert -total / math.log(2) / sum(sizes) == close(
        bits_per_byte(list(zip(want, sizes, strict=True))), rel=1e-5
    )


def test_a_context_that_is_too_long(small_model: Any) -> None:
    context, text = LONG, " and so on"
    model = opened(small_model("gpt2"))
    (refused,) = score(model, [pair(context, text)])
    assert isinstance(refused, InputError) and refused.name == "E-CONTEXT"
    (found,) = figures(model, [pair(context, text)], truncate="left")
    lm = harness(small_model("gpt2"))
    ((want, _),) = lm.loglikelihood(requests("loglikelihood", [(context, text)]), disable_tqdm=True)
    assert found["log_likelihood"] == close(want, rel=1e-5)
    assert found["truncated"] is True


def test_a_context_of_blanks_is_part_of_the_text(model_of: ModelOf) -> None:
    model = model_of("gpt2")
    blank, whole = figures(model, [pair("  ", "a b", 0), Asked(1, "  a b")])
    assert blank["log_likelihood"] == close(whole["log_likelihood"])
    assert blank["bos"] is True


# --- two models


def test_divergence_is_torchs_own(model_of: ModelOf, tmp_path: Path) -> None:
    model, other = model_of("llama"), model_of("gpt2")
    for text, found in zip(TEXTS[:6], figures(model, TEXTS[:6], against=other), strict=True):
        ids = tokens_of(model, text)
        p, q = (log_probabilities(each, [BEGIN, *ids])[:-1] for each in (model, other))
        apart = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
        assert found["kl_divergence"] == close(float(apart), rel=1e-4)
        theirs = own_sum(other, [BEGIN], ids)
        assert found["against"]["log_likelihood"] == close(theirs, rel=1e-5)
        difference = (theirs - found["log_likelihood"]) / math.log(2) / len(text.encode())
        assert found["bits_per_byte_difference"] == close(difference, abs=1e-5)


def against(model: Path, other: Path, told: list[str]) -> Any:
    def hear(event: Event) -> None:
        if isinstance(event, Notice):
            told.append(event.name or "")

    config = ModelConfig(model=str(model), dtype="float32", device="cpu")
    return open_scorer(ScoreConfig(model=config, scoring=ScoringConfig(against=str(other))), hear)


def test_other_vocabularies(small_model: Any, tmp_path: Path) -> None:
    told: list[str] = []
    torch.manual_seed(3)
    tokenizer = byte_tokenizer(300)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=24, n_layer=1, n_head=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = against(small_model("llama"), tmp_path, told)
    assert told.count("W-VOCAB") == 1
    found = dict(scorer.score([Asked(at, text) for at, text in enumerate(TEXT)]))
    alone = figures(opened(tmp_path), TEXT)
    for at, other in enumerate(alone):
        assert "kl_divergence" not in found[at]
        assert found[at]["against"]["log_likelihood"] == close(other["log_likelihood"])
        apart = found[at]["bits_per_byte"] - other["bits_per_byte"]
        assert found[at]["bits_per_byte_difference"] == close(apart)
    # A record that is done already, whose batch only one of the two still computes.
    many = [Asked(at, TEXT[at % 4] * (1 + at % 5)) for at in range(200)]
    rest = dict(scorer.score(many, done=range(50)))
    assert set(range(50, 200)) <= set(rest)


def test_two_contexts_share_the_smaller_window(model_of: ModelOf) -> None:
    model, other = model_of("bloom"), model_of("gpt2")  # no limit, and a table of 128 positions
    (found,) = figures(model, [LONG], against=other)
    assert found["window"] == 128


# --- what cannot be scored


def test_errors_of_records(model_of: ModelOf) -> None:
    model = model_of("llama")
    empty, fine, nothing = score(model, ["", "a b", Asked(2, "", "context")])
    assert isinstance(empty, InputError) and empty.name == "E-EMPTY"
    assert isinstance(nothing, InputError) and nothing.name == "E-EMPTY"
    assert isinstance(fine, dict)


@pytest.fixture(name="without_beginning")
def _without_beginning(small_model: Any, tmp_path: Path) -> Iterator[Model]:
    model = opened(small_model("llama"))
    backend: Any = model.tokenizer.backend
    kept = backend.bos_token, backend.eos_token
    backend.bos_token = backend.eos_token = None
    yield model
    backend.bos_token, backend.eos_token = kept


def test_a_tokenizer_without_a_beginning(without_beginning: Model) -> None:
    found, only = score(without_beginning, [TEXT[0], "a"])
    assert isinstance(found, dict) and found["bos"] is False
    assert found["tokens"] == len(tokens_of(without_beginning, TEXT[0])) - 1
    assert isinstance(only, InputError)
    with pytest.raises(UsageError, match="E-TOKENIZER"):
        score(without_beginning, ["a b"], bos="always")


def test_weights_that_are_no_numbers(small_model: Any) -> None:
    model = opened(small_model("llama"))
    with torch.no_grad():
        model.net.lm_head.weight[0, 0] = math.nan
    for one in score(model, TEXTS[:3], tokens=True, top=3):
        assert isinstance(one, ModelError) and one.name == "E-NAN"


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=200), min_size=1, max_size=6)
)
def test_any_text_has_figures(model_of: ModelOf, texts: list[str]) -> None:
    for text, found in zip(texts, figures(model_of("llama"), texts, tokens=True, words=True), strict=True):
        assert found["log_likelihood"] < 0
        assert found["characters"] == len(text)
        assert len(found["token_scores"]) == found["tokens"]
