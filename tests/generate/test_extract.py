"""Answers marked in a context, against spans found by brute force from transformers' own forward passes."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parts.models import TEXT, word_tokenizer
from parts.shell import Shell

from textgen_cli.config import ModelConfig
from textgen_cli.events import silent
from textgen_cli.generate.extract import ExtractEngine
from textgen_cli.generate.request import Completion, Request
from textgen_cli.model.load import load

QUESTION = "what jumps over the lazy dog?"
CONTEXTS = [
    TEXT[1],
    "  " + TEXT[0] + "\n\n" + TEXT[2],
    " ".join(TEXT * 6),
]  # the last is longer than the model takes
LONGEST = 30  # tokens of an answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with random weights that marks spans."""
    path = tmp_path_factory.mktemp("marks")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer().backend_tokenizer,
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(3)
    net = transformers.BertForQuestionAnswering(config)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    net.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def silent_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network taught to find nothing: what it says of the first token is said much louder."""
    path = tmp_path_factory.mktemp("silent")
    net: Any = transformers.AutoModelForQuestionAnswering.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        states = net.bert(**tokenizer(QUESTION, TEXT[1], return_tensors="pt")).last_hidden_state[0]  # (T, D)
        rows = torch.linalg.pinv(states) @ torch.eye(len(states))[:, :1] * 9  # 9 at the first token, else 0
        net.qa_outputs.weight.copy_(rows.T.expand(2, -1))
        net.qa_outputs.bias.zero_()
    net.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def answer(folder: Path, pairs: list[tuple[str, str]], top: int = 1) -> list[tuple[str, Completion]]:
    model = load(ModelConfig(model=str(folder), dtype="float32", device="cpu"), "generate", silent)
    requests = [Request(i, 0, None, None, 0, pair=pair) for i, pair in enumerate(pairs)]
    chunks = ExtractEngine(model, top).stream(requests)
    return [(chunk.text, chunk.final) for chunk in chunks if chunk.final]


def spans(folder: Path, question: str, context: str) -> tuple[list[tuple[float, int, int]], float]:
    """Every span of every window with its score, best first, and the lowest score of no answer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    net: Any = transformers.AutoModelForQuestionAnswering.from_pretrained(folder, dtype=torch.float32).eval()
    asked = tokenizer(question, add_special_tokens=False)["input_ids"]
    whole = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    room = 128 - len(asked) - 3
    step = room - min(128, (room + 1) // 2)
    found: dict[tuple[int, int], float] = {}
    null = float("inf")
    for first in range(0, max(len(whole["input_ids"]) - room + step, 1), step):
        part = whole["input_ids"][first : first + room]
        ids = [2, *asked, 3, *part, 3]
        kinds = [0] * (len(asked) + 2) + [1] * (len(part) + 1)
        with torch.inference_mode():
            out = net(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([kinds]))
        start, end = out.start_logits[0].tolist(), out.end_logits[0].tolist()
        null = min(null, start[0] + end[0])
        lead = len(asked) + 2
        for i in range(len(part)):
            for j in range(i, min(i + LONGEST, len(part))):
                opens, closes = whole["offset_mapping"][first + i][0], whole["offset_mapping"][first + j][1]
                score = start[lead + i] + end[lead + j]
                found[opens, closes] = max(score, found.get((opens, closes), -float("inf")))
    ranked = sorted(((score, *span) for span, score in found.items()), key=lambda entry: -entry[0])
    return ranked, null


def test_the_best_span_is_that_of_brute_force(folder: Path) -> None:
    pairs = [(QUESTION, context) for context in CONTEXTS]
    for (text, final), (question, context) in zip(answer(folder, pairs, top=5), pairs, strict=True):
        expected, null = spans(folder, question, context)
        score, start, end = expected[0]
        assert final.error is None
        assert final.extra["null_score"] == pytest.approx(null, abs=1e-4)
        assert final.finish_reason == ("stop" if score >= null else "no_answer")
        assert final.finish_reason == "stop", "a seed whose weights find something is wanted"
        assert (final.extra["answer_start"], final.extra["answer_end"]) == (start, end)
        assert final.extra["score"] == pytest.approx(score, abs=1e-4)
        assert text == context[start:end]
        ours = [(a["answer_start"], a["answer_end"], a["text"]) for a in final.extra["answers"]]
        assert ours == [(s, e, context[s:e]) for _, s, e in expected[:5]]


def test_alone_and_together_are_the_same(folder: Path) -> None:
    pairs = [(QUESTION, context) for context in CONTEXTS]
    together = answer(folder, pairs)
    for pair, (text, final) in zip(pairs, together, strict=True):
        [(alone, single)] = answer(folder, [pair])
        assert (alone, single.extra) == (text, final.extra)


def test_as_many_windows_are_computed_together_as_asked(folder: Path) -> None:
    model = load(ModelConfig(model=str(folder), dtype="float32", device="cpu"), "generate", silent)
    sizes: list[int] = []
    model.net.register_forward_hook(lambda net, args, out: sizes.append(len(out.start_logits)))
    for rows in (None, 2):
        list(ExtractEngine(model, 1, rows).stream([Request(0, 0, None, None, 0, (QUESTION, CONTEXTS[2]))]))
    assert sizes[0] > 2
    assert sizes[1:] == [2] * (sizes[0] // 2) + [1] * (sizes[0] % 2)


def test_no_answer(silent_folder: Path) -> None:
    expected, null = spans(silent_folder, QUESTION, TEXT[1])
    assert null > expected[0][0]
    [(text, final)] = answer(silent_folder, [(QUESTION, TEXT[1])], top=3)
    assert (text, final.finish_reason) == ("", "no_answer")
    assert final.extra["null_score"] == pytest.approx(null, abs=1e-4)
    assert (final.extra["answer_start"], final.extra["answer_end"], final.extra["score"]) == (
        None,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("pair", "name"),
    [((QUESTION + " word" * 200, "a context"), "E-CONTEXT"), ((QUESTION, ""), None), (("", TEXT[0]), None)],
)
def test_unusual_pairs(folder: Path, pair: tuple[str, str], name: str | None) -> None:
    (text, final), (_, good) = answer(folder, [pair, (QUESTION, TEXT[1])])
    assert (final.error.name if final.error else None) == name
    assert good.error is None
    if pair[1] == "":
        assert (text, final.finish_reason, final.extra["score"]) == ("", "no_answer", None)


def run(warm: Shell, folder: Path, *args: str, stdin: str) -> subprocess.CompletedProcess[str]:
    argv = [warm.program, "generate", "-m", str(folder), "--dtype", "float32", *args]
    return subprocess.run(
        argv, input=stdin, capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_from_the_command_line(warm: Shell, folder: Path) -> None:
    expected, null = spans(folder, QUESTION, TEXT[1])
    best = [TEXT[1][start:end] for _, start, end in expected[:3]]
    done = run(warm, folder, "--task", "qa", "--question", QUESTION, stdin=TEXT[1] + "\n")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", best[0] + "\n")

    done = run(warm, folder, "--task", "qa", "--question", QUESTION, "--top", "3", stdin=TEXT[1] + "\n")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [answer for _, answer in rows] == best
    assert [float(score) for score, _ in rows] == pytest.approx([s for s, _, _ in expected[:3]], rel=1e-3)

    records = [{"id": 1, "question": QUESTION, "context": TEXT[1]}, {"id": 2, "question": QUESTION}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    done = run(warm, folder, "--task", "qa", "--jsonl", stdin=lines)
    first, second = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 3
    assert {name: first[name] for name in ("id", "question", "context", "text")} == records[0] | {
        "text": best[0]
    }
    assert (first["answer_start"], first["answer_end"]) == expected[0][1:]
    assert first["null_score"] == pytest.approx(null, abs=1e-4)
    assert second["error"]["code"] == "E-FIELD"
