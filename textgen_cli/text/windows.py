"""Which records are computed together: a function of the input alone, so that a resumed run forms the same.

Numbers in, numbers out: knows nothing of models, files or what a size counts.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def windows(items: Iterable[T], size: int, done: int = 0) -> Iterator[tuple[int, list[T]]]:
    """(position of its first item, items) of each window of `size` items that is not wholly among the `done`.

    Windows are counted from the first item whatever is done; the last may be shorter.
    """
    source = iter(items)
    start = 0
    while window := list(islice(source, size)):
        if start + len(window) > done:
            yield start, window
        start += len(window)


def batches(sizes: Sequence[int], max_tokens: int, max_batch: int) -> list[list[int]]:
    """Split a window into batches of like sizes, each padded to its longest within `max_tokens`.

    `sizes`: tokens each item needs. Returns lists of positions in `sizes`, every position once, the batch
    with the earliest position first; an item that is over the budget by itself is a batch of one.
    """
    order = sorted(range(len(sizes)), key=lambda at: (-sizes[at], at))
    parts, start = [], 0
    while start < len(order):
        fit = max_tokens // max(1, sizes[order[start]])
        end = start + max(1, min(max_batch, fit))
        parts.append(sorted(order[start:end]))
        start = end
    return sorted(parts)


def in_order(parts: Iterable[Iterable[tuple[int, T]]], start: int = 0) -> Iterator[list[T]]:
    """Runs of values in the order of their positions from `start` on, each once nothing before it lacks.

    `parts`: (position, value) pairs in any order. Positions before `start` are dropped.
    """
    held: dict[int, T] = {}
    for part in parts:
        held.update((at, value) for at, value in part if at >= start)
        run = []
        while start in held:
            run.append(held.pop(start))
            start += 1
        if run:
            yield run
