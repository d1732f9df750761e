"""Batches: every item once, within the budget, the same whatever was done before."""

import random
from collections.abc import Iterator
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from textgen_cli.text.windows import batches, in_order, windows

SIZES = st.lists(st.integers(0, 300), max_size=80)


@given(SIZES, st.integers(1, 1000), st.integers(1, 20))
def test_every_item_once_and_within_the_budget(sizes: list[int], max_tokens: int, max_batch: int) -> None:
    parts = batches(sizes, max_tokens, max_batch)
    assert sorted(at for part in parts for at in part) == list(range(len(sizes)))
    for part in parts:
        assert 1 <= len(part) <= max_batch
        assert len(part) == 1 or len(part) * max(sizes[at] for at in part) <= max_tokens


@given(SIZES, st.integers(1, 1000), st.integers(1, 20))
def test_batches_hold_like_sizes(sizes: list[int], max_tokens: int, max_batch: int) -> None:
    """No batch reaches into another's range of sizes: that is what keeps padding small."""
    ranges = sorted(
        (min(sizes[at] for at in part), max(sizes[at] for at in part))
        for part in batches(sizes, max_tokens, max_batch)
    )
    assert all(high <= low for (_, high), (low, _) in pairwise(ranges))


@given(st.lists(st.integers(0, 300), max_size=40, unique=True), st.randoms(use_true_random=False))
def test_membership_depends_on_sizes_alone(sizes: list[int], shuffle: random.Random) -> None:
    other = sizes.copy()
    shuffle.shuffle(other)
    here = {frozenset(sizes[at] for at in part) for part in batches(sizes, 500, 8)}
    assert here == {frozenset(other[at] for at in part) for part in batches(other, 500, 8)}


def test_batches_by_hand() -> None:
    assert batches([5, 1, 5, 1, 9], max_tokens=10, max_batch=8) == [[0, 2], [1, 3], [4]]
    assert batches([1] * 5, max_tokens=100, max_batch=2) == [[0, 1], [2, 3], [4]]
    assert batches([50], max_tokens=10, max_batch=8) == [[0]]
    assert batches([], max_tokens=10, max_batch=8) == []


@given(st.integers(0, 60), st.integers(1, 9), st.data())
def test_a_resumed_run_forms_the_same_windows(count: int, size: int, data: st.DataObject) -> None:
    done = data.draw(st.integers(0, count))
    whole = list(windows(range(count), size))
    assert [item for _, window in whole for item in window] == list(range(count))
    assert all(len(window) == size for _, window in whole[:-1])
    assert list(windows(range(count), size, done)) == [w for w in whole if w[0] + len(w[1]) > done]


@given(st.permutations(range(12)), st.integers(0, 12), st.integers(1, 5))
def test_results_come_back_in_order(order: list[int], start: int, step: int) -> None:
    parts = [[(at, f"value {at}") for at in order[i : i + step]] for i in range(0, 12, step)]
    runs: list[str] = []
    for run in in_order((parts[i] for i in range(len(parts))), start):
        assert run
        runs += run
    assert runs == [f"value {at}" for at in range(start, 12)]


def test_a_run_is_given_as_soon_as_it_is_whole() -> None:
    taken: list[int] = []

    def parts() -> Iterator[list[tuple[int, str]]]:
        for number, part in enumerate([[(0, "a"), (2, "c")], [(3, "d")], [(1, "b")]]):
            taken.append(number)
            yield part

    runs = in_order(parts())
    assert next(runs) == ["a"]
    assert taken == [0]
    assert next(runs) == ["b", "c", "d"]
