"""The words of a text, and which word a token belongs to. Knows no tokenizer: offsets in, numbers out.

Words stand between blanks; where a script puts none between them (Chinese, Japanese), every character is a word.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

Span = tuple[int, int]  # first character, and the one behind the last

_HAN = "\u2e80-\u2fdf\u3005\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"
_KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d\U0001aff0-\U0001b16f"
# Voicing marks and variation selectors: parts of the character before them.
_MARKS = "\u3099-\u309c\uff9e\uff9f\ufe00-\ufe0f\U000e0100-\U000e01ef"
_WORD = re.compile(rf"[{_HAN}{_KANA}][{_MARKS}]*|[^\s{_HAN}{_KANA}]+")
_UNSPACED = re.compile(
    rf"[{_HAN}{_KANA}\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
)  # and Thai, Lao, Burmese, Khmer
_CLOSING = "\"'\u2019\u201d\u00bb)\\]\u300d\u300f\uff09"
# What a run of marks is like is asked where it begins alone, so that long ones cost no more than their length.
_END = re.compile(
    rf"(?<![.!?\u2026])[.!?\u2026]++[{_CLOSING}]*+(?=\s)|(?<![\u3002\uff01\uff1f])[\u3002\uff01\uff1f]++[{_CLOSING}]*+|\n"
)


def is_unspaced(character: str) -> bool:
    """Whether a character is of a script that puts no blanks between words."""
    return bool(_UNSPACED.match(character))


def segments(text: str) -> list[Span]:
    """The words of a text in order; every character that is not blank is in exactly one."""
    return [match.span() for match in _WORD.finditer(text)]


def sentences(text: str) -> list[Span]:
    """The sentences of a text in order, without the blanks around them; a line end ends one too.

    They end behind a full stop, question or exclamation mark before a blank, in Chinese and Japanese behind any such
    mark, with the quotes and brackets that close there. An abbreviation ends one as well.
    """
    ends = [match.end() for match in _END.finditer(text)]
    found = []
    for start, end in pairwise([0, *ends, len(text)]):
        sentence = text[start:end]
        if sentence.strip():
            found.append((end - len(sentence.lstrip()), start + len(sentence.rstrip())))
    return found


def assign(offsets: Sequence[Span], words: Sequence[Span]) -> list[int | None]:
    """The number of the word each token belongs to: that of its first character that is not blank.

    offsets: of the tokens, special ones left out; words: what `segments` found. Blanks alone belong to the next word,
    at the end to the last; an empty span (a further byte of a character) to the word of the character before
    it. None only where there is no word at all.
    """
    if not words:
        return [None] * len(offsets)
    ends = [end for _, end in words]
    # The first word that ends behind the token's start; at an empty span, the one that ends there comes first.
    found = (bisect_left(ends, start + (start < end)) for start, end in offsets)
    return [min(word, len(words) - 1) for word in found]
