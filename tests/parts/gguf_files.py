"""GGUF files: any bytes, however wrong, by a writer of our own; a small whole Llama by gguf's."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMS = dict(enumerate("BbHhIif?")) | {U64: "Q", I64: "q", F64: "d"}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: Any) -> bytes:
    return text(value) if kind == STRING else struct.pack("<" + FORMS[kind], value)


def pair(key: str | bytes, kind: int, value: Any) -> bytes:
    """One metadata pair; `value` as bytes is taken as it is."""
    payload = value if isinstance(value, bytes) and kind != STRING else scalar(kind, value)
    return text(key) + struct.pack("<I", kind) + payload


def items(kind: int, values: Sequence[Any], *, claimed: int | None = None) -> bytes:
    """The payload of an array that claims `claimed` elements."""
    count = len(values) if claimed is None else claimed
    return struct.pack("<IQ", kind, count) + b"".join(
        value if kind == ARRAY else scalar(kind, value) for value in values
    )


def row(
    name: str | bytes, shape: Sequence[int], kind: int = 0, offset: int = 0, *, dims: int | None = None
) -> bytes:
    """One row of the tensor table."""
    count = len(shape) if dims is None else dims
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


ARCHITECTURE = pair("general.architecture", STRING, "llama")


def build(
    pairs: Sequence[bytes] = (ARCHITECTURE,),
    rows: Sequence[bytes] = (row("a", (8,)),),
    *,
    data: int = 32,
    version: int = 3,
    magic: bytes = b"GGUF",
    key_count: int | None = None,
    tensor_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file of these parts; counts are the true ones unless others are claimed."""
    keys = len(pairs) if key_count is None else key_count
    tensors = len(rows) if tensor_count is None else tensor_count
    head = magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(pairs) + b"".join(rows)
    return head + bytes(-len(head) % alignment) + bytes(data)


def tokens() -> tuple[list[str], list[str]]:
    """A byte-level vocabulary with three special tokens, a few merges, and the merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = ["t h", "th e", "Ġ a", "o n"]
    vocabulary = special + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in merges]
    return vocabulary + [f"<unused{n}>" for n in range(-len(vocabulary) % 32)], merges


def tiny_llama(seed: int = 0, **more: Any) -> Any:
    """A random two-layer transformers Llama that fits `tokens`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": len(tokens()[0]), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    config = LlamaConfig(**{**settings, **more})
    return LlamaForCausalLM(config).eval()


def divisors(head_dim: int, theta: float, factor: float, low: float, high: float, length: int) -> Any:
    """What each rotary frequency is divided by, as the Llama 3.1 paper's code has it, and so GGUF's writers."""
    import numpy as np

    found = []
    for place in range(0, head_dim, 2):
        wave = 2 * np.pi * theta ** (place / head_dim)
        if wave < length / high:
            found.append(1.0)
        elif wave > length / low:
            found.append(factor)
        else:
            smooth = (length / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


def write_llama(
    path: Path,
    model: Any,
    *,
    quantised: bool = False,
    drop: str = "",
    extra: str = "",
    eot: int | None = None,
    rope_freqs: Any = None,
    scaling: str = "",
) -> None:
    """Write a Llama with gguf's own writer, matrices in Q8_0 where `quantised`, without the tensor `drop`."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if scaling:
        writer.add_string("llama.rope.scaling.type", scaling)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _write_tokenizer(writer, eot)
    for name, weight in _tensors(model).items():
        if name == drop:
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        if quantised and weight.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    if extra:
        writer.add_tensor(extra, _tensors(model)["output_norm.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer: Any, eot: int | None) -> None:
    vocabulary, merges = tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2 if eot is None else 0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    if eot is not None:
        writer.add_eot_token_id(eot)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _tensors(model: Any) -> dict[str, Any]:
    """The weights as numpy arrays under GGUF's names."""
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    state = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    for layer in range(model.config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
            if ours in heads:  # GGUF interleaves the two halves that rotate together
                half = weight.shape[0] // heads[ours] // 2
                weight = weight.reshape(heads[ours], 2, half, -1).swapaxes(1, 2).reshape(weight.shape).copy()
            found[f"blk.{layer}.{ours}.weight"] = weight
    return found
