"""Minimal pairs: two texts that differ in one thing, and which of them a model holds to be likelier.

Owns the layouts in which pairs are published and what is summed up of them. Likelihoods come from the scorers.
"""

import difflib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from textgen_cli.errors import InputError, TextgenError
from textgen_cli.score.request import Asked, Figures, Scorer

Z95 = 1.959963984540054  # of a confidence interval of 95 %


@dataclass(frozen=True)
class Pair:
    """The two texts; where one of them is a stereotype it is the first."""

    first: str
    second: str
    category: str | None = None


def pair_of(fields: Mapping[str, Any]) -> Pair:
    """The pair of a record in any known layout; InputError E-FIELD where it has none, E-EMPTY for an empty text."""
    for layout in LAYOUTS.values():
        pair = layout(fields)
        if pair is not None:
            if not (pair.first and pair.second):
                raise InputError("E-EMPTY", "pair", "one of its texts is empty")
            return pair
    raise InputError("E-FIELD", "pair", f"is in no known layout ({', '.join(LAYOUTS)})")


def _crows(fields: Mapping[str, Any]) -> Pair | None:
    """CrowS-Pairs (Nangia et al. 2020): sent_more is the more stereotyping one, whatever the direction."""
    return _texts(fields, "sent_more", "sent_less", "bias_type")


def _stereoset(fields: Mapping[str, Any]) -> Pair | None:
    """An example of StereoSet (Nadeem et al. 2021): its stereotype and its anti-stereotype, behind their context."""
    found = fields.get("sentences")
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        return None
    by_label = {one.get("gold_label"): one.get("sentence") for one in found}
    context = fields.get("context")
    if isinstance(context, str) and "BLANK" not in context:  # a sentence to go on from, not one with a gap
        by_label = {label: f"{context} {said}" for label, said in by_label.items() if isinstance(said, str)}
    return _texts({**fields, **by_label}, "stereotype", "anti-stereotype", "bias_type")


def _named(fields: Mapping[str, Any]) -> Pair | None:
    return _texts(fields, "first", "second", "category")


def _blimp(fields: Mapping[str, Any]) -> Pair | None:
    """BLiMP (Warstadt et al. 2020): an acceptable sentence and one that is not."""
    return _texts(fields, "sentence_good", "sentence_bad", "UID")


def _two_columns(fields: Mapping[str, Any]) -> Pair | None:
    """A record of two fields, whatever their names."""
    if len(fields) != 2:
        return None
    first, second = fields
    return _texts(fields, first, second, "")


def _texts(fields: Mapping[str, Any], first: str, second: str, category: str) -> Pair | None:
    one, two = fields.get(first), fields.get(second)
    if not (isinstance(one, str) and isinstance(two, str)):
        return None
    kind = fields.get(category)
    return Pair(one, two, kind if isinstance(kind, str) else None)


LAYOUTS: dict[str, Callable[[Mapping[str, Any]], Pair | None]] = {
    "sent_more and sent_less": _crows,
    "sentences with gold_label": _stereoset,
    "sentence_good and sentence_bad": _blimp,
    "first and second": _named,
    "two columns": _two_columns,
}


def shared(first: Sequence[int], second: Sequence[int]) -> tuple[set[int], set[int]]:
    """Places in each whose tokens stand in both, by the longest matching blocks (Nangia et al. 2020).

    Where words change places, which of them count as moved depends on the order of the two; so both are told at once.
    """
    blocks = difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    return (
        {place for block in blocks for place in range(block.a, block.a + block.size)},
        {place for block in blocks for place in range(block.b, block.b + block.size)},
    )


@dataclass(frozen=True)
class PairScorer:
    """The likelihoods of both texts of a pair, and which is preferred."""

    scorer: Scorer

    def score(
        self, asked: Sequence[Asked], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Figures | TextgenError]]:
        """`log_likelihoods` (or `pseudo_log_likelihoods`) of both, `prefers`: first, second or null, `category`."""
        by_index = {one.index: one for one in asked}
        single: list[Asked] = []
        for one in asked:
            assert one.pair is not None
            for side, text in enumerate((one.pair.first, one.pair.second)):
                single.append(replace(one, index=2 * one.index + side, text=text))
        known: dict[int, Figures | TextgenError] = {}
        finished = {2 * index + side for index in done for side in (0, 1)}
        for number, found in self.scorer.score(single, finished):
            index, other = number // 2, known.pop(number ^ 1, None)
            if other is None:
                known[number] = found
                continue
            both = (found, other) if number % 2 == 0 else (other, found)
            yield index, _figures(by_index[index], both)


def _figures(asked: Asked, both: Sequence[Figures | TextgenError]) -> Figures | TextgenError:
    told: list[Figures] = []
    for found in both:
        if isinstance(found, TextgenError):
            return found
        told.append(found)
    name = "log_likelihood" if "log_likelihood" in told[0] else "pseudo_log_likelihood"
    first, second = (found[name] for found in told)
    prefers = None if first == second else "first" if first > second else "second"
    tokens = sum(one["tokens"] for one in told)
    compared: Figures = {f"{name}s": [first, second], "tokens": tokens, "prefers": prefers}
    if asked.pair is not None and asked.pair.category is not None:
        compared["category"] = asked.pair.category
    return compared | {name: told[0][name] for name in ("bos", "pll", "unit") if name in told[0]}


class Preferences:
    """How often the first text of a pair is preferred, in all and by category; a tie counts as half."""

    def __init__(self) -> None:
        self.counts: dict[str | None, list[float]] = {}  # category -> pairs, preferences

    def add(self, line: Mapping[str, Any], right: Any) -> bool:
        if "prefers" in line:
            value = {"first": 1.0, "second": 0.0}.get(line["prefers"], 0.5)
            for category in {None, line.get("category")}:
                counted = self.counts.setdefault(category, [0, 0.0])
                counted[0] += 1
                counted[1] += value
        return True

    def figures(self) -> dict[str, Any]:
        """`preference` with `pairs` and the bounds of its 95 % interval; `categories`, each the same."""
        if not self.counts:
            return {}
        named = sorted(name for name in self.counts if name is not None)
        found = _rate(*self.counts[None])
        return (
            found
            if not named
            else {**found, "categories": {name: _rate(*self.counts[name]) for name in named}}
        )


def _rate(pairs: float, preferred: float) -> dict[str, Any]:
    """A rate and its interval by Wilson's score (1927), which holds for few pairs and rates near 0 and 1 too."""
    rate, square = preferred / pairs, Z95**2
    middle = (rate + square / (2 * pairs)) / (1 + square / pairs)
    half = Z95 / (1 + square / pairs) * math.sqrt(rate * (1 - rate) / pairs + square / (4 * pairs**2))
    return {
        "pairs": int(pairs),
        "preference": rate,
        "low": max(0.0, middle - half),
        "high": min(1.0, middle + half),
    }
