"""The scaling of rotary frequencies that Llama 3 has, found again from the divisors that a GGUF file holds.

GGUF keeps what each frequency is divided by; transformers computes it from four numbers. Knows no file.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# Both sides compute in float32, where the ramp between the frequencies cancels digits.
TOLERANCE = 2e-5  # relative, of a frequency

LOW, HIGH = 1.0, 4.0  # as published for Llama 3.1, 3.2 and 3.3
LENGTHS = (8192, *(1 << n for n in range(4, 21)))  # tokens of the context before it was stretched


def scaling_of(divisors: Sequence[float], config: Any) -> dict[str, Any] | None:
    """What `rope_parameters` of a config must say for its frequencies to be divided so; None where nothing does.

    `divisors`: one a frequency, the fastest first.
    """
    found = np.asarray(divisors, dtype=np.float64)
    plain = _plain(config)
    theta = config.rope_parameters["rope_theta"]
    if found.shape != plain.shape or not np.isfinite(found).all() or (found < 1).any():
        return None
    if (found == 1).all():
        return {"rope_type": "default", "rope_theta": theta}
    factor = float(found.max())
    for low, high, length in _candidates(found, plain, factor):
        numbers = {
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": length,
        }
        scaling = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **numbers}
        if np.allclose(_frequencies(scaling, config), plain / found, rtol=TOLERANCE, atol=0):
            return scaling
    return None


def _plain(config: Any) -> Any:
    """The frequencies before they are divided, radians a token."""
    half = config.head_dim // 2
    return config.rope_parameters["rope_theta"] ** (-np.arange(half) / half)


def _frequencies(scaling: dict[str, Any], config: Any) -> Any:
    """The frequencies as transformers computes them."""
    ours = type(config)(**{**config.to_dict(), "rope_parameters": dict(scaling)})
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](ours, torch.device("cpu"))
    return frequencies.double().numpy()


def _candidates(divisors: Any, plain: Any, factor: float) -> Iterator[tuple[float, float, int]]:
    """(low, high, length) that may be meant: as published, then what the ramp says.

    Between the two bounds the share s of the undivided frequency is linear in it: s = (L·f/2π - low) / (high - low)
    and 1/d = (1 - s)/factor + s. One number of the three is free: all may be multiplied by the same.
    """
    for length in LENGTHS:
        yield LOW, HIGH, length
    ramp = (divisors > 1) & (divisors < factor)
    if ramp.sum() < 2:
        return
    share = (1 / divisors[ramp] - 1 / factor) / (1 - 1 / factor)
    slope, start = np.polyfit(plain[ramp] / (2 * math.pi), share, 1)
    if not (slope > 0 > start):
        return
    for low in (1.0, 2.0, 0.5, 1.5, 3.0, 4.0):
        high = low * (1 - 1 / start)
        length = round(slope * (high - low))
        for digits in (0, 1, 2, 3, 6):
            if length >= 1 and round(high, digits) > low:
                yield low, float(round(high, digits)), length
