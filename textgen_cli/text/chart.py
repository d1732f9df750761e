"""Curves over steps as the markup of one SVG picture: axes, lines, a legend. Plain numbers in, text out.

It loads nothing and runs nothing; colours and letters come from the page's style. Knows nothing of training.
"""

import html
import math
from collections.abc import Mapping, Sequence

from textgen_cli.text.sanitize import visible

Points = Sequence[tuple[float, float]]  # (x, y) in the order of x

WIDTH, HEIGHT = 480, 220  # of the whole picture; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 28, 26  # around the curves
MOST = 300  # points of a line; more are averaged
MARKED = 24  # points of a line that are few enough to be seen one by one
TICKS = 4  # at least so many intervals on an axis
LINES = 2  # colours the page's style has for lines

STYLE = """
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(22rem,100%),1fr));gap:1rem}
svg{width:100%;height:auto;font-size:11px}
svg text{fill:var(--soft)}
svg .grid{stroke:var(--line)}
svg polyline{fill:none;stroke-width:1.6;stroke-linejoin:round}
svg .l0{stroke:#3987d5}svg .l1{stroke:#e0762f}
svg circle.l0,svg rect.l0{fill:#3987d5}svg circle.l1,svg rect.l1{fill:#e0762f}
"""


def chart(curves: Mapping[str, Points]) -> str:
    """The curves by their names in one picture over a common x; points that are no numbers are left out.

    "" where fewer than two points are left in all.
    """
    kept = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in curves.items()}
    every = [point for points in kept.values() for point in points]
    if len(every) < 2:
        return ""
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    xs = nice(left, right, whole=True)
    ys = nice(min(y for _, y in every), max(y for _, y in every))
    place = _Place((left, right) if left < right else (xs[0], xs[-1]), (ys[0], ys[-1]))
    parts = [_axes(place, xs, ys), _names(list(kept))]
    parts += [_line(thinned(points), number % LINES, place) for number, points in enumerate(kept.values())]
    label = _safe(", ".join(kept))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def nice(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers at even distances, of which the first is at most `low` and the last at least `high`."""
    if high <= low:
        apart = abs(low) / 2 or 1.0
        low, high = (low, low + 1) if whole else (low - apart, high + apart)
    rough = (high - low) / TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most MOST points: the means of neighbours where there are more; the first and the last stay."""
    inner = points[1:-1]
    if len(points) <= MOST:
        return list(points)
    size = math.ceil(len(inner) / (MOST - 2))
    groups = [inner[start : start + size] for start in range(0, len(inner), size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [points[0], *means, points[-1]]


class _Place:
    """From values to places in the picture."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        self.xs, self.ys = xs, ys

    def x(self, value: float) -> float:
        return LEFT + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.ys[0]) / (self.ys[1] - self.ys[0]) * (HEIGHT - TOP - BOTTOM)


def _axes(place: _Place, xs: Sequence[float], ys: Sequence[float]) -> str:
    parts = []
    for value in ys:
        y = place.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in xs:
        x = place.x(value)
        if LEFT - 1 <= x <= WIDTH - RIGHT + 1:
            anchor = "end" if x > WIDTH - 4 * RIGHT else "middle"
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{_number(value)}</text>')
    return "".join(parts)


def _number(value: float) -> str:
    return "0" if abs(value) < 1e-300 else f"{value:,.10g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"


def _names(names: Sequence[str]) -> str:
    """What each line is, above the curves."""
    parts, at = [], LEFT
    for number, name in enumerate(names):
        parts.append(f'<rect class="l{number % LINES}" x="{at}" y="10" width="12" height="3"/>')
        parts.append(f'<text x="{at + 18}" y="15">{_safe(name)}</text>')
        at += 40 + 7 * len(name)
    return "".join(parts)


def _line(points: Points, colour: int, place: _Place) -> str:
    spots = [(place.x(x), place.y(y)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    line = f'<polyline class="l{colour}" points="{path}"/>'
    if len(points) > MARKED:
        return line
    marks = zip(spots, points, strict=True)
    return line + "".join(
        f'<circle class="l{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{step:g}: {value:.6g}</title></circle>'
        for (x, y), (step, value) in marks
    )


def _safe(text: str) -> str:
    return html.escape(visible(text))
