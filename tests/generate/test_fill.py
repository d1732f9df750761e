"""Filling gaps with a masked model, against transformers' own fill-mask pipeline."""

import json
import os
import subprocess
from typing import Any

import pytest
import torch
import transformers
from parts.shell import Shell

from textgen_cli.config import ModelConfig
from textgen_cli.events import silent
from textgen_cli.generate.fill import FillEngine
from textgen_cli.generate.ranked import as_lines
from textgen_cli.generate.request import Chunk, Completion, Request
from textgen_cli.model.load import load

TEXTS = [
    "the quick brown [MASK] jumps over the lazy dog",
    "once upon a ___ there was a small model",
    "[MASK] language model assigns ____ to text",
]


def fill(folder: Any, texts: list[str], top: int = 4) -> list[Completion]:
    engine = FillEngine(
        load(ModelConfig(model=str(folder), dtype="float32", device="cpu"), "generate", silent), top
    )
    chunks = engine.stream([Request(i, 0, text, None, 0) for i, text in enumerate(texts)])
    finals = {chunk.index: chunk.final for chunk in chunks}
    return [final for _, final in sorted(finals.items()) if final]


@pytest.fixture(scope="module")
def folder(small_model: Any) -> Any:
    return small_model("bert")


def test_equals_the_pipeline(folder: Any) -> None:
    net = transformers.AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    pipeline = transformers.pipeline(
        "fill-mask",
        model=net,
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        top_k=4,
        device="cpu",
    )
    for final, text in zip(fill(folder, TEXTS), TEXTS, strict=True):
        expected: Any = pipeline(text.replace("____", "[MASK]").replace("___", "[MASK]"))
        rows = expected if isinstance(expected[0], list) else [expected]
        assert len(final.extra["fillings"]) == len(rows)
        for ours, theirs in zip(final.extra["fillings"], rows, strict=True):
            assert [entry["token"] for entry in ours] == [entry["token_str"] for entry in theirs]
            assert [e["probability"] for e in ours] == pytest.approx([e["score"] for e in theirs], rel=1e-4)


def test_a_batch_gives_what_each_text_gives_alone(folder: Any) -> None:
    for final, text in zip(fill(folder, TEXTS), TEXTS, strict=True):
        [alone] = fill(folder, [text])
        for together, single in zip(final.extra["fillings"], alone.extra["fillings"], strict=True):
            assert [e["token"] for e in together] == [e["token"] for e in single]


def test_a_text_without_a_gap_fails_alone(folder: Any) -> None:
    good, bad = fill(folder, ["a ___ b", "nothing to fill"])
    assert good.error is None
    assert bad.error is not None and bad.error.name == "E-NO-GAP"


def run(warm: Shell, folder: Any, *args: str, said: str = "") -> str:
    argv = [warm.program, "generate", "-m", str(folder), "--dtype", "float32", *args]
    done = subprocess.run(
        [*argv, "--no-stdin"], capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, said)
    return done.stdout


@pytest.mark.slow
def test_from_the_command_line(warm: Shell, folder: Any) -> None:
    one, two = "once upon a ___ there was a small model", "[MASK] language model assigns ____ to text"
    [final] = fill(folder, [one], top=3)
    [best] = final.extra["fillings"]
    assert run(warm, folder, one) == best[0]["text"] + "\n"
    rows = [line.split("\t") for line in run(warm, folder, one, "--top", "3").splitlines()]
    assert [text for _, text in rows] == [entry["text"] for entry in best]
    assert [float(p) for p, _ in rows] == pytest.approx([entry["probability"] for entry in best], rel=1e-3)
    assert all(len(p.replace("0.", "").lstrip("0")) == 4 for p, _ in rows)
    [final] = fill(folder, [two], top=3)
    assert json.loads(run(warm, folder, two, "--top", "3", "--jsonl"))["fillings"] == [
        [entry | {"probability": pytest.approx(entry["probability"])} for entry in gap]
        for gap in final.extra["fillings"]
    ]
    told = "textgen: warning: [W-TOP] the text has 2 gaps; --jsonl shows the fillings of each\n"
    assert run(warm, folder, two, "--top", "3", said=told) == run(warm, folder, two)


def test_several_gaps_give_the_best_text(folder: Any) -> None:
    [final] = fill(folder, [TEXTS[2]], top=3)
    chunk = Chunk(0, 0, final.extra["fillings"][0][0]["text"], final)
    assert as_lines(chunk) == chunk
    assert chunk.text == final.extra["fillings"][1][0]["text"]  # the best of both
