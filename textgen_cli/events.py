"""What long work tells the face while it runs: progress and notices. Plain data, no printing."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Work under way; `total` is None where the end is not known."""

    stage: str  # one word: download, convert, load, wait, generate
    subject: str  # what it concerns: a model's or file's name
    done: float = 0.0
    total: float | None = None
    unit: str = ""  # "bytes", "records", "tokens"; "" where only the stage matters
    detail: str = ""  # more for people: how fast it goes, how long the rest will take
    part: str = ""  # one of several things that the work does at once, such as a file; "": the whole of it


@dataclass(frozen=True)
class Notice:
    """A fact for people: a warning (always shown) or a choice made (shown with -v)."""

    text: str
    name: str = ""  # W-NAME: a warning; "hint": shown on a terminal; "": a choice, which only -v shows


@dataclass(frozen=True)
class Measured:
    """Figures of a running training by their names: one log (`loss`, ...) or evaluation (`eval_loss`, ...)."""

    step: int  # updates of the weights so far
    values: dict[str, float]


Event = Progress | Notice | Measured
Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """A Report that drops everything."""
