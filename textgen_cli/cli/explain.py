"""How an explanation is told: its words in colours and its grid on a terminal, the same and more as a page.

Shared by generate and score. It knows which options speak of it, not how an explanation comes about.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgen_cli.cli.console import Output
from textgen_cli.config import BatchConfig, ExplainConfig
from textgen_cli.errors import UsageError
from textgen_cli.text import disk, explained

if TYPE_CHECKING:
    from textgen_cli.text.page import Block

MOST = 3_000_000  # attention weights of a page; with more, those of all heads are averaged


def check(config: ExplainConfig, batch: BatchConfig, html: Path | None, *, single: bool) -> None:
    """UsageError where an explanation is asked for and would not be seen; `single`: of one text, not of records.

    OutputError for a page that could not take its name, before anything is computed for it.
    """
    jsonl = batch.jsonl or batch.output is not None
    if config.explain is not None and not (jsonl or (single and (html or os.isatty(1)))):
        raise UsageError(
            "E-CONFLICT", "--explain", "needs JSONL output", hint="add --jsonl, -o FILE or --html FILE"
        )
    if html is not None and not single:
        raise UsageError("E-CONFLICT", "--html", "shows one text, not records")
    if html == Path("-"):
        raise UsageError("E-RANGE", "--html -", "is no file", hint="give it a name, such as page.html")
    if html is not None:
        disk.refuse_other(html)


def for_page(config: ExplainConfig, html: Path | None) -> ExplainConfig:
    """What a page needs: all layers and heads, to choose from."""
    chooses = html is not None and config.explain == "attention" and config.attention == "mean"
    return replace(config, attention="all") if chooses else config


def draw(explanation: dict[str, Any]) -> None:
    """Write it to the terminal."""
    from rich.console import Console

    from textgen_cli.cli import render
    from textgen_cli.text.sanitize import visible

    screen = Console()
    shade = render.colours(screen)
    Output().write(visible(explained.caption(explanation)) + "\n")
    if (heat := explained.heat(explanation)) is not None:
        pieces, scale, _ = heat
        for line in render.heat_map(pieces, scale, shade):
            screen.print(line)
        screen.print(render.legend(scale, shade))
    if (grid := explained.grid(explanation)) is not None:
        for line in render.grid(grid, screen.width, shade):
            screen.print(line, no_wrap=True, crop=True)
        screen.print(render.legend(grid.scale, shade))


def blocks(explanation: dict[str, Any]) -> "list[Block]":
    """It as parts of a page."""
    from textgen_cli.text import page

    found = [page.paragraph(explained.caption(explanation))]
    if (heat := explained.heat(explanation)) is not None:
        found.append(page.heat_map(*heat))
    if (grid := explained.grid(explanation)) is not None:
        layers = _fitting(explanation.get("layers"))
        found.append(page.attention(grid, layers) if layers else page.grid(grid))
    return found


def write_page(path: Path, title: str, explanations: Sequence[dict[str, Any]]) -> None:
    """A page with explanations under one another."""
    from textgen_cli.text import page

    parts = [block for one in explanations for block in blocks(one)]
    disk.write_whole(path, page.page(title, parts).encode())


def _fitting(layers: Any) -> Any:
    """Weights by layer and head, as many as a page can hold; None where there are none or far too many."""
    if not layers:
        return None
    size = sum(len(row) for row in layers[0][0])
    if len(layers) * len(layers[0]) * size <= MOST:
        return layers
    return [[_averaged(layer)] for layer in layers] if len(layers) * size <= MOST else None


def _averaged(heads: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    return [
        [sum(column) / len(heads) for column in zip(*rows, strict=True)] for rows in zip(*heads, strict=True)
    ]
