"""The logit lens (nostalgebraist 2020): what a network would have said behind each of its layers.

The hidden states behind a layer go into the network in place of its last layer's; what stands behind that (the last
norm, a pooler, the head) stays the network's own. So the last layer says what the network says.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from textgen_cli.errors import ModelError
from textgen_cli.explain.case import Row
from textgen_cli.explain.network import Network


@dataclass(frozen=True)
class Said:
    """What a layer says at a target: its best answer, and what it thinks of the one that is explained."""

    token: int  # or label: the best
    probability: float
    target_probability: float
    rank: int  # of the target; 1: the best


@torch.no_grad()
def said(network: Network, row: Row) -> list[list[Said]]:
    """What each layer says at each target, [targets][layers]; 0: the embeddings alone, the last: the network.

    Raises ModelError E-EXPLAIN where the layers cannot be told apart.
    """
    layers = _layers(network)
    states: list[torch.Tensor] = []
    outputs: list[Any] = []
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_heard(layer, states, outputs))
        network.logits([row])
    found: list[list[Said]] = [[] for _ in row.targets]
    for state in states:
        with ExitStack() as stack:
            for layer, output in zip(layers, outputs, strict=True):
                stack.enter_context(
                    _saying(layer, (state, *output[1:]) if isinstance(output, tuple) else state)
                )
            logits = network.logits([row])[0]  # (targets, V)
        for number, told in enumerate(_told(network, logits, row)):
            found[number].append(told)
    return found


def _told(network: Network, logits: torch.Tensor, row: Row) -> Iterator[Said]:
    several = network.net.config.problem_type == "multi_label_classification" or logits.shape[-1] == 1
    odds = logits.sigmoid() if network.labels and several else logits.softmax(-1)
    for target, scores in zip(row.targets, odds, strict=True):
        best = int(scores.argmax())
        own = scores[target.token]
        yield Said(best, float(scores[best]), float(own), int((scores > own).sum()) + 1)


def _layers(network: Network) -> list[Any]:
    """The layers of what answers: the decoder where there are two halves."""
    config = network.net.config
    trunk = network.net.get_decoder() if config.is_encoder_decoder else network.net.base_model
    names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "num_layers", "n_layer", "n_layers")
    counts = [
        getattr(config, name, None) for name in names if config.is_encoder_decoder or "decoder" not in name
    ]
    for _, module in trunk.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and len(module) in counts:
            return list(module)
    raise ModelError("E-EXPLAIN", network.model.name, "has no row of layers that the lens could look behind")


@contextmanager
def _heard(layer: Any, states: list[torch.Tensor], outputs: list[Any]) -> Iterator[None]:
    """Keep the hidden states that a layer is given, if it is the first, and what it gives."""

    def given(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not states:
            states.append(arguments[0] if arguments else named["hidden_states"])

    def gave(_: Any, __: Any, output: Any) -> None:
        outputs.append(output)
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_pre_hook(given, with_kwargs=True), layer.register_forward_hook(gave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _saying(layer: Any, output: Any) -> Iterator[None]:
    """Let a layer compute nothing and give this."""
    before = vars(layer).get("forward")
    layer.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before
