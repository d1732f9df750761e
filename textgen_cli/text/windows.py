"""Which records are computed together: a function of the input alone, so that a resumed run forms the same.

Knows nothing of models, files or what a size counts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from textgen_cli.errors import InputError

T = TypeVar("T")


def windows(
    items: Iterable[T],
    size: int,
    done: int = 0,
    *,
    cost: Callable[[T], int] = lambda _: 0,
    budget: int = 0,
) -> Iterator[tuple[int, list[T]]]:
    """(position of its first item, items) of each window that is not wholly among the `done`.

    A window ends with `size` items, or with the item that brings its cost to `budget`. Windows are counted from
    the first item whatever is done; the last may be shorter. An InputError of `items` is raised behind the last.
    """
    start, spent = 0, 0
    window: list[T] = []
    broken: InputError | None = None
    source = iter(items)
    while True:
        try:
            window.append(item := next(source))
        except StopIteration:
            break
        except InputError as error:
            broken = error
            break
        spent += cost(item)
        if len(window) == size or spent > budget > 0:
            if start + len(window) > done:
                yield start, window
            start, spent, window = start + len(window), 0, []
    if window and start + len(window) > done:
        yield start, window
    if broken is not None:
        raise broken


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
