"""Figures as people read them: nested fields as names with values, numbers with six significant digits.

Knows neither terminal nor page, nor what the figures mean.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

NONE = "–"


def flat(figures: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of each figure, names of nested ones joined by points; lists of records are left out."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")
        elif not (isinstance(value, list) and value and isinstance(value[0], Mapping)):
            yield above + name, value


def shown(value: Any) -> str:
    """A value as text, not yet sanitised; what is no number stands as "–"."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else NONE
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return str(value)


def size(count: float) -> str:
    """`98.4 MB`: bytes as people read them."""
    return scaled(count, "B") if abs(count) >= 1000 else f"{count:.0f} B"


def scaled(number: float, unit: str = "") -> str:
    """`134.5 M`, `1.2 TFLOP`: a large number with the letter of its thousands; without a unit B is a billion."""
    billion = "G" if unit else "B"
    for letter, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), (billion, 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= scale * (1 - 5e-5):
            return f"{number / scale:.1f} {letter}{unit}"
    return f"{number:.6g} {unit}".rstrip()
