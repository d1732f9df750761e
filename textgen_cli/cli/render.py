"""How results look on a terminal: text in colours, tables, names with values, small curves.

It makes lines and does not write them. Everything it takes is sanitised and no markup in it is interpreted.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.style import Style
from rich.text import Text

from textgen_cli.text.explained import Grid
from textgen_cli.text.figures import NONE, flat, shown
from textgen_cli.text.heat import BLUE, ORANGE, STEPS, Piece, Ramp, Scale
from textgen_cli.text.sanitize import Sanitizer, visible

GAP = "  "
LEAST_TEXT = 16  # cells of a line that stay for its text
LOOKED_AT = 4  # characters of a text that are looked at for each cell it may fill

# --- text in colours


def colours(screen: Console) -> bool:
    """Whether this terminal shows colours and nobody forbade them."""
    return screen.is_terminal and screen.color_system is not None and not screen.no_color


# A terminal may be dark or light and does not say which. So lightness stays between the two and chroma tells the
# weight: the first steps are not shown, the next colour the letters, the rest the background.
BARE, LETTERS = 2, 5
INK = Ramp((0.62, 0.07), (0.62, 0.17), "")
PAPER = Ramp((0.74, 0.01), (0.70, 0.17), "#000000")


@cache
def _style(step: int) -> Style:
    if abs(step) <= BARE:
        return Style.null()
    ramp = INK if abs(step) <= LETTERS else PAPER
    colour = ramp.colours(ORANGE if step > 0 else BLUE)[abs(step) - 1]
    return Style(color=colour) if ramp is INK else Style(color=ramp.ink, bgcolor=colour)


def heat_map(pieces: Iterable[Piece], scale: Scale, coloured: bool) -> Iterator[Text]:
    """The lines of a text, the background of each piece as strong as its weight.

    Not `coloured`: no style at all; what weighs half the scale or more has its weight in brackets behind it.
    """
    sanitizer = Sanitizer()
    line = Text()
    for text, weight in pieces:
        step = scale.step(weight)
        drawn = sanitizer.feed(text)
        if text and not coloured and weight is not None and 2 * abs(step) >= STEPS:
            word = drawn.rstrip()
            drawn = f"{word}[{weight:.2g}]{drawn[len(word) :]}"
        for number, part in enumerate(drawn.split("\n")):
            if number:
                # A line end that is a surprise is seen.
                if coloured and abs(step) > BARE and not drawn.strip():
                    line.append("↵", _style(step))
                yield line
                line = Text()
            bare = part.lstrip(" ")
            blanks = part[: len(part) - len(bare)] if bare else ""
            line.append(blanks)
            line.append(part[len(blanks) :], _style(step) if coloured and step else None)
    yield line


def legend(scale: Scale, coloured: bool) -> Text:
    """One line that says what the colours of a heat map mean."""
    what = visible(f"{scale.name} in {scale.unit}" if scale.unit else scale.name)
    if not coloured:
        return Text(f"[{what}, where it is {'±' if scale.signed else ''}{scale.high / 2:g} or more]")
    line = Text(f"{what}  ")
    for step in range(-STEPS if scale.signed else 0, STEPS + 1):
        mark = {-STEPS: f"−{scale.high:g} ", 0: " 0 " if scale.signed else "0 "}.get(step, "")
        line.append(mark)
        line.append("x" if step else "", _style(step) if step else None)
    return line.append(f" {scale.high:g}" + ("" if scale.signed else "+"))


# --- grids

CELL = 8  # cells of a text in a grid
NARROW = 2  # cells of a colour alone
SHADES = " ·░▒▓█"  # where there is no colour


def grid(found: Grid, width: int, coloured: bool) -> Iterator[Text]:
    """The lines of a grid: columns by the last digit of their number, or by name where cells hold text.

    A line is at most `width` cells; columns that have no room are left out, and the last line says so.
    """
    size, gap = (CELL, " ") if found.texts else (NARROW, "")
    same = list(found.rows) == list(found.columns)
    names = [clipped(name, LEAST_TEXT) for name in found.rows]
    if same and not found.texts:
        names = [f"{at % 100:>2} {name}" for at, name in enumerate(names)]
    indent = max(map(cell_len, names), default=0) + len(GAP)
    count = min(len(found.columns), max(1, (width - indent) // (size + len(gap))))
    if not (same or found.texts):
        yield from _numbered(found.columns[:count], width)
    heads = [
        _fill(clipped(name, size), size, True) if found.texts else f"{at % 10:>{size}}"
        for at, name in enumerate(found.columns[:count])
    ]
    yield Text(" " * indent + gap.join(heads))
    texts = found.texts or [[""] * len(found.columns)] * len(found.rows)
    for name, shades, own in zip(names, found.shades, texts, strict=True):
        line = Text(_fill(name, indent, True))
        for shade, text in zip(shades[:count], own[:count], strict=True):
            step = found.scale.step(shade)
            drawn = _fill(clipped(text, size), size, True) if found.texts else _shade(step, coloured)
            line.append(drawn, _style(step) if coloured and step else None)
            line.append(gap)
        yield line
    if count < len(found.columns):
        yield Text(f"{len(found.columns) - count} more columns have no room here; --html shows all")


def _numbered(names: Sequence[str], width: int) -> Iterator[Text]:
    """What the numbers of columns stand for, as lines of at most `width` cells."""
    line = ""
    for at, name in enumerate(names):
        entry = f"{at % 100} {clipped(name, LEAST_TEXT)}"
        if line and cell_len(line) + len(GAP) + cell_len(entry) > width:
            yield Text(line)
            line = ""
        line = f"{line}{GAP}{entry}" if line else entry
    yield Text(line)


def _shade(step: int, coloured: bool) -> str:
    if coloured and abs(step) > LETTERS:
        return " " * NARROW
    mark = SHADES[math.ceil(abs(step) / STEPS * (len(SHADES) - 1))]
    return (("−" if step < 0 and not coloured else mark) + mark) if step else " ·"


# --- many results


@dataclass(frozen=True)
class Column:
    """How a figure is shown in a table."""

    head: str
    width: int  # cells
    decimals: int = 0


COLUMNS = {
    "tokens": Column("tokens", 7),
    "log_likelihood": Column("log-lik.", 10, 2),
    "pseudo_log_likelihood": Column("pseudo-LL", 10, 2),
    "perplexity": Column("perplexity", 10, 2),
    "pseudo_perplexity": Column("pseudo-ppl", 10, 2),
    "bits_per_byte": Column("bits/byte", 9, 3),
    "bits_per_byte_difference": Column("Δ bits/byte", 11, 3),
    "kl_divergence": Column("KL", 8, 4),
    "value": Column("value", 10, 4),
    "prediction": Column("prediction", 16),
    "labels": Column("p", 6, 3),
    "entities": Column("entities", 28),
}
_BLANKS = re.compile(r"[ \t\n]+")


class Table:
    """The lines of a table of results, made as the results come.

    The figures stand first and the text last: so nothing is moved by wide characters whose width terminals do not
    agree on, nor by letters that run from right to left. Columns are those of COLUMNS that the first result has.
    """

    def __init__(self, width: int, field: str = "text") -> None:
        self._width, self._field = width, field
        self._names: list[str] = []

    def lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        """The lines of one result, without line ends; those of the head before the first that has figures."""
        error = result.get("error")
        if not self._names and error is None:
            self._names = self._chosen(result)
            heads = [_fill(COLUMNS[name].head, COLUMNS[name].width, _is_text(name)) for name in self._names]
            yield cut(GAP.join([*heads, clipped(self._field, self._width)]), self._width)
            yield "─" * self._width
        if error is None:
            figures = [_cell(name, result) for name in self._names]
        else:
            figures = [self._failure(error)]
        room = self._width - sum(cell_len(figure) + len(GAP) for figure in figures)
        text = str(result.get(self._field, result.get("prompt", "")))
        yield cut(GAP.join([*figures, clipped(text, room)]), self._width)

    def _chosen(self, result: Mapping[str, Any]) -> list[str]:
        names = [name for name in COLUMNS if name in result]
        while len(names) > 1 and self._width - _taken(names) < LEAST_TEXT:
            names.pop()
        return names

    def _failure(self, error: Mapping[str, Any]) -> str:
        """What went wrong, as wide as the figures are."""
        width = _taken(self._names) - len(GAP) if self._names else self._width - LEAST_TEXT - len(GAP)
        return _fill(clipped(f"{error.get('code')}: {error.get('message')}", width), width, True)


def _taken(names: Sequence[str]) -> int:
    return sum(COLUMNS[name].width + len(GAP) for name in names)


def _is_text(name: str) -> bool:
    return name in ("prediction", "entities")


def _cell(name: str, result: Mapping[str, Any]) -> str:
    """A figure as wide as its column. A field of the input may have a figure's name: nothing is taken for granted."""
    value, column = result.get(name), COLUMNS[name]
    if name == "labels" and isinstance(value, dict):
        predicted = result.get("prediction")
        value = value.get(predicted) if isinstance(predicted, str) else None
    if isinstance(value, list):
        value = ", ".join(map(_item, value))
    drawn = value if isinstance(value, str) else _number(value, column)
    return _fill(clipped(drawn, column.width), column.width, _is_text(name))


