"""Measures whole processes side by side and prints ratios.

The two sides of a comparison take turns, and which goes first alternates, so that a slow minute of the
machine falls on both; the figure is the median of the rounds' ratios. It does not know what it measures.
"""

import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """One finished process."""

    seconds: float  # wall time
    peak: int  # bytes of resident memory at most
    output: str  # stdout
    cpu: float = 0.0  # seconds of all processors: what a busy machine changes less


@dataclass(frozen=True)
class Side:
    """What is measured: a command line, the environment added to ours, and the exit code it must have."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] | None = None
    code: int = 0

    def __call__(self) -> Run:
        """Run it once, standard input closed. Raises RuntimeError when the exit code is another one."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            start = time.perf_counter()
            child = subprocess.Popen(
                self.argv,
                env={**os.environ, **(self.env or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
            # wait4 gives the peak memory of this very child.
            _, status, usage = os.wait4(child.pid, 0)
            seconds = time.perf_counter() - start
            child.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            err.seek(0)
            if child.returncode != self.code:
                raise RuntimeError(f"{self.name}: exit {child.returncode}: {err.read().decode()[-2000:]}")
            unit = 1 if sys.platform == "darwin" else 1024
            cpu = usage.ru_utime + usage.ru_stime
            return Run(seconds, usage.ru_maxrss * unit, out.read().decode(), cpu)


@dataclass(frozen=True)
class Ratio:
    """One figure: seconds of ours / seconds of the peer, round by round."""

    name: str
    ours: Sequence[Run]
    peer: Sequence[Run]
    target: float  # at most

    @property
    def rounds(self) -> list[float]:
        """The ratio of each round."""
        return [a.seconds / b.seconds for a, b in zip(self.ours, self.peer, strict=True)]

    @property
    def met(self) -> bool:
        """Whether the median ratio is within the target."""
        return statistics.median(self.rounds) <= self.target


def compare(
    name: str, ours: Callable[[], Run], peer: Callable[[], Run], *, rounds: int, target: float
) -> Ratio:
    """Measure two sides in turn, after one round that only warms the caches."""
    sides = (ours, peer)
    in_turn(sides, 1)
    measured = in_turn(sides, rounds)
    return Ratio(name, measured[0], measured[1], target)


def in_turn(sides: Sequence[Callable[[], Run]], rounds: int) -> list[list[Run]]:
    """The runs of each side; every other round goes from the last side to the first."""
    measured: list[list[Run]] = [[] for _ in sides]
    for number in range(rounds):
        for side in range(len(sides))[:: -1 if number % 2 else 1]:
            measured[side].append(sides[side]())
    return measured


def table(ratios: Sequence[Ratio]) -> str:
    """The ratios as aligned text: median and range, median seconds and peak memory of both sides."""
    head = (
        "figure",
        "ratio",
        "lowest",
        "highest",
        "target",
        "",
        "ours s",
        "peer s",
        "ours MB",
        "peer MB",
        "rounds",
    )
    rows = [head, *(row(ratio) for ratio in ratios)]
    widths = [max(len(line[column]) for line in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in rows
    )  # fmt: skip


def row(ratio: Ratio) -> tuple[str, ...]:
    """One line of the table."""
    seconds = [statistics.median(run.seconds for run in side) for side in (ratio.ours, ratio.peer)]
    peaks = [max(run.peak for run in side) / 1e6 for side in (ratio.ours, ratio.peer)]
    return (
        ratio.name,
        f"{statistics.median(ratio.rounds):.3f}",
        f"{min(ratio.rounds):.3f}",
        f"{max(ratio.rounds):.3f}",
        f"<= {ratio.target:g}",
        "met" if ratio.met else "MISSED",
        f"{seconds[0]:.3f}",
        f"{seconds[1]:.3f}",
        f"{peaks[0]:.0f}",
        f"{peaks[1]:.0f}",
        str(len(ratio.rounds)),
    )


def fields(ratio: Ratio) -> dict[str, Any]:
    """A ratio as JSON has it; a target that is only printed is null."""
    sides = {"ours": ratio.ours, "peer": ratio.peer}
    return {
        "figure": ratio.name,
        "ratio": statistics.median(ratio.rounds),
        "rounds": ratio.rounds,
        "target": ratio.target if math.isfinite(ratio.target) else None,
        "met": ratio.met,
        "seconds": {name: statistics.median(run.seconds for run in side) for name, side in sides.items()},
        "peak_bytes": {name: max(run.peak for run in side) for name, side in sides.items()},
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `fields` as a table for docs/results.md."""
    lines = ["| figure | ratio | range | target | | ours MB | peer MB |", "|---|---|---|---|---|---|---|"]
    for found in rows:
        target = "printed" if found["target"] is None else f"{found['target']:.3g}"
        verdict = "" if found["target"] is None else "met" if found["met"] else "missed"
        peaks = [f"{found['peak_bytes'][side] / 1e6:.0f}" for side in ("ours", "peer")]
        spread = f"{min(found['rounds']):.3f} to {max(found['rounds']):.3f}"
        cells = (found["figure"], f"{found['ratio']:.3f}", spread, target, verdict, *peaks)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> str:
    """What the figures were measured on: processor, threads and versions."""
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        facts = []
    models = (line.partition(":")[2].strip() for line in facts if line.startswith("model name"))
    cpu = next(models, platform.processor() or platform.machine())
    libraries = ("textgen-cli", "torch", "transformers", "typer", "rich")
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    import torch

    can = sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    matrix = ", ".join(name for name in can if "bf16" in name or name.startswith("amx")) or "no bfloat16"
    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{cpu} ({torch.backends.cpu.get_cpu_capability()}; {matrix}), {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads{card}; Python {platform.python_version()}, {versions}"
    )
