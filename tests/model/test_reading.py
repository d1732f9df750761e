"""Weights read piece by piece are those that the safetensors library reads, bit for bit."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from textgen_cli.errors import ModelError
from textgen_cli.model import reading

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {f"{kind}": torch.randn(7, 5).mul(9).to(kind) for kind in (*FLOATS, *WHOLE, *EIGHT_BITS)}
    tensors |= {
        "number": torch.tensor(3.5),
        "nothing": torch.empty(0, 4),
        "pieces": torch.randn(2 * reading._PIECE + 3),
        "not numbers": torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-45, -0.0]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_dtype_and_shape_is_read_as_the_library_reads_it(file: Path, dtype: torch.dtype) -> None:
    found, expected = dict(reading.tensors([file], dtype)), load_file(file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        wanted = tensor.to(dtype) if tensor.dtype == torch.float32 else tensor
        assert (found[name].dtype, found[name].shape) == (wanted.dtype, wanted.shape), name
        assert bits(found[name]) == bits(wanted), name


def test_the_dtypes_of_a_file(file: Path) -> None:
    assert reading.dtypes([file]) == {*FLOATS, *WHOLE, *EIGHT_BITS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_is_cut_while_it_is_read_is_an_error(file: Path, dtype: torch.dtype) -> None:
    tensors = reading.tensors([file], dtype)
    next(tensors)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ModelError, match=r"ends [\d,]+ bytes too early") as caught:
        list(tensors)
    assert caught.value.name == "E-TRUNCATED"
