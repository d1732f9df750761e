"""What a network is made of and what it costs to run, from its config and the names and shapes of its weights.

Pure arithmetic: no file is read, no library imported. With M the weights of all matrices that a token is multiplied
by (experts that are not chosen left out; an embedding table counts as the head that shares it, not as a table), L the
layers, D the elements of all query heads together and T the tokens before and with this one:

    FLOPs a token  = 2·M + 4·L·D·T        two for a multiply-add; scores and the weighted sum of values, 2·D·T each
    cache a token  = L·(K + V)·b bytes    K and V the elements of all key and value heads

as in Chowdhery et al. 2022 (PaLM), appendix B, and Pope et al. 2022, section 3.3.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from textgen_cli.model.family import Family
from textgen_cli.model.weights import Tensor

PARTS = ("embeddings", "attention", "feed_forward", "norms", "head", "other")
FORMULA = "2·M + 4·L·D·T"

# The first that a tensor's name matches says which part it belongs to; names of transformers' and of GGUF files.
_PARTS = {
    "head": r"(^|\.)(lm_head|embed_out|cls|classifier|pre_classifier|score|qa_outputs|pooler|vocab_\w+|"
    r"(generator_|discriminator_|lm_)?predictions|final_logits_bias|classification_head)(\.|$)|^output\.",
    "norms": r"norm|(^|[._])ln(_|\d|\.)",
    "embeddings": r"embed_|embed\.|_embed|_embd\.|embeddings\.|(^|\.)w[tp]e\.|(^|\.)shared\.|token_types",
    "attention": r"attn|attention|(^|\.)[qkvo]_proj\.|query_key_value",
    "feed_forward": r"mlp|ffn|\.fc\d|feed_forward|DenseReluDense|intermediate|output\.dense|expert|moe|\.gate\.",
}
_PART = {part: re.compile(pattern, re.IGNORECASE) for part, pattern in _PARTS.items()}
# What checkpoints hold besides weights: masks and tables that are computed.
_BUFFERS = re.compile(r"inv_freq$|position_ids$|token_type_ids$|masked_bias$|final_logits_bias$|rope_freqs")
_TABLES = re.compile(r"relative_attention_bias|rel_embeddings")  # are looked up, not multiplied
# What stands twice in some files and once in the network.
_COPIES = re.compile(r"(^|\.)(encoder|decoder)\.embed_tokens\.weight$")
_TWIN_BIAS = re.compile(r"cls\.predictions\.decoder\.bias$|lm_head\.decoder\.bias$")
_ONCE = re.compile(r"pooler|seq_relationship")  # computed for a text, not for a token
_EXPERTS = re.compile(r"(^|\.)experts\.|_exps\.")
_GATES = re.compile(r"gate_proj|gate_up|ffn_gate\.|wi_1\.|\.w3\.")
_HEAD_TABLE = re.compile(
    r"(^|\.)(lm_head|embed_out|predictions\.decoder|vocab_projector)\.weight$|^output\.weight$"
)
# Types whose configs leave it out where head and embeddings are one.
_TIED = frozenset({
    "albert", "bart", "bert", "bloom", "distilbert", "electra", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2",
    "gpt_neo", "m2m_100", "marian", "mbart", "mpt", "opt", "roberta", "t5", "xlm-roberta",
})  # fmt: skip
GROUP = 32  # int4: weights of a row that share a scale and an offset; `quantize.GROUP`, which needs torch


@dataclass(frozen=True)
class Sizes:
    """The numbers of a config that memory and work depend on."""

    hidden: int
    layers: int  # of the decoder where there are two stacks
    encoder_layers: int  # 0: there is one stack
    heads: int
    kv_heads: int
    key: int  # elements of a head's query or key
    value: int  # elements of a head's value
    inner: int  # of the feed-forward part
    vocabulary: int
    context: int | None  # tokens; None: no limit of its own
    window: int | None = None  # tokens that a layer with a window sees
    windowed: int = 0  # layers with one
    experts: int = 0
    chosen: int = 0  # experts of a token

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        found: dict[str, Any] = {"layers": self.layers, "hidden": self.hidden, "heads": self.heads}
        found |= {"kv_heads": self.kv_heads, "head_size": self.key, "feed_forward": self.inner}
        found |= {"encoder_layers": self.encoder_layers} if self.encoder_layers else {}
        found |= {"window": self.window, "windowed_layers": self.windowed} if self.windowed else {}
        found |= {"experts": self.experts, "experts_a_token": self.chosen} if self.experts else {}
        return found


def inner_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where the sizes of the language model stand: models that see pictures, too, keep them apart."""
    found = config.get("text_config")
    return found if isinstance(found, dict) else config


