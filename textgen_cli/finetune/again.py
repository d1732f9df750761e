"""What a network holds for the way back that is quickly made again: results of norms, activations and gates.

Layers that cost next to nothing keep their input alone, and who keeps their result keeps how it was made instead. So
a network that learns through an adapter holds about half, for a few hundredths of its time. It is selective
recomputation (Korthikanti et al., arXiv:2205.05198, section 5) by torch's hooks for what is saved.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import ACT2CLS

_ACTIVATIONS = {found[0] if isinstance(found, tuple) else found for found in ACT2CLS.values()}


@dataclass(eq=False)
class _Cell:
    """A result that is made again of x, once for all that ask for it on the way back."""

    x: torch.Tensor | None
    version: int
    make: Callable[[torch.Tensor], torch.Tensor]
    made: tuple[torch.Tensor, torch.Tensor] | None = None  # x and the result, with the way between them

    def again(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.x is None or self.x._version != self.version:
            raise RuntimeError("what is to be made again has been used or changed")
        if self.made is None:
            with torch.enable_grad():
                x = self.x.detach().requires_grad_()
                self.made = x, self.make(x)
        return self.made

    def result(self) -> torch.Tensor:
        return self.again()[1].detach()


class _Again(torch.autograd.Function):
    """A cell's result: x alone is held."""

    @staticmethod
    def forward(ctx: Any, x: Any, cell: _Cell) -> Any:
        ctx.cell = cell
        return cell.make(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:
        x, made = ctx.cell.again()
        ctx.cell.x = ctx.cell.made = None  # who asks for the result came before
        return torch.autograd.grad(made, x, gradient)[0], None


@dataclass(frozen=True)
class _Recipe:
    """What is held instead of a tensor of this shape."""

    make: Callable[[], torch.Tensor]
    shape: tuple[int, ...]


@dataclass
class Kept:
    """What is known to be made again, by where it lies; each for as long as it is there as it was."""

    known: dict[int, tuple[Any, int, Callable[[], torch.Tensor]]] = field(default_factory=dict)

    def tell(self, made: torch.Tensor, make: Callable[[], torch.Tensor]) -> None:
        self.known[made.data_ptr()] = weakref.ref(made), made._version, make

    def pack(self, tensor: torch.Tensor) -> Any:
        """A recipe instead of a tensor that has one."""
        if tensor.data_ptr() not in self.known:
            return tensor.detach()
        ref, version, make = self.known[tensor.data_ptr()]
        made = ref()
        same = made is not None and (made._version, made.numel(), made.dtype) == (
            version, tensor.numel(), tensor.dtype
        )  # fmt: skip
        if made is None or not (same and made.is_contiguous() and tensor.is_contiguous()):
            return tensor.detach()
        return _Recipe(make, tuple(tensor.shape))

    @contextmanager
    def holding(self) -> Iterator[None]:
        """What is saved in the block for the way back is held as told."""
        with saved_tensors_hooks(self.pack, _unpack):
            yield
        self.known.clear()


def _unpack(packed: Any) -> torch.Tensor:
    return packed.make().view(packed.shape) if isinstance(packed, _Recipe) else packed


def steps(net: Any, kept: Kept) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """The layers of a network that cost next to nothing, each with what it is to do instead of its forward."""
    for module in net.modules():
        if _is_cheap(module):
            yield module, partial(_step, module.forward, kept)


def _is_cheap(module: torch.nn.Module) -> bool:
    if next(module.children(), None) is not None or any(p.requires_grad for p in module.parameters()):
        return False
    return type(module) in _ACTIVATIONS or type(module).__name__.endswith("Norm")


def _step(plain: Callable[..., Any], kept: Kept, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs or not torch.is_grad_enabled() or not x.requires_grad:
        return plain(x, *args, **kwargs)
    kind = x.device.type
    now = partial(torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def make(given: torch.Tensor) -> Any:
        with now():
            return plain(given)

    cell = _Cell(x.detach(), x._version, make)
    found: torch.Tensor = _Again.apply(x, cell)  # type: ignore[no-untyped-call]  # torch's
    kept.tell(found, cell.result)
    return found


def tell_product(x: torch.Tensor, kept: Kept) -> None:
    """Where x is the product of two tensors that are held anyway, it is made of them again."""
    node = x.grad_fn
    if node is not None and node.name() == "MulBackward0" and all(one for one, _ in node.next_functions):
        # Both have a gradient, so each is held for that of the other, and longer than their product.
        kept.tell(x, lambda: node._saved_self * node._saved_other)  # type: ignore[attr-defined]  # of this kind of node
