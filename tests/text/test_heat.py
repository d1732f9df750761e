"""Weights become steps of a scale, steps colours that can be read, a text pieces that join to it again."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parts.contrast import contrast

from textgen_cli.text.heat import (
    BLUE,
    DARK,
    LIGHT,
    ORANGE,
    STEPS,
    Ramp,
    Scale,
    by_surprisal,
    fitted,
    oklch,
    surprisal,
)


@pytest.mark.parametrize(
    ("weight", "signed", "step"),
    [
        (None, False, 0), (0.0, False, 0), (0.9, False, 0), (1.0, False, 1), (5.5, False, 5), (10.0, False, 10),
        (1e300, False, 10), (math.inf, False, 10), (math.nan, False, 0), (-9.0, False, 0),
        (-9.0, True, -9), (-0.9, True, 0), (-math.inf, True, -10),
    ],
)  # fmt: skip
def test_step(weight: float | None, signed: bool, step: int) -> None:
    assert Scale("x", "nats", 10.0, signed).step(weight) == step


@pytest.mark.parametrize(
    ("weights", "high"),
    [
        ([0.123, None, -0.9871], 0.99),
        ([3], 3.0),
        ([1.1], 1.1),
        ([-0.0101], 0.011),
        ([0.0, None], 1.0),
        ([], 1.0),
        ([math.inf, 1234.5], 1300.0),
    ],
)
def test_a_scale_is_fitted_to_the_largest_weight(weights: list[float | None], high: float) -> None:
    assert fitted(weights, "attribution", signed=True) == Scale("attribution", "", high, True)


def test_surprisal_has_one_scale_for_all_texts_of_a_unit() -> None:
    assert surprisal("bits").high / surprisal("nats").high == pytest.approx(1 / math.log(2), rel=0.05)


@pytest.mark.parametrize(
    ("lightness", "chroma", "hue", "colour"),  # CSS Color 4's own samples
    [
        (1.0, 0.0, 0.0, "#ffffff"), (0.0, 0.0, 0.0, "#000000"), (0.62796, 0.25768, 29.234, "#ff0000"),
        (0.86644, 0.29483, 142.495, "#00ff00"), (0.45201, 0.31321, 264.052, "#0000ff"),
        (0.51975, 0.17686, 142.495, "#008000"), (0.59987, 0.0, 0.0, "#808080"),
    ],
)  # fmt: skip
def test_oklch(lightness: float, chroma: float, hue: float, colour: str) -> None:
    assert oklch(lightness, chroma, hue) == colour


@pytest.mark.parametrize("hue", [ORANGE, BLUE])
@pytest.mark.parametrize(("ramp", "page"), [(LIGHT, "#fdfdfc"), (DARK, "#16181b")])
def test_text_is_read_on_every_colour_and_every_colour_is_stronger(ramp: Ramp, page: str, hue: float) -> None:
    colours = ramp.colours(hue)
    assert len(colours) == STEPS
    assert min(contrast(colour, ramp.ink) for colour in colours) >= 4.5
    strengths = [contrast(colour, page) for colour in colours]
    assert strengths == sorted(set(strengths))


def entry(start: int | None, end: int | None, log: float | None, token: str = "") -> dict[str, Any]:
    return {"token": token, "start": start, "end": end, "log_probability": log}


def test_pieces_of_a_text() -> None:
    text = "A 👩‍🚀é."
    first, half, rest = entry(0, 1, None), entry(1, 3, -3.0), entry(3, 3, -4.0)
    joiner, rocket, mark = entry(3, 4, -1.0), entry(4, 5, -2.0), entry(6, 7, -5.0)
    text = text.replace("é", "e\u0301")
    letter = entry(5, 6, -0.5)
    assert by_surprisal(text, [first, half, rest, joiner, rocket, letter, mark]) == [
        ("A", None, [first]),
        (" 👩‍🚀", 10.0, [half, rest, joiner, rocket]),
        ("e\u0301", 5.5, [letter, mark]),
        (".", None, []),
    ]


def test_pieces_of_words_and_of_tokens_without_offsets() -> None:
    word = {"word": "b", "start": 2, "end": 3, "log_likelihood": -1.5, "tokens": 1}
    assert by_surprisal("a b", [word]) == [("a ", None, []), ("b", 1.5, [word])]
    lost = entry(None, None, -2.0, "▁b")
    assert by_surprisal("b", [lost]) == [("▁b", 2.0, [lost])]
    assert by_surprisal("", []) == []


@given(st.text(max_size=20), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), max_size=12))
def test_pieces_join_to_the_text(text: str, spans: list[tuple[int, int]]) -> None:
    entries = [entry(min(s, len(text)), min(s + n, len(text)), -1.0) for s, n in sorted(spans)]
    pieces = by_surprisal(text, entries)
    assert "".join(piece for piece, _, _ in pieces) == text
    told = [one for _, _, own in pieces for one in own]
    assert [id(one) for one in told] == [id(one) for one in entries if any(one is other for other in told)]
