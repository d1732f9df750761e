"""Rows of one or several texts computed in batches of like lengths, and put together again.

Owns batching, lack of memory and which of a record's rows are still out. Knows neither network nor text.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from textgen_cli.errors import OutOfMemory, TextgenError
from textgen_cli.events import Notice, Report
from textgen_cli.model import device
from textgen_cli.model.load import Model
from textgen_cli.text.windows import batches

T = TypeVar("T")
Compute = Callable[[list[int]], Sequence[T | TextgenError]]  # row numbers -> what came of each


def batched(
    sizes: Sequence[int],
    compute: Compute[T],
    needed: Callable[[int], bool],
    model: Model,
    report: Report,
    *,
    tokens: int,
    rows: int,
    alike: bool = False,
) -> Iterator[tuple[int, T | TextgenError]]:
    """(number, what came of it) of every row in batches that hold a `needed` one, in no order.

    sizes: tokens of each row; a batch has at most `rows` rows and comes to `tokens` tokens with its padding; `alike`:
    there is none, since its rows are of one size. Batches are the same whatever is needed, so that results depend on
    the rows alone.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for row, size in enumerate(sizes):
        groups[size if alike else 0].append(row)
    for group in groups.values():
        for part in batches([sizes[row] for row in group], tokens, rows):
            batch = [group[place] for place in part]
            if any(map(needed, batch)):
                yield from _attempt(batch, compute, model, report)


def _attempt(
    batch: list[int], compute: Compute[T], model: Model, report: Report
) -> Iterator[tuple[int, T | TextgenError]]:
    """One batch; where memory runs out, its halves."""
    try:
        found = compute(batch)
    except (RuntimeError, MemoryError) as error:
        if not device.out_of_memory(error):
            raise
        device.release(model.placement.device)
    else:
        yield from zip(batch, found, strict=True)
        return
    if len(batch) == 1:
        yield batch[0], OutOfMemory("E-MEMORY", model.name, "one text does not fit")
        return
    report(Notice(f"out of memory with {len(batch)} rows, going on with half"))
    middle = (len(batch) + 1) // 2
    yield from _attempt(batch[:middle], compute, model, report)
    yield from _attempt(batch[middle:], compute, model, report)


def gathered(
    owners: Sequence[int], found: Iterable[tuple[int, T | TextgenError]]
) -> Iterator[tuple[int, list[T] | TextgenError]]:
    """(owner, what came of its rows, in order, or their first error), each owner once all its rows are there.

    owners: the owner of each row.
    """
    count = Counter(owners)
    parts: dict[int, dict[int, T | TextgenError]] = defaultdict(dict)
    for row, part in found:
        owner = owners[row]
        parts[owner][row] = part
        if len(parts[owner]) == count[owner]:
            yield owner, _whole(part for _, part in sorted(parts.pop(owner).items()))


def _whole(parts: Iterable[T | TextgenError]) -> list[T] | TextgenError:
    whole = []
    for part in parts:
        if isinstance(part, TextgenError):
            return part
        whole.append(part)
    return whole
