"""The split: the same examples whatever the order, examples alike on one side, labels in equal shares."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from textgen_cli.finetune.split import held_out, key_of

ROWS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), max_size=120)


def split(rows: list[tuple[int, int]], share: float, seed: int = 0) -> list[bool]:
    keys = np.array([key_of(str(content), seed) for content, _ in rows], dtype=np.uint64)
    strata = np.array([stratum for _, stratum in rows], dtype=np.int32)
    return [bool(chosen) for chosen in held_out(keys, strata, share)]


@given(ROWS, st.floats(0, 0.5), st.randoms())
def test_order_decides_nothing(
    rows: list[tuple[int, int]], share: float, random: "np.random.Generator"
) -> None:
    other = list(rows)
    random.shuffle(other)
    assert dict(zip(rows, split(rows, share), strict=True)) == dict(
        zip(other, split(other, share), strict=True)
    )


@given(ROWS, st.floats(0, 0.5))
def test_every_stratum_keeps_something_and_gives_its_share_at_most(
    rows: list[tuple[int, int]], share: float
) -> None:
    chosen = Counter(stratum for (_, stratum), held in zip(rows, split(rows, share), strict=True) if held)
    for stratum, size in Counter(stratum for _, stratum in rows).items():
        assert chosen[stratum] < size
        assert chosen[stratum] <= share * size + 1


@pytest.mark.parametrize("share", [0.05, 0.1, 0.333, 0.5])
def test_different_examples_give_the_exact_share_of_each_label(share: float) -> None:
    rows = [(number, int(number % 10 == 0)) for number in range(2000)]
    chosen = split(rows, share)
    assert sum(chosen) == round(2000 * share)
    rare = sum(held for (_, stratum), held in zip(rows, chosen, strict=True) if stratum)
    assert abs(rare - 200 * share) <= 1


def test_examples_alike_stay_together() -> None:
    rows = [(number % 100, 0) for number in range(1000)]
    sides: dict[int, set[bool]] = {}
    for (content, _), held in zip(rows, split(rows, 0.2), strict=True):
        sides.setdefault(content, set()).add(held)
    assert all(len(side) == 1 for side in sides.values())
    assert sum(side == {True} for side in sides.values()) == 20


def test_a_seed_chooses_others() -> None:
    rows = [(number, 0) for number in range(500)]
    assert split(rows, 0.1, seed=1) != split(rows, 0.1, seed=2)
    assert split(rows, 0.1, seed=1) == split(rows, 0.1, seed=1)


@pytest.mark.parametrize(
    ("count", "share", "held"), [(0, 0.5, 0), (1, 0.5, 0), (9, 0.05, 0), (10, 0.05, 1), (2, 0.5, 1)]
)
def test_few_examples(count: int, share: float, held: int) -> None:
    assert sum(split([(number, 0) for number in range(count)], share)) == held
