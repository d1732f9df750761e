"""Key-value caches that are computed once: a prompt's beginning that rows share, and a conversation's past.

Works on plain growing caches only; models with sliding or recurrent layers compute everything anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from textgen_cli.model.past import CACHE, is_plain

WORTHWHILE = 16  # tokens; below this a separate pass costs more than it saves


@dataclass
class Kept:
    """What one conversation has computed so far; filled by the decoding loop."""

    ids: list[int] = field(default_factory=list)
    cache: Any = None


def common(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all sequences share, leaving at least one of each to be computed."""
    lists = [list(sequence) for sequence in sequences]
    first, last = min(lists), max(lists)  # the lexicographic extremes share what all share
    limit = min(map(len, lists)) - 1
    return next((n for n in range(limit) if first[n] != last[n]), limit)


def shared(net: Any, prompts: Sequence[Sequence[int]]) -> tuple[int, Any]:
    """The length of the prompts' common beginning and its cache, once for each row; (0, None) if not worth it."""
    if len(prompts) < 2 or net.config.is_encoder_decoder:
        return 0, None
    length = common(prompts)
    if length < WORTHWHILE:
        return 0, None
    cache = DynamicCache(config=net.config)
    if not is_plain(cache):
        return 0, None
    with torch.inference_mode():
        ids = torch.tensor([list(prompts[0][:length])], device=net.device)  # (1, T)
        net(input_ids=ids, use_cache=True, **{CACHE: cache})
    cache.batch_repeat_interleave(len(prompts))
    return length, cache


def resumed(kept: Kept, prompt: Sequence[int]) -> tuple[int, Any]:
    """How much of a prompt the conversation has computed already, and its cache cut to that."""
    if kept.cache is None or not is_plain(kept.cache):
        return 0, None
    length = common([kept.ids, prompt]) if kept.ids else 0
    if length < WORTHWHILE:
        return 0, None
    cache, kept.cache = kept.cache, None
    # Not cache.crop: an answer broken off amid a pass leaves layers, or a layer's two halves, of different lengths.
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
    return length, cache
