"""What an option is on the command line: its panel, help, short form and completion."""

from collections.abc import Callable
from dataclasses import dataclass

from textgen_cli.config import DEFAULT_MODEL


@dataclass(frozen=True)
class Opt:
    """How a setting appears on the command line; its long name comes from the field's."""

    panel: str
    help: str
    short: str = ""
    metavar: str | None = None
    complete: Callable[[str], list[str]] | None = None
    typed: bool = False  # on the command line alone: what a run does is not left to a variable or a file


def words(*choices: str) -> Callable[[str], list[str]]:
    """A completion that offers these words."""
    return lambda incomplete: [word for word in choices if word.startswith(incomplete)]


def catalogue(incomplete: str) -> list[str]:
    """The catalogue's names as a completion."""
    from textgen_cli.model.catalog import CATALOG

    return words(DEFAULT_MODEL, *(name for name in CATALOG if name != DEFAULT_MODEL))(incomplete)
