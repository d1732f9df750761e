"""Pseudo-log-likelihood, against minicons on a published BERT and against a loop of single passes."""

import importlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from parts.models import byte_tokenizer
from parts.published import masked_model

from textgen_cli.config import ModelConfig, ScoringConfig
from textgen_cli.errors import InputError, ModelError, TextgenError
from textgen_cli.events import silent
from textgen_cli.model import head
from textgen_cli.model.load import Model, load
from textgen_cli.score.masked import MaskedScorer
from textgen_cli.score.request import Asked, Figures

KINDS = ("original", "within_word_l2r")
TEXTS = [
    "The souvenir shop sold colourful kaleidoscopes.",
    "Paris is the capital of France.",
    "a",
    "naïve café 你好 🙂 שלום",
    "Whose antidisestablishmentarianism? Unbelievably, the photosynthesizers' own!",
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return _load(masked_model(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def small(small_model: Any) -> Model:
    return _load(small_model("bert"))


def _load(folder: Path) -> Model:
    return load(ModelConfig(model=str(folder), dtype="float32", device="cpu"), "score", silent)


def score(
    model: Model, asked: list[Asked], rows: int | None = None, **options: Any
) -> list[Figures | TextgenError]:
    found = dict(MaskedScorer(ScoringConfig(**options), model, rows, silent).score(asked))
    return [found[one.index] for one in asked]


def figures(model: Model, texts: list[str], rows: int | None = None, **options: Any) -> list[Figures]:
    found = []
    for one in score(model, [Asked(number, text) for number, text in enumerate(texts)], rows, **options):
        assert not isinstance(one, TextgenError)
        found.append(one)
    return found


def loop(model: Model, ids: list[int], places: list[int]) -> list[float]:
    """Log-probability in nats of each place by a pass of its own, in float64 behind the network's logits."""
    logs = []
    for place in places:
        masked = torch.tensor([ids])
        masked[0, place] = model.tokenizer.backend.mask_token_id
        with torch.no_grad():
            logits = model.net(input_ids=masked).logits[0, place].double()
        logs.append(logits.log_softmax(-1)[ids[place]].item())
    return logs


# --- against others


@pytest.mark.parametrize("kind", KINDS)
def test_equals_minicons_on_a_published_bert(bert: Model, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer: Any = importlib.import_module("minicons.scorer")
    backend = bert.tokenizer.backend
    # It calls its tokenizer by a name that transformers 5 has dropped.
    monkeypatch.setattr(
        type(backend), "batch_encode_plus", lambda self, *args, **kw: self(*args, **kw), raising=False
    )
    peer = scorer.MaskedLMScorer(bert.net, "cpu", tokenizer=backend)
    for text, found in zip(TEXTS, figures(bert, TEXTS, pll=kind, tokens=True), strict=True):
        (expected,) = peer.sequence_score([text], reduction=lambda x: x.sum().item(), PLL_metric=kind)
        assert found["pseudo_log_likelihood"] == pytest.approx(expected, abs=1e-4)
        (told,) = peer.token_score([text], PLL_metric=kind)
        own = [entry["log_probability"] for entry in found["token_scores"]]
        assert own == pytest.approx(
            [value for token, value in told if token not in ("[CLS]", "[SEP]")], abs=1e-4
        )
        assert found["tokens"] == len(own)
        assert found["pseudo_perplexity"] == pytest.approx(math.exp(-expected / len(own)), rel=1e-4)
        assert (found["pll"], found["unit"]) == (kind, "nats")


def test_known_figures(bert: Model) -> None:
    for kind, expected in (("original", -126.6205), ("within_word_l2r", -130.5213)):
        (found,) = figures(bert, TEXTS[:1], pll=kind)
        assert found["pseudo_log_likelihood"] == pytest.approx(expected, abs=1e-3)


def test_token_figures_are_the_models_own(bert: Model) -> None:
    text = "Paris is the capital of France."
    (found,) = figures(bert, [text], pll="original", tokens=True, top=4)
    ids = bert.tokenizer.encode(text)
    told = found["token_scores"]
    for place, entry in enumerate(told, start=1):
        masked = torch.tensor([ids])
        masked[0, place] = bert.tokenizer.backend.mask_token_id
        with torch.no_grad():
            logs = bert.net(input_ids=masked).logits[0, place].double().log_softmax(-1)
        assert entry["log_probability"] == pytest.approx(logs[ids[place]].item(), abs=1e-4)
        assert entry["rank"] == int((logs > logs[ids[place]]).sum()) + 1
        assert entry["entropy"] == pytest.approx(-(logs.exp() * logs).sum().item(), abs=1e-4)
        best = logs.topk(4)
        assert [t["log_probability"] for t in entry["top"]] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert entry["top"][0]["token"] == bert.tokenizer.spell(best.indices[0].item())
    assert [text[t["start"] : t["end"]] for t in told] == [
        "Paris",
        "is",
        "the",
        "capital",
        "of",
        "France",
        ".",
    ]


# --- other architectures: each makes its logits in its own way


def _distilbert(size: int) -> Any:
    return transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(vocab_size=size, dim=32, hidden_dim=64, n_layers=2, n_heads=4)
    )


def _electra(size: int) -> Any:
    config = transformers.ElectraConfig(
        vocab_size=size, embedding_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    return transformers.ElectraForMaskedLM(config)


def _albert(size: int) -> Any:
    config = transformers.AlbertConfig(
        vocab_size=size, embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    return transformers.AlbertForMaskedLM(config)


def _modernbert(size: int) -> Any:
    config = transformers.ModernBertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        pad_token_id=0, bos_token_id=2, cls_token_id=2, eos_token_id=3, sep_token_id=3,
    )  # fmt: skip
    return transformers.ModernBertForMaskedLM(config)


def _deberta(size: int) -> Any:
    config = transformers.DebertaV2Config(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        relative_attention=True, pos_att_type=["p2c", "c2p"],
    )  # fmt: skip
    return transformers.DebertaV2ForMaskedLM(config)


def _fnet(size: int) -> Any:
    """Sees padding, for want of a mask."""
    config = transformers.FNetConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, intermediate_size=64, pad_token_id=0
    )
    return transformers.FNetForMaskedLM(config)


def _longformer(size: int) -> Any:
    """Pads by itself, which its head relies on."""
    config = transformers.LongformerConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        attention_window=8,
    )  # fmt: skip
    return transformers.LongformerForMaskedLM(config)


OTHERS: dict[str, Callable[[int], Any]] = {
    "distilbert": _distilbert, "electra": _electra, "albert": _albert, "modernbert": _modernbert,
    "deberta": _deberta, "fnet": _fnet, "longformer": _longformer,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_every_architecture_equals_a_loop_of_passes(name: str, small: Model, tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = OTHERS[name](small.tokenizer.size)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    net.save_pretrained(tmp_path)
    small.tokenizer.backend.save_pretrained(tmp_path)
    model = _load(tmp_path)
    scorer = MaskedScorer(ScoringConfig(pll="original"), model, None, silent)
    assert scorer.head.splits is (name != "longformer")
    _equals_the_loop(scorer, model, TEXTS[:2])
    scorer.head.splits = False
    _equals_the_loop(scorer, model, TEXTS[:2])


def _equals_the_loop(scorer: MaskedScorer, model: Model, texts: list[str]) -> None:
    for index, found in scorer.score([Asked(number, text) for number, text in enumerate(texts)]):
        assert not isinstance(found, TextgenError)
        ids = model.tokenizer.encode(texts[index])
        expected = math.fsum(loop(model, ids, list(range(1, len(ids) - 1))))
        assert found["pseudo_log_likelihood"] == pytest.approx(expected, abs=1e-4 * len(ids))


def test_roberta_with_byte_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 1), ("<|end|>", 0)]
    )
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=66, pad_token_id=0, bos_token_id=1, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(3)
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = _load(tmp_path)
    _equals_the_loop(MaskedScorer(ScoringConfig(pll="original"), model, None, silent), model, TEXTS[:4])
    # Blanks at a context's end go to the text.
    before, behind = score(
        model, [Asked(0, " lines and words", "a few"), Asked(1, "lines and words", "a few ")], tokens=True
    )
    assert isinstance(before, dict) and isinstance(behind, dict)
    assert behind["pseudo_log_likelihood"] == pytest.approx(before["pseudo_log_likelihood"])
    starts = [[entry["start"] for entry in found["token_scores"]] for found in (before, behind)]
    assert starts[1] == [max(0, start - 1) for start in starts[0]]


# --- rules


@pytest.mark.parametrize("kind", KINDS)
def test_batch_and_order_change_nothing(bert: Model, kind: Any) -> None:
    alone = figures(bert, TEXTS, 1, pll=kind)
    for rows in (3, 16, None):
        for one, found in zip(alone, figures(bert, TEXTS, rows, pll=kind), strict=True):
            assert (
                abs(found["pseudo_log_likelihood"] - one["pseudo_log_likelihood"]) <= 1e-4 * found["tokens"]
            )
    for one, found in zip(alone[::-1], figures(bert, TEXTS[::-1], pll=kind), strict=True):
        assert abs(found["pseudo_log_likelihood"] - one["pseudo_log_likelihood"]) <= 1e-4 * found["tokens"]


def test_a_context_is_seen_and_never_masked(bert: Model) -> None:
    context, text = "The capital of France is", " Paris, unbelievably."
    plain, behind = score(
        bert, [Asked(0, text.strip()), Asked(1, text, context)], pll="original", tokens=True
    )
    assert isinstance(plain, dict) and isinstance(behind, dict)
    assert behind["tokens"] == plain["tokens"]
    ids = bert.tokenizer.encode(context + text)
    places = list(range(len(ids) - 1 - behind["tokens"], len(ids) - 1))
    assert behind["pseudo_log_likelihood"] == pytest.approx(math.fsum(loop(bert, ids, places)), abs=1e-3)
    assert behind["pseudo_log_likelihood"] != pytest.approx(plain["pseudo_log_likelihood"], abs=0.1)
    assert text[slice(*(behind["token_scores"][0][k] for k in ("start", "end")))] == "Paris"


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_judged_in_windows(small: Model, kind: Any) -> None:
    text = "the quick brown fox jumps over the lazy dog and a naïve kaleidoscope " * 6
    (found,) = figures(small, [text], pll=kind, tokens=True)
    backend: Any = small.tokenizer.backend
    encoded = backend(text)
    ids, words = encoded["input_ids"], encoded.word_ids()
    assert len(ids) > 128 and found["window"] == 128 and found["tokens"] == len(ids) - 2
    for place in (1, 2, 63, 64, 65, len(ids) // 2, len(ids) - 66, len(ids) - 3, len(ids) - 2):
        start = min(max(place - 63, 1), len(ids) - 1 - 126)
        masked = list(ids)
        for later in range(place, len(ids)):
            if later == place or (kind != "original" and words[later] == words[place]):
                masked[later] = backend.mask_token_id
        window = [ids[0], *masked[start : start + 126], ids[-1]]
        with torch.no_grad():
            logits = small.net(input_ids=torch.tensor([window])).logits[0, 1 + place - start].double()
        expected = logits.log_softmax(-1)[ids[place]].item()
        assert found["token_scores"][place - 1]["log_probability"] == pytest.approx(expected, abs=1e-4)


def test_a_text_that_just_fits_needs_no_window(small: Model) -> None:
    short, long = figures(small, ["dog " * 126, "dog " * 127])
    assert "window" not in short and short["tokens"] == 126
    assert long["window"] == 128 and long["tokens"] == 127


def test_bits_and_words(bert: Model) -> None:
    (nats,) = figures(bert, TEXTS[:1])
    (bits,) = figures(bert, TEXTS[:1], bits=True, words=True)
    assert bits["pseudo_log_likelihood"] == pytest.approx(nats["pseudo_log_likelihood"] / math.log(2))
    assert bits["pseudo_perplexity"] == nats["pseudo_perplexity"]
    words = bits["word_scores"]
    assert [word["word"] for word in words][:2] == ["The", "souvenir"]
    assert math.fsum(word["log_likelihood"] for word in words) == pytest.approx(bits["pseudo_log_likelihood"])


def test_texts_that_cannot_be_scored_leave_the_others_alone(bert: Model) -> None:
    empty, blank, control, good = score(
        bert, [Asked(0, ""), Asked(1, " \n "), Asked(2, "[SEP] [MASK]"), Asked(3, "a 🙂")]
    )
    for found in (empty, blank, control):
        assert isinstance(found, InputError) and found.name == "E-EMPTY"
    assert isinstance(good, dict) and math.isfinite(good["pseudo_log_likelihood"])


def test_logits_that_are_no_numbers_fail_their_record_alone(small_model: Any) -> None:
    model = _load(small_model("bert"))
    with torch.no_grad():
        model.net.base_model.embeddings.position_embeddings.weight[20:] = math.nan
    good, failed = score(model, [Asked(0, "the dog"), Asked(1, "the lazy dog " * 9)], rows=1)
    assert isinstance(good, dict)
    assert isinstance(failed, ModelError) and failed.name == "E-NAN"


def test_lack_of_memory_halves_the_batch(bert: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = figures(bert, TEXTS)
    tried: list[int] = []
    real = MaskedScorer._batch

    def narrow(self: MaskedScorer, rows: Any) -> Any:
        tried.append(len(rows))
        if len(rows) > 4:
            raise MemoryError
        return real(self, rows)

    monkeypatch.setattr(MaskedScorer, "_batch", narrow)
    for one, found in zip(expected, figures(bert, TEXTS), strict=True):
        assert found["pseudo_log_likelihood"] == pytest.approx(one["pseudo_log_likelihood"], rel=1e-5)
    assert max(tried) > 4


def test_logits_are_never_batch_by_length_by_vocabulary(bert: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = bert.net.config.vocab_size
    scorer = MaskedScorer(ScoringConfig(), bert, None, silent)
    monkeypatch.setattr(head, "CHUNK", 5 * vocabulary)
    seen: list[int] = []
    handle = bert.net.get_output_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.numel())
    )
    try:
        found = list(scorer.score([Asked(number, text) for number, text in enumerate(TEXTS)]))
    finally:
        handle.remove()
    assert len(found) == len(TEXTS)
    assert max(seen) <= 5 * vocabulary
    assert sum(seen) == vocabulary * sum(f["tokens"] for _, f in found if isinstance(f, dict))


def test_batches_of_finished_records_are_not_computed(bert: Model) -> None:
    scorer = MaskedScorer(ScoringConfig(), bert, 1, silent)
    asked = [Asked(number, text) for number, text in enumerate(TEXTS)]
    assert {index for index, _ in scorer.score(asked, {0, 2, 4})} == {1, 3}


@pytest.mark.slow
def test_five_times_as_fast_as_a_loop_of_passes(bert: Model) -> None:
    texts = [f"{text} Number {number} of the colourful words." for number in range(6) for text in TEXTS]
    figures(bert, texts[:2])
    start = time.perf_counter()
    found = figures(bert, texts, pll="original")
    ours = time.perf_counter() - start
    start = time.perf_counter()
    for text in texts:
        ids = bert.tokenizer.encode(text)
        loop(bert, ids, list(range(1, len(ids) - 1)))
    theirs = time.perf_counter() - start
    assert len(found) == len(texts)
    assert theirs > 5 * ours
