"""Targets under encoder-decoders, against transformers' own loss."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from parts.seq2seq_models import MAKERS

from textgen_cli.config import ModelConfig, ScoringConfig
from textgen_cli.errors import InputError, ModelError, TextgenError
from textgen_cli.events import silent
from textgen_cli.model import head
from textgen_cli.model.load import Model, load
from textgen_cli.score.request import Asked, Figures
from textgen_cli.score.seq2seq import Seq2SeqScorer

PAIRS = [
    ("The quick brown fox jumps over the lazy dog.", "Once upon a time"),
    ("A small model", "The dog does not mind at all, and numbers such as 42 stand beside words."),
    ("", "words"),
    ("A small model", "café, naïve, 你好 and 🙂"),
    ("Numbers 1, 2, 3", "a"),
]
NAMES = ["t5", "bart", "marian", "m2m", "nllb"]


@pytest.fixture(scope="module")
def model_of(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            folder = small_model("t5") if name == "t5" else MAKERS[name](tmp_path_factory.mktemp(name))
            if name == "m2m":
                _name_target(folder, "de")
            made[name] = _load(folder)
            if name == "bart":
                _as_published(made[name])
        return made[name]

    return get


def _load(folder: Path) -> Model:
    return load(ModelConfig(model=str(folder), dtype="float32", device="cpu"), "score", silent)


def _name_target(folder: Path, code: str) -> None:
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tgt_lang": code}))


def _as_published(model: Model) -> None:
    """Let a byte tokenizer put its tokens around every text, as BART's does."""
    backend: Any = model.tokenizer.backend
    backend.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 1), ("<|end|>", 0)]
    )


def score(
    model: Model, asked: list[Asked], rows: int | None = None, **options: Any
) -> list[Figures | TextgenError]:
    scorer = Seq2SeqScorer(ScoringConfig(**options), model, rows, silent)
    found = dict(scorer.score(asked))
    return [found[one.index] for one in asked]


def pairs(model: Model, **options: Any) -> list[Figures]:
    asked = [Asked(number, text, source) for number, (source, text) in enumerate(PAIRS)]
    found = []
    for figures in score(model, asked, **options):
        assert not isinstance(figures, TextgenError)
        found.append(figures)
    return found


