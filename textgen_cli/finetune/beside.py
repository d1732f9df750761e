"""Linear layers with a LoRA adapter beside them, as one step forth and one back that hold their input once.

The library's goes through copies of the input in the adapter's precision, one for each layer, and makes what the
adapter adds apart from what it is added to. Here is the arithmetic for an adapter that only adds: no dropout, no DoRA.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from textgen_cli.finetune.again import Kept, tell_product


class _Beside(torch.autograd.Function):
    """W·x + b + s·B·(A·x) of x (..., I), with W (O, I), which does not learn, A (R, I) and B (O, R), which do.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Any, bias: Any, down: Any, up: Any, scale: float, dtype: Any
    ) -> Any:
        flat = x.to(dtype).flatten(0, -2)  # (N, I)
        ctx.scale, ctx.dtype, ctx.dtypes = scale, dtype, (x.dtype, down.dtype, up.dtype)
        with torch.autocast(x.device.type, enabled=False):
            offset = None if bias is None else bias.to(dtype)
            found = torch.nn.functional.linear(flat, weight.to(dtype), offset)  # (N, O)
            low = flat @ down.to(dtype).T  # (N, R)
            found.addmm_(low, up.to(dtype).T, alpha=scale)
        ctx.save_for_backward(x, weight, down, up, low)
        return found.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:
        x, weight, down, up, low = ctx.saved_tensors
        dtype, (of_x, of_down, of_up) = ctx.dtype, ctx.dtypes
        with torch.autocast(x.device.type, enabled=False):
            slope = gradient.to(dtype).reshape(-1, gradient.shape[-1])  # (N, O)
            inner = slope @ up.to(dtype) * ctx.scale  # (N, R)
            ups = (slope.T @ low * ctx.scale).to(of_up)
            downs = (inner.T @ x.to(dtype).flatten(0, -2)).to(of_down)
            back = None
            if ctx.needs_input_grad[0]:
                back = slope @ weight.to(dtype)  # (N, I)
                back = back.addmm_(inner, down.to(dtype)).view_as(x).to(of_x)
        return back, None, None, downs, ups, None, None


def steps(net: Any, kept: Kept | None) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """The layers of a network that are such, each with what it is to do instead of its forward while it learns.

    `kept`: is told of an input that is a product, as it is behind a gate.
    """
    from peft.tuners.lora import Linear  # noqa: PLC0415 - with an adapter it is there already

    for module in net.modules():
        if type(module) is Linear and _only_adds(module):
            yield module, partial(_step, module, module.forward, kept)


def _only_adds(module: Any) -> bool:
    base, names = module.get_base_layer(), module.active_adapters
    if len(names) != 1 or names[0] not in module.lora_A or module.merged or module.disable_adapters:
        return False
    down, up = module.lora_A[names[0]], module.lora_B[names[0]]
    return (
        type(base) in (torch.nn.Linear, Conv1D)
        and not any(p.requires_grad for p in base.parameters())
        and not module.lora_variant
        and isinstance(module.lora_dropout[names[0]], torch.nn.Identity)
        and down.bias is None
        and up.bias is None
    )


def _step(
    module: Any, plain: Callable[..., Any], kept: Kept | None, x: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    if args or kwargs or not torch.is_grad_enabled():
        return plain(x, *args, **kwargs)
    if kept is not None:
        tell_product(x, kept)
    base, name = module.get_base_layer(), module.active_adapters[0]
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    down, up = module.lora_A[name].weight, module.lora_B[name].weight
    return _Beside.apply(x, weight, base.bias, down, up, module.scaling[name], dtype)  # type: ignore[no-untyped-call]  # torch's
