"""Fields of transformers' GenerationConfig by name: which --set reaches, what each may be, why others are not set.

A field that would be ignored is refused, whether by a reason of its own or for what it needs beside it.
"""

import ast
import math
from collections.abc import Callable
from typing import Any, get_args

from textgen_cli.config import GENERATION_FIELDS, DecodingConfig
from textgen_cli.errors import UsageError

# (value, rows of the vocabulary) -> the value as the library takes it; ValueError says what it must be.
Check = Callable[[Any, int], Any]


def _whole(low: int, high: int) -> Check:
    def check(value: Any, rows: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high:,}")
        return value

    return check


def _number(low: float, high: float) -> Check:
    """Between the two bounds, neither of which is meant."""

    def check(value: Any, rows: int) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not low < value < high:
            raise ValueError(f"must be a number above {low:g} and below {high:g}")
        return float(value)

    return check


def _one_of(*values: Any) -> Check:
    def check(value: Any, rows: int) -> Any:
        if not any(value is known or (isinstance(value, str) and value == known) for known in values):
            raise ValueError("must be " + " or ".join(str(known).lower() for known in values))
        return value

    return check


def _token(value: Any, rows: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < rows:
        raise ValueError(f"must be a token id below {rows:,}")
    return value


def _tokens(value: Any, rows: int) -> list[int]:
    ids = value if isinstance(value, list | tuple) else [value]
    if not ids:
        raise ValueError("must be a token id or a list of some")
    return [_token(one, rows) for one in ids]


def _words(value: Any, rows: int) -> list[list[int]]:
    if (
        not isinstance(value, list | tuple)
        or not value
        or not all(isinstance(one, list | tuple) for one in value)
    ):
        raise ValueError("must be a list of lists of token ids")
    return [_tokens(one, rows) for one in value]


def _biases(value: Any, rows: int) -> list[list[Any]]:
    pairs = value if isinstance(value, list | tuple) else []
    if not pairs or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError("must be a list of [[token ids], number]")
    return [[_tokens(ids, rows), _number(-math.inf, math.inf)(bias, rows)] for ids, bias in pairs]


def _decay(value: Any, rows: int) -> tuple[int, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("must be (token to begin at, factor)")
    return _whole(0, 10_000_000)(value[0], rows), _number(0, math.inf)(value[1], rows)


def _watermark(value: Any, rows: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a mapping of the library's own watermark settings")
    return value


def _as_option(name: str) -> Check:
    """The kind of the option of that name; its bounds are those of DecodingConfig."""
    kind = get_args(DecodingConfig.__dataclass_fields__[name].type)[0]
    return _whole(-(10**18), 10**18) if kind is int else _number(-math.inf, math.inf)


CHECKS: dict[str, Check] = {
    **{name: _as_option(name) for name in GENERATION_FIELDS},
    "early_stopping": _one_of(True, False, "never"),
    "renormalize_logits": _one_of(True, False),
    "top_h": _number(0, 1),
    "epsilon_cutoff": _number(0, 1),
    "eta_cutoff": _number(0, 1),
    "encoder_repetition_penalty": _number(0, 100),
    "encoder_no_repeat_ngram_size": _whole(0, 10_000),
    "exponential_decay_length_penalty": _decay,
    "bad_words_ids": _words,
    "sequence_bias": _biases,
    "suppress_tokens": _tokens,
    "begin_suppress_tokens": _tokens,
    "guidance_scale": _number(-100, 100),
    "watermarking_config": _watermark,
    "bos_token_id": _token,
    "eos_token_id": _tokens,
    "pad_token_id": _token,
    "decoder_start_token_id": _token,
    "forced_bos_token_id": _token,
    "forced_eos_token_id": _tokens,
    "prompt_lookup_num_tokens": _whole(1, 1000),
    "max_matching_ngram_size": _whole(1, 1000),
    "assistant_early_exit": _whole(1, 1000),
    "num_assistant_tokens": _whole(1, 1000),
    "num_assistant_tokens_schedule": _one_of("constant", "heuristic", "heuristic_transient"),
    "assistant_confidence_threshold": _number(0, 1),
    "assistant_ensemble_weight": _number(0, 1),
}

# What must stand beside a field that has no effect alone; a key of `present` in sampling.py.
NEEDS = {
    **dict.fromkeys(("length_penalty", "early_stopping", "renormalize_logits"), "beams"),
    **dict.fromkeys(("decoder_start_token_id", "forced_bos_token_id"), "an encoder-decoder model"),
    **dict.fromkeys(("guidance_scale", "bos_token_id"), "a model without an encoder"),
    "max_matching_ngram_size": "--prompt-lookup",
    **dict.fromkeys(
        (
            "num_assistant_tokens",
            "num_assistant_tokens_schedule",
            "assistant_confidence_threshold",
            "assistant_ensemble_weight",
        ),
        "--draft-model",
    ),
}

_WHY_NOT: dict[str, tuple[str, ...]] = {
    "the library fetches code for it, which is never run": (
        "constraints", "force_words_ids", "penalty_alpha", "dola_layers", "num_beam_groups", "diversity_penalty",
        "custom_generate", "trust_remote_code",
    ),
    "how the past is kept is not a setting": (
        "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size",
    ),
    "what is compiled or computed together is not left to the library": (
        "compile_config", "disable_compile", "continuous_batching_config",
    ),
    "it says what the library returns and nothing about the text": (
        "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    ),
    "it is the library's bookkeeping": ("transformers_version", "is_assistant"),
    "there is an option for it": ("stop_strings", "num_return_sequences", "do_sample"),
    "it counts padding": ("min_length",),
    "the text would depend on the machine's speed": ("max_time",),
    "logits that are no numbers end a text with an error": ("remove_invalid_values",),
    "it would change the prompt": ("token_healing",),
    "it has no effect in the library any more": ("low_memory",),
    "the layers it needs are not loaded": ("use_mtp",),
    "no draft model of the kind it needs is loaded": ("speculation_type",),
    "a draft model has the vocabulary of the model": ("assistant_lookbehind", "target_lookbehind"),
}  # fmt: skip
REFUSED = {name: why for why, names in _WHY_NOT.items() for name in names}

_INSTEAD = {
    "stop_strings": "--stop TEXT",
    "num_return_sequences": "--num-return-sequences N",
    "do_sample": "--greedy, or a sampling option such as --temperature",
    "min_length": "--min-new-tokens N",
    "max_time": "--max-time ends a batch",
    "output_scores": "--logprobs K",
    "output_logits": "--logprobs K",
}


def assignments(pairs: tuple[str, ...], rows: int) -> dict[str, Any]:
    """KEY=VALUE texts as fields for a vocabulary of so many; UsageError E-SET for one that cannot be set so."""
    return dict(_assignment(pair, rows) for pair in pairs)


def _assignment(pair: str, rows: int) -> tuple[str, Any]:
    name, equals, text = pair.partition("=")
    name, subject = name.strip().replace("-", "_"), f"--set {pair}"
    if not equals:
        raise UsageError("E-SET", subject, "is not KEY=VALUE")
    if name in REFUSED:
        raise UsageError("E-SET", subject, REFUSED[name], hint=_INSTEAD.get(name))
    if name not in CHECKS:
        raise UsageError(
            "E-SET", subject, "is not a decoding field", hint="KEY=VALUE with a field of GenerationConfig"
        )
    value = _value(text.strip())
    try:
        return name, None if value is None else CHECKS[name](value, rows)
    except ValueError as error:
        raise UsageError("E-SET", subject, str(error)) from error


def _value(text: str) -> Any:
    literal = {"true": True, "false": False, "null": None, "none": None}.get(text.lower(), text)
    if literal is not text:
        return literal
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
