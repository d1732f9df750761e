"""What `textgen finetune` makes of real data: a figure before and after, beside a simple method; and how fast.

Every row is the command as a user types it, in a process of its own. Figures are those of the finished folder's model
card, on examples that were not learnt. Texts and models come out of pinned archives (archives.py); default model: LoRA.
"""

import json
import math
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import examples
from benchmarks.archives import model_folder
from benchmarks.examples import Examples
from benchmarks.runner import Ratio, Run, Side, compare

TEXTGEN = (sys.executable, "-m", "textgen_cli")
HALF = "--dtype bfloat16"  # the weights of an adapter's base, else the products alone


@dataclass(frozen=True)
class Row:
    """One training, and what must come of it."""

    name: str
    data: Callable[[Path], Examples]
    base: str  # a model of archives.py, "default", or a preset to begin from scratch
    options: str
    figure: str
    target: float  # at least; of a perplexity, the share of the base's that it may be at most
    needed: bool = True  # a target of the project; others are a look

    @property
    def is_perplexity(self) -> bool:
        return self.figure == "perplexity"


ROWS = {
    "sentiment": Row("good or bad film (4,000 reviews)", examples.sentiment, "minilm",
                     f"--truncate --max-length 128 --epochs 1 --learning-rate 1e-4 {HALF}", "accuracy", 0.80),
    "spam": Row("spam or not (3,000 mails)", examples.spam, "bert",
                "--truncate --max-length 128 --epochs 2 --learning-rate 3e-4", "accuracy", 0.95, needed=False),
    "tags": Row("parts of speech (3,000 sentences)", examples.tags, "minilm",
                f"--epochs 2 --learning-rate 2e-4 {HALF}", "accuracy", 0.93),
    "plays": Row("Shakespeare, two plays held out", examples.plays, "default",
                 f"--lora 16 --max-length 256 --batch-size 2 --epochs 1 --learning-rate 1e-3 {HALF}",
                 "perplexity", 2 / 3),
    "talks": Row("conversations (160), answers alone", examples.talks, "default",
                 f"--lora 16 --max-length 256 --truncate --batch-size 8 --epochs 1 --learning-rate 5e-4 {HALF}",
                 "perplexity", 2 / 3, needed=False),
    "prose": Row("masked words of edited prose", examples.prose, "bert",
                 "--task mlm --epochs 2 --learning-rate 5e-4", "perplexity", 2 / 3, needed=False),
    "translation": Row("made-up language, both directions", examples.translation, "tiny",
                       "--vocab-size 1000 --epochs 12 --learning-rate 1e-3 --batch-size 32", "exact_match", 0.98),
    "questions": Row("spans that answer, or none", examples.questions, "bert",
                     "--epochs 4 --learning-rate 1e-3 --batch-size 32", "f1", 0.90, needed=False),
}  # fmt: skip


def run(quick: bool, only: str | None = None) -> Iterator[list[Ratio]]:
    """Each row as soon as it is measured, then speed and memory. `only`: a row, or `speed`."""
    if only not in (None, "speed", *ROWS):
        raise SystemExit(f"--only: one of speed, {', '.join(ROWS)}")
    with tempfile.TemporaryDirectory() as scratch:
        parts = Parts(Path(scratch))
        if only != "speed":
            print(
                "| data | base | figure | before | after | simple methods | target | | minutes | CPU min | MB |"
            )
            print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
        for name in [name for name in ROWS if only in (None, name)]:
            yield [_row(ROWS[name], parts, quick)]
        if only in (None, "speed"):
            yield speed(parts, quick)