def _item(item: Any) -> str:
    return f"{item.get('text', '?')} {item.get('type', '?')}" if isinstance(item, dict) else str(item)


def _number(value: Any, column: Column) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, float) or not math.isfinite(value):
        return NONE
    drawn = f"{value:.{column.decimals}f}"
    return drawn if len(drawn) <= column.width else f"{value:.{max(column.width - 7, 0)}e}"


def _fill(text: str, width: int, left: bool) -> str:
    blanks = " " * max(width - cell_len(text), 0)
    return text + blanks if left else blanks + text


def clipped(text: str, width: int) -> str:
    """The text on one line of at most `width` cells, sanitised; one that is cut ends with "…"."""
    if width < 1:
        return ""
    drawn = visible(_BLANKS.sub(" ", text[: LOOKED_AT * width + 1]).strip(" "))
    if cell_len(drawn) <= width and len(text) <= LOOKED_AT * width:
        return drawn
    return set_cell_size(drawn, min(cell_len(drawn), width - 1)).rstrip(" ") + "…"


def cut(line: str, width: int) -> str:
    """A line that is already safe to show, of at most `width` cells."""
    line = line.rstrip(" ")
    if cell_len(line) <= width:
        return line
    return set_cell_size(line, width - 1) + "…" if width > 0 else ""


