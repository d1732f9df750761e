"""Compiles a decoder-only network ahead of time: three graphs of native code that share its weights.

Takes whatever transformers can export by its own modules: the past and the attention are ours, through its
interfaces, and there is no code for an architecture. What comes out is proved against the network it was made of.
How it is found and run stands in compiled.py.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import eager_mask

from textgen_cli.config import ModelConfig
from textgen_cli.errors import ModelError, OutOfMemory, UsageError
from textgen_cli.events import Progress, Report
from textgen_cli.model import cache, device
from textgen_cli.model.compiled import (
    FACTS,
    GRAPHS,
    PROMPT,
    STEP,
    TOGETHER,
    TOKENIZER,
    WEIGHTS,
    folder_of,
    names_of,
    past_of,
    runner_of,
)
from textgen_cli.model.load import Model, load
from textgen_cli.model.past import CACHE, is_plain
from textgen_cli.model.plain_tokenizer import facts_of
from textgen_cli.model.prove import prove
from textgen_cli.model.quantize import GROUP, QuantizedLinear

NAME = "textgen_compiled"  # of the attention below

# What the compiler and the exporter raise for a network that they cannot take.
_REFUSALS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    NotImplementedError,
    AssertionError,
)


def compile_model(config: ModelConfig, report: Report) -> Path:
    """The folder of a model's compiled form in the cache; made, proved and published where it is not there yet.

    Raises UsageError (E-COMPILER, E-CONFLICT), ModelError E-COMPILE where the network cannot be compiled or the
    proof fails, and what `load` and `cache.publish` raise. Nothing is left of an attempt that fails.
    """
    placement = device.place(config, "generate")
    if placement.device.type != "cpu":
        raise UsageError(
            "E-COMPILER", f"--device {placement.device}", "compiled models run on the CPU so far"
        )
    if config.adapter:
        raise UsageError("E-CONFLICT", "--adapter", "cannot be compiled; merge it first")
    _need_compiler()
    target = folder_of(config, placement, report)
    with cache.publish(target, report=report, origin={"name": config.model, "kind": "compiled"}) as staging:
        if staging is not None:
            model = load(config, "generate", report, hasten=False)
            _fill(staging, model, report)
            prove(staging, model, report)
    return target


def _need_compiler() -> None:
    # Both cost a second; the second is imported by threads of the compiler at once, which it does not survive.
    import torch.utils.cpp_extension  # noqa: F401
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        hint = "install g++ or clang++, or name one in CXX"
        raise UsageError("E-COMPILER", "--compile", "no C++ compiler was found", hint=hint) from error


def _fill(folder: Path, model: Model, report: Report) -> None:
    """Write graphs, weights, tokenizer and facts."""
    net, name = model.net, model.name
    if model.family != "causal" or not is_plain(DynamicCache(config=net.config)):
        raise ModelError(
            "E-COMPILE", name, "only decoders whose every layer sees the whole past are compiled"
        )
    if model.tokenizer.fast is None:
        raise ModelError("E-COMPILE", name, "its tokenizer is not one of tokenizers")
    shapes = _shapes(net)
    with _own_attention(net, name):
        constants: dict[str, torch.Tensor] = {}
        for graph in GRAPHS:
            report(Progress("compile", f"{name}: {graph}"))
            constants |= _graph(graph, net, shapes, folder / f"{graph}.so", name)
    stored = _save(constants, folder / WEIGHTS)
    (folder / TOKENIZER).write_text(model.tokenizer.fast.to_str(), "utf-8")
    facts = {
        "name": name,
        "revision": model.revision,
        "context": model.context,
        "generation": model.generation,
        "shapes": shapes,
        "rows": net.get_input_embeddings().weight.shape[0],
        "width": net.get_output_embeddings().out_features,
        "config": {
            "model_type": net.config.model_type,
            "eos_token_id": getattr(net.config, "eos_token_id", None),
        },
        "constants": stored,
        "tokenizer": facts_of(model.tokenizer.backend),
    }
    (folder / FACTS).write_text(json.dumps(facts, ensure_ascii=False, indent=1), "utf-8")


def _shapes(net: Any) -> list[tuple[tuple[int, int], ...]]:
    """(heads, width) of the keys and of the values of each layer, as a pass of one token makes them."""
    past = DynamicCache(config=net.config)  # plain, as was checked
    with torch.inference_mode():
        net(input_ids=torch.tensor([[0]]), use_cache=True, **{CACHE: past})
    layers: list[Any] = list(past.layers)
    return [tuple((part.shape[1], part.shape[3]) for part in (layer.keys, layer.values)) for layer in layers]


# --- the graphs


def _graph(graph: str, net: Any, shapes: Any, target: Path, name: str) -> dict[str, torch.Tensor]:
    """Export one graph and compile it to a shared object; its weights by their names."""
    module = _Prompt(net) if graph == PROMPT else _Behind(net)
    past = past_of(shapes, 32)
    room, length = (
        torch.export.Dim("room", min=17, max=1 << 20),
        torch.export.Dim("length", min=2, max=1 << 20 if graph == PROMPT else TOGETHER),
    )
    rooms = [{2: room}] * len(past)
    if graph == PROMPT:
        inputs: tuple[Any, ...] = (torch.zeros(1, 20, dtype=torch.long), past)
        dynamic: tuple[Any, ...] = ({1: length}, rooms)
    else:
        at = torch.arange(3, 4 if graph == STEP else 8)
        inputs = (torch.zeros(1, len(at), dtype=torch.long), at, past)
        dynamic = ({}, {}, rooms) if graph == STEP else ({1: length}, {0: length}, rooms)
    options = {
        "aot_inductor.package": False,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.output_path": str(target),
        # What a sum over many rows reads is computed once before it, not again for each row.
        "realize_opcount_threshold": 1,
        "realize_reads_threshold": 1,
        # Each set of instructions the processor has would be tried in a library of its own: a quarter of the time.
        "cpp.vec_isa_ok": True,
        # Headers made ready for the next compilation would stay in a folder of torch's.
        "aot_inductor.precompile_headers": False,
    }
    try:
        with _scratch(), _ways(net, graph), torch.no_grad():
            exported = torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic, strict=False)
            torch._inductor.aot_compile(exported.module(check_guards=False), inputs, options=options)
    except _REFUSALS as error:
        if device.out_of_memory(error):
            raise OutOfMemory("E-MEMORY", name, "does not fit into memory while it is compiled") from error
        fact = f"cannot be compiled: {str(error).strip().partition(chr(10))[0][:160] or type(error).__name__}"
        raise ModelError("E-COMPILE", name, fact, hint="--engine eager runs it as it is") from error
    for path in target.parent.iterdir():  # what the compiler leaves beside its product
        if path.suffix not in (".so", ".safetensors"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    tensors = {**exported.state_dict, **exported.constants}
    found = {key: value.detach() for key, value in tensors.items() if isinstance(value, torch.Tensor)}
    # The kernel for int4 takes the size of its groups from tensors that the compiler adds.
    added = {outer for outer in names_of(runner_of(target)).values() if outer not in found}
    return found | {outer: torch.tensor(GROUP) for outer in added}


class _Prompt(nn.Module):
    """A whole prompt: ids (1, T), the past to be written -> logits (1, V) behind the last token."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: torch.Tensor, past: list[torch.Tensor]) -> torch.Tensor:
        at = torch.arange(ids.shape[1])
        mask = torch.zeros(1, 1, 1, 1)  # stands for the one that the attention makes itself
        return _logits(self.net, ids, at, mask, past, prompt=True)[-1:]


