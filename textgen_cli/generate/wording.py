"""Decoding options that speak of words: what is favoured, and any other setting by name.

Turns them into the token ids and values that GenerationConfig takes.
"""

import ast
import math
from typing import Any

from textgen_cli.errors import UsageError
from textgen_cli.model.tokenizer import Tokenizer

# Fields that run foreign code, name files, belong to the library's bookkeeping or have an option of ours.
_NOT_BY_SET = {
    "use_cache",  # the loop keeps one
    "min_length",  # counts padding; min_new_tokens does not
    "cache_implementation",
    "cache_config",
    "compile_config",
    "disable_compile",
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "transformers_version",
    "stop_strings",
    "num_return_sequences",
    "do_sample",
    "max_time",
    "is_assistant",
    "use_mtp",
    "token_healing",
    "constraints",
    "force_words_ids",
    "penalty_alpha",
    "dola_layers",
    "num_beam_groups",
    "diversity_penalty",
    "trust_remote_code",
    "custom_generate",
}


def settable() -> dict[str, Any]:
    """The fields of GenerationConfig that --set reaches, with the library's defaults."""
    from transformers import GenerationConfig

    known = GenerationConfig().to_dict()
    return {
        name: value for name, value in known.items() if name not in _NOT_BY_SET and not name.startswith("_")
    }


def assignments(pairs: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE texts as fields; UsageError for an unknown field or a value that is no literal."""
    found: dict[str, Any] = {}
    known = settable() if pairs else {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise UsageError("E-SET", f"--set {pair}", "is not KEY=VALUE")
        if name not in known:
            raise UsageError(
                "E-SET",
                f"--set {pair}",
                "is not a decoding field",
                hint="KEY=VALUE with a field of GenerationConfig",
            )
        found[name] = _value(text.strip())
    return found


def _value(text: str) -> Any:
    literal = {"true": True, "false": False, "null": None, "none": None}.get(text.lower(), text)
    if literal is not text:
        return literal
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def sequence_bias(biases: tuple[str, ...], tokenizer: Tokenizer) -> list[list[Any]]:
    """[[token ids, bias], …] of TEXT=X options; the bias meets TEXT's last token once the others stand."""
    found = {}
    for bias in biases:
        text, equals, number = bias.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not (equals and text and math.isfinite(value)):
            raise UsageError("E-BIAS", f"--bias {bias}", "is not TEXT=NUMBER")
        found[tuple(tokenizer.encode_literal(text))] = value
    return [[list(ids), value] for ids, value in found.items() if ids]
