"""Weights in 8 or 4 bits, made in memory after loading or read from a folder of ours; activations keep their dtype.

Owns the formats, the layer that computes with them, and what config.json says of a folder that has them. Such a
folder holds the codes in plain order; that of a processor's kernels is made when it is loaded. On a CPU torch's own
kernels multiply the packed weights in bfloat16, where that is the dtype or rounding to it is allowed; everywhere else
a layer is turned back block by block while it is used, which saves memory and not time. Codes do not learn, but pass
gradients on to what learns beside them: QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314). It does not
know how a model is loaded.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from textgen_cli.errors import ModelError
from textgen_cli.events import Notice, Report
from textgen_cli.model import device

Format = Literal["int8", "int4"]
# How a layer multiplies: by torch's kernels where there are any, as a matrix product of weights that are turned back,
# or, for a compiler that makes one loop of it, as a sum over plain products.
Way = Literal["kernel", "turned back", "sum"]

METHOD = "textgen"  # quant_method in config.json
GROUP = 32  # int4: neighbours in a row that share a scale and an offset; 64 loses more than the 6 % it saves
# Rows that the int4 kernels keep together: a matrix packed in parts of so many is packed as a whole.
TILE = 64
BLOCK = 1 << 20  # weights made or turned back at once
# Up to so many rows of activations the int8 kernel is faster than turning weights back for a matrix product.
KERNEL_ROWS = 16


class QuantizedLinear(nn.Module):
    """y = x W^T + b, W (N, K) in int8 with a scale a row, or in int4 with a scale and an offset a group."""

    weight: torch.Tensor  # int8: (N, K); int4: (N, K/2), in the kernel's order where there is one
    scale: torch.Tensor  # int8: (N,); int4: (K/GROUP, N, 2) of scales and offsets
    bias: torch.Tensor | None

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, form: Format, *, arranged: bool = True
    ) -> None:
        super().__init__()
        self.kind: type[nn.Linear | Conv1D] = nn.Linear  # what it stands in the place of
        self.out_features, self.in_features = weight.shape
        self.form = form
        self.way: Way = "kernel"
        self.kernel = False
        quantize = self._int8 if form == "int8" else self._int4
        parts = [quantize(weight[rows]) for rows in self._blocks()]
        self.register_buffer("weight", torch.cat([part for part, _ in parts]))
        self.register_buffer(
            "scale", torch.cat([scale for _, scale in parts], dim=0 if form == "int8" else 1)
        )
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        if arranged:
            self.arrange()
        else:
            self.weight = self.weight[None]  # (1, N, ...): no other program can take the codes for weights

    def arrange(self, *, kernels: bool = True, rounds: bool = False) -> None:
        """Bring the codes into an order to compute with: of the kernels where there are some for this place and dtype,
        which know no gradient. `rounds`: products may be rounded to bfloat16, which the kernels compute in."""
        if self.weight.dim() == 3:
            self.weight = self.weight[0]
        fast = self.weight.device.type == "cpu" and (rounds or self.scale.dtype == torch.bfloat16)
        if self.kernel or not (fast and kernels) or (self.form == "int4" and self.out_features % TILE):
            return
        if self.form == "int4":
            pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
            packed = [pack(self._codes(rows).to(torch.int32), 1) for rows in self._blocks()]
            self.weight = torch.cat(packed).view(torch.int8)
        self.kernel = True
        if (
            self.scale.dtype != torch.bfloat16
        ):  # for the kernels; else a compiler would take it for other numbers
            self.narrow = self.scale.bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N), in the dtype of x, or in that of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        flat = x.reshape(-1, self.in_features).contiguous()  # or the kernels refuse rows that lie apart
        y: torch.Tensor
        if not self.kernel and flat.requires_grad and torch.is_grad_enabled():
            y = _Product.apply(flat, self)  # type: ignore[no-untyped-call]  # torch's
        elif self.kernel and self.form == "int4" and self.way != "turned back":
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                flat.bfloat16(), self.weight.view(torch.uint8), GROUP, self._narrow()
            ).to(flat.dtype)
        elif self.way == "sum" and self.form == "int8":
            y = self._summed(flat)
        elif self.kernel and self.way == "kernel" and flat.shape[0] <= KERNEL_ROWS:
            y = torch.ops.aten._weight_int8pack_mm(flat.bfloat16(), self.weight, self._narrow()).to(
                flat.dtype
            )
        else:
            y = self._turned_back(flat)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def _narrow(self) -> torch.Tensor:
        return self.scale if self.scale.dtype == torch.bfloat16 else self.narrow

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.form}"

    def dense(self) -> nn.Linear | Conv1D:
        """The layer that it stands for with the weights that its codes mean; not for codes in a kernel's order."""
        weight = torch.cat([self._meant(rows) for rows in self._blocks()])  # (N, K)
        with torch.device("meta"):
            plain = self.kind is nn.Linear
            found = nn.Linear(*weight.shape[::-1]) if plain else Conv1D(*weight.shape)
        found.weight = nn.Parameter(weight if plain else weight.t().contiguous())
        found.register_parameter("bias", None if self.bias is None else nn.Parameter(self.bias))
        return found

    def _blocks(self) -> Iterator[slice]:
        step = max(TILE, BLOCK // self.in_features // TILE * TILE)
        for start in range(0, self.out_features, step):
            yield slice(start, start + step)

    def _int8(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = (weight.float().abs().amax(dim=1) / 127).clamp_min(1e-8).to(weight.dtype)
        # Divided by the scale as it is stored, so that its own rounding costs nothing.
        return (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale

    def _int4(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        groups = weight.float().view(weight.shape[0], -1, GROUP)  # (n, K/GROUP, GROUP)
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        scale = ((high - low) / 15).clamp_min(1e-8).to(weight.dtype)
        offset = (low + 8 * scale.float()).to(weight.dtype)  # what 8 means
        codes = ((groups - offset.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)
        codes = codes.view_as(weight).to(torch.uint8)
        packed = codes[:, 0::2] | codes[:, 1::2] << 4
        return packed.view(torch.int8), torch.stack([scale, offset], dim=2).transpose(0, 1).contiguous()

    def _summed(self, flat: torch.Tensor) -> torch.Tensor:
        """(M, K) -> (M, N) by int8, each sum in float32."""
        products = flat.float()[:, None] * self.weight.float()  # (M, N, K), which no compiler keeps
        return (products.sum(dim=-1) * self.scale.float()).to(flat.dtype)

    def _turned_back(self, flat: torch.Tensor) -> torch.Tensor:
        y = flat.new_empty(flat.shape[0], self.out_features)
        if self.kernel and self.way == "kernel" and not device.cpu_has_bfloat16():
            flat = flat.float()  # such a CPU multiplies matrices five times as fast so
        for rows in self._blocks():
            if self.form == "int8":
                y[:, rows] = nn.functional.linear(flat, self.weight[rows].to(flat.dtype)) * self.scale[rows]
            else:
                y[:, rows] = nn.functional.linear(flat, self._plain(rows).to(flat.dtype))
        return y

    def _gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """(M, N) -> (M, K): of the inputs, from that of the outputs; sums of blocks in float32."""
        found = grad.new_zeros(grad.shape[0], self.in_features, dtype=torch.float32)
        for rows in self._blocks():
            if self.form == "int8":
                found += (grad[:, rows] * self.scale[rows]) @ self.weight[rows].to(grad.dtype)
            else:
                found += grad[:, rows] @ self._plain(rows).to(grad.dtype)
        return found.to(grad.dtype)

    def _meant(self, rows: slice) -> torch.Tensor:
        """Rows of the weights, (n, K), in the dtype of the scales; not in a kernel's order."""
        return (
            self._plain(rows)
            if self.form == "int4"
            else self.weight[rows].to(self.scale.dtype) * self.scale[rows, None]
        )

    def _plain(self, rows: slice) -> torch.Tensor:
        """int4: rows of the weights; from a kernel's order they come rounded to bfloat16."""
        if self.kernel:
            unit = torch.eye(self.in_features, dtype=torch.bfloat16)
            scale = self.scale[:, rows].bfloat16().contiguous()
            found: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                unit, self.weight[rows].view(torch.uint8), GROUP, scale
            )
            return found.t()
        codes = self._codes(rows)
        codes = codes.view(codes.shape[0], -1, GROUP)
        scale, offset = self.scale[:, rows].transpose(0, 1)[..., None].unbind(dim=2)  # (n, K/GROUP, 1) each
        return ((codes.to(scale.dtype) - 8) * scale + offset).view(codes.shape[0], -1)

    def _codes(self, rows: slice) -> torch.Tensor:
        """int4 that is not in a kernel's order: the codes of rows, (n, K) from 0 to 15."""
        packed = self.weight[rows].view(torch.uint8)
        return torch.stack([packed & 15, packed >> 4], dim=2).view(packed.shape[0], -1)


class _Product(torch.autograd.Function):
    """x W^T with a gradient for x alone: weights are turned back once more for it, so that none is kept till then."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer._turned_back(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer._gradient(grad), None


def apply(net: Any, form: Format, name: str, report: Report, but: Collection[str] = ()) -> None:
    """Replace the linear layers of a network, its head included, by quantised ones; one layer at a time.

    Embedding tables stay as they are, as do layers named in `but`; a head that shares its table gets a quantised copy.
    The codes are as in a folder: `arrange` is to follow. Raises ModelError E-QUANTIZE where the weights are quantised
    already or there is no linear layer.
    """
    if getattr(net.config, "quantization_config", None) is not None:
        raise ModelError("E-QUANTIZE", name, "comes with quantised weights already", hint="drop --quantize")
    before = _bytes(net)
    made = _replace(net, form, but)
    if not made:
        raise ModelError("E-QUANTIZE", name, "has no linear layer that could be quantised")
    wide = sum(layer.form != form for layer in made)
    kept = f", {wide} of them in int8 since their width is no multiple of {GROUP}" if wide else ""
    report(
        Notice(
            f"{name}: {len(made)} layers in {form}{kept}; {before / 1e6:,.0f} -> {_bytes(net) / 1e6:,.0f} MB"
        )
    )


def _replace(net: Any, form: Format, but: Collection[str] = ()) -> list[QuantizedLinear]:
    """Put a quantised layer in the place of each linear one; on the device "meta" they hold nothing yet."""
    made = []
    for path in [path for path, module in net.named_modules() if type(module) in (nn.Linear, Conv1D)]:
        parent, _, child = path.rpartition(".")
        if child in but:
            continue
        owner = net.get_submodule(parent)
        layer = getattr(owner, child)
        weight = layer.weight.detach() if type(layer) is nn.Linear else layer.weight.detach().t().contiguous()
        fits = form == "int8" or weight.shape[1] % GROUP == 0
        made.append(QuantizedLinear(weight, layer.bias, form if fits else "int8", arranged=False).eval())
        made[-1].kind = type(layer)
        setattr(owner, child, made[-1])
    return made


def layers(net: Any) -> dict[str, QuantizedLinear]:
    """The quantised layers of a network by name."""
    return {name: module for name, module in net.named_modules() if isinstance(module, QuantizedLinear)}


def stood_for(net: Any) -> int:
    """How many parameters the codes of a network stand for, with the biases beside them."""
    found = layers(net).values()
    return sum(one.out_features * (one.in_features + (one.bias is not None)) for one in found)


def restore(net: Any) -> None:
    """Put plain layers in the place of all quantised ones, with the weights that their codes mean."""
    for path, layer in layers(net).items():
        parent, _, child = path.rpartition(".")
        setattr(net.get_submodule(parent), child, layer.dense())
    for owner, name in ((net, "hf_quantizer"), (net, "is_quantized"), (net.config, "quantization_config")):
        if name in vars(owner):
            delattr(owner, name)


# --- folders with quantised weights


def settings(form: Format) -> dict[str, Any]:
    """What config.json says of a folder with weights in this format.

    Plain transformers skips a method it does not know; it refuses the folder for the shape of its tensors.
    """
    return {"quant_method": METHOD, "form": form, "group": GROUP}


def form_of(config: Mapping[str, Any]) -> Format | None:
    """The format of a folder of ours, by its config.json; None for other models. ModelError E-QUANTIZATION."""
    found = config.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        return None
    if found.get("form") not in get_args(Format) or found.get("group") != GROUP:
        raise ModelError("E-QUANTIZATION", "config.json", "its quantised weights are of another version")
    form: Format = found["form"]
    return form


def arrange(net: Any, *, kernels: bool = True, rounds: bool = False) -> None:
    """Bring the codes of a network into an order to compute with; without `kernels` gradients pass through it.

    `rounds`: products of float32 may be rounded to bfloat16.
    """
    for layer in layers(net).values():
        layer.arrange(kernels=kernels, rounds=rounds)


@register_quantization_config(METHOD)
class _Config(QuantizationConfigMixin):
    """How transformers reads `settings`."""

    def __init__(self, form: Format = "int8", group: int = GROUP, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.form, self.group = form, group


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):
    """How transformers makes room for quantised weights before it reads them."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        config: Any = self.quantization_config
        _replace(model, config.form)
        for target in list(model.all_tied_weights_keys):  # a quantised head shares no table
            if isinstance(model.get_submodule(target.rpartition(".")[0]), QuantizedLinear):
                del model.all_tied_weights_keys[target]

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True  # beside them; the library asks it only of those that have an adapter


def _bytes(net: Any) -> int:
    tensors = [*net.parameters(), *net.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
