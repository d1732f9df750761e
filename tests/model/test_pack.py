"""Packed weights against torch's own linear layers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from textgen_cli.config import ModelConfig
from textgen_cli.events import silent
from textgen_cli.model import device, pack
from textgen_cli.model.load import load

needs_bfloat16 = pytest.mark.skipif(
    not device.cpu_has_bfloat16(), reason="this CPU has no bfloat16 arithmetic"
)


@needs_bfloat16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 300])
def test_a_packed_layer_gives_the_products_of_a_plain_one(rows: int, bias: bool) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(96, 160, bias=bias).bfloat16().eval()
    packed = pack.PackedLinear(layer)
    x = torch.randn(3, rows, 96).bfloat16()
    with torch.inference_mode():
        exact = nn.Linear(96, 160, bias=bias).double()
        exact.load_state_dict(layer.state_dict())
        got, wanted = packed(x), exact(x.double())
    assert got.shape == (3, rows, 160)
    assert got.dtype == torch.bfloat16
    # Half a step of bfloat16's eight bits, and float32's own sums.
    assert torch.allclose(got.double(), wanted, rtol=2**-8, atol=1e-3)


@needs_bfloat16
@pytest.mark.parametrize("architecture", ["llama", "t5", "bert"])
def test_a_network_on_a_cpu_in_bfloat16_is_packed(
    small_model: Callable[[str], Path], architecture: str
) -> None:
    folder = str(small_model(architecture))
    net = load(ModelConfig(model=folder, dtype="bfloat16", device="cpu"), "generate", silent).net
    kinds = {type(module) for module in net.modules()}
    assert pack.PackedLinear in kinds
    assert nn.Linear not in kinds
    assert net.get_output_embeddings().weight.shape[0] >= 100 or architecture == "bert"


def test_a_network_in_float32_is_left_alone(small_model: Callable[[str], Path]) -> None:
    net = load(
        ModelConfig(model=str(small_model("llama")), dtype="float32", device="cpu"), "generate", silent
    ).net
    assert pack.PackedLinear not in {type(module) for module in net.modules()}
