"""How results look: coloured text, tables whose figures stand in line, names with values."""

import io
import math
import re
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parts.contrast import contrast
from rich.cells import cell_len
from rich.console import Console

from textgen_cli.cli import render
from textgen_cli.text.heat import BLUE, ORANGE, Piece, Scale, surprisal
from textgen_cli.text.sanitize import visible

NATS = surprisal("nats")
SIGNED = Scale("attribution", "", 2.0, signed=True)
PIECES: list[Piece] = [
    ("The", None),
    (" ox", 9.5),
    (" [b]is\x1b[2J", 4.0),
    (" on", 0.5),
    ("\n", 10.0),
    ("x", -3.0),
]


def screen(**variables: str) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "xterm"} | variables)


def shown(console: Console, pieces: list[Piece], scale: Scale = NATS) -> str:
    for line in render.heat_map(pieces, scale, render.colours(console)):
        console.print(line)
    console.print(render.legend(scale, render.colours(console)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_words_are_coloured_by_weight() -> None:
    text = shown(screen(COLORTERM="truecolor"), PIECES)
    full, letters = render.PAPER.colours(ORANGE), render.INK.colours(ORANGE)
    red, green, blue = (int(full[8][at : at + 2], 16) for at in (1, 3, 5))
    assert f"The \x1b[38;2;0;0;0;48;2;{red};{green};{blue}mox\x1b[0m \x1b[38;2;" in text
    red, green, blue = (int(letters[3][at : at + 2], 16) for at in (1, 3, 5))
    assert f"\x1b[38;2;{red};{green};{blue}m[b]is\\x1B[2J\x1b[0m on\x1b" in text
    assert re.search(r"m↵\x1b\[0m\nx\n", text)
    assert re.sub(r"\x1b\[[0-9;]*m", "", text).endswith("surprisal in nats  0 xxxxxxxxxx 10+\n")


def test_both_sides_of_a_signed_scale() -> None:
    console = screen(COLORTERM="truecolor")
    text = shown(console, [("a", -2.0), ("b", 2.0)], SIGNED)
    codes = re.findall(r"48;2;(\d+);(\d+);(\d+)ma|48;2;(\d+);(\d+);(\d+)mb", text)
    cold, warm = [tuple(map(int, filter(None, code))) for code in codes]
    assert cold[2] > cold[0] and warm[0] > warm[2]
    assert "attribution  −2 xxxxxxxxxx 0 xxxxxxxxxx 2" in re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("plain", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_without_colours_there_are_numbers_and_no_escape_codes(plain: dict[str, str]) -> None:
    assert shown(screen(**plain), PIECES) == (
        "The ox[9.5] [b]is\\x1B[2J on[10]\nx\n[surprisal in nats, where it is 5 or more]\n"
    )
    assert "a[-1.5] b[1] c\n[attribution, where it is ±1 or more]" in shown(
        screen(**plain), [("a", -1.5), (" b", 1.0), (" c", 0.9)], SIGNED
    )


@pytest.mark.parametrize("hue", [ORANGE, BLUE])
def test_letters_are_read_on_dark_and_light_terminals(hue: float) -> None:
    inks, papers = render.INK.colours(hue)[render.BARE :], render.PAPER.colours(hue)[render.LETTERS :]
    assert min(contrast(paper, render.PAPER.ink) for paper in papers) >= 7
    assert min(contrast(ink, page) for ink in inks for page in ("#ffffff", "#1e1e1e")) >= 3


@given(st.lists(st.tuples(st.text(), st.none() | st.floats(allow_infinity=False)), max_size=8), st.booleans())
def test_a_heat_map_adds_line_end_marks_only(pieces: list[Piece], coloured: bool) -> None:
    scale = NATS if coloured else Scale("x", "", math.inf)
    lines = [line.plain for line in render.heat_map(pieces, scale, coloured)]
    text = visible("".join(text for text, _ in pieces))
    assert [line.replace("↵", "") for line in lines] == text.replace("↵", "").split("\n")


FIGURES = {
    "tokens": 12,
    "log_likelihood": -45.125,
    "perplexity": 43.0,
    "bits_per_byte": 1.2345,
    "unit": "nats",
}


def test_a_table_grows_line_by_line() -> None:
    table = render.Table(60)
    assert list(table.lines({"id": 1, "text": "One  two\nthree", **FIGURES})) == [
        " tokens    log-lik.  perplexity  bits/byte  text",
        "─" * 60,
        "     12      -45.12       43.00      1.234  One two three",
    ]
    long = {"text": "words " * 100, **FIGURES, "perplexity": 1e30, "bits_per_byte": None}
    assert list(table.lines(long)) == ["     12      -45.12   1.000e+30          –  words words wor…"]
    error = {"code": "E-CONTEXT", "message": "9,000 tokens"}
    assert list(table.lines({"text": "x", "error": error})) == [
        "E-CONTEXT: 9,000 tokens                     x"
    ]
    assert list(table.lines({"text": "\x1b[2J[b]\r", "tokens": 1})) == [
        "      1           –           –          –  \\x1B[2J[b]\\x0D"
    ]


def test_columns_follow_the_figures() -> None:
    table = render.Table(80)
    head, _, line = table.lines(
        {"text": "good", "prediction": "pos", "labels": {"pos": 0.9375, "neg": 0.0625}}
    )
    assert (head, line) == ("prediction             p  text", "pos                0.938  good")
    several = {"prediction": ["a", "b"], "labels": {"a": 0.9, "b": 0.8}, "text": ""}
    assert next(table.lines(several)).rstrip() == "a, b                   –"
    table = render.Table(80)
    *_, line = table.lines({"text": "Ann", "entities": [{"text": "Ann", "type": "PER", "start": 0}]})
    assert line == "Ann PER" + " " * 23 + "Ann"


def test_fields_of_the_input_that_are_named_like_figures() -> None:
    odd = {"text": "x", "tokens": 10**400, "value": 7, "labels": ["a"], "entities": [{"start": 0}, "\x07"]}
    _, _, line = render.Table(100).lines(odd)
    assert line.split() == ["100000…", "7", "a", "?", "?,", "\\x07", "x"]


def test_names_are_sanitised_too() -> None:
    assert next(render.Table(80, "a\x1b").lines({"a\x1b": "x", **FIGURES})).endswith("  a\\x1B")
    assert next(render.listing([{"a\x1b": "x"}], 80)) == "a\\x1B"
    assert render.legend(Scale("a\x1b", "\x07", 1.0), True).plain.startswith("a\\x1B in \\x07  0 ")


def test_an_error_may_come_first() -> None:
    table = render.Table(60)
    [line] = table.lines({"text": "x", "error": {"code": "E-JSON", "message": "m" * 99}})
    assert line == "E-JSON: " + "m" * 33 + "…" + "  x"
    assert len(list(table.lines({"text": "x", **FIGURES}))) == 3


@pytest.mark.parametrize("width", [0, 1, 10, 40, 80, 200])
def test_no_line_is_wider_than_the_screen(width: int) -> None:
    table = render.Table(width)
    texts = [
        "日本語" * 99,
        "مرحبا بالعالم " * 30,
        "👩‍🚀👍🏽" * 80,
        "e\u0301" * 300,
        "\u202e" * 300,
        "a" * 300,
        "",
    ]
    for text in texts:
        for line in table.lines({"text": text, **FIGURES}):
            assert cell_len(line) <= width


@given(st.text(max_size=60), st.integers(1, 30))
def test_clipped(text: str, width: int) -> None:
    line = render.clipped(text, width)
    assert cell_len(line) <= width
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in line)
    assert visible(line) == line


def test_wide_characters_take_two_cells() -> None:
    assert render.clipped("日本語日本語", 12) == "日本語日本語"
    assert render.clipped("日本語日本語", 8) == "日本語…"
    assert render.clipped("日本語日本語", 7) == "日本語…"
    assert render.clipped("e\u0301e\u0301e\u0301", 3) == "e\u0301e\u0301e\u0301"


def test_pairs_stand_at_their_decimal_points() -> None:
    values = {
        "tokens": 1200, "log_likelihood": {"mean": -3.25, "standard_error": 0.0123456789}, "perplexity": 1e30,
        "bos": True, "unit": "nats", "none": None, "bad\x1b": math.nan, "token_scores": [{"token": "a"}],
        "tags": ["a", "b"],
    }  # fmt: skip
    assert list(render.pairs(values)) == [
        "tokens                         1200",
        "log_likelihood.mean              -3.25",
        "log_likelihood.standard_error     0.0123457",
        "perplexity                        1e+30",
        "bos                            true",
        "unit                           nats",
        "none                              –",
        "bad\\x1B                           –",
        "tags                           a, b",
    ]
    assert list(render.pairs({})) == []


def test_a_listing_is_as_wide_as_it_needs_to_be() -> None:
    entries: list[dict[str, Any]] = [
        {"text": "日本", "type": "LOC", "score": 0.987654321, "top": []},
        {"text": "Ann\x07", "type": "PER", "score": None},
    ]
    assert list(render.listing(entries, 80)) == [
        "text     type     score",
        "日本     LOC   0.987654",
        "Ann\\x07  PER          –",
    ]
    assert list(render.listing([], 80)) == []


def test_a_listing_cuts_no_figure() -> None:
    """What has no room beside the rest stands below, and the text gives way first."""
    entries = [{"text": "b" * 30, "tokens": 12, "log_likelihood": -33.9168, "p": 0.25}]
    assert list(render.listing(entries, 25)) == [
        "text       tokens",
        "bbbbbbbb…      12",
        "",
        "text       log_likelihood",
        "bbbbbbbb…        -33.9168",
        "",
        "text          p",
        "bbbbbbbb…  0.25",
    ]
    assert [line for line in render.listing(entries, 60) if "12" in line and "0.25" in line]


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], 8, "▁▂▃▄▅▆▇█"), ([0, 1, 9, 5], 2, "█▁"), ([2, 2], 9, "▁▁"), ([], 5, ""),
        ([1, math.nan, 2], 5, "▁ █"), ([1], 0, ""),
    ],
)  # fmt: skip
def test_sparkline(values: list[float], width: int, line: str) -> None:
    assert render.sparkline(values, width) == line
