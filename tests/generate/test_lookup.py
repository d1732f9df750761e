"""Prompt lookup: what a repeated end is guessed to go on with, against a search through the whole text."""

import random

from textgen_cli.generate.lookup import SIZES, Lookup


def searched(ids: list[int], count: int) -> list[int]:
    """The same by looking at every place, the latest first."""
    for size in SIZES:
        for place in range(len(ids) - 1, size - 1, -1):
            if ids[place - size : place] == ids[len(ids) - size :]:
                every = list(ids)
                for _ in range(count):
                    every.append(every[place + len(every) - len(ids)])
                return every[len(ids) :]
    return []


def test_it_finds_what_a_search_finds() -> None:
    stream = random.Random(4)
    found = 0
    for letters in (2, 5, 40):
        ids: list[int] = []
        lookup = Lookup()
        for _ in range(300):
            ids += [stream.randrange(letters) for _ in range(stream.randrange(1, 4))]
            count = stream.randrange(0, 9)
            guess = lookup.guess(ids, count)
            assert guess == searched(ids, count)
            found += bool(guess)
    assert found > 300


def test_a_text_that_goes_round_is_guessed_to_go_on() -> None:
    assert Lookup().guess([9, 1, 2, 3, 1, 2, 3, 1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]
    assert Lookup().guess([1, 2, 3, 4, 5], 4) == []
