"""Which tokens a sliding window shows and which it scores: every token once, with context before it.

Numbers in, numbers out: knows no tokenizer and no model.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Convention:
    """How a text longer than the model's context is cut into windows, and what each begins with."""

    window: int  # inputs of a window, the token that begins it included
    stride: int  # tokens scored in each window behind the first
    start: int | None = None  # the token that begins a text; None: none, and the first token is not scored
    each: bool = True  # it begins every window, not the first alone


@dataclass(frozen=True)
class Window:
    """Inputs of one pass: the beginning token where `starts`, then tokens [shown, end - 1).

    Of tokens [scored, end) the log-probabilities are taken.
    """

    starts: bool
    shown: int
    scored: int
    end: int


def windows(count: int, rule: Convention, first: int = 0) -> Iterator[Window]:
    """The windows over `count` tokens, of which those from `first` on are scored, each exactly once.

    A window behind the first looks as far back as it has room for. Without a beginning token, token 0 has nothing
    before it and is not scored.
    """
    at = max(first, 0 if rule.start is not None else 1)
    # Room for tokens before the last one that is scored, in the first window and in those behind it.
    room = rule.window - (rule.start is not None)
    later = rule.window - (rule.start is not None and rule.each)
    end = min(count, max(room + 1, at + 1))
    while at < count:
        is_first = end - 1 <= room
        shown = 0 if is_first else max(0, end - 1 - later)
        yield Window(rule.start is not None and (is_first or rule.each), min(shown, at), at, end)
        at, end = end, min(count, end + rule.stride)
