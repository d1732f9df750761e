"""A network's past, its key-value cache: what transformers calls it, and whether it can be cut and shared out."""

import inspect
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMixin

# The argument of every network and of generate: `cache` since transformers 5.24, `past_key_values` before.
_TAKES = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _TAKES else "past_key_values"


def is_plain(cache: Any) -> bool:
    """Whether every layer of a cache only grows: none slides over a window, none is recurrent."""
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
