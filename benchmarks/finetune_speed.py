"""How fast and how lean `textgen finetune` is beside the library's own examples on the same rows.

A side is a process of its own, and so is its warm-up: both count the same steps, from the end of the warm-up's last one
to the end of the last one, and must have learnt from equally many tokens. Figures are seconds for a token or a text;
those of memory are bytes at the peak of the whole process.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import examples
from benchmarks.bases import HALF, TEXTGEN, Parts
from benchmarks.runner import Ratio, Run, Side, in_turn

# What both peers begin with: a clock that starts behind the steps that warm up.
CLOCK = """
import json, sys, time
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
class Clock(TrainerCallback):
    def __init__(self, warm):
        self.warm = warm
    def on_step_end(self, args, state, control, **kwargs):
        self.last = time.perf_counter(), state.num_input_tokens_seen
        if state.global_step == self.warm:
            self.first = self.last
def timed(net, data, collate, warm, **settings):
    arguments = TrainingArguments(learning_rate=5e-5, save_strategy="no", report_to="none", disable_tqdm=True,
                                  use_cpu=True, seed=0, data_seed=0, logging_first_step=True,
                                  include_num_input_tokens_seen="non_padding", **settings)
    clock = Clock(warm)
    trainer = Trainer(net, arguments, train_dataset=data, data_collator=collate, callbacks=[clock])
    trainer.train()
    seconds, tokens = (last - first for last, first in zip(clock.last, clock.first))
    print(json.dumps({"seconds": seconds, "tokens": tokens, "loss": trainer.state.log_history[0]["loss"]}))
"""
# The library's causal example: in float32, by AdamW, with blocks of one length that are cut out of the whole text. Each
# weight learns, or an adapter as peft's quick tour has it.
STOCK = f"""{CLOCK}
from transformers import AutoModelForCausalLM, default_data_collator
folder, train, length, rows, warm, rank, out = sys.argv[1:]
length = int(length)
tokenizer = AutoTokenizer.from_pretrained(folder)
texts = [json.loads(line)["text"] for line in open(train)]
ids = [number for text in texts for number in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
blocks = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
data = Dataset.from_list([dict(input_ids=block, attention_mask=[1] * length, labels=block) for block in blocks])
net = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
if rank != "0":
    import peft
    net = peft.get_peft_model(net, peft.LoraConfig(
        r=int(rank), lora_alpha=2 * int(rank), target_modules="all-linear", task_type="CAUSAL_LM"))
timed(net, data, default_data_collator, int(warm), output_dir=out, per_device_train_batch_size=int(rows),
      num_train_epochs=1)
"""
# The library's classification example: every text is padded to the longest length that is allowed.
PADDED = f"""{CLOCK}
from transformers import AutoModelForSequenceClassification, default_data_collator
folder, train, length, rows, warm, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
found = [json.loads(line) for line in open(train)]
names = sorted({{row["label"] for row in found}})
cut = dict(padding="max_length", truncation=True, max_length=int(length))
data = Dataset.from_list([{{**tokenizer(row["text"], **cut), "labels": names.index(row["label"])}} for row in found])
net = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names), dtype="float32")
timed(net, data, default_data_collator, int(warm), output_dir=out, per_device_train_batch_size=int(rows),
      num_train_epochs=2)
