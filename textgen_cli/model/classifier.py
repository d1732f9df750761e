"""What classifiers say of texts: their labels, what their logits mean, and texts longer than they can see.

Which function turns the logits of a sequence classifier into probabilities is transformers' rule, by the config's
`problem_type`. Knows no batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from textgen_cli.model.heads import Row
from textgen_cli.model.load import Model


def label_names(model: Model) -> list[str]:
    """The labels of a classifier, in the order of its logits."""
    names: dict[int, str] = model.net.config.id2label
    return [str(names[number]) for number in sorted(names)]


def is_regression(model: Model) -> bool:
    """Whether a sequence classifier gives numbers on a scale and no probabilities."""
    return bool(model.net.config.problem_type == "regression")


def is_multi_label(model: Model) -> bool:
    """Whether the labels of a sequence classifier are independent of each other; its probabilities don't sum to 1."""
    return bool(model.net.config.problem_type == "multi_label_classification" or len(label_names(model)) == 1)


def probabilities(model: Model, logits: torch.Tensor) -> dict[str, float]:
    """The probability of each label of a sequence classifier that is no regression, from one text's logits (L,)."""
    shares = logits.sigmoid() if is_multi_label(model) else logits.softmax(-1)
    return dict(zip(label_names(model), shares.tolist(), strict=True))


@dataclass(frozen=True)
class Window:
    """A stretch of a text's tokens that the model sees, and the stretch within it that it decides."""

    start: int
    end: int
    first: int
    last: int  # behind the last


def windows(count: int, room: int) -> list[Window]:
    """The windows of `room` tokens over a text of `count` tokens; the last ends with the text.

    Neighbours share half a window or more, and the middle of what they share divides them.
    """
    if not count:
        return []
    starts = [*range(0, count - room, max(1, room // 2)), max(0, count - room)]
    cuts = [0, *((start + room + following) // 2 for start, following in pairwise(starts)), count]
    return [
        Window(start, min(start + room, count), first, last)
        for start, (first, last) in zip(starts, pairwise(cuts), strict=True)
    ]


@dataclass(frozen=True)
class Framed:
    """A text's `count` tokens behind `head` that the tokenizer puts before them, and before those it puts behind."""

    ids: list[int]
    types: list[int] | None
    head: int
    count: int

    @property
    def frame(self) -> int:
        """How many tokens are not the text's own."""
        return len(self.ids) - self.count

    def row(self, start: int, end: int) -> Row:
        """The text's tokens from `start` to `end` between all that the tokenizer adds."""
        return Row(self._seen(self.ids, start, end), self.types and self._seen(self.types, start, end))

    def _seen(self, values: list[int], start: int, end: int) -> list[int]:
        behind = self.head + self.count
        return [*values[: self.head], *values[self.head + start : self.head + end], *values[behind:]]


def views(model: Model, text: str) -> list[Row]:
    """A text as a sequence classifier sees it: whole, or in windows that overlap by half; [] where it has no token."""
    backend: Any = model.tokenizer.backend
    whole = framed(backend(text, truncation=False, return_special_tokens_mask=True))
    if model.context is None or len(whole.ids) <= model.context:
        return [whole.row(0, whole.count)] if whole.ids else []
    return [whole.row(one.start, one.end) for one in windows(whole.count, model.context - whole.frame)]


def framed(encoded: Mapping[str, Any]) -> Framed:
    """What a tokenizer gave, which was asked for a `special_tokens_mask`, as its own tokens and a text's."""
    added = encoded["special_tokens_mask"]
    head = next((at for at, special in enumerate(added) if not special), len(added))
    tail = next((at for at, special in enumerate(reversed(added[head:])) if not special), 0)
    return Framed(encoded["input_ids"], encoded.get("token_type_ids"), head, len(added) - head - tail)
