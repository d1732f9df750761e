"""Weights of linear layers in the order in which oneDNN multiplies them, for CPUs in bfloat16.

Torch hands oneDNN plain matrices, which it brings into that order again for every product. Doing so once makes the
step that generates a token, alone or in a batch, a fifth to a third faster; the products are the same.
"""

from typing import Any

import torch
from torch import nn

from textgen_cli.model import device


class PackedLinear(nn.Module):
    """y = x W^T + b with W (N, K) packed; for inference alone."""

    weight: torch.Tensor  # (N, K), opaque: only its shape and dtype can be looked at
    bias: torch.Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.out_features, layer.in_features
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        self.register_buffer("weight", packed, persistent=False)
        own: torch.Tensor | None = layer.bias
        bias = None if own is None else own.detach()
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N) in bfloat16."""
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return found

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


def suits(net: Any) -> bool:
    """Whether the network runs where packing helps: in bfloat16 on a processor that computes in it."""
    plain = net.device.type == "cpu" and net.dtype == torch.bfloat16
    return plain and device.cpu_has_bfloat16() and torch.backends.mkldnn.is_available()


@torch.inference_mode()
def apply(net: Any) -> None:
    """Replace the linear layers of a network by packed ones, one at a time; an embedding table stays as it is."""
    # Names alone: a list of the layers would hold each until the last one is packed.
    plain = [path for path, layer in net.named_modules() if type(layer) is nn.Linear]
    for path in plain:
        parent, _, child = path.rpartition(".")
        owner = net.get_submodule(parent)
        if getattr(owner, child).weight.dtype == torch.bfloat16:
            setattr(owner, child, PackedLinear(getattr(owner, child)).eval())
