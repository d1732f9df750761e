"""What a training leaves to read: metrics.jsonl while it runs, report.html when it is done.

Owns both formats, and which settings may be told: names of files without their folders, no times, no users. It knows
no trainer and imports nothing heavy; figures come as plain values.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from textgen_cli.config.finetune import FinetuneConfig
from textgen_cli.text import disk, page
from textgen_cli.text.chart import Points
from textgen_cli.text.page import Block
from textgen_cli.text.sanitize import redact

LOG, REPORT = "metrics.jsonl", "report.html"
CLASSES = 24  # classes of which a table of confusions is readable
CONFUSED = 20  # the commonest confusions that are told where they are more
ROWS = 100  # classes told of one by one
SAMPLE_TEXT = 600  # characters of a sample's text

# Settings that say where or how it is told, not what is learnt.
UNTOLD = frozenset({"output", "resume", "resume_previous", "restart", "verbose", "check", "offline", "cache_dir",
                    "report_to", "model", "adapter"})  # fmt: skip
FIRST_CHARTS: tuple[tuple[str, ...], ...] = (("loss", "eval_loss"), ("learning_rate",))
UNDRAWN = frozenset({"step", "epoch", "loss", "eval_loss", "learning_rate", "eval_runtime",
                     "eval_samples_per_second", "eval_steps_per_second", "total_flos", "train_loss"})  # fmt: skip


@dataclass(frozen=True)
class DataFile:
    """A file of examples."""

    name: str  # without its folder
    rows: int
    sha256: str


@dataclass(frozen=True)
class Told:
    """All that is told of a finished training."""

    name: str  # of the model that came out
    task: str
    base: str  # the model it began with, without its folder; "" from scratch
    revision: str  # of the base; "" where it has none
    way: str  # which weights learnt, for people: "LoRA of rank 8"
    data: tuple[DataFile, ...]
    settings: dict[str, Any]  # as `told_settings` has them
    facts: dict[str, Any]  # of the data, JSON values
    history: Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl
    before: dict[str, float]  # figures of the base on the held-out data; {} without such data
    after: dict[str, float]
    tables: dict[str, Any] = field(default_factory=dict)  # as evaluate.Evaluation has them
    samples_before: Sequence[Mapping[str, str]] = ()  # as answers.samples has them
    samples_after: Sequence[Mapping[str, str]] = ()
    run: dict[str, float] = field(default_factory=dict)  # steps, seconds, tokens_per_second, peak_bytes ...
    versions: dict[str, str] = field(default_factory=dict)
    adapter: bool = False  # the folder holds an adapter, not a whole model
    quantize: str | None = None  # the form into which the base has to be brought for it
    hub: bool = False  # the base is a name on the Hub


def told_settings(config: FinetuneConfig) -> dict[str, Any]:
    """The settings that decide what is learnt, by name; of files their names alone."""
    return {
        name: _plain(value) for name, value in _leaves(config) if name not in UNTOLD and value is not None
    }


def _leaves(config: Any) -> Iterable[tuple[str, Any]]:
    for part in fields(config):
        value = getattr(config, part.name)
        if is_dataclass(value):
            yield from _leaves(value)
        else:
            yield part.name, value


def _plain(value: Any) -> Any:
    """A value without folders: a path, or a text that is one, gives its last name."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return value.name
    if isinstance(value, str):
        return model_name(value)
    return value


def model_name(name: str) -> str:
    """A model's name as it may be told: of a folder or file its last part."""
    local = name.startswith((".", "/", "~")) or name.lower().endswith((".gguf", ".json"))
    return redact(Path(name).name if local else name, ())


# --- metrics.jsonl


def begin_log(folder: Path, step: int = 0) -> None:
    """Begin metrics.jsonl anew, or cut it back to what was logged up to `step`. OutputError E-WRITE."""
    kept = [line for line in read_log(folder) if step and line["step"] <= step]
    disk.write_whole(folder / LOG, b"".join(map(_line, kept)))


