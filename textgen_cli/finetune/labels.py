"""Labels of texts, all of them taken together: names, several names each, or numbers on a scale.

Knows no rows and no files.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from textgen_cli.errors import InputError

LABEL_LIMIT = 10_000  # different labels of a classification
FEW = 10  # numbers with a fraction are classes up to this many different ones, beyond it a scale


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}" if value is not None else "null")


def name_of(label: Any) -> str:
    """A label's name: 3 and 3.0 are "3", true is "true"."""
    if isinstance(label, str):
        return label
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return json.dumps(label)


@dataclass
class Labels:
    """What the labels of all texts are together: one name each, several, or a number.

    The first row says whether they are lists. Numbers are values of a scale (regression) where one has a fraction and
    more than FEW are different; else they are names of classes. Numbers in CSV are read as such.
    """

    counts: Counter[str] = field(default_factory=Counter)
    lists: bool | None = None
    fractions: bool = False
    words: int = 0  # labels that are no numbers
    word: str = ""  # the first of them
    low: float = math.inf
    high: float = -math.inf

    def add(self, label: Any) -> str | None:
        """Count a row's label; a fact where it does not go with those before."""
        several = isinstance(label, list)
        if self.lists is None:
            self.lists = several
        if several != self.lists:
            return f"label is {kind_of(label)}, " + (
                "those before are not" if several else "those before are lists"
            )
        for one in label if several else [label]:
            self._add(one)
        return None

    def _add(self, one: Any) -> None:
        name, number = name_of(one), number_of(one)
        if number is None:
            self.words, self.word = self.words + 1, self.word or name
        else:
            self.fractions |= isinstance(one, float) or (isinstance(one, str) and "." in one)
            self.low, self.high = min(self.low, number), max(self.high, number)
        if len(self.counts) <= LABEL_LIMIT or name in self.counts:
            self.counts[name] += 1

    @property
    def problem(self) -> str:
        """A value of `problem_type`. InputError E-LABELS where they are neither classes nor a scale."""
        if self.lists:
            found = "multi_label_classification"
        elif self.fractions and len(self.counts) > FEW:
            if not self.words:
                return "regression"
            total = sum(self.counts.values())
            if self.words * 2 < total:
                fact = f"{self.words:,} of {total:,} labels are no numbers, such as {self.word[:40]!r}"
                raise InputError("E-LABELS", "data", fact)
            found = "single_label_classification"
        else:
            found = "single_label_classification"
        if len(self.counts) > LABEL_LIMIT:
            raise InputError("E-LABELS", "data", f"has more than {LABEL_LIMIT:,} different labels")
        return found


def number_of(label: Any) -> float | None:
    """The number a label is, also as CSV has it; None where it is a name."""
    if isinstance(label, bool):
        return None
    try:
        number = float(label)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def final_label(label: Any, problem: str) -> str | list[str] | float:
    """A row's label as `problem` has it."""
    if problem == "regression":
        number = number_of(label)
        assert number is not None  # `problem` says so only where all are numbers
        return number
    return [name_of(one) for one in label] if isinstance(label, list) else name_of(label)


LABEL_TYPES = {
    "regression": pa.float64(),
    "multi_label_classification": pa.list_(pa.string()),
    "single_label_classification": pa.string(),
}