"""
RANK = "16"
LEAN = "--recompute"
LENGTH = 256  # tokens of a row at most
# Rows and counted steps of the causal model: the example's batch, and what `auto` takes as well.
BATCH, STEPS = 8, 3
TEXTS, TEXT_BATCH = 640, 16  # of the classifier, whose second epoch counts
NEAR = 0.02  # by so much of it the first losses of one batch differ, in bfloat16 and float32


@dataclass(frozen=True)
class Work:
    """One training by ours: of which base, with which options, behind how many steps it counts, and in what units."""

    base: str
    train: Path
    options: tuple[str, ...]
    warm: int
    count: int  # tokens or texts that are counted


def lora(parts: Parts, quick: bool) -> list[Ratio]:
    """Seconds a token of the default model."""
    exact = _causal(parts)
    exact = replace(exact, options=(*exact.options, "--lora", RANK))
    half = replace(exact, options=(*exact.options, *HALF.split()))
    lean = replace(half, options=(*half.options, LEAN))
    sides = [_ours(parts, work) for work in (half, lean, exact)]
    sides += [_stock(parts, exact, rank) for rank in ("0", RANK)]
    ours, ours_lean, ours_exact, stock, peft = in_turn(sides, _rounds(quick))
    return [
        _ratio("LoRA, bfloat16 / the stock example, float32", ours, stock, 1 / 1.3, same_loss=True),
        _ratio(f"the same with {LEAN}", ours_lean, stock, 1 / 1.3, same_loss=True),
        _ratio("LoRA / the stock example, both float32", ours_exact, stock, same_loss=True),
        _ratio("LoRA, bfloat16 / LoRA by peft, float32", ours, peft, same_loss=True),
        _ratio("LoRA / LoRA by peft, both float32", ours_exact, peft, same_loss=True),
    ]


def memory(parts: Parts, quick: bool) -> list[Ratio]:
    """Bytes at the peak, of both sides by ours."""
    work = _causal(parts)
    half = ("--dtype", "bfloat16")
    ways = {
        "LoRA, bfloat16": ("--lora", RANK, *half),
        f"LoRA, bfloat16, {LEAN}": ("--lora", RANK, *half, LEAN),
        "all weights, bfloat16": half,
        "all weights, float32": ("--dtype", "float32"),
    }
    peaks = {}
    for name, options in ways.items():
        run = _ours(parts, replace(work, options=(*work.options, *options)))()
        peaks[name] = [replace(run, seconds=float(run.peak))]
    ours, peers = list(ways)[:2], list(ways)[2:]
    return [
        Ratio(f"peak memory: {one} / {other}", peaks[one], peaks[other], target=0.5)
        for one in ours
        for other in peers
    ]


def lengths(parts: Parts, quick: bool) -> list[Ratio]:
    """Seconds a text of a small classifier; most texts are far shorter than the longest."""
    train = _mixed_lengths(_folder(parts, "lengths"))
    warm = math.ceil(TEXTS / TEXT_BATCH)
    shape = (
        f"--truncate --max-length {LENGTH} --batch-size {TEXT_BATCH} --epochs 2 --learning-rate 5e-5 "
        f"--valid-share 0 --save-steps {2 * warm}"
    )
    ours = _ours(parts, Work("bert", train, tuple(shape.split()), warm, TEXTS))
    folder, out = parts.model("bert"), train.with_name("padded")
    padded = _peer(PADDED, TEXTS, folder, train, LENGTH, TEXT_BATCH, warm, out)
    here, there = in_turn([ours, padded], _rounds(quick))
    return [_ratio("mixed lengths / padded to 256", here, there, 1 / 1.5)]


ROWS: dict[str, Callable[[Parts, bool], list[Ratio]]] = {"lora": lora, "memory": memory, "lengths": lengths}


def rows(parts: Parts, quick: bool, only: str | None = None) -> Iterator[list[Ratio]]:
    """Each of ROWS as soon as it is measured, or one of them."""
    for name, measure in ROWS.items():
        if only in (None, name):
            yield measure(parts, quick)


# --- the sides


def _ours(parts: Parts, work: Work) -> Callable[[], Run]:
    """The command as a user types it; what its steps took stands in metrics.jsonl."""
    out = work.train.with_name("ours")
    argv = [*TEXTGEN, "finetune", str(work.train), *parts.base(work.base), *work.options, "-o", str(out)]

    def run() -> Run:
        done = Side("ours", argv)()
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        shutil.rmtree(out)
        steps = [line for line in lines if "loss" in line]
        counted = [
            (after["tokens"] - before["tokens"], after["tokens_per_second"])
            for before, after in pairwise(steps)
        ][work.warm - 1 :]
        seconds = sum(tokens / rate for tokens, rate in counted)
        return _counted(done, seconds, sum(tokens for tokens, _ in counted), steps[0]["loss"], work.count)

    return run


def _stock(parts: Parts, work: Work, rank: str) -> Callable[[], Run]:
    folder, out = parts.model(work.base), work.train.with_name("stock")
    return _peer(STOCK, work.count, folder, work.train, LENGTH, BATCH, work.warm, rank, out)


def _peer(code: str, count: int, *arguments: Any) -> Callable[[], Run]:
    def run() -> Run:
        done = Side("peer", [sys.executable, "-c", code, *map(str, arguments)])()
        said = json.loads(done.output.strip().splitlines()[-1])
        return _counted(done, said["seconds"], said["tokens"], said["loss"], count)

    return run


def _counted(done: Run, seconds: float, tokens: int, loss: float, count: int) -> Run:
    return replace(done, seconds=seconds / count, output=json.dumps([tokens, loss]))


def _rounds(quick: bool) -> int:
    return 1 if quick else 3


def _ratio(
    name: str, ours: list[Run], peer: list[Run], target: float = math.inf, *, same_loss: bool = False
) -> Ratio:
    """A figure of two sides. RuntimeError where they did not learn from the same number of tokens, or, with
    `same_loss`, not from the same first batch."""
    (tokens, loss), (others, other) = (json.loads(side[0].output) for side in (ours, peer))
    if tokens != others or (same_loss and abs(loss - other) > NEAR * other):
        raise RuntimeError(
            f"{name}: the sides disagree: {tokens} tokens and {others}; first loss {loss} and {other}"
        )
    print(f"{name}: {tokens:,} tokens on both sides, first loss {loss:.4g} and {other:.4g}", flush=True)
    return Ratio(name, ours, peer, target)


# --- what is learnt


def _folder(parts: Parts, name: str) -> Path:
    folder = parts.scratch / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _causal(parts: Parts) -> Work:
    """Pieces of plays, each a row of LENGTH tokens with the one that ends it, for one step that warms up and STEPS."""
    from transformers import AutoTokenizer

    folder = _folder(parts, "causal")
    tokenizer = AutoTokenizer.from_pretrained(parts.model("default"))
    ids = tokenizer(examples.plays(folder).train.read_text("utf-8"))["input_ids"]
    width = LENGTH - 1
    pieces = (tokenizer.decode(ids[at : at + width]) for at in range(0, len(ids), width))
    whole = (text for text in pieces if len(tokenizer(text)["input_ids"]) == width)
    train = folder / "causal.jsonl"
    texts = [next(whole) for _ in range(BATCH * (1 + STEPS))]
    train.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shape = f"--task clm --max-length {LENGTH} --batch-size {BATCH} --epochs 1 --learning-rate 5e-5 --valid-share 0"
    return Work("default", train, tuple(shape.split()), 1, STEPS * BATCH * LENGTH)


def _mixed_lengths(folder: Path) -> Path:
    """Reviews of which most are cut to a sentence or two, as such collections are."""
    found = examples.sentiment(folder, TEXTS, 64).train
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["text"] = " ".join(row["text"].split()[: 8 + (number * 37) % 200])
    found.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found
