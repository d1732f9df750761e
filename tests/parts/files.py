"""Model folders written by hand, byte by byte: nothing heavy is imported to make them."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}
TOKENIZER = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header (JSON, or raw bytes) and data; `length` may lie about the header's."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensors(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A whole safetensors file of float32 zeros."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return safetensors(header, b"\0" * at)


def folder(
    path: Path, *, config: Mapping[str, Any] | None = None, files: Mapping[str, bytes | None] | None = None
) -> Path:
    """A model folder that passes, with changes: keys of config.json, and files (None: absent)."""
    path.mkdir(parents=True, exist_ok=True)
    whole = {
        "config.json": json.dumps({**CONFIG, **(config or {})}).encode(),
        "tokenizer.json": json.dumps(TOKENIZER).encode(),
        "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
        "model.safetensors": tensors({"model.embed_tokens.weight": (32, 8), "model.norm.weight": (8,)}),
    }
    for name, content in {**whole, **(files or {})}.items():
        if content is not None:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path
