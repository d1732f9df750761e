"""How fast this machine is at what networks do, measured for a second or two.

Two figures: operations a second of a feed-forward part, forward or forth and back, and bytes a second of weights that
are read for one token. It knows no network but its sizes.
"""

import time
from collections.abc import Callable

import torch
from torch import nn

from textgen_cli.model.device import Placement, cpu_has_bfloat16
from textgen_cli.model.pack import PackedLinear

SECONDS = 1.0  # of each measurement, besides one round before it
ROWS = 1024  # tokens at once at most: more of them are not faster
READ = 128 << 20  # bytes of weights that are read in turn, more than caches hold
LAYERS = 64  # that are read in turn at most: small networks stay in the caches
WIDEST = 16384  # elements; a wider feed-forward part is no faster


def operations(
    placement: Placement, tokens: int, hidden: int, inner: int, *, learns: bool, seconds: float | None = None
) -> float:
    """Operations a second of a feed-forward part of these sizes with so many tokens, forward, or forth and back."""
    inner = min(inner, WIDEST)
    rows = min(tokens, ROWS)
    work = _Part(placement.device, placement.dtype, hidden, inner, learns)
    x = work.draw(rows, hidden)
    count = 4 * rows * hidden * inner * (3 if learns else 1)
    if learns:
        return count / mean(lambda: work.forth_and_back(x), placement, seconds or SECONDS)
    with torch.inference_mode():
        return count / mean(lambda: work.forth(x), placement, seconds or SECONDS)


@torch.inference_mode()
def reading(placement: Placement, hidden: int, inner: int) -> float:
    """Bytes a second of weights that are read for one token."""
    inner = min(inner, WIDEST)
    one = torch.randn(1, hidden, device=placement.device, dtype=placement.dtype)
    size = hidden * inner * placement.dtype.itemsize
    layers = [_layer(placement, hidden, inner) for _ in range(max(1, min(LAYERS, READ // size)))]

    def read() -> None:
        for layer in layers:
            layer(one)

    return size * len(layers) / mean(read, placement, SECONDS)


def _layer(placement: Placement, hidden: int, inner: int) -> nn.Module:
    """A linear layer as one that generates has it here."""
    layer = nn.Linear(hidden, inner, bias=False, device=placement.device, dtype=placement.dtype)
    packs = placement.device.type == "cpu" and placement.dtype == torch.bfloat16 and cpu_has_bfloat16()
    return PackedLinear(layer) if packs and torch.backends.mkldnn.is_available() else layer


class _Part:
    """A feed-forward part with what stands around it: norm, two matrices, an activation, a sum."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, hidden: int, inner: int, learns: bool
    ) -> None:
        self.device, self.dtype = device, dtype
        # Weights that learn are in float32, whatever is computed in.
        self.up = self._weights(inner, hidden, learns)
        self.down = self._weights(hidden, inner, learns)

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype) / 16

    def _weights(self, rows: int, columns: int, learns: bool) -> torch.Tensor:
        return self.draw(rows, columns).requires_grad_(learns)

    def forth(self, x: torch.Tensor) -> torch.Tensor:
        """(T, H) -> (T, H)."""
        y = nn.functional.linear(nn.functional.layer_norm(x, x.shape[-1:]), self.up)  # (T, I)
        return x + nn.functional.linear(nn.functional.silu(y), self.down)

    def forth_and_back(self, x: torch.Tensor) -> None:
        self.forth(x.requires_grad_()).sum().backward()
        x.grad = self.up.grad = self.down.grad = None


def mean(run: Callable[[], object], placement: Placement, seconds: float) -> float:
    """Seconds of one run, the mean of as many as the seconds have room for, after one that is not counted."""
    run()
    _settle(placement)
    rounds, began = 0, time.perf_counter()
    while True:
        run()
        _settle(placement)
        rounds += 1
        if (taken := time.perf_counter() - began) >= seconds:
            return taken / rounds


def _settle(placement: Placement) -> None:
    """Wait until the device has done what it was given."""
    if placement.device.type != "cpu":
        torch.zeros(1, device=placement.device).item()
