"""Which examples are held out: told by what they hold and the seed, never by where they stand.

So the same examples are held out whatever the order of rows and files, and examples alike stay on one side. Knows
numbers only: a key and a stratum for each example.
"""

import hashlib
from collections import Counter

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 8


def key_of(content: str, seed: int) -> int:
    """A number of 64 bits that stands for a content under a seed."""
    raw = hashlib.blake2b(content.encode(), digest_size=KEY_BYTES, key=str(seed).encode()).digest()
    return int.from_bytes(raw, "big")


def held_out(keys: NDArray[np.uint64], strata: NDArray[np.int32], share: float) -> NDArray[np.bool_]:
    """True for the examples that are held out, about `share` of them and the same share of every stratum.

    Examples with one key go together; of each stratum one example at least stays. With few examples none may be
    held out.
    """
    chosen = np.zeros(len(keys), dtype=bool)
    if not len(keys):
        return chosen
    quotas = _quotas(Counter(strata.tolist()), share)
    order = np.argsort(strata, kind="stable")
    numbers, starts = np.unique(strata[order], return_index=True)
    for stratum, rows in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        if quota := quotas.get(stratum, 0):
            chosen[rows] = np.isin(keys[rows], _smallest(keys[rows], quota))
    return chosen


def _smallest(keys: NDArray[np.uint64], quota: int) -> NDArray[np.uint64]:
    """The smallest keys that together have as many examples, or as near below as may be."""
    found, counts = np.unique(keys, return_counts=True)
    taken, left = [], quota
    for key, count in zip(found.tolist(), counts.tolist(), strict=True):
        if count <= left:
            left -= count
            taken.append(key)
        if not left:
            break
    return np.array(taken, dtype=np.uint64)


def _quotas(sizes: Counter[int], share: float) -> dict[int, int]:
    """How many of each stratum: whole parts first, then one more where the rest is largest."""
    total = int(share * sum(sizes.values()) + 0.5)
    quotas = {stratum: int(share * size) for stratum, size in sizes.items()}
    rests = sorted(sizes, key=lambda stratum: (quotas[stratum] - share * sizes[stratum], stratum))
    for stratum in rests[: max(0, total - sum(quotas.values()))]:
        quotas[stratum] += 1
    return {stratum: min(quota, sizes[stratum] - 1) for stratum, quota in quotas.items() if quota}
