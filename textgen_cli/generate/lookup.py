"""Guesses how a text goes on from where its last tokens stood before (prompt lookup).

Pays where a text repeats what it was given: summaries, quotations, code that is changed. It knows no model.
"""

from collections.abc import Sequence

SIZES = (3, 2)  # tokens in a row that must have stood before, the longer first


class Lookup:
    """Where each n-gram of a growing text was last followed by something."""

    def __init__(self) -> None:
        self._behind: dict[tuple[int, ...], int] = {}  # n-gram -> the place behind it
        self._read = 0

    def guess(self, ids: Sequence[int], count: int) -> list[int]:
        """What `count` tokens may follow `ids`; none where its end is new. Called with the same text as it grows.

        A text that repeats itself within these tokens is guessed to go on doing so.
        """
        for place in range(self._read, len(ids)):
            for size in SIZES:
                if place >= size:
                    self._behind[tuple(ids[place - size : place])] = place
        self._read = len(ids)
        for size in SIZES:
            place = self._behind.get(tuple(ids[-size:]), -1)
            if place >= 0:
                found: list[int] = []
                for at in range(place, place + count):
                    found.append(ids[at] if at < len(ids) else found[at - len(ids)])
                return found
        return []