def sizes(config: Mapping[str, Any]) -> Sizes | None:
    """The sizes that a config tells, whatever it calls them; None where it leaves one out."""
    own = inner_config(config)

    def first(*names: str) -> int | None:
        return next((own[name] for name in names if type(own.get(name)) is int), None)

    hidden = first("hidden_size", "n_embd", "d_model", "dim", "n_embed")
    layers = first("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
    heads = first("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads")
    if hidden is None or layers is None or heads is None or not heads:
        return None
    encoder = 0
    if config.get("is_encoder_decoder"):
        encoder = first("encoder_layers", "num_layers") or layers
        layers = first("decoder_layers", "num_decoder_layers") or layers
    inner = first(
        "intermediate_size",
        "d_ff",
        "n_inner",
        "hidden_dim",
        "ffn_dim",
        "decoder_ffn_dim",
        "moe_intermediate_size",
    )
    nope, rope = first("qk_nope_head_dim"), first("qk_rope_head_dim")
    key = (
        nope + rope if nope and rope else first("head_dim", "d_kv", "attention_key_length") or hidden // heads
    )
    window, windowed = _window(own, layers)
    return Sizes(
        hidden=hidden, layers=layers, encoder_layers=encoder, heads=heads,
        kv_heads=_kv_heads(own, heads), key=key, value=first("v_head_dim") or key, inner=inner or 4 * hidden,
        vocabulary=first("vocab_size") or 0, context=context_of(config), window=window, windowed=windowed,
        experts=first("num_local_experts", "num_experts", "n_routed_experts") or 0,
        chosen=first("num_experts_per_tok", "moe_k") or 0,
    )  # fmt: skip


def _kv_heads(own: Mapping[str, Any], heads: int) -> int:
    if own.get("multi_query") and not own.get("new_decoder_architecture"):  # Falcon, StarCoder
        return 1
    found = next(
        (own[n] for n in ("num_key_value_heads", "num_kv_heads", "n_head_kv") if type(own.get(n)) is int), 0
    )
    return found or heads


def _window(own: Mapping[str, Any], layers: int) -> tuple[int | None, int]:
    """The window of attention in tokens, and how many layers have it."""
    window = own.get("sliding_window")
    if type(window) is not int or window < 1 or own.get("use_sliding_window") is False:
        return None, 0
    kinds, pattern = own.get("layer_types"), own.get("sliding_window_pattern")
    if isinstance(kinds, list):
        return window, sum(kind == "sliding_attention" for kind in kinds)
    if type(pattern) is int and pattern > 0:
        return window, layers - layers // pattern
    return window, (layers + 1) // 2 if own.get("model_type") == "gemma2" else layers


# Where configs keep the longest input; None: no limit.
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
# Positions begin behind the padding's own.
_OFFSET_KINDS = re.compile(r"roberta|camembert|longformer|mpnet|\besm\b")


def context_of(config: Mapping[str, Any]) -> int | None:
    """The longest input in tokens that a config states."""
    own = inner_config(config)
    values = (own.get(name) for name in _CONTEXT_FIELDS)
    found = next((value for value in values if type(value) is int and value > 0), None)
    if found is not None and _OFFSET_KINDS.search(str(config.get("model_type"))):
        padding = config.get("pad_token_id")
        return found - (padding if type(padding) is int else 1) - 1
    return found


@dataclass(frozen=True)
class Weights:
    """The parameters of a network, counted by part."""

    parts: Mapping[str, int]  # PARTS -> parameters; what two parts share is counted once, as embeddings
    tied: bool  # the head is the embedding table
    matrices: int  # parameters that one token of the decoder, or of the only stack, is multiplied by
    encoder: int  # the same for the encoder of two stacks
    experts: int  # parameters of experts, among those of the feed-forward part
    linear: Mapping[Literal["int8", "int4"], int]  # bytes of the layers that are quantised, in either format
    linear_count: int  # parameters of these layers; a head that shares the table stays a table besides
    stored: Mapping[str, int]  # dtype in the files -> bytes
    widths: int  # inputs and outputs of all linear layers below the head: what an adapter of rank 1 has of parameters
    gated: bool  # whether the feed-forward part multiplies with a gate

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parts.values())

    def active(self, found: Sizes | None) -> int:
        """Parameters that take part in one token."""
        if found is None or not (found.experts and found.chosen):
            return self.total
        return self.total - self.experts + self.experts * found.chosen // found.experts