def loss(model: Model, source: str, text: str) -> tuple[float, int]:
    """The sum of the model's own loss over a pair, in nats, and how many tokens it has."""
    backend: Any = model.tokenizer.backend
    inputs = backend(source, return_tensors="pt")
    labels = backend(text_target=text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.net(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels)
    return out.loss.item() * labels.shape[1], labels.shape[1]


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_models_own_loss(model_of: Callable[[str], Model], name: str) -> None:
    model = model_of(name)
    for (source, text), found in zip(PAIRS, pairs(model), strict=True):
        nats, tokens = loss(model, source, text)
        assert found["tokens"] == tokens
        assert found["log_likelihood"] == pytest.approx(-nats, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert found["bytes"] == len(text.encode())
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
        assert found["unit"] == "nats"
        assert found["eos"] is True


@pytest.mark.parametrize("name", NAMES)
def test_batch_and_order_change_nothing(model_of: Callable[[str], Model], name: str) -> None:
    model = model_of(name)
    alone = [found["log_likelihood"] for found in pairs(model, rows=1)]
    for rows in (3, 16):
        together = pairs(model, rows=rows)
        for one, found in zip(alone, together, strict=True):
            assert abs(found["log_likelihood"] - one) <= 1e-4 * found["tokens"]
    turned = [Asked(number, text, source) for number, (source, text) in enumerate(PAIRS)][::-1]
    for other, one in zip(score(model, turned), alone[::-1], strict=True):
        assert not isinstance(other, TextgenError)
        assert abs(other["log_likelihood"] - one) <= 1e-4 * other["tokens"]


@pytest.mark.parametrize("name", NAMES)
def test_small_chunks_of_positions_change_nothing(
    model_of: Callable[[str], Model], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name)
    whole = pairs(model)
    monkeypatch.setattr(head, "CHUNK", 3 * model.net.config.vocab_size)
    for one, found in zip(whole, pairs(model), strict=True):
        assert found["log_likelihood"] == pytest.approx(one["log_likelihood"], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_head_is_had_apart_and_the_whole_network_gives_the_same(
    model_of: Callable[[str], Model], name: str
) -> None:
    model = model_of(name)
    scorer = Seq2SeqScorer(ScoringConfig(), model, None, silent)
    assert scorer.head.splits
    asked = [Asked(number, text, source) for number, (source, text) in enumerate(PAIRS)]
    apart: Any = dict(scorer.score(asked))
    scorer.head.splits = False
    whole: Any = dict(scorer.score(asked))
    for number, found in apart.items():
        assert found["log_likelihood"] == pytest.approx(whole[number]["log_likelihood"], rel=1e-5)


def test_tokens_sum_up_and_are_the_models_own(model_of: Callable[[str], Model]) -> None:
    model = model_of("t5")
    source, text = PAIRS[1]
    (found,) = score(model, [Asked(0, text, source)], tokens=True, top=3)
    assert not isinstance(found, TextgenError)
    told = found["token_scores"]
    assert math.fsum(t["log_probability"] for t in told) == pytest.approx(found["log_likelihood"], rel=1e-6)
    assert "".join(text[t["start"] : t["end"]] for t in told) == text
    assert told[-1]["token"] == "<|end|>" and told[-1]["start"] == told[-1]["end"] == len(text)
    backend: Any = model.tokenizer.backend
    labels = backend(text_target=text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model.net(**backend(source, return_tensors="pt"), labels=labels).logits[0].double()
    logs = logits.log_softmax(-1)
    for at, entry in enumerate(told):
        token = labels[0, at]
        assert entry["log_probability"] == pytest.approx(logs[at, token].item(), abs=1e-4)
        assert entry["rank"] == int((logs[at] > logs[at, token]).sum()) + 1
        assert entry["entropy"] == pytest.approx(-(logs[at].exp() * logs[at]).sum().item(), abs=1e-4)
        assert entry["top"][0]["token"] == backend.decode([logs[at].argmax().item()])
        assert len(entry["top"]) == 3


def test_bits(model_of: Callable[[str], Model]) -> None:
    model = model_of("bart")
    for nats, bits in zip(pairs(model), pairs(model, bits=True), strict=True):
        assert bits["log_likelihood"] == pytest.approx(nats["log_likelihood"] / math.log(2))
        assert bits["perplexity"] == pytest.approx(nats["perplexity"])
        assert bits["unit"] == "bits"


def test_choices_are_scored_each_and_their_source_is_encoded_once(model_of: Callable[[str], Model]) -> None:
    model = model_of("t5")
    choices = ("a dog", "the lazy dog jumps over the quick brown fox", "🙂")
    encoded: list[int] = []
    handle = (
        model.net.get_encoder()
        .block[0]
        .register_forward_hook(lambda module, args, output: encoded.append(len(args[0])))
    )
    try:
        scorer = Seq2SeqScorer(ScoringConfig(), model, None, silent)
        encoded.clear()
        ((_, found),) = scorer.score([Asked(0, "", "The quick brown fox", choices)])
    finally:
        handle.remove()
    assert encoded == [1]
    assert isinstance(found, dict) and list(found) == ["choices"]
    for choice, text in zip(found["choices"], choices, strict=True):
        nats, tokens = loss(model, "The quick brown fox", text)
        expected = {"text": text, "log_likelihood": -nats, "tokens": tokens, "bytes": len(text.encode())}
        assert choice == expected | {"log_likelihood": pytest.approx(-nats, rel=1e-5)}


def test_records_that_cannot_be_scored_leave_the_others_alone(model_of: Callable[[str], Model]) -> None:
    model = model_of("bart")
    asked = [
        Asked(0, "text"),
        Asked(1, "", "source"),
        Asked(2, "text", "word " * 400),
        Asked(3, "word " * 400, "source"),
        Asked(4, "text", "source"),
    ]
    *failed, good = score(model, asked)
    names = ["E-FIELD", "E-EMPTY", "E-CONTEXT", "E-CONTEXT"]
    for found, name in zip(failed, names, strict=True):
        assert isinstance(found, InputError) and found.name == name
    assert isinstance(good, dict) and good["log_likelihood"] < 0


def test_a_tokenizer_that_adds_nothing(tmp_path: Path) -> None:
    good, empty = score(_load(MAKERS["bart"](tmp_path)), [Asked(0, "text", "source"), Asked(1, "text", "")])
    assert isinstance(good, dict) and good["eos"] is False
    assert isinstance(empty, InputError) and empty.name == "E-EMPTY"


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_long_source_is_cut_where_allowed(model_of: Callable[[str], Model], side: str) -> None:
    model = model_of("bart")
    backend: Any = model.tokenizer.backend
    source = " ".join(str(number) for number in range(200))
    ids = backend(source, add_special_tokens=False)["input_ids"]
    kept = backend.decode(ids[-126:] if side == "left" else ids[:126])
    cut, short = score(model, [Asked(0, "text", source), Asked(1, "text", kept)], truncate=side)
    assert isinstance(cut, dict) and isinstance(short, dict)
    assert cut["truncated"] is True and "truncated" not in short
    assert cut["log_likelihood"] == pytest.approx(short["log_likelihood"], rel=1e-5)


def test_a_tokenizer_without_a_target_language_says_so(tmp_path: Path) -> None:
    (found,) = score(_load(MAKERS["m2m"](tmp_path)), [Asked(0, "text", "source")])
    assert isinstance(found, ModelError) and found.name == "E-LANGUAGE"


def test_logits_that_are_no_numbers_fail_their_record_alone(tmp_path: Path) -> None:
    model = _load(MAKERS["bart"](tmp_path))
    with torch.no_grad():
        model.net.get_decoder().embed_positions.weight[20:] = math.nan
    good, failed = score(model, [Asked(0, "the dog", "fox"), Asked(1, "the lazy dog " * 9, "fox")], rows=1)
    assert isinstance(good, dict)
    assert isinstance(failed, ModelError) and failed.name == "E-NAN"


def test_lack_of_memory_halves_the_batch(
    model_of: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("t5")
    expected = pairs(model)
    tried: list[int] = []
    real = Seq2SeqScorer._batch

    def narrow(self: Seq2SeqScorer, rows: Any) -> Any:
        tried.append(len(rows))
        if len(rows) > 2:
            raise MemoryError
        return real(self, rows)

    monkeypatch.setattr(Seq2SeqScorer, "_batch", narrow)
    for one, found in zip(expected, pairs(model), strict=True):
        assert found["log_likelihood"] == pytest.approx(one["log_likelihood"], rel=1e-5)
    assert tried[0] == 5 and max(tried[1:]) == 3 and tried.count(2) == 2


def test_batches_of_finished_records_are_not_computed(model_of: Callable[[str], Model]) -> None:
    scorer = Seq2SeqScorer(ScoringConfig(), model_of("t5"), 1, silent)
    asked = [Asked(number, text, source) for number, (source, text) in enumerate(PAIRS)]
    assert {index for index, _ in scorer.score(asked, {0, 2, 4})} == {1, 3}
