"""A training as people watch it on stderr: drawn on a terminal, plain lines with -v elsewhere, else silent.

It knows the events of a training and how they look, not how one is run; other events are left to console.Reporter.
"""

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from textgen_cli.cli import signals
from textgen_cli.cli.console import (
    PLAIN_INTERVAL,
    SHOW_CURSOR,
    Reporter,
    draws,
    forgiving_stderr,
    safe,
    tell,
    worded,
)
from textgen_cli.events import Event, Measured, Notice, Progress
from textgen_cli.text.figures import shown

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live

SPARKS = 24  # losses of the curve in one line
REMEMBERED = 400  # losses from which the curve is drawn
BAR = 24  # cells
HIDDEN = frozenset({"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"})


class Training:
    """A Report for a training; from its first step on it owns the terminal until `stop`."""

    def __init__(self, verbose: bool, report: Reporter, clock: Callable[[], float] = time.monotonic) -> None:
        self._verbose, self._report, self._clock = verbose, report, clock
        self._draws = draws()
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._told_at = -math.inf
        self._begun: tuple[float, float] | None = (
            None  # the clock and the steps done when the first event came
        )
        self._step: Progress | None = None
        self._beside: Progress | None = None  # what is done between two steps: evaluate, save
        self._losses: deque[float] = deque(maxlen=REMEMBERED)
        self._values: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, Measured):
                self._measure(event)
            elif isinstance(event, Progress) and event.stage == "train":
                self._advance(event)
            elif self._live is None:
                self._report(event)
                return
            elif isinstance(event, Notice):
                if line := worded(event, self._verbose):
                    self._print(line)
            else:
                self._beside = event
            if self._live is not None:
                self._live.update(self._drawn(self._live.console))

    def stop(self) -> None:
        """Take the picture away; nothing is drawn any more."""
        with self._lock:
            self._report.hide()
            if self._live is not None:
                self._live.stop()
                signals.last_words = b""
            self._live = None
            self._draws = False

    def _measure(self, event: Measured) -> None:
        held_out = {name: value for name, value in event.values.items() if name.startswith("eval_")}
        self._values |= {name: value for name, value in event.values.items() if name not in held_out}
        if "loss" in event.values:
            self._losses.append(event.values["loss"])
        if held_out and (self._draws or self._verbose):
            self._print(f"textgen: step {event.step}: {_spoken(held_out)}")

    def _advance(self, event: Progress) -> None:
        now = self._clock()
        if self._begun is None:
            self._begun = now, event.done
        self._step, self._beside = event, None
        if self._draws and self._live is None:
            self._report.stop()
            self._live = _new_live()
            signals.last_words = SHOW_CURSOR
            self._live.start()
        elif self._verbose and not self._draws and now - self._told_at >= PLAIN_INTERVAL:
            self._told_at = now
            told = ", ".join(filter(None, (self._counted(), self._figures(), self._left())))
            tell(f"textgen: train {safe(event.subject)}: {told}\n")

    def _print(self, line: str) -> None:
        if self._live is None:
            self._report.stop()
            tell(line + "\n")
        else:
            self._live.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    # --- what is said

    def _counted(self) -> str:
        """`340/1,200 steps`."""
        if self._step is None:
            return ""
        total = "" if self._step.total is None else f"/{self._step.total:,.0f}"
        return f"{self._step.done:,.0f}{total} {self._step.unit}"

    def _figures(self) -> str:
        """The loss, the speed and the memory, as far as they are known."""
        told = [f"loss {shown(self._values['loss'])}"] if "loss" in self._values else []
        if "learning_rate" in self._values:
            told.append(f"rate {self._values['learning_rate']:.3g}")
        if "tokens_per_second" in self._values:
            told.append(f"{self._values['tokens_per_second']:,.0f} tokens/s")
        return ", ".join([*told, f"{_memory(self._values) / 1e9:.2f} GB"])

    def _left(self) -> str:
        """How long the rest will take, by the steps so far."""
        if self._step is None or self._begun is None or self._step.total is None:
            return ""
        since, before = self._begun
        done = self._step.done - before
        if done <= 0:
            return ""
        return f"{_duration((self._clock() - since) / done * (self._step.total - self._step.done))} left"

    # --- what is drawn

    def _drawn(self, console: "Console") -> "Group":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        from textgen_cli.cli.render import cut, sparkline

        step = self._step
        assert step is not None  # nothing is drawn before the first one
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=step.total, completed=step.done, width=BAR)
        head.add_row(Text("train"), bar, Text(", ".join(filter(None, (self._counted(), self._left())))))
        curve = sparkline(averaged(self._losses, SPARKS), SPARKS)
        lines = ["  ".join(filter(None, (self._figures(), curve)))]
        if (beside := self._beside) is not None:
            of = "" if beside.total is None else f" {beside.done:,.0f}/{beside.total:,.0f} {beside.unit}"
            lines.append(f"{beside.stage} {safe(beside.subject)}{of}")
        return Group(head, *(Text(cut(line, console.width)) for line in lines))


def averaged(values: "deque[float] | list[float]", count: int) -> list[float]:
    """At most `count` values: the means of equal runs of them, the last run the longest."""
    every = list(values)
    size = max(1, len(every) // count)
    starts = [*range(0, len(every), size)][:count]
    runs = [every[start : start + size] for start in starts[:-1]] + [every[starts[-1] :]] if every else []
    return [sum(run) / len(run) for run in runs]


def _spoken(values: Mapping[str, float]) -> str:
    """`held-out loss 1.3, accuracy 0.81`."""
    named = [
        (name.removeprefix("eval_").replace("_", " "), value)
        for name, value in values.items()
        if name not in HIDDEN
    ]
    return "held-out " + ", ".join(f"{name} {shown(round(value, 6))}" for name, value in named)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _memory(values: Mapping[str, float]) -> float:
    """The most bytes that were in use: what the training says, else what the system says of the process."""
    if "peak_bytes" in values:
        return values["peak_bytes"]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def _new_live() -> "Live":
    from rich.console import Console
    from rich.live import Live

    console = Console(file=forgiving_stderr(), force_terminal=True)
    return Live(
        console=console, transient=True, redirect_stdout=False, redirect_stderr=False, refresh_per_second=4
    )


@contextmanager
def training(verbose: bool) -> Iterator[Training]:
    """A Training whose picture is gone when the block ends, however it ends."""
    report = Reporter(verbose)
    view = Training(verbose, report)
    try:
        yield view
    finally:
        view.stop()
