"""Plain values between the score flow and its scorers: what is to be scored, and what came of it.

Knows no model; every scorer speaks it.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from textgen_cli.errors import TextgenError

if TYPE_CHECKING:
    from textgen_cli.score.pairs import Pair

Figures = dict[str, Any]  # fields of the contract, ready for JSON: no NaN, no infinity


@dataclass(frozen=True)
class Asked:
    """One record's question to a model."""

    index: int  # record number
    text: str  # what is scored; "" where `choices` are
    context: str | None = None  # what stands before it and is not scored; an encoder-decoder's source
    choices: tuple[str, ...] | None = None  # continuations to choose from, in place of a text
    gold: Any = None  # the right answer; None: not known
    pair: "Pair | None" = None  # two texts to compare; `text` is "" until it is one of them


class Scorer(Protocol):
    """Turns questions into figures, in any order; a question that fails gets its error.

    `done`: records whose results stand already. They still shape the batches, but need no figures.
    """

    def score(
        self, asked: Sequence[Asked], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Figures | TextgenError]]: ...
