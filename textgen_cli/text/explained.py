"""An explanation as something to look at: a text with weights, and a grid of what goes with what. Plain values.

Knows neither terminal nor page, nor how an explanation comes about.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textgen_cli.text.figures import shown
from textgen_cli.text.heat import Piece, Scale, fitted, pieces

Explanation = Mapping[str, Any]

NAMES = {
    "gradient": "gradient × input",
    "integrated-gradients": "integrated gradients",
    "occlusion": "loss by leaving it out",
    "contrast": "contrastive gradient × input",
    "attention": "attention",
    "logit-lens": "probability",
}


@dataclass(frozen=True)
class Grid:
    """Rows and columns by name; of each cell what gives its colour, a note, and a text where it has one."""

    rows: Sequence[str]
    columns: Sequence[str]
    shades: Sequence[Sequence[float | None]]
    notes: Sequence[Sequence[str]]
    scale: Scale
    texts: Sequence[Sequence[str]] | None = None


def caption(explanation: Explanation) -> str:
    """What is explained, in a line."""
    said = f"why {explanation['target']!r}"
    if "contrast" in explanation:
        said += f" rather than {explanation['contrast']!r}"
    told = ""
    if "score" in explanation:
        told = f", {explanation['measure'].replace('_', ' ')} {shown(explanation['score'])}"
    which = {"all": " (mean)"}.get(explanation.get("attention", ""), f" ({explanation.get('attention')})")
    which = which if "attention" in explanation else ""
    return f"{said}: {NAMES[explanation['method']]}{which}{told}"


def heat(explanation: Explanation) -> tuple[list[Piece], Scale, list[str]] | None:
    """The text in pieces with their weights, what colours mean, and a note for each piece; None without weights."""
    weights = explanation.get("weights")
    if weights is None:
        return None
    tokens, offsets = explanation["tokens"], explanation["offsets"]
    spans = [None if span is None else (span[0], span[1]) for span in offsets]
    found: list[Piece] = []
    notes: list[str] = []
    for piece, own in pieces(explanation["text"], spans):
        known = [weights[at] for at in own if weights[at] is not None]
        found.append((piece, math.fsum(known) if known else None))
        notes.append("\n".join(f"{tokens[at]!r} {shown(weights[at])}" for at in own))
    name = NAMES[explanation["method"]]
    signed = explanation["method"] != "attention"
    return found, fitted((weight for _, weight in found), name, signed=signed), notes


def grid(explanation: Explanation) -> Grid | None:
    """What goes with what: attention, the steps of an answer, or what the layers said; None where there is no such."""
    if "matrix" in explanation:
        return attention(explanation, explanation["matrix"])
    steps = explanation.get("steps")
    if not steps:
        return None
    return _lens(steps) if "layers" in steps[0] else _steps(explanation, steps)


def attention(explanation: Explanation, matrix: Sequence[Sequence[float]]) -> Grid:
    """Who looks at whom; colours go by the square root, since a few places get most of it."""
    rows, columns = _named(explanation["queries"]), _named(explanation["tokens"])
    notes = [
        [f"{row} looks at {column}: {value:.4f}" for column, value in zip(columns, values, strict=True)]
        for row, values in zip(rows, matrix, strict=True)
    ]
    shades = [[math.sqrt(value) for value in values] for values in matrix]
    return Grid(rows, columns, shades, notes, Scale("square root of attention", "", 1.0))


def _named(tokens: Iterable[str]) -> list[str]:
    """Tokens as they stand in a table: a blank they begin with and line ends are seen."""
    return [("␣" + token[1:] if token.startswith(" ") else token).replace("\n", "↵") for token in tokens]


def _steps(explanation: Explanation, steps: Sequence[Mapping[str, Any]]) -> Grid:
    columns, rows = _named(explanation["tokens"]), _named(step["target"] for step in steps)
    notes = [
        [
            f"{column} for {row}: {shown(value)}"
            for column, value in zip(columns, step["weights"], strict=True)
        ]
        for row, step in zip(rows, steps, strict=True)
    ]
    weights = [step["weights"] for step in steps]
    scale = fitted((value for row in weights for value in row), NAMES[explanation["method"]], signed=True)
    return Grid(rows, columns, weights, notes, scale)


def _lens(steps: Sequence[Mapping[str, Any]]) -> Grid:
    layers = list(zip(*(step["layers"] for step in steps), strict=True))
    columns = _named(step["target"] for step in steps)
    notes = [
        [
            f"layer {number}: {cell['token']!r} {cell['probability']:.4f}\n{column} "
            f"{cell['target_probability']:.4f}, rank {cell['rank']}"
            for column, cell in zip(columns, row, strict=True)
        ]
        for number, row in enumerate(layers)
    ]
    return Grid(
        [f"layer {number}" for number in range(len(layers))],
        columns,
        [[cell["probability"] for cell in row] for row in layers],
        notes,
        Scale("probability", "", 1.0),
        [_named(cell["token"] for cell in row) for row in layers],
    )
