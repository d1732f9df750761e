"""Log-probabilities of given tokens: rows of ids through causal networks, positions through their heads in chunks.

Knows nothing of texts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from textgen_cli.errors import ModelError, TextgenError
from textgen_cli.events import Report
from textgen_cli.model.load import Model
from textgen_cli.model.rows import batched
from textgen_cli.score.measures import Measured, Wanted, collect
from textgen_cli.score.network import Network, width

BATCH_TOKENS = 2048  # larger ones leave the processor's caches
BATCH_ROWS = 64


@dataclass(frozen=True)
class Row:
    """One pass: inputs, and what follows each of the last of them."""

    ids: Sequence[int]
    targets: Sequence[int]


def measure(
    networks: Sequence[Network],
    rows: Sequence[Row],
    wanted: Wanted,
    *,
    model: Model,
    max_rows: int | None,
    needed: Callable[[int], bool],
    report: Report,
) -> Iterator[tuple[int, Measured | TextgenError]]:
    """(number, what was measured) of each row in a batch where one is `needed`, in no order.

    `networks`: that of `model`; a second one of the same vocabulary tells how far its distributions are from it.
    """

    def compute(batch: list[int]) -> list[Measured | TextgenError]:
        found = _batch(networks, [rows[number] for number in batch], wanted)
        return [
            part if _finite(part) else ModelError("E-NAN", model.name, "logits are not finite")
            for part in found
        ]

    sizes = [len(row.ids) for row in rows]
    return batched(sizes, compute, needed, model, report, tokens=BATCH_TOKENS, rows=max_rows or BATCH_ROWS)


def _finite(part: Measured) -> bool:
    return all(map(math.isfinite, (*part.log_probability, *part.other, *part.divergence)))


@torch.inference_mode()
def _batch(networks: Sequence[Network], rows: Sequence[Row], wanted: Wanted) -> list[Measured]:
    where_to = networks[0].net.device
    ids, targets, where = (part.to(where_to) for part in padded(rows))
    found = [Measured() for _ in rows]
    columns = width(len(rows), max(network.vocabulary for network in networks))
    for parts in zip(*(network.logits(ids, where, columns) for network in networks), strict=True):
        at, logits = parts[0][0], [part[1].float() for part in parts]  # (P, 2), (P, V)
        own = targets[at[:, 0], at[:, 1]]
        collect(found, at[:, 0].tolist(), logits, own, wanted)
    return found


def padded(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets and which positions have one, each (B, T), padded on the right."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in rows])
    aligned = [
        [*[-1] * (len(row.ids) - len(row.targets)), *row.targets, *[-1] * (longest - len(row.ids))]
        for row in rows
    ]
    targets = torch.tensor(aligned)
    return ids, targets, targets >= 0
