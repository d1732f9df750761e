"""Heat: a text cut into pieces with a weight each, and the colours that weights have.

One hue from grey to full for weights from 0 up; with signs a second hue for those below 0. Knows neither terminal nor
page: cli/render.py and text/page.py draw.
"""

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textgen_cli.text.sanitize import ZWJ
from textgen_cli.text.segments import Span

STEPS = 10  # colours on either side of 0
FULL = {
    "nats": 10.0,
    "bits": 15.0,
}  # surprisal that has the full colour: the same in every text, so colours compare
ORANGE, BLUE = 55.0, 255.0  # hues in degrees that most kinds of colour blindness tell apart

Piece = tuple[str, float | None]  # a part of a text and its weight; None: it has none


@dataclass(frozen=True)
class Scale:
    """What the colours mean."""

    name: str  # what is measured
    unit: str  # "" where it has none
    high: float  # the weight, and with signs its negative, from which on the colour is full
    signed: bool = False

    def step(self, weight: float | None) -> int:
        """The colour of a weight: 0 for none, up to STEPS, and down to -STEPS with signs."""
        if weight is None or math.isnan(weight):
            return 0
        if not self.signed:
            weight = max(weight, 0.0)
        return math.trunc(max(-1.0, min(weight / self.high, 1.0)) * STEPS)


def surprisal(unit: str) -> Scale:
    """The scale of surprisal, -log p, in nats or bits."""
    return Scale("surprisal", unit, FULL[unit])


def fitted(weights: Iterable[float | None], name: str, unit: str = "", *, signed: bool = False) -> Scale:
    """A scale whose full colour is the largest weight, rounded up to two digits."""
    high = max((abs(w) for w in weights if w is not None and math.isfinite(w)), default=0.0)
    if not high:
        return Scale(name, unit, 1.0, signed)
    rounded = float(f"{high:.2g}")
    if rounded < high:
        rounded = float(f"{rounded + 10.0 ** (math.floor(math.log10(high)) - 1):.2g}")
    return Scale(name, unit, rounded, signed)


Entry = Mapping[str, Any]  # one of `token_scores` or `word_scores`


def by_surprisal(text: str, entries: Sequence[Entry]) -> list[tuple[str, float | None, list[Entry]]]:
    """The text in pieces, each with its surprisal and the entries it is made of; joined they give the text.

    Entries that share characters, or whose characters are drawn as one (an emoji of several tokens), share a piece,
    whose surprisal is their sum. Without offsets the pieces are the tokens as they are spelled.
    """
    if entries and entries[0]["start"] is None:
        return [(entry["token"], _surprisal([entry]), [entry]) for entry in entries]
    spans = [(entry["start"], entry["end"]) for entry in entries]
    parts = ((piece, [entries[at] for at in own]) for piece, own in pieces(text, spans))
    return [(piece, _surprisal(own) if own else None, own) for piece, own in parts]


def pieces(text: str, spans: Sequence[Span | None]) -> list[tuple[str, list[int]]]:
    """The text in pieces, each with the numbers of the spans it is made of (none between them); joined they give it."""
    cuts: list[tuple[int, int, list[int]]] = []
    for number, span in enumerate(spans):
        if span is None:
            continue
        start, end = span
        if cuts and (start < cuts[-1][1] or start == end or _continues(text, start)):
            first, last, shared = cuts[-1]
            cuts[-1] = first, max(last, end), [*shared, number]
        elif start < end:
            cuts.append((start, end, [number]))
    found: list[tuple[str, list[int]]] = []
    at = 0
    for start, end, own in cuts:
        if at < start:
            found.append((text[at:start], []))
        found.append((text[start:end], own))
        at = end
    if at < len(text):
        found.append((text[at:], []))
    return found


def _continues(text: str, at: int) -> bool:
    """Whether the character there is drawn together with the one before it."""
    joined = at > 0 and ZWJ in text[at - 1 : at + 1]
    return joined or unicodedata.category(text[at])[0] == "M"


def _surprisal(entries: Sequence[Entry]) -> float | None:
    logs = [entry.get("log_probability", entry.get("log_likelihood")) for entry in entries]
    known = [value for value in logs if value is not None]
    return max(-math.fsum(known), 0.0) if known else None


# --- colours

Point = tuple[float, float]  # lightness and chroma in Oklch, where equal distances look equal


@dataclass(frozen=True)
class Ramp:
    """The backgrounds of a scale, from the weakest to the full one, and the text that is read on all of them."""

    weak: Point
    full: Point
    ink: str

    def colours(self, hue: float) -> list[str]:
        """STEPS colours as #rrggbb."""
        (l0, c0), (l1, c1) = self.weak, self.full
        shares = [step / (STEPS - 1) for step in range(STEPS)]
        return [oklch(l0 + (l1 - l0) * share, c0 + (c1 - c0) * share, hue) for share in shares]


LIGHT = Ramp((0.975, 0.015), (0.78, 0.14), "#1b1b1b")
DARK = Ramp((0.26, 0.02), (0.52, 0.12), "#f0f0f0")


def oklch(lightness: float, chroma: float, hue: float) -> str:
    """A colour of the Oklch space (hue in degrees) as #rrggbb; what a screen cannot show is cut off."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    return "#" + "".join(f"{round(255 * _gamma(min(max(part, 0.0), 1.0))):02x}" for part in linear)


def _gamma(linear: float) -> float:
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