# --- names and values


def pairs(figures: Mapping[str, Any]) -> Iterator[str]:
    """Lines "name  value", nested names joined by points, numbers under one another at their decimal point.

    Lists of records (tokens, words, entities, choices) are left out: they are `listing`s.
    """
    rows = [(visible(name), _value(value)) for name, value in flat(figures)]
    names = max((cell_len(name) for name, _ in rows), default=0)
    before = max((_before_point(value) for _, value in rows), default=0)
    for name, value in rows:
        blanks = before - _before_point(value) if _is_number(value) else 0
        yield _fill(name, names, True) + GAP + " " * blanks + value


def aligned(rows: Sequence[tuple[str, str]], width: int) -> Iterator[str]:
    """Lines "name  value" of at most `width` cells, the values under one another; blanks before a value stay."""
    drawn = [(visible(name), visible(value)) for name, value in rows]
    names = max((cell_len(name) for name, _ in drawn), default=0)
    for name, value in drawn:
        yield cut(_fill(name, names, True) + GAP + value, width)


def _value(value: Any) -> str:
    return _BLANKS.sub(" ", visible(shown(value)))


def _is_number(value: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?(e[+-]\d+)?|–", value) is not None


def _before_point(value: str) -> int:
    return len(re.split(r"[.e]", value)[0]) if _is_number(value) else 0


def listing(entries: Sequence[Mapping[str, Any]], width: int) -> Iterator[str]:
    """A table of a few records alike, each column as wide as it needs to be; a line is at most `width` cells.

    Columns that have no room stand below, behind the first once more: a figure that is cut looks like another one.
    """
    if not entries:
        return
    names = [name for name, value in entries[0].items() if not isinstance(value, list | dict)]
    first, *others = [_column(name, entries) for name in names]
    widest = max((cell_len(column[0]) for column in others), default=0)
    room = max(width - widest - len(GAP), CELL)
    first = [cut(cell, room) for cell in first] if cell_len(first[0]) > room else first
    first = [_fill(cell, max(map(cell_len, first)), True) for cell in first]
    for number, band in enumerate(_bands(others, width - cell_len(first[0]))):
        if number:
            yield ""
        yield from (cut(GAP.join(row), width) for row in zip(first, *band, strict=True))


def _column(name: str, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Head and cells of a column, all as wide as the widest; text stands on the left."""
    cells = [_value(name), *(_value(entry.get(name)) for entry in entries)]
    left = any(isinstance(entry.get(name), str) for entry in entries)
    width = max(map(cell_len, cells))
    return [_fill(cell, width, left) for cell in cells]


def _bands(columns: Sequence[list[str]], width: int) -> list[list[list[str]]]:
    """The columns in groups, each with its gaps at most `width` cells, or of one column."""
    bands: list[list[list[str]]] = [[]]
    taken = 0
    for column in columns:
        wants = len(GAP) + cell_len(column[0])
        if bands[-1] and taken + wants > width:
            bands.append([])
            taken = 0
        bands[-1].append(column)
        taken += wants
    return bands


# --- curves

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as bars between their least and their greatest; a blank for what is no number."""
    last = list(values)[-width:] if width > 0 else []
    known = [value for value in last if math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    unit = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((v - low) / unit)] if math.isfinite(v) else " " for v in last)