class Parts:
    """What rows share: the folders of models."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.known: dict[str, Path] = {}

    def model(self, name: str) -> Path:
        """The folder of a base."""
        if name not in self.known:
            if name == "default":
                said = Side("download", [*TEXTGEN, "download"])().output
                self.known[name] = Path(said.strip().splitlines()[-1])
            else:
                self.known[name] = model_folder(name, self.scratch / "models" / name)
        return self.known[name]

    def base(self, name: str) -> list[str]:
        """The options that name a base."""
        if name == "tiny":
            return ["--from-scratch", name]
        return [] if name == "default" else ["-m", str(self.model(name))]


def _row(row: Row, parts: Parts, quick: bool) -> Ratio:
    """Print a line; a perplexity over the base's, or what is wanted over what was reached: at most the target."""
    folder = parts.scratch / row.data.__name__
    folder.mkdir()
    data = row.data(folder)
    out = folder / "out"
    options = row.options.split() + (["--max-steps", "10"] if quick else [])
    argv = [
        *TEXTGEN,
        "finetune",
        str(data.train),
        "--valid",
        str(data.valid),
        *parts.base(row.base),
        *options,
    ]
    done = Side(row.name, [*argv, "-o", str(out)])()
    before, after = _before(out, row.figure), _after(out, row.figure)
    simple = dict(data.baselines)
    if row.is_perplexity and row.base == "default":
        simple = {"unigram": _unigram(data, parts.model(row.base))}
    met = after <= row.target * before if row.is_perplexity else after >= row.target
    limit = f"<= {row.target:.2f} x before" if row.is_perplexity else f">= {row.target:g}"
    told = "; ".join(f"{name} {value:.3g}" for name, value in simple.items())
    verdict = ("met" if met else "MISSED") if row.needed else ("" if met else "below")
    cells = [row.name, row.base, row.figure, f"{before:.4g}", f"{after:.4g}", told, limit, verdict,
             f"{done.seconds / 60:.1f}", f"{done.cpu / 60:.1f}", f"{done.peak / 1e6:.0f}"]  # fmt: skip
    print("| " + " | ".join(cells) + " |")
    named = ["textgen", "finetune", data.train.name, "--valid", data.valid.name, *parts.base(row.base)]
    print(f"<!-- {' '.join(_short(word, parts) for word in [*named, *options])} -->", flush=True)
    shutil.rmtree(out)
    ours, peer, target = (after, before, row.target) if row.is_perplexity else (row.target, after, 1.0)
    limit_side, peer_side = [replace(done, seconds=ours)], [replace(done, seconds=max(peer, 1e-9))]
    return Ratio(f"{row.name}: {row.figure}", limit_side, peer_side, target if row.needed else math.inf)


def _short(word: str, parts: Parts) -> str:
    return f"./{Path(word).name}" if word.startswith(str(parts.scratch)) else word


