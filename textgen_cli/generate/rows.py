"""What engines that decode step by step hand on: rows that grow, steps, and the draw of one token a row.

Knows torch and no library of models.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from textgen_cli.generate.constrain import State


@dataclass
class Row:
    """One sequence while it grows; whoever consumes the steps sets `done`."""

    prompt: list[int]
    room: int  # tokens that may still come
    stream: random.Random
    state: "State | None" = None  # where its grammar stands
    first: int | None = None  # the token it must begin with
    done: bool = False
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """What one forward pass gave."""

    rows: list[Row]  # B: the rows it speaks of
    tokens: list[int]  # B; meaningless for rows that are done
    finite: list[bool]  # B; False where the logits are NaN or infinite
    logits: torch.Tensor  # (B, V) float32, as the model gave them


def draw(scores: torch.Tensor, streams: Sequence[random.Random]) -> torch.Tensor:
    """One token a row, (B, V) -> (B,), from the row's own stream of random numbers.

    Inverse of the cumulative distribution: a row's token depends on its scores and its stream alone, so neither
    the rest of the batch nor the device's generator can change it.
    """
    uniform = torch.tensor([[stream.random()] for stream in streams], dtype=torch.float32).to(scores.device)
    mass = torch.softmax(scores, dim=-1).cumsum(dim=-1)  # (B, V)
    total = mass[:, -1:]
    # Strictly below the total, so that rounding can never choose a token of probability 0.
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(mass, threshold, right=True).squeeze(-1)
    return found.clamp_(max=scores.shape[-1] - 1)  # a row of NaN has no place; whoever asked has seen it