class _Behind(nn.Module):
    """One token or a few: ids (1, T), their places (T,), the past with room S -> logits (T, V)."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: torch.Tensor, at: torch.Tensor, past: list[torch.Tensor]) -> torch.Tensor:
        seen = torch.arange(past[-1].shape[2])[None] <= at[:, None]  # (T, S)
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]
        return _logits(self.net, ids, at, mask, past, prompt=False)


def _logits(
    net: Any,
    ids: torch.Tensor,
    at: torch.Tensor,
    mask: torch.Tensor,
    past: list[torch.Tensor],
    *,
    prompt: bool,
) -> torch.Tensor:
    half = len(past) // 2
    layers: list[Any] = [
        _Layer(keys, values, at, prompt) for keys, values in zip(past[:half], past[half:], strict=True)
    ]
    out = net(
        input_ids=ids,
        attention_mask=mask,
        position_ids=at[None],
        use_cache=True,
        logits_to_keep=int(prompt),  # 0 keeps all
        **{CACHE: Cache(layers=layers)},
    )
    found: torch.Tensor = out.logits[0].float()
    return found


class _Layer(CacheLayerMixin):
    """Keys and values (1, H, S, D) in float32, in which a CPU attends to one token fastest; written in place."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor, prompt: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the library's
        self.keys, self.values, self.at, self.prompt = keys, values, at, prompt
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self.at, key_states.float())  # type: ignore[union-attr]  # set above
        self.values.index_copy_(2, self.at, value_states.float())  # type: ignore[union-attr]  # set above
        return (key_states, value_states) if self.prompt else (self.keys, self.values)  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.values.shape[2], 0  # type: ignore[union-attr]  # set above

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return int(self.values.shape[2])  # type: ignore[union-attr]  # set above


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query (1, H, T, D) to keys and values (1, H/G, S, D): (1, T, H, D) in query's dtype."""
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "sliding_window")):
        raise NotImplementedError("its attention does more than a softmax over the past")
    _, H, T, D = query.shape
    heads = key.shape[1]
    attend = nn.functional.scaled_dot_product_attention
    if attention_mask.shape[-1] > 1:
        # The heads that share a key are the queries of one head: it is read once.
        packed = query[0].float().reshape(heads, -1, D) * (D**-0.5 if scaling is None else scaling)
        scores = (packed @ key[0].mT).view(heads, H // heads, T, -1) + attention_mask[0]  # (H/G, G, T, S)
        out = scores.softmax(dim=-1).flatten(1, 2) @ value[0]
        out = out.view(heads, H // heads, T, value.shape[3]).flatten(0, 1)[None]  # (1, H, T, D)
    else:
        key, value = (_repeated(part, H // heads) for part in (key, value))
        out = attend(query, key, value, is_causal=True, scale=scaling)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def _repeated(part: torch.Tensor, times: int) -> torch.Tensor:
    """(1, H, T, D) -> (1, H * times, T, D), each head so many times in a row."""
    return part if times == 1 else part.repeat_interleave(times, dim=1)


@contextlib.contextmanager
def _own_attention(net: Any, name: str) -> Iterator[None]:
    before = net.config._attn_implementation
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    if not net._can_set_attn_implementation():
        raise ModelError("E-COMPILE", name, "computes its attention in a way of its own")
    net.set_attn_implementation(NAME)
    try:
        yield
    finally:
        net.set_attn_implementation(before)


@contextlib.contextmanager
def _ways(net: Any, graph: str) -> Iterator[None]:
    """Let quantised layers multiply as suits a graph: one row by loops of the compiler's, a few by the kernel, many
    as matrices; what int4 has in the order of its kernel is for that alone."""
    layers = [layer for layer in net.modules() if isinstance(layer, QuantizedLinear)]
    for layer in layers:
        if layer.form == "int4" and layer.kernel:
            continue
        if graph == STEP or (graph == PROMPT and layer is net.get_output_embeddings()):
            layer.way = "sum"
        elif graph == PROMPT:
            layer.way = "turned back"
    try:
        yield
    finally:
        for layer in layers:
            layer.way = "kernel"


@contextlib.contextmanager
def _scratch() -> Iterator[None]:
    """The compiler's own cache in a folder that goes with it."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="textgen-compile-") as place:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = place
        try:
            yield
        finally:
            if before is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def _save(constants: dict[str, torch.Tensor], path: Path) -> dict[str, str]:
    """Write each tensor once, also where it has several names; name -> the name under which it is stored."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    stored = {
        name: first.setdefault((value.data_ptr(), tuple(value.shape)), name)
        for name, value in constants.items()
    }
    with cache.writing(path):
        save_file({name: constants[name].contiguous() for name in set(stored.values())}, path)
    return stored