def _before(out: Path, figure: str) -> float:
    """The base's figure on the held-out examples, before the first step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return float(
        next(line[f"eval_{figure}"] for line in lines if f"eval_{figure}" in line and line["step"] == 0)
    )


def _after(out: Path, figure: str) -> float:
    """The figure that the model card tells."""
    found = re.search(rf'type: "{figure}"\s+value: (\S+)', (out / "README.md").read_text())
    assert found is not None
    return float(found[1])


def _unigram(data: Examples, folder: Path) -> float:
    from transformers import AutoTokenizer

    return examples.unigram(data.train, data.valid, AutoTokenizer.from_pretrained(folder))


# --- speed and memory

STEPS = 6
# The library's causal example, as its README has it: every weight learns, in float32, by AdamW, with blocks of one
# length that are cut out of the whole text.
STOCK = """
import json, sys, time
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator
folder, train, length, rows, steps, out = sys.argv[1:]
length, rows, steps = int(length), int(rows), int(steps)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(open(train).read())["input_ids"]
blocks = [ids[at : at + length] for at in range(0, len(ids) - length, length)]
data = Dataset.from_list([{"input_ids": block, "attention_mask": [1] * length, "labels": block} for block in blocks])
net = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
arguments = TrainingArguments(out, per_device_train_batch_size=rows, max_steps=steps, learning_rate=5e-5,
                              save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
trainer = Trainer(net, arguments, train_dataset=data, data_collator=default_data_collator)
start = time.perf_counter()
trainer.train()
print(json.dumps({"seconds": time.perf_counter() - start, "tokens": steps * rows * length}))
"""
# The library's classification example: every text is padded to the longest length that is allowed.
PADDED = """
import json, sys, time
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
folder, train, length, rows, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
found = [json.loads(line) for line in open(train)]
names = sorted({row["label"] for row in found})
cut = dict(padding="max_length", truncation=True, max_length=int(length))
data = Dataset.from_list([{**tokenizer(row["text"], **cut), "labels": names.index(row["label"])} for row in found])
net = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names), dtype="float32")
arguments = TrainingArguments(out, per_device_train_batch_size=int(rows), num_train_epochs=1, learning_rate=5e-5,
                              save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
trainer = Trainer(net, arguments, train_dataset=data)
start = time.perf_counter()
trainer.train()
print(json.dumps({"seconds": time.perf_counter() - start, "tokens": len(found)}))
"""


def speed(parts: Parts, quick: bool) -> list[Ratio]:
    """Seconds a token against the library's own examples; a figure of memory is bytes / bytes."""
    rounds = 1 if quick else 3
    folder = parts.scratch / "speed"
    folder.mkdir()
    plays = examples.plays(folder).train
    shape = ("--max-length", "256", "--batch-size", "2", "--max-steps", str(STEPS), "--valid-share", "0")
    lora = _ours(parts, "default", plays, *shape, "--lora", "16", *HALF.split())
    stock = _peer(STOCK, parts.model("default"), plays, 256, 2, STEPS, folder / "stock")
    causal = compare(
        "LoRA, bfloat16 / the stock example, float32", lora, stock, rounds=rounds, target=1 / 1.3
    )
    full = _ours(parts, "default", plays, *shape)()
    memory = [
        [replace(run, seconds=float(run.peak)) for run in side] for side in (causal.ours, [full] * rounds)
    ]
    mixed = _mixed_lengths(folder)
    options = (
        "--truncate",
        "--max-length",
        "256",
        "--batch-size",
        "16",
        "--epochs",
        "1",
        "--valid-share",
        "0",
    )
    padded = _peer(PADDED, parts.model("bert"), mixed, 256, 16, folder / "padded")
    return [
        causal,
        Ratio("peak memory, LoRA / all weights", memory[0], memory[1], target=0.5),
        compare("mixed lengths / padded to 256", _ours(parts, "bert", mixed, *options), padded, rounds=rounds,
                target=1 / 1.5),
    ]  # fmt: skip


def _ours(parts: Parts, base: str, train: Path, *options: str) -> Callable[[], Run]:
    """A training whose seconds are those for one token, as metrics.jsonl has them; the first line is a warm-up."""
    out = train.with_name("ours")
    argv = [*TEXTGEN, "finetune", str(train), *parts.base(base), *options, "-o", str(out)]

    def run() -> Run:
        done = Side("ours", argv)()
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        rates = [line["tokens_per_second"] for line in lines if "loss" in line][1:]
        shutil.rmtree(out)
        return replace(done, seconds=1 / statistics.harmonic_mean(rates))

    return run


def _peer(code: str, *arguments: Any) -> Callable[[], Run]:
    def run() -> Run:
        done = Side("peer", [sys.executable, "-c", code, *map(str, arguments)])()
        said = json.loads(done.output.strip().splitlines()[-1])
        return replace(done, seconds=said["seconds"] / said["tokens"])

    return run


def _mixed_lengths(folder: Path) -> Path:
    """Reviews of which most are cut to a sentence or two, as such collections are."""
    (folder / "mixed").mkdir()
    found = examples.sentiment(folder / "mixed", 640, 64).train
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["text"] = " ".join(row["text"].split()[: 8 + (number * 37) % 200])
    found.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found
