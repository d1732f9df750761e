"""What `textgen finetune` makes of real data: a figure before and after, beside a simple method; and how fast.

Every row is the command as a user types it, in a process of its own. Figures are those of the finished folder's model
card, on examples that were not learnt. Texts and models come out of pinned archives (archives.py); default model: LoRA.
"""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import examples, finetune_speed, finetune_trl
from benchmarks.bases import HALF, TEXTGEN, Parts
from benchmarks.examples import Examples
from benchmarks.runner import Ratio, Side


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
    """Each row as soon as it is measured, speed and memory, then trl. `only`: a row of either, `speed` or `trl`."""
    if only not in (None, "speed", "trl", *ROWS, *finetune_speed.ROWS):
        raise SystemExit(f"--only: one of speed, trl, {', '.join([*finetune_speed.ROWS, *ROWS])}")
    with tempfile.TemporaryDirectory() as scratch:
        parts = Parts(Path(scratch))
        names = [name for name in ROWS if only in (None, name)]
        if names:
            print(
                "| data | base | figure | before | after | simple methods | target | | minutes | CPU min | MB |"
            )
            print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
        for name in names:
            yield [_row(ROWS[name], parts, quick)]
        if only not in ("trl", *ROWS):
            yield from finetune_speed.rows(parts, quick, None if only == "speed" else only)
        if only in (None, "trl"):
            yield finetune_trl.rows(parts, quick)


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
