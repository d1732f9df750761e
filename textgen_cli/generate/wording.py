"""Decoding options that speak of words, as the token ids that GenerationConfig takes."""

import math
from typing import Any

from textgen_cli.errors import UsageError
from textgen_cli.model.tokenizer import Tokenizer


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
