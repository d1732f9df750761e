"""What is to be explained, as plain values: inputs of a network, and what of its answer counts.

Knows no network and no method. A score is the sum over rows, each with its sign, of what its targets get.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from textgen_cli.text.segments import Span, assign, segments

# What a target gets: log p in nats; log p - log(1 - p), which does not flatten out where p is near 1; the logit of a
# label that stands beside others, which is its log-odds; a number itself.
Measure = Literal["log_probability", "log_odds", "logit", "value"]


@dataclass(frozen=True)
class Target:
    """One answer of a network: a token or a label, and the place at which it is given."""

    place: int
    token: int
    # Where among the inputs this very token stands, at the place or behind it; None: nowhere, and the place stays
    # the place whatever is left out.
    own: int | None = None


@dataclass(frozen=True)
class Row:
    """One input, of which (with the other rows of its case) the same places are explained."""

    ids: tuple[int, ...]
    targets: tuple[Target, ...]
    decoder: tuple[int, ...] = ()  # what an encoder-decoder's decoder reads
    types: tuple[int, ...] = ()  # token types
    hidden: tuple[int, ...] = ()  # places that are masked in this row: no weight comes to them
    sign: float = 1.0

    def without(self, places: Sequence[int]) -> "Row":
        """The row with tokens left out, and targets that are these very tokens with them."""
        gone = set(places)

        def moved(target: Target) -> Target:
            if target.own is None:
                return target
            before = target.place if target.own == target.place else target.place + 1
            return replace(target, place=target.place - sum(place < before for place in gone))

        kept = [at for at in range(len(self.ids)) if at not in gone]
        return replace(
            self,
            ids=tuple(self.ids[at] for at in kept),
            types=tuple(self.types[at] for at in kept) if self.types else (),
            targets=tuple(moved(target) for target in self.targets if target.own not in gone),
        )


@dataclass(frozen=True)
class Case:
    """An answer to be explained, and the text it was given to."""

    text: str
    ids: tuple[int, ...]  # of the text, special ones included
    spans: tuple[Span | None, ...]  # characters of `text` of each token; None: it stands for none
    rows: tuple[Row, ...]
    said: str  # what is explained, as text
    measure: Measure = "log_probability"
    rather: tuple[Row, ...] = ()  # what it is compared with, where that is a text or label of its own
    rather_said: str | None = None
    fixed: frozenset[int] = field(default=frozenset())  # places that no weight is given to
    answer: tuple[int, ...] = ()  # tokens of an encoder-decoder's answer

    def units(self, *, words: bool) -> list[list[int]]:
        """The places that weights are given to, one list a weight; in the order of the text."""
        free = [at for at, span in enumerate(self.spans) if span is not None and at not in self.fixed]
        if not words:
            return [[at] for at in free]
        owners = assign([self.spans[at] or (0, 0) for at in free], segments(self.text))
        groups: dict[int | None, list[int]] = {}
        for at, owner in zip(free, owners, strict=True):
            groups.setdefault(owner, []).append(at)
        return list(groups.values())
