"""Sizes of public models, as their config.json files have them, and what their publishers say of them.

Only what a network's shapes depend on; the weights are never fetched. `headers` makes of a config what a whole
checkpoint's headers would say.
"""

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from textgen_cli.model.weights import Tensor


@dataclass(frozen=True)
class Public:
    """A config and published figures."""

    config: dict[str, Any]
    parameters: int  # as published, exactly or rounded
    source: str  # of the parameters
    digits: int | None = None  # to which they are rounded; None: exact
    active: float | None = None  # parameters in use for a token, rounded to the same digits
    cache_token: int | None = None  # bytes of keys and values of a token, 16-bit
    cache_source: str = ""
    training: tuple[float, float] | None = None  # tokens and operations of its training
    training_source: str = ""


def _llama(**sizes: Any) -> dict[str, Any]:
    base = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    return base | {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096} | sizes


PUBLIC: dict[str, Public] = {
    "gpt2": Public(
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 1024,
         "n_embd": 768, "n_layer": 12, "n_head": 12},
        124_000_000, "https://huggingface.co/openai-community/gpt2", digits=3,
    ),
    "bert-base-uncased": Public(
        {"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 30522, "hidden_size": 768,
         "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
         "max_position_embeddings": 512, "type_vocab_size": 2},
        110_000_000, "https://arxiv.org/abs/1810.04805, section 3", digits=2,
    ),
    "t5-small": Public(
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True,
         "d_model": 512, "d_ff": 2048, "d_kv": 64, "num_layers": 6, "num_heads": 8, "vocab_size": 32128},
        60_000_000, "https://arxiv.org/abs/1910.10683, section 3.7", digits=1,
    ),
    "llama-2-7b": Public(
        _llama(intermediate_size=11008, num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096),
        6_700_000_000, "https://arxiv.org/abs/2302.13971, table 2, the same shape", digits=2,
        cache_token=524_288, cache_source="https://arxiv.org/abs/2307.09288",
    ),
    "llama-3-8b": Public(
        _llama(intermediate_size=14336, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192),
        8_030_261_248, "https://huggingface.co/meta-llama/Meta-Llama-3-8B",
        cache_token=131_072, cache_source="https://arxiv.org/abs/2407.21783, table 3",
    ),
    "mistral-7b": Public(
        _llama(intermediate_size=14336, num_key_value_heads=8, vocab_size=32000, max_position_embeddings=32768)
        | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096},
        7_241_732_096, "https://huggingface.co/mistralai/Mistral-7B-v0.1",
        cache_token=131_072, cache_source="https://arxiv.org/abs/2310.06825, table 1",
    ),
    "opt-13b": Public(
        {"model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": 50272, "hidden_size": 5120,
         "num_hidden_layers": 40, "num_attention_heads": 40, "ffn_dim": 20480, "max_position_embeddings": 2048,
         "word_embed_proj_dim": 5120},
        13_000_000_000, "https://arxiv.org/abs/2205.01068, table 1", digits=2,
        cache_token=819_200, cache_source="https://arxiv.org/abs/2309.06180, section 3: 800 KB",
    ),
    "gpt-3-small": Public(
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 2048,
         "n_embd": 768, "n_layer": 12, "n_head": 12},
        125_000_000, "https://arxiv.org/abs/2005.14165, table 2.1", digits=3,
        training=(300e9, 2.25e20), training_source="https://arxiv.org/abs/2005.14165, table D.1",
    ),
    "llama-3-405b": Public(
        _llama(intermediate_size=53248, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192)
        | {"num_hidden_layers": 126, "hidden_size": 16384, "num_attention_heads": 128},
        405_853_388_800, "https://huggingface.co/meta-llama/Llama-3.1-405B",
        training=(15.6e12, 3.8e25), training_source="https://arxiv.org/abs/2407.21783, section 3.2",
    ),
    "mixtral-8x7b": Public(
        _llama(intermediate_size=14336, num_key_value_heads=8, vocab_size=32000, max_position_embeddings=32768)
        | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8,
           "num_experts_per_tok": 2},
        46_700_000_000, "https://arxiv.org/abs/2401.04088", digits=2, active=13e9,
    ),
}  # fmt: skip


def row(name: str, counted: int, cache_token: int | None, training: float | None) -> str:
    """The line of docs/results.md that compares a model's figures with the published ones."""
    public = PUBLIC[name]

    def told(number: float | None) -> str:
        return "" if number is None else f"{number:,.0f}" if number < 1e15 else f"{number:.2e}"

    published = (
        told(public.parameters) if public.digits is None else f"{public.parameters:.{public.digits - 1}e}"
    )
    cells = [name, published, told(counted), told(public.cache_token), told(cache_token)]
    cells += [told(public.training and public.training[1]), told(training)]
    sources = [public.source, public.cache_source, public.training_source]
    return "| " + " | ".join([*cells, "; ".join(dict.fromkeys(filter(None, sources)))]) + " |"


def headers(config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint of this config in float32, as transformers names and shapes them."""
    sizes = {name: value for name, value in config.items() if name != "model_type"}
    whole = transformers.AutoConfig.for_model(config["model_type"], **sizes)
    with torch.device("meta"):
        net = getattr(transformers, config["architectures"][0])(whole)
    twins = set(net.all_tied_weights_keys)
    return {
        name: Tensor("F32", tuple(value.shape), 0, 4 * value.numel())
        for name, value in net.state_dict().items()
        if name not in twins
    }
