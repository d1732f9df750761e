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
