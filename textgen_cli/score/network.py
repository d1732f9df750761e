"""A causal network as scoring needs it: ids in, the logits of chosen positions out, a few columns at a time.

Owns what must never be: batch x length x vocabulary in memory at once. Knows nothing of texts and figures.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache

from textgen_cli.model.head import CHUNK, Head
from textgen_cli.model.past import CACHE


def width(rows: int, vocabulary: int) -> int:
    """How many columns of a batch make CHUNK logits, one at least."""
    return max(1, CHUNK // (rows * vocabulary))


class Network:
    """A causal model cut in two where that can be: its layers, and the head that makes logits of them."""

    def __init__(self, net: Any) -> None:
        self.net = net
        ids = torch.arange(8, device=net.device)[None] % net.get_input_embeddings().weight.shape[0]  # (1, T)
        self.head = Head(net, [net.base_model], {"input_ids": ids})
        self.head.prove(lambda: net.base_model(input_ids=ids, use_cache=False)[0])
        self.vocabulary, self.splits = self.head.vocabulary, self.head.splits

    def logits(
        self, ids: torch.Tensor, where: torch.Tensor, width: int, **inputs: Any
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(rows and columns of positions, their logits) until all positions that are True in `where` are told.

        ids, where: (B, T), padded on the right, where a causal network's real tokens never look. Yields (P, 2)
        and (P, V), for `width` columns at a time. `inputs`: what else the layers are given, where it `splits`.
        """
        inputs.setdefault("use_cache", False)
        hidden = self.net.base_model(input_ids=ids, **inputs)[0] if self.splits else None  # (B, T, D)
        cache = None if self.splits or ids.shape[1] <= width else DynamicCache(config=self.net.config)
        for start in range(0, ids.shape[1], width):
            chosen = where[:, start : start + width]
            # The whole network must see every column, since its cache grows by them.
            whole = None if hidden is not None else self._columns(ids[:, start : start + width], cache)
            if chosen.any():
                at = chosen.nonzero()
                at[:, 1] += start
                if whole is not None:
                    yield at, whole[chosen]
                elif hidden is not None:
                    yield at, self.head.apart(hidden[:, start : start + width][chosen])

    def _columns(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits of the next columns by way of the whole network, which does more to them than its head."""
        found: torch.Tensor = self.net(input_ids=ids, use_cache=cache is not None, **{CACHE: cache}).logits
        return found
