"""Stop strings in text that comes in pieces, against a search in the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textgen_cli.text.stops import StopFinder

SHORT = st.text("ab \n", max_size=24)
STOPS = st.lists(st.text("ab \n", max_size=4), max_size=4)


def streamed(pieces: list[str], stops: list[str], *, trim: bool) -> tuple[list[str], bool]:
    finder = StopFinder(stops, trim=trim)
    shown = [finder.feed(piece) for piece in pieces]
    return [*shown, finder.end()], finder.found


def reference(text: str, stops: list[str], *, trim: bool) -> tuple[str, bool]:
    """Reading on until a stop string is complete: the text before it."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if complete:
            text = text[: end - max(map(len, complete))]
            return (text.strip() if trim else text), True
    return (text.strip() if trim else text), False


@given(st.lists(SHORT, max_size=8), STOPS, st.booleans())
def test_any_pieces_give_the_text_up_to_the_stop(pieces: list[str], stops: list[str], trim: bool) -> None:
    shown, found = streamed(pieces, stops, trim=trim)
    assert ("".join(shown), found) == reference("".join(pieces), stops, trim=trim)


@given(st.lists(SHORT, max_size=8), STOPS)
def test_no_more_than_a_stop_string_is_held_back(pieces: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    fed, shown = "", ""
    for piece in pieces:
        fed, shown = fed + piece, shown + finder.feed(piece)
        if finder.found:
            break
        held = fed.removeprefix(shown)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["a\n", "\nb"], ["\n\n"], ["a", "", ""]),
        (["one EN", "D two"], ["END"], ["one ", "", ""]),
        (["one EN", "T two"], ["END"], ["one ", "ENT two", ""]),
        (["one EN"], ["END"], ["one ", "EN"]),
        (["aab", "ab"], ["abab"], ["a", "", ""]),
        (["xSTOP", "y"], ["TOP", "STOP"], ["x", "", ""]),
        (["abcd"], ["abcd", "c"], ["ab", ""]),  # "c" is complete first
    ],
)
def test_held_back(pieces: list[str], stops: list[str], shown: list[str]) -> None:
    assert streamed(pieces, stops, trim=False)[0] == shown
