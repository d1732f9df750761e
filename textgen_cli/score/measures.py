"""What is measured of a distribution over tokens: log-probability, rank, entropy, alternatives, divergence.

Logits in, plain numbers out, in nats. Knows no network and no text.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from textgen_cli.errors import ModelError, TextgenError


@dataclass(frozen=True)
class Wanted:
    """What is told of every token besides its log-probability."""

    detail: bool = False  # rank and entropy
    top: int = 0  # most likely alternatives


@dataclass
class Measured:
    """What a row's targets got, one entry each, in nats."""

    log_probability: list[float] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)  # 1: the most likely
    entropy: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(
        default_factory=list
    )  # (token, log-probability), best first, those ruled out left out
    other: list[float] = field(default_factory=list)  # log-probability under the second model
    divergence: list[float] = field(default_factory=list)  # KL(this model || the second)


def collect(
    found: Sequence[Measured],
    owners: Sequence[int],
    logits: Sequence[torch.Tensor],
    own: torch.Tensor,
    wanted: Wanted,
) -> None:
    """Add what a chunk of positions tells to the rows they belong to. logits (P, V), own (P,)."""
    first = logits[0]
    total = first.logsumexp(-1)  # (P,)
    chosen = first.gather(1, own[:, None])[:, 0]
    for owner, value in zip(owners, (chosen - total).tolist(), strict=True):
        found[owner].log_probability.append(value)
    if wanted.detail:
        ranks = (first > chosen[:, None]).sum(-1) + 1
        entropies = torch.special.entr((first - total[:, None]).exp_()).sum(-1)
        for owner, rank, entropy in zip(owners, ranks.tolist(), entropies.tolist(), strict=True):
            found[owner].rank.append(rank)
            found[owner].entropy.append(entropy)
    if wanted.top:
        best = first.topk(min(wanted.top, first.shape[-1]), dim=-1)
        logs = (best.values - total[:, None]).tolist()
        for owner, tokens, values in zip(owners, best.indices.tolist(), logs, strict=True):
            pairs = zip(tokens, values, strict=True)
            found[owner].top.append([pair for pair in pairs if math.isfinite(pair[1])])
    for second in logits[1:]:
        q = second.log_softmax(-1)
        size = min(first.shape[-1], q.shape[-1])  # one may have rows of padding behind the vocabulary
        p = (first - total[:, None])[:, :size]
        divergence = torch.nn.functional.kl_div(q[:, :size], p, reduction="none", log_target=True).sum(-1)
        others = q.gather(1, own[:, None])[:, 0]
        for owner, value, apart in zip(owners, others.tolist(), divergence.tolist(), strict=True):
            found[owner].other.append(value)
            found[owner].divergence.append(apart)


def measured(
    chunks: Iterable[torch.Tensor],
    owners: Sequence[int],
    targets: torch.Tensor,
    rows: int,
    wanted: Wanted,
    name: str,
) -> list[Measured | TextgenError]:
    """What each of `rows` rows got; ModelError E-NAN in place of one whose logits are no numbers.

    chunks: logits (<= P, V) of all P positions in order; owners: the row of each; targets (P,): its token. `name`:
    the model's.
    """
    found = [Measured() for _ in range(rows)]
    start = 0
    for logits in chunks:
        end = start + len(logits)
        collect(found, owners[start:end], [logits], targets[start:end], wanted)
        start = end
    return [
        part
        if all(map(math.isfinite, part.log_probability))
        else ModelError("E-NAN", name, "logits are not finite")
        for part in found
    ]
