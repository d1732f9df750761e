"""What a GGUF header says, in the words of config.json and of safetensors. It reads no file."""

from typing import Any

from textgen_cli.errors import ModelError
from textgen_cli.model import gguf
from textgen_cli.model.family import Family
from textgen_cli.model.weights import Tensor

# Names of config.json -> what GGUF calls them behind the architecture's name.
_GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "v_head_dim": "attention.value_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "vocab_size": "vocab_size",
}


def config_of(header: gguf.Header) -> dict[str, Any]:
    """What a GGUF file says of its sizes. ModelError E-GGUF where it is a part of a larger one."""
    parts = header.metadata.get("split.count")
    if type(parts) is int and parts > 1:
        raise ModelError("E-GGUF", header.name or header.architecture, f"is split into {parts} files")
    kind = header.architecture
    found = {name: header.metadata.get(f"{kind}.{key}") for name, key in _GGUF_KEYS.items()}
    found["vocab_size"] = found["vocab_size"] or header.vocab_size
    tied = all(tensor.name != "output.weight" for tensor in header.tensors)
    return {"model_type": kind, "tie_word_embeddings": tied} | {
        name: value for name, value in found.items() if value is not None
    }


def tensors_of(header: gguf.Header) -> dict[str, Tensor]:
    """The weights with their ggml types; where they lie is left out."""
    return {tensor.name: Tensor(tensor.type, tensor.shape[::-1], 0, tensor.size) for tensor in header.tensors}


def family_of(header: gguf.Header) -> Family:
    """T5 is the one encoder-decoder that has the format."""
    return "seq2seq" if header.architecture.startswith("t5") else "causal"


def licence_of(header: gguf.Header) -> str | None:
    """The licence that it names."""
    found = header.metadata.get("general.license")
    return found if isinstance(found, str) else None
