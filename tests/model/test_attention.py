"""One-token attention against the library's own, and in whole models."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from textgen_cli.config import ModelConfig
from textgen_cli.events import silent
from textgen_cli.model import attention
from textgen_cli.model.load import load
from textgen_cli.model.past import CACHE

HEADS = [(9, 3), (4, 4), (8, 1)]


def parts(heads: int, shared: int, rows: int, length: int, queries: int = 1) -> tuple[Any, ...]:
    torch.manual_seed(heads * length)
    query = torch.randn(rows, heads, queries, 16)
    key, value = torch.randn(2, rows, shared, length, 16)
    module: Any = SimpleNamespace(num_key_value_groups=heads // shared, is_causal=True)
    return module, query, key, value


def masks(rows: int, heads: int, length: int) -> dict[str, torch.Tensor | None]:
    seen = torch.arange(length)[None, :] >= torch.arange(rows)[:, None]  # rows padded on the left
    bool_mask = seen[:, None, None, :]
    return {
        "none": None,
        "bool": bool_mask,
        "float": torch.where(bool_mask, 0.0, torch.finfo(torch.bfloat16).min).bfloat16(),
        "by head": (torch.randn(rows, heads, 1, length)).bfloat16(),
    }


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "by head"])
@pytest.mark.parametrize("length", [1, 7, 100])
@pytest.mark.parametrize(("heads", "shared"), HEADS)
def test_bfloat16_is_as_near_to_the_truth_as_sdpa(
    heads: int, shared: int, length: int, kind: str, scaling: float | None
) -> None:
    rows = min(3, length)
    module, query, key, value = (
        part if i == 0 else part.bfloat16() for i, part in enumerate(parts(heads, shared, rows, length))
    )
    mask = masks(rows, heads, length)[kind]
    wide = mask if mask is None or mask.dtype == torch.bool else mask.float()
    truth, _ = sdpa_attention_forward(
        module, query.float(), key.float(), value.float(), wide, scaling=scaling
    )
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)
    mine, _ = attention.attend(module, query, key, value, mask, scaling=scaling)
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
    error, allowed = (mine.float() - truth).abs().mean(), (theirs.float() - truth).abs().mean()
    assert error <= 1.1 * allowed + 1e-6


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize(("heads", "shared"), HEADS)
def test_everything_else_is_the_librarys(heads: int, shared: int, queries: int) -> None:
    module, query, key, value = parts(heads, shared, 2, 12, queries)
    theirs, _ = sdpa_attention_forward(module, query, key, value, None)
    mine, _ = attention.attend(module, query, key, value, None)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("architecture", "dtype", "used"),
    [("llama", "bfloat16", True), ("gpt2", "bfloat16", True), ("llama", "float32", False)],
)
def test_models_on_the_cpu_in_bfloat16_use_it(
    small_model: Callable[..., Path], architecture: str, dtype: Any, used: bool
) -> None:
    model = load(
        ModelConfig(model=str(small_model(architecture)), device="cpu", dtype=dtype), "generate", silent
    )
    assert (model.net.config._attn_implementation == attention.NAME) is used


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_step_by_step_equals_all_at_once(small_model: Callable[..., Path], architecture: str) -> None:
    """With padding, over a cache: the next token's logits are as near to float32's as sdpa's in one pass."""
    folder = small_model(architecture)
    half = load(ModelConfig(model=str(folder), device="cpu", dtype="bfloat16"), "generate", silent).net
    full = load(ModelConfig(model=str(folder), device="cpu", dtype="float32"), "generate", silent).net
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.copy_(parameter.bfloat16())
    ids = torch.arange(20, 60).view(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    if architecture == "t5":
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        steps, key = ids, "decoder_input_ids"
    else:
        given, steps, key = {}, ids, "input_ids"
    cache = None
    with torch.inference_mode():
        for at in range(20):
            seen = {} if architecture == "t5" else {"attention_mask": mask[:, : at + 1]}
            out = half(**given, **seen, **{key: steps[:, at : at + 1]}, use_cache=True, **{CACHE: cache})
            cache = out[CACHE]
        half.set_attn_implementation("sdpa")
        seen = {} if architecture == "t5" else {"attention_mask": mask}
        whole = half(**given, **seen, **{key: steps}).logits[:, -1]
        truth = full(**given, **seen, **{key: steps}).logits[:, -1]
    assert (out.logits[:, -1] - truth).abs().mean() <= 1.5 * (whole - truth).abs().mean() + 1e-3