def count(tensors: Mapping[str, Tensor], config: Mapping[str, Any], family: Family) -> Weights:
    """Count what the headers of a checkpoint name; `config` tells what of it is one and the same."""
    shapes = {name: shape for name, shape in shapes_of(tensors) if not _is_buffer(name, shape)}
    tied, shapes = _untwinned(shapes, config)
    parts = dict.fromkeys(PARTS, 0)
    for name, shape in shapes.items():
        parts[part_of(name)] += math.prod(shape)
    speaks = family in ("causal", "masked", "seq2seq")
    table = _table(shapes) if tied and speaks else None
    multiplied = {name: shape for name, shape in shapes.items() if _multiplies(name, shape, speaks)}
    repeated = _repeated(inner_config(config))
    found = sizes(config)
    experts = sum(math.prod(shape) for name, shape in shapes.items() if _EXPERTS.search(name))
    share = found.chosen / found.experts if found and found.experts and found.chosen else 1.0
    work = {"encoder": 0.0, "decoder": float(math.prod(table) if table else 0)}
    for name, shape in multiplied.items():
        side = (
            "encoder"
            if config.get("is_encoder_decoder") and re.search(r"(^|\.|_)enc(oder)?\.", name)
            else "decoder"
        )
        times = share if _EXPERTS.search(name) else repeated if "layer_groups" in name else 1
        work[side] += math.prod(shape) * times
    own = [_rows_first(shape, config) for name, shape in shapes.items() if _is_linear(name, shape)]
    linear = [*own, *([table] if table else [])]
    return Weights(
        parts=parts, tied=tied, matrices=round(work["decoder"]), encoder=round(work["encoder"]), experts=experts,
        linear={"int8": sum(map(_int8, linear)), "int4": sum(map(_int4, linear))},
        linear_count=sum(map(math.prod, own)), stored=_stored(tensors),
        widths=sum(sum(shape) for name, shape in shapes.items() if _is_adapted(name, shape, speaks)),
        gated=any(_GATES.search(name) for name in shapes),
    )  # fmt: skip


def part_of(name: str) -> str:
    """Which of PARTS a tensor belongs to, by its name."""
    return next((part for part, pattern in _PART.items() if pattern.search(name)), "other")


