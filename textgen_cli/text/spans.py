"""The answer of an extractive model: the best span of a context by its start and end logits.

Plain lists in, offsets in characters out. It knows no model and no tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest


@dataclass(frozen=True)
class Answer:
    """A span of the context; `start` and `end` are character offsets, `score` a sum of two logits."""

    start: int
    end: int
    score: float


def best_spans(
    start: Sequence[float],
    end: Sequence[float],
    offsets: Sequence[tuple[int, int]],
    in_context: Sequence[bool],
    *,
    max_answer_tokens: int = 30,
    count: int = 1,
) -> list[Answer]:
    """The `count` best spans of at most `max_answer_tokens` tokens; of equals the earlier, shorter first.

    All sequences have length T: logits, each token's character offsets, whether it is of the context.
    A span runs over context tokens only and takes at least one character.
    """
    spans = []
    for first, opens in enumerate(start):
        if not in_context[first]:
            continue
        for last in range(first, min(first + max_answer_tokens, len(end))):
            if not in_context[last]:
                break
            if offsets[last][1] > offsets[first][0]:
                spans.append((opens + end[last], -first, -last))
    best = nlargest(count, spans)
    return [Answer(offsets[-first][0], offsets[-last][1], score) for score, first, last in best]


def null_score(start: Sequence[float], end: Sequence[float]) -> float:
    """The score of "no answer": both logits at the first token, as models of SQuAD 2 are trained."""
    return start[0] + end[0]


def answered(best: Answer | None, null: float, *, threshold: float = 0.0) -> bool:
    """Whether the best span beats "no answer": SQuAD 2's rule, null - best <= threshold."""
    return best is not None and null - best.score <= threshold
