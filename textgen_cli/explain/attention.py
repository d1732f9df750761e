"""Attention weights, softmax(QK^T / sqrt(d)), as the network itself makes them: by layer and head, and summed up.

Rows are the places that ask, columns the input's places; each row sums to 1. Rollout (Abnar and Zuidema 2020) follows
them through all layers, half of each being the residual way. In encoder-decoders the answer asks the source
(cross-attention), and rollout goes on through the encoder.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from textgen_cli.errors import InputError, ModelError, UsageError
from textgen_cli.explain.case import Measure, Row
from textgen_cli.explain.network import Network, measured

MOST = 100_000_000  # weights of one input in all layers, which the network holds at once: 400 MB in float32


@dataclass(frozen=True)
class Attended:
    """The attention of one case: weights (L, H, Q, S), their rollout (Q, S), and which rows give the answer."""

    weights: torch.Tensor
    rollout: torch.Tensor
    asking: tuple[int, ...]  # the rows at whose places the targets are told

    def chosen(self, which: str) -> torch.Tensor:
        """mean, rollout, LAYER or LAYER.HEAD as (Q, S). UsageError E-RANGE for one that is not there."""
        if which == "rollout":
            return self.rollout
        if which in ("mean", "all"):
            return self.weights.mean((0, 1))
        layer, _, head = which.partition(".")
        layers, heads = self.weights.shape[:2]
        if int(layer) >= layers or (head and int(head) >= heads):
            fact = f"there are {layers} layers of {heads} heads, counted from 0"
            raise UsageError("E-RANGE", f"--attention {which}", fact)
        return self.weights[int(layer), int(head)] if head else self.weights[int(layer)].mean(0)


def attended(network: Network, rows: Sequence[Row], measure: Measure) -> Attended:
    """The attention behind the answers of rows.

    A single row gives all its places; of several, which differ by what is hidden in them, each gives the places of
    its own targets. Raises ModelError E-EXPLAIN where a network gives no attention, InputError E-TOO-LONG.
    """
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    with _eager(network):
        for row in rows:
            weights, rollout = _one(network, row)
            if len(rows) > 1:
                places = [target.place for target in row.targets]
                weights, rollout = weights[:, :, places], rollout[places]
            found.append((weights, rollout))
        asking = range(len(rows)) if len(rows) > 1 else _asking(network, rows[0], measure)
    weights = torch.cat([weights for weights, _ in found], dim=2)
    return Attended(weights, torch.cat([rollout for _, rollout in found]), tuple(asking))


@torch.no_grad()
def _one(network: Network, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    config = network.net.config.get_text_config()
    count = (getattr(config, name, None) or 1 for name in ("num_hidden_layers", "num_attention_heads"))
    size = math.prod(count) * max(len(row.ids), len(row.decoder)) ** 2
    if size > MOST:
        fact = f"{len(row.ids):,} tokens have {size / 1e6:,.0f} million attention weights, more than {MOST / 1e6:.0f}"
        raise InputError("E-TOO-LONG", "text", fact, hint="--explain gradient")
    out: Any = network.net(**network.inputs([row]), output_attentions=True)
    if not network.net.config.is_encoder_decoder:
        own = _stacked(network, getattr(out, "attentions", None))
        return own, _rollout(own)
    cross = _stacked(network, getattr(out, "cross_attentions", None))
    encoder = _stacked(network, getattr(out, "encoder_attentions", None))
    return cross, cross.mean((0, 1)) @ _rollout(encoder)


def _stacked(network: Network, layers: Any) -> torch.Tensor:
    """The attention of all layers, (L, H, Q, S) float32 on the CPU; some layers of a hybrid have none."""
    kept = [layer[0].float().cpu() for layer in layers or () if layer is not None and layer.dim() == 4]
    if not kept:
        raise ModelError(
            "E-EXPLAIN", network.model.name, "gives no attention weights", hint="--explain gradient"
        )
    return torch.stack(kept)


def _rollout(weights: torch.Tensor) -> torch.Tensor:
    """The product of all layers, from (L, H, T, T) to (T, T)."""
    found = torch.eye(weights.shape[-1])
    for layer in weights.mean(1):
        found = (layer + torch.eye(len(layer))) / 2 @ found
    return found


def _asking(network: Network, row: Row, measure: Measure) -> list[int]:
    """The places at which the answer is told; for one label of a whole text, those that the head looks at."""
    if network.model.family != "sequence-classification":
        return sorted({target.place for target in row.targets})
    with torch.enable_grad():
        inputs = network.embed(row)[None].requires_grad_()
        with network.embedded(inputs):
            out = network.net(**network.inputs([row]), output_hidden_states=True)
        last = (getattr(out, "hidden_states", None) or getattr(out, "decoder_hidden_states", None) or [None])[
            -1
        ]
        score = measured(out.logits[:, None].float(), [row], measure).sum()
        slopes = None if last is None else torch.autograd.grad(score, last, allow_unused=True)[0]
    every = range(len(row.ids))
    looked_at = [at for at in every if slopes is not None and slopes[0, at].abs().max() > 0]
    return looked_at or list(every)


@contextmanager
def _eager(network: Network) -> Iterator[None]:
    """The one implementation that tells its weights; with another the library gives none and only logs it."""
    before = network.net.config._attn_implementation
    try:
        network.net.set_attn_implementation("eager")
        yield
    except ValueError as error:
        raise ModelError("E-EXPLAIN", network.model.name, "gives no attention weights") from error
    finally:
        network.net.set_attn_implementation(before)