def shapes_of(tensors: Mapping[str, Tensor]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the weights; codes in 8 or 4 bits of our own as the matrices they stand for."""
    found = []
    for name, tensor in tensors.items():
        shape = tensor.shape
        scale = tensors.get(f"{name.removesuffix('.weight')}.scale") if name.endswith(".weight") else None
        if scale is not None and len(shape) == 3:  # (1, N, K), or with two codes in a byte
            shape = (shape[1], shape[2] * (2 if len(scale.shape) == 3 else 1))
        if not (name.endswith(".scale") and f"{name.removesuffix('.scale')}.weight" in tensors):
            found.append((name, shape))
    return found


def _is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    mask = len(shape) == 4 and name.endswith(("attn.bias", "attention.bias"))
    return mask or _BUFFERS.search(name) is not None


def _untwinned(
    shapes: dict[str, tuple[int, ...]], config: Mapping[str, Any]
) -> tuple[bool, dict[str, tuple[int, ...]]]:
    """Whether the head is the embedding table, and the weights without what checkpoints hold twice."""
    table = _table(shapes)
    head = next((name for name in shapes if _HEAD_TABLE.search(name)), None)
    own = inner_config(config)
    says = own.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    one = (own.get("model_type") in _TIED) if says is None else bool(says)
    tied = head is None or (one and shapes[head] == table)
    shared = "shared.weight" in shapes or "model.shared.weight" in shapes
    twins = {name for name in shapes if _TWIN_BIAS.search(name) or (shared and _COPIES.search(name))}
    twins |= {head} if tied and head is not None else set()
    return tied, {name: shape for name, shape in shapes.items() if name not in twins}


def _table(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of the table of tokens."""
    tables = [
        s
        for n, s in shapes.items()
        if len(s) == 2 and part_of(n) == "embeddings" and not re.search("pos|type", n)
    ]
    return max(tables, key=math.prod, default=None)


def _multiplies(name: str, shape: tuple[int, ...], speaks: bool) -> bool:
    if len(shape) < 2 or _TABLES.search(name) or _ONCE.search(name):
        return False
    part = part_of(name)
    return part in ("attention", "feed_forward", "other") or (part == "head" and speaks)


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether `--quantize` makes codes of it: linear layers; experts are no such layers in transformers."""
    if len(shape) != 2 or _TABLES.search(name) or _EXPERTS.search(name):
        return False
    return part_of(name) not in ("embeddings", "norms")


def _is_adapted(name: str, shape: tuple[int, ...], speaks: bool) -> bool:
    """Whether an adapter of all linear layers has a part beside it: not beside the last one, nor beside labels."""
    inside = part_of(name) != "head" or (speaks and not _HEAD_TABLE.search(name))
    return inside and _is_linear(name, shape)


def _rows_first(shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[int, ...]:
    return (
        shape[::-1] if config.get("model_type") == "gpt2" else shape
    )  # its matrices stand the other way round


def _int8(shape: tuple[int, ...]) -> int:
    """Bytes of a matrix (N, K) with a scale of two bytes a row."""
    return shape[0] * shape[1] + 2 * shape[0]


def _int4(shape: tuple[int, ...]) -> int:
    """Bytes of a matrix (N, K) with scale and offset of two bytes a group; of one that has no whole groups in int8."""
    rows, width = shape
    return rows * width // 2 + rows * (width // GROUP) * 4 if width % GROUP == 0 else _int8(shape)


def _repeated(own: Mapping[str, Any]) -> float:
    """How often a layer's weights are used: ALBERT has one layer for many."""
    groups = own.get("num_hidden_groups")
    return own["num_hidden_layers"] / groups if type(groups) is int and groups else 1.0


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    found: dict[str, int] = {}
    for tensor in tensors.values():
        found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.end - tensor.begin
    return {dtype: size for dtype, size in sorted(found.items(), key=lambda item: -item[1]) if size}


# --- what it costs


def weight_bytes(weights: Weights) -> dict[str, int]:
    """Bytes of the weights in memory in each dtype; in 8 and 4 bits what is no linear layer stays in 16."""
    found = {"float32": 4 * weights.total, "bfloat16": 2 * weights.total}
    rest = weights.total - weights.linear_count
    return found | {form: size + 2 * rest for form, size in weights.linear.items()}


def _seen(found: Sizes, tokens: int) -> int:
    """Tokens that a token looks at, summed over the layers."""
    return found.windowed * min(tokens, found.window or tokens) + (found.layers - found.windowed) * tokens


def cache_elements(found: Sizes, tokens: int) -> int:
    """Numbers in the key-value cache of a sequence of so many tokens; cross-attention has as many for its source."""
    return _seen(found, tokens) * found.kv_heads * (found.key + found.value)


def flops(weights: Weights, found: Sizes, tokens: int) -> int:
    """Floating-point operations of one token of the decoder, or of the only stack, that looks at so many."""
    return 2 * weights.matrices + 2 * _seen(found, tokens) * found.heads * (found.key + found.value)
