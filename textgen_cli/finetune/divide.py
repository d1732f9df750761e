"""A network whose weights are divided among processes: torch's FSDP 2, its parts on the disk, and the whole again.

Each process keeps its rows of every weight, its gradient and its moments; the whole of a layer is gathered while it
computes. Each reads and writes its own part alone; only `whole` gathers all of them. Knows no trainer.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from textgen_cli.errors import UsageError
from textgen_cli.finetune.division import LAUNCHER, Division
from textgen_cli.model.quantize import QuantizedLinear


def divide(net: Any, division: Division, size: int, device: torch.device) -> None:
    """Leave to this process its part of the weights.

    Raises UsageError E-CONFLICT for a network that cannot be divided.
    """
    mesh = init_device_mesh(device.type, (size,))
    try:
        for layer in _unshared(net, _layers(net, division)):
            layer.register_forward_hook(_apart)
            fully_shard(layer, mesh=mesh, reshard_after_forward=division.reshard)
        fully_shard(net, mesh=mesh)
    except (ValueError, NotImplementedError) as error:
        raise UsageError("E-CONFLICT", f"{LAUNCHER} --use_fsdp", str(error).partition("\n")[0]) from error
    if hasattr(net, "generate"):
        register_fsdp_forward_method(net, "generate")


def divisible(net: Any, launcher: str) -> None:
    """Refuse layers that a process leaves out by chance: they are not gathered there, and the others would wait for
    ever. And weights in a form that has no rows of numbers, such as packed ones."""
    for name, value in net.config.to_dict().items():
        if "layerdrop" in name and value:
            fact = f"the model leaves layers out by chance ({name} {value})"
            raise UsageError("E-CONFLICT", launcher, fact)
    if any(isinstance(module, QuantizedLinear) for module in net.modules()):
        fact = f"each process of {launcher} would hold all codes"
        raise UsageError("E-CONFLICT", "--quantize", fact, hint="leave one of them out")
    for name, p in net.named_parameters():
        if type(p) is not torch.nn.Parameter or not p.is_floating_point():
            fact = f"{name} is of a kind that cannot be divided ({type(p).__name__}, {p.dtype})"
            raise UsageError("E-CONFLICT", launcher, fact)


def _layers(net: Any, division: Division) -> list[torch.nn.Module]:
    """The modules that are gathered one by one."""
    if division.layers is None:
        return list(dict.fromkeys(_stacked(net)))
    known = {type(module).__name__ for module in net.modules()}
    for name in division.layers:
        if name not in known:
            option = f"{LAUNCHER} --fsdp_transformer_layer_cls_to_wrap {name}"
            raise UsageError("E-CONFLICT", option, "the model has no such layers")
    return [module for module in net.modules() if type(module).__name__ in division.layers]


def _stacked(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The outermost layers that stand in a row. What stands in a row inside of them, such as experts, is not used by
    every process in every step."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        else:
            yield from _stacked(child)


def _unshared(net: Any, layers: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """The layers that have no weight in common with what is outside of them: divided apart, it would be two."""
    place = {id(module): number for number, layer in enumerate(layers) for module in layer.modules()}
    users: dict[int, set[int | None]] = {}
    for module in net.modules():
        for p in module.parameters(recurse=False):
            users.setdefault(id(p), set()).add(place.get(id(module)))
    shared = {number for found in users.values() if len(found) > 1 for number in found}
    return [layer for number, layer in enumerate(layers) if number not in shared]


def _apart(_module: Any, _given: Any, output: Any) -> Any:
    """What a layer returns, as tensors of their own: a view that is changed in place would lose the hook that gathers
    the weights again on the way back, and the gradients would be wrong without a word."""
    return tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) and t._is_view() else t, output)


def empty_frame(net: Any, *, rounds: bool = False) -> Any:
    """A copy of the network without its weights, for `whole`.

    `rounds`: the weights are going to be rounded to bfloat16; those that do not learn are kept, or they came back so.
    """
    empty = {
        id(p): torch.nn.Parameter(
            p.detach().to("cpu", copy=True)
            if rounds and not p.requires_grad and p.dtype != torch.bfloat16
            else torch.empty_like(p, device="meta"),
            requires_grad=p.requires_grad,
        )
        for p in net.parameters()
    }
    return copy.deepcopy(net, dict(empty))


# --- one's own part


def own(net: Any) -> dict[str, torch.Tensor]:
    """This process's part of the weights that learn, by name."""
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass may leave the whole weights behind
    return {name: _local(p.detach()) for name, p in net.named_parameters() if p.requires_grad}


def save_own(net: Any, optimizer: Any, folder: Path, number: int) -> None:
    """Write this process's part of a training's state."""
    save_file({name: part.contiguous() for name, part in own(net).items()}, folder / _weights(number))
    torch.save(tree_map(_local, optimizer.state_dict()), folder / _moments(number))


def load_own(net: Any, folder: Path, number: int) -> None:
    """Take this process's part of the weights from a checkpoint."""
    found = load_file(folder / _weights(number))
    parts = own(net)
    assert found.keys() == parts.keys()
    for name, part in parts.items():
        part.copy_(found[name])


def load_moments(optimizer: Any, folder: Path, number: int) -> None:
    """Take this process's part of the optimizer's state from a checkpoint."""
    found = torch.load(folder / _moments(number), map_location="cpu", weights_only=True)
    for saved, group in zip(found["param_groups"], optimizer.param_groups, strict=True):
        for index, p in zip(saved["params"], group["params"], strict=True):
            if index in found["state"]:
                found["state"][index] = {
                    name: _divided(value, p) for name, value in found["state"][index].items()
                }
    optimizer.load_state_dict(found)


def _weights(number: int) -> str:
    return f"weights_{number}.safetensors"


def _moments(number: int) -> str:
    return f"optimizer_{number}.pt"


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _divided(value: Any, like: DTensor) -> Any:
    """A part of a state as the part of a whole that is divided as `like` is; counts of steps are not divided."""
    if not isinstance(value, torch.Tensor) or not value.ndim:
        return value
    return DTensor.from_local(
        value.to(like.device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


# --- the whole


def whole(net: Any, frame: Any, full: Callable[[Any], torch.Tensor], *, here: bool) -> Any:
    """All weights put together in the frame, on the CPU, where they are wanted `here`. All processes have to come.

    `full` gives all of a weight.
    """
    for p, empty in zip(net.parameters(), frame.parameters(), strict=True):
        value = full(p).detach()
        if here and empty.is_meta:
            filled = torch.nn.Parameter(value.to("cpu", empty.dtype), requires_grad=empty.requires_grad)
            torch.utils.swap_tensors(empty, filled)  # so that weights that are one stay one
    return frame.cpu() if here else None


def full(p: torch.nn.Parameter) -> torch.Tensor:
    """All of a weight that `divide` has divided."""
    return p.full_tensor() if isinstance(p, DTensor) else p
