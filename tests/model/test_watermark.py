"""The watermark against transformers' own processor and detector, and through the program."""

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from scipy.stats import binom
from transformers.generation.watermarking import WatermarkDetector

from textgen_cli.config import (
    BatchConfig,
    DecodingConfig,
    GenerateConfig,
    ModelConfig,
    ScoreConfig,
    ScoringConfig,
)
from textgen_cli.errors import ModelError, ResumeError, TextgenError, UsageError
from textgen_cli.events import silent
from textgen_cli.generate import compiled, sampling
from textgen_cli.generate.engines import open_engine
from textgen_cli.generate.openai_api import check_sendable
from textgen_cli.generate.request import Request
from textgen_cli.model.load import load
from textgen_cli.model.watermark import RATIO, Marker, evidence, green, hashing_key
from textgen_cli.score.request import Asked
from textgen_cli.score.run import run_batch
from textgen_cli.score.scorers import open_scorer

SmallModel = Callable[..., Path]
VOCABULARY = 400


def settings(key: str, bias: float = 2.0) -> transformers.WatermarkingConfig:
    return transformers.WatermarkingConfig(
        greenlist_ratio=RATIO, bias=bias, hashing_key=hashing_key(key), seeding_scheme="lefthash"
    )


@pytest.mark.parametrize("key", ["a", "Schlüssel", "k" * 500])
def test_lists_are_those_of_transformers(key: str) -> None:
    theirs = settings(key).construct_processor(VOCABULARY, "cpu")
    ids = torch.randint(VOCABULARY, (6, 9), generator=torch.Generator().manual_seed(1))
    scores = torch.zeros(6, VOCABULARY)
    expected = theirs(ids, scores)
    assert torch.equal(Marker(key, 2.0, VOCABULARY)(ids, scores.clone()), expected)
    assert expected.sum() == 6 * 2.0 * int(VOCABULARY * RATIO)


def test_evidence_is_that_of_transformers() -> None:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, bos_token_id=VOCABULARY - 1)
    detector = WatermarkDetector(config, "cpu", settings("key"), ignore_repeated_ngrams=True)
    draw = random.Random(0)
    for size in (2, 5, 60, 300):
        ids = [draw.randrange(20) for _ in range(size)]  # few tokens: pairs repeat
        given: Any = torch.tensor([ids])
        theirs: Any = detector(given, return_dict=True)
        ours = evidence(ids, "key", VOCABULARY)
        assert ours is not None
        assert ours.z == pytest.approx(theirs.z_score[0], abs=1e-9)
        assert (ours.tokens, ours.green) == (theirs.num_tokens_scored[0], theirs.num_green_tokens[0])
        assert ours.p_value == pytest.approx(binom.sf(ours.green - 1, ours.tokens, RATIO), rel=1e-9)
    assert evidence([7], "key", VOCABULARY) is None


def test_repetition_does_not_add_evidence() -> None:
    number = hashing_key("key")
    after = int(green(number, 3, VOCABULARY).nonzero()[0])
    once, often = evidence([3, after], "key", VOCABULARY), evidence([3, after] * 50, "key", VOCABULARY)
    assert once is not None and often is not None
    assert once.tokens == 1 and often.tokens == 2
    assert not torch.equal(green(number, 3, VOCABULARY), green(hashing_key("yek"), 3, VOCABULARY))


def test_batches_write_what_single_prompts_write_and_score_finds_it(small_model: SmallModel) -> None:
    model = ModelConfig(model=str(small_model("gpt2")), dtype="float32")
    decoding = DecodingConfig(watermark="key", watermark_bias=8.0, max_new_tokens=50, min_new_tokens=50)
    prompts = ["The sun", "A bird sat on the old fence", "x"]
    requests = [Request(number, 0, prompt, None, number) for number, prompt in enumerate(prompts)]
    engine = open_engine(GenerateConfig(model=model, decoding=decoding), 0, silent).engine

    def ids(asked: list[Request]) -> list[list[int]]:
        ended = sorted((c.index, c.final) for c in engine.stream(asked) if c.final)
        return [list(final.tokens[1]) for _, final in ended if final.tokens]

    together = ids(requests)
    assert together == [ids([request])[0] for request in requests]
    vocabulary = load(model, "generate", silent).net.config.vocab_size
    for own in together:
        found, other = evidence(own, "key", vocabulary), evidence(own, "yek", vocabulary)
        assert found is not None and found.p_value < 1e-6
        assert other is not None and other.p_value > 1e-3


def test_score_tells_without_weights(small_model: SmallModel, tmp_path: Path) -> None:
    folder = shutil.copytree(small_model("gpt2"), tmp_path / "bare")
    texts = ["The sun is bright and the sea is wide.", ""]
    results = []
    for _ in range(2):
        config = ScoreConfig(model=ModelConfig(model=str(folder)), scoring=ScoringConfig(watermark="key"))
        scorer = open_scorer(config, silent)
        results.append(dict(scorer.score([Asked(n, text) for n, text in enumerate(texts)])))
        save_file({"other": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ModelError):
        load(ModelConfig(model=str(folder)), "score", silent)
    found = results[0][0]
    assert found == results[1][0]
    assert isinstance(found, dict) and found["watermarked"] is False
    assert list(found) == ["watermarked", "green_fraction", "z", "p_value", "tokens"]
    assert isinstance(results[0][1], TextgenError)


@pytest.mark.parametrize(
    "other", [{"num_beams": 2}, {"prompt_lookup": 3}, {"set": ("num_beams=2",)}, {"draft_model": "other"}]
)
def test_beams_and_speculation_are_refused(small_model: SmallModel, other: dict[str, object]) -> None:
    model = load(ModelConfig(model=str(small_model("gpt2"))), "generate", silent)
    with pytest.raises(UsageError, match="beams or speculation"):
        sampling.plan(DecodingConfig(watermark="key", **other), model, silent)  # type: ignore[arg-type]


def test_what_cannot_be_obeyed_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        DecodingConfig(watermark="")
    with pytest.raises(UsageError, match="endpoint"):
        check_sendable(DecodingConfig(watermark="key"))
    with pytest.raises(UsageError, match="--tokens"):
        ScoringConfig(watermark="key", tokens=True)
    assert compiled.unfit(GenerateConfig(decoding=DecodingConfig(watermark="key"))) == "--watermark"


def test_a_batch_keeps_no_key_and_goes_on_with_no_other(small_model: SmallModel, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("One line of text.\nAnother line of text.\n")
    key, out = "Schlüssel-4711", tmp_path / "out.jsonl"

    def job(key: str, *, limit: float | None = None) -> None:
        batch = BatchConfig(
            input=tmp_path / "in.txt", output=out, lines=True, resume=True, batch_size="1", max_time=limit
        )
        model = ModelConfig(model=str(small_model("gpt2")))
        config = ScoreConfig(model=model, scoring=ScoringConfig(watermark=key), batch=batch)
        run_batch(config, None, io.BytesIO(), silent)

    job(key, limit=1e-9)
    state = Path(f"{out}.state").read_text("utf-8")
    assert '"watermark"' in state and key not in state and json.dumps(key)[1:-1] not in state
    with pytest.raises(ResumeError, match=r"scoring\.watermark") as refused:
        job("other")
    assert key not in str(refused.value) and "other" not in str(refused.value)
    job(key)
    assert len(out.read_text().splitlines()) == 2