def log(folder: Path, step: int, values: Mapping[str, Any]) -> None:
    """Add one line to metrics.jsonl; what is no finite number is left out. OutputError E-WRITE."""
    path = folder / LOG
    with disk.guard(path), path.open("ab", buffering=0) as file:
        disk.write_all(file.fileno(), _line({"step": step, **values}))


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; [] where there is none. A line cut by a kill is left out."""
    path = folder / LOG
    if not path.exists():
        return []
    found = []
    with disk.guard(path):
        data = path.read_bytes()
    for line in data.split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append(value)
    return found


def _line(values: Mapping[str, Any]) -> bytes:
    finite = {
        name: value
        for name, value in values.items()
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    }
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


# --- report.html


def write_report(folder: Path, told: Told) -> None:
    """Write report.html into a folder: one page that loads nothing. OutputError E-WRITE."""
    disk.write_whole(folder / REPORT, page.page(f"{told.name}: {told.task}", blocks(told)).encode())


def blocks(told: Told) -> list[Block]:
    """The page's parts from above to below; those without content are left out."""
    return [
        page.paragraph(summary(told)),
        *_metrics(told),
        page.heading("Curves"),
        page.charts(_charts(told.history)),
        *_tables(told.tables),
        *_samples(told),
        page.heading("Data"),
        page.table(["file", "rows", "sha256"], [[part.name, part.rows, part.sha256] for part in told.data]),
        *([page.heading("Examples"), page.figures(told.facts)] if told.facts else []),
        page.heading("Settings"),
        page.figures(told.settings),
        page.heading("Run"),
        page.figures({**told.run, **{f"version of {name}": v for name, v in told.versions.items()}}),
    ]


def summary(told: Told) -> str:
    """One phrase: which weights learnt, and where they came from."""
    if not told.base:
        return f"{told.way}, from random ones"
    return f"{told.way}, from {told.base}" + (f" at {told.revision}" if told.revision else "")


def compared(told: Told) -> list[list[Any]]:
    """[figure, before, after] of each figure of the held-out data, those that speak of time left out."""
    names = [*told.after, *(name for name in told.before if name not in told.after)]
    return [[name, told.before.get(name), told.after.get(name)] for name in names]


def _metrics(told: Told) -> list[Block]:
    rows = compared(told)
    if not rows:
        return [page.paragraph("No data was held out, so nothing was measured.")]
    return [page.heading("On held-out data"), page.table(["figure", "before", "after"], rows)]


def _charts(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Points]]:
    """Losses in one picture, the learning rate in one, then each figure of evaluations."""
    names = dict.fromkeys(name for line in history for name in line)
    more = [(name,) for name in names if name.startswith("eval_") and name not in UNDRAWN]
    return [
        {_spoken(name): points for name in group if (points := _points(history, name))}
        for group in (*FIRST_CHARTS, *more)
    ]


def _spoken(name: str) -> str:
    names = {"loss": "training loss", "eval_loss": "held-out loss"}
    return names.get(name, name.removeprefix("eval_").replace("_", " "))


def _points(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in history if name in line]


def _tables(tables: Mapping[str, Any]) -> list[Block]:
    found: list[Block] = []
    confusion = tables.get("confusion")
    if confusion and len(confusion) <= CLASSES:
        found += [page.heading("Confusion"), page.confusion(confusion)]
    elif confusion:
        found += [page.heading("Commonest confusions"), _commonest(confusion)]
    if classes := tables.get("classes"):
        head = ["name", "precision", "recall", "f1", "support"]
        by_support = sorted(classes.items(), key=lambda pair: -pair[1]["support"])
        rows = [[name, *(round(scores[part], 4) for part in head[1:])] for name, scores in by_support[:ROWS]]
        found += [page.heading("By class"), page.table(head, rows)]
        if len(classes) > ROWS:
            found.append(page.paragraph(f"and {len(classes) - ROWS} rarer ones"))
    return found


def _commonest(confusion: Mapping[str, Mapping[str, int]]) -> Block:
    pairs = ((right, made, count) for right, row in confusion.items() for made, count in row.items())
    wrong = sorted((p for p in pairs if p[2] and p[0] != p[1]), key=lambda pair: -pair[2])
    return page.table(["right", "predicted", "times"], wrong[:CONFUSED])


def _samples(told: Told) -> list[Block]:
    if not told.samples_after:
        return []
    begun = told.samples_before or [{}] * len(told.samples_after)
    rows = [
        [
            _cut(text)
            for text in (after["input"], after["expected"], before.get("answer", ""), after["answer"])
        ]
        for before, after in zip(begun, told.samples_after, strict=False)
    ]
    return [page.heading("Samples"), page.table(["input", "expected", "before", "after"], rows)]


def _cut(text: str) -> str:
    return text if len(text) <= SAMPLE_TEXT else text[: SAMPLE_TEXT - 1] + "…"
