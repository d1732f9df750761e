"""Quantised layers against a float32 product with the weights that they mean, then whole models."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from textgen_cli.config import DecodingConfig, ModelConfig
from textgen_cli.errors import ModelError
from textgen_cli.events import Event, Notice, silent
from textgen_cli.generate import sampling
from textgen_cli.generate.local import LocalEngine
from textgen_cli.generate.request import Request, derive_seed
from textgen_cli.model import quantize
from textgen_cli.model.load import Model, load
from textgen_cli.model.pack import PackedLinear
from textgen_cli.model.quantize import GROUP, QuantizedLinear

FORMATS: list[quantize.Format] = ["int8", "int4"]
avx = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="this CPU has no kernels for codes"
)


def layer_of(
    n: int, k: int, form: quantize.Format, dtype: torch.dtype, bias: bool = False
) -> tuple[torch.Tensor, QuantizedLinear]:
    torch.manual_seed(n + k)
    weight = (torch.randn(n, k) * torch.rand(n, 1)).to(dtype)
    return weight, QuantizedLinear(weight, torch.randn(n).to(dtype) if bias else None, form)


def meant(layer: QuantizedLinear) -> torch.Tensor:
    """The weights of a layer in float32, from its codes alone, written for the test: slow and plain."""
    n, k, scale = layer.out_features, layer.in_features, layer.scale.float()
    if layer.form == "int8":
        return layer.weight.float() * scale[:, None]
    assert not layer.kernel
    weight = torch.empty(n, k)
    for row in range(n):
        for column in range(k):
            byte = int(layer.weight[row, column // 2]) & 255
            code = byte >> 4 if column % 2 else byte & 15
            size, offset = scale[column // GROUP, row].tolist()
            weight[row, column] = (code - 8) * size + offset
    return weight


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("form", FORMATS)
def test_float32_is_the_product_with_the_weights_meant(form: quantize.Format, rows: int, bias: bool) -> None:
    _, layer = layer_of(24, 96, form, torch.float32, bias)
    x = torch.randn(2, rows, 96)
    expected = x @ meant(layer).T + (layer.bias if layer.bias is not None else 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert layer(x).shape == (2, rows, 24)


@pytest.mark.parametrize("rows", [1, 8, quantize.KERNEL_ROWS, quantize.KERNEL_ROWS + 1, 64])
@pytest.mark.parametrize(("n", "k"), [(128, 96), (192, 64), (72, 96), (1, 32), (65, 160)])
@pytest.mark.parametrize("form", FORMATS)
def test_bfloat16_is_near_the_float32_product(form: quantize.Format, n: int, k: int, rows: int) -> None:
    """The kernels and the plain path: an error of bfloat16's rounding, whatever the codes."""
    weight, layer = layer_of(n, k, form, torch.bfloat16, bias=True)
    x = torch.randn(rows, k).bfloat16()
    assert layer.bias is not None
    expected = x.float() @ plain_of(weight, form).T + layer.bias.float()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).float(), expected, rtol=2e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_lie_apart_are_multiplied(form: quantize.Format, dtype: torch.dtype) -> None:
    _, layer = layer_of(128, 96, form, dtype, bias=False)
    layer.arrange(rounds=True)
    x = torch.randn(5, 3, 96, dtype=dtype)[:, -1]
    assert not x.is_contiguous()
    assert torch.equal(layer(x), layer(x.contiguous()))


@avx
@pytest.mark.parametrize("form", FORMATS)
def test_kernels_round_float32_where_they_may(form: quantize.Format) -> None:
    """By what rounding both sides of a product to bfloat16 costs, and no more."""
    _, exact = layer_of(128, 96, form, torch.float32, bias=True)
    rounded = copy.deepcopy(exact)
    rounded.arrange(rounds=True)
    assert rounded.kernel and not exact.kernel
    for rows in (1, quantize.KERNEL_ROWS, 40):
        x = torch.randn(rows, 96)
        found, expected = rounded(x), exact(x)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=5e-3 * float(expected.abs().max()))


@avx
@pytest.mark.parametrize("form", FORMATS)
def test_a_cpu_without_bfloat16_multiplies_codes_by_kernels_unless_float32_is_asked_for(
    small_model: Callable[..., Path], form: quantize.Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("textgen_cli.model.device.cpu_has_bfloat16", lambda: False)
    chosen, asked = (
        loaded(small_model("llama"), quantize=form, dtype=dtype) for dtype in ("auto", "float32")
    )
    assert chosen.placement.dtype == asked.placement.dtype == torch.float32
    assert "products with codes in bfloat16" in str(chosen.placement)
    assert "bfloat16" not in str(asked.placement)
    assert any(layer.kernel for layer in quantize.layers(chosen.net).values())
    assert not any(layer.kernel for layer in quantize.layers(asked.net).values())
    ids = torch.arange(20, 32).view(2, 6)
    with torch.inference_mode():
        found, expected = chosen.net(ids).logits, asked.net(ids).logits
    assert float((found - expected).abs().max()) < 0.03 * float(expected.std())


def through(layer: Any) -> torch.Tensor:
    """The weights (N, K) that a layer computes with, in float32: what it makes of the unit matrix."""
    unit = torch.eye(layer.in_features, dtype=layer.scale.dtype)
    found: torch.Tensor = layer(unit).T.float()
    return found if layer.bias is None else found - layer.bias.float()[:, None]


def plain_of(weight: torch.Tensor, form: quantize.Format) -> torch.Tensor:
    """What a bfloat16 layer should mean, computed by the definition of its format."""
    wide = weight.float()
    if form == "int8":
        scale = (wide.abs().amax(1, keepdim=True) / 127).bfloat16().float()
        return (wide / scale).round().clamp(-127, 127) * scale
    groups = wide.view(wide.shape[0], -1, GROUP)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((high - low) / 15).bfloat16().float()
    offset = (low + 8 * scale).bfloat16().float()
    return (((groups - offset) / scale).round().clamp(-8, 7) * scale + offset).view_as(wide)


@pytest.mark.parametrize(("form", "steps"), [("int8", 127 * 2), ("int4", 15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_is_off_by_more_than_half_a_step(
    form: quantize.Format, steps: int, dtype: torch.dtype
) -> None:
    weight, layer = layer_of(128, 96, form, dtype)
    span = (
        weight.float().amax(1) - weight.float().amin(1)
        if form == "int4"
        else 2 * weight.float().abs().amax(1)
    )
    error = (through(layer) - weight.float()).abs().amax(1)
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-5
    assert (error <= span / steps * 0.51 + rounding * weight.float().abs().amax(1)).all()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_made_in_blocks_is_the_same(
    form: quantize.Format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = layer_of(256, 96, form, dtype)
    monkeypatch.setattr(quantize, "BLOCK", 1)
    _, parts = layer_of(256, 96, form, dtype)
    assert len(list(parts._blocks())) == 4
    assert whole.weight.equal(parts.weight) and whole.scale.equal(parts.scale)
    x = torch.randn(40, 96).to(dtype)
    torch.testing.assert_close(whole(x), parts(x))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_and_zero_weights_stay(form: quantize.Format, dtype: torch.dtype) -> None:
    weight = torch.zeros(64, 64)
    weight[1] = 0.5
    found = through(QuantizedLinear(weight.to(dtype), None, form))
    torch.testing.assert_close(found, weight, rtol=5e-3, atol=1e-6)


# --- gradients, for what learns beside the codes


def learning(form: quantize.Format, dtype: torch.dtype) -> QuantizedLinear:
    """A layer with its codes in plain order."""
    torch.manual_seed(0)
    weight = (torch.randn(192, 96) * torch.rand(192, 1)).to(dtype)
    layer = QuantizedLinear(weight, torch.randn(192).to(dtype), form, arranged=False)
    layer.arrange(kernels=False)
    return layer


@pytest.mark.parametrize("form", FORMATS)
def test_a_layer_turned_back_has_the_weights_meant(form: quantize.Format) -> None:
    layer = learning(form, torch.float32)
    plain = layer.dense()
    assert type(plain) is nn.Linear and (plain.in_features, plain.out_features) == (96, 192)
    torch.testing.assert_close(plain.weight.detach(), meant(layer), rtol=0, atol=1e-6)
    assert layer.bias is not None and plain.bias.equal(layer.bias)
    layer.kind = Conv1D
    turned = layer.dense()
    assert type(turned) is Conv1D
    x = torch.randn(3, 96)
    torch.testing.assert_close(turned(x), plain(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("form", FORMATS)
def test_outputs_and_gradients_are_those_of_the_plain_product(
    form: quantize.Format, dtype: torch.dtype, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in float32 with the very weights; in bfloat16 an error of its rounding (2**-8) of the largest value."""
    monkeypatch.setattr(quantize, "BLOCK", 1)
    layer = learning(form, dtype)
    weight, bias = layer.dense().weight.detach().float(), layer.bias
    assert bias is not None and len(list(layer._blocks())) == 3
    x = torch.randn(2, 5, 96).to(dtype).requires_grad_()
    exact = x.detach().float().requires_grad_()
    y, expected = layer(x), exact @ weight.T + bias.float()
    wanted = torch.randn_like(expected)
    y.backward(wanted.to(dtype))
    expected.backward(wanted)
    assert x.grad is not None and exact.grad is not None and x.grad.dtype == y.dtype == dtype
    for found, true in ((y.detach(), expected.detach()), (x.grad, exact.grad)):
        torch.testing.assert_close(found.float(), true, rtol=0, atol=near * float(true.abs().max()))


@pytest.mark.parametrize("form", FORMATS)
def test_no_weight_is_kept_for_the_way_back(form: quantize.Format) -> None:
    layer, kept = learning(form, torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.shape), lambda one: one):
        layer(torch.randn(5, 96, requires_grad=True))
    assert kept == []


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_is_obeyed(grad: bool) -> None:
    layer = learning("int4", torch.bfloat16)
    x = torch.randn(5, 96, requires_grad=grad)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, layer(x.bfloat16()), rtol=0, atol=0)
    if grad:
        y.float().sum().backward()
        assert x.grad is not None and x.grad.dtype == torch.float32


def test_the_bytes_are_those_of_the_format() -> None:
    sizes = {}
    for form in FORMATS:
        _, layer = layer_of(256, 512, form, torch.bfloat16)
        sizes[form] = sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
    assert sizes == {"int8": 256 * 512 + 2 * 256, "int4": 256 * 512 // 2 + 256 * 512 // GROUP * 4}


# --- whole models


def loaded(folder: Path, report: Any = silent, **settings: Any) -> Model:
    return load(ModelConfig(model=str(folder), device="cpu", **settings), "generate", report)


def linear(net: Any) -> list[str]:
    return [name for name, module in net.named_modules() if type(module) in (nn.Linear, Conv1D)]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5", "bert"])
def test_every_linear_layer_is_replaced_and_said(
    small_model: Callable[..., Path], architecture: str, form: quantize.Format
) -> None:
    events: list[Event] = []
    folder = small_model(architecture)
    before, after = loaded(folder).net, loaded(folder, events.append, quantize=form).net
    assert not linear(after)
    assert not any(isinstance(module, PackedLinear) for module in after.modules())
    layers = [module for module in after.modules() if isinstance(module, QuantizedLinear)]
    said = [event.text for event in events if isinstance(event, Notice) and f"layers in {form}" in event.text]
    assert len(said) == 1 and f"{len(layers)} layers" in said[0]
    narrow = [layer for layer in layers if layer.form != form]
    assert all(layer.in_features % GROUP for layer in narrow)
    assert (f"{len(narrow)} of them in int8" in said[0]) is bool(narrow)
    assert after.get_input_embeddings().weight.equal(before.get_input_embeddings().weight)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
def test_greedy_text_is_that_of_the_weights_meant(
    small_model: Callable[..., Path], architecture: str, form: quantize.Format
) -> None:
    folder = small_model(architecture)
    quantised, meaning = (loaded(folder, dtype="float32", quantize=form), loaded(folder, dtype="float32"))
    for name in linear(meaning.net):
        layer, found = meaning.net.get_submodule(name), quantised.net.get_submodule(name)
        weight = through(found)
        layer.weight = nn.Parameter(weight.T.contiguous() if type(layer) is Conv1D else weight)
    prompts = ["Once upon a time", "Numbers such as 1, 2, 3"]
    requests = [Request(i, 0, prompt, None, derive_seed(0, i, 0)) for i, prompt in enumerate(prompts)]
    texts = []
    for model in (quantised, meaning):
        engine = LocalEngine(
            model, sampling.plan(DecodingConfig(greedy=True, max_new_tokens=24), model, silent)
        )
        texts.append("".join(chunk.text for chunk in engine.stream(requests)))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("form", FORMATS)
def test_bfloat16_models_generate(small_model: Callable[..., Path], form: quantize.Format) -> None:
    model = loaded(small_model("llama"), dtype="bfloat16", quantize=form)
    full = loaded(small_model("llama"), dtype="float32").net
    ids = torch.arange(20, 60).view(2, 20)
    with torch.inference_mode():
        found, expected = model.net(ids).logits.float(), full(ids).logits
    assert found.isfinite().all()
    similarity = torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    assert similarity > 0.98


def test_what_is_quantised_already_is_refused(small_model: Callable[..., Path]) -> None:
    net = loaded(small_model("llama")).net
    net.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(ModelError, match="E-QUANTIZE"):
        quantize.apply(net, "int8", "small", silent)


def test_a_network_without_linear_layers_is_refused(small_model: Callable[..., Path]) -> None:
    net = loaded(small_model("llama"), quantize="int8").net
    with pytest.raises(ModelError, match="E-QUANTIZE"):
        quantize.apply(net, "int8", "small", silent)
