"""Words that are never written: which tokens would complete one, given the end of the text so far.

The text counts, not its tokens: each token is what it adds to the text in bytes, so no other spelling, split or case
gets a word through. Knows no sampling.
"""

import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING

import torch
from transformers.generation.logits_process import LogitsProcessor

from textgen_cli.errors import ModelError
from textgen_cli.generate.token_bytes import token_table
from textgen_cli.text.segments import is_unspaced

if TYPE_CHECKING:
    from textgen_cli.model.tokenizer import Tokenizer

Word = tuple[frozenset[bytes], ...]  # for each character, all that counts as it
# Of a word: its number, the character, what this one still lacks ("": nothing begun); where the number of the
# character is below 0, an invisible one stands before character ~number and lacks that.
Part = tuple[int, int, bytes]
State = frozenset[Part]  # the words that the text may be within


class Banned(LogitsProcessor):
    """Forbids every token that would complete a word; scores (B, V), ids (B, T) in, scores out.

    A word counts in any case and anywhere, inside of longer words too; a blank in it is a space, a tab or a line end,
    and beside Chinese and Japanese characters and punctuation blanks may stand; invisible characters (category Cf)
    in it count for nothing. States depend on the ids alone, so beams and rows may come and go.
    """

    def __init__(self, words: Iterable[str], texts: Sequence[bytes]) -> None:
        self._texts = texts
        self._sizes = [sum(byte not in invisible().bytes for byte in text) for text in texts]
        seen = (invisible().none_in(word) or word for word in words)
        both = dict.fromkeys(spelled for word in seen for spelled in (word, word.casefold()))
        self._words = [spellings(word) for word in both]
        self._longest = max((sum(max(map(len, c)) for c in word) for word in self._words), default=0)
        self._sorted = sorted((text, token) for token, text in enumerate(texts) if text)
        self._keys = [text for text, _ in self._sorted]
        self._begins: dict[int, set[Part]] = defaultdict(set)  # by first byte
        for number, word in enumerate(self._words):
            for spelling in word[0]:
                self._begins[spelling[0]].add((number, 0, spelling))
        self._moves: dict[tuple[State, int], tuple[State, bool]] = {}
        self._after: dict[tuple[State, int], State] = {}
        self._completing: dict[Part, set[int]] = {}
        self._forbidden: dict[tuple[State, torch.device], torch.Tensor] = {}
        self._always = {token for token, text in enumerate(texts) if self._read(frozenset(), text)[1]}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        near = input_ids[:, -4 * self._longest :].tolist()
        for row, ids in enumerate(near):
            state = self._state(ids)
            if state is None:  # tokens without text stand between, or invisible ones
                state = self._state(input_ids[row].tolist(), whole=True) or frozenset()
            scores[row].index_fill_(0, self.forbidden(state, scores.device), -torch.inf)
        return scores

    def adds(self, token: int) -> bool:
        """Whether a token is text."""
        return token < len(self._texts) and bool(self._texts[token])

    def _state(self, ids: Sequence[int], *, whole: bool = False) -> State | None:
        """The state behind these ids; None where they hold less text than a word may have, and are not all."""
        size, start = 0, len(ids)
        while start and size < self._longest:
            start -= 1
            size += self._sizes[ids[start]] if ids[start] < len(self._texts) else 0
        if size < self._longest and not whole:
            return None
        state: State = frozenset()
        for token in ids[start:]:
            if self.adds(token):
                key = state, token
                if key not in self._after:
                    self._after[key] = self._read(state, self._texts[token])[0]
                state = self._after[key]
        return state

    def forbidden(self, state: State, where: torch.device) -> torch.Tensor:
        """The tokens that complete a word behind a state."""
        key = state, where
        if key not in self._forbidden:
            tokens = set(self._always)
            for part in state:
                if part not in self._completing:
                    self._completing[part] = self._that_complete(part)
                tokens |= self._completing[part]
            self._forbidden[key] = torch.tensor(sorted(tokens), dtype=torch.long, device=where)
        return self._forbidden[key]

    def _that_complete(self, part: Part) -> set[int]:
        """The tokens that begin with the rest of a word."""
        number, at, rest = part
        starts = {rest} if rest else {b""}
        for character in self._words[number][~at if at < 0 else at + 1 if rest else at :]:
            behind = self._with_invisible(starts)
            starts = {start + more for start in behind for more in character if self._some(start + more)}
        return {token for start in starts for _, token in self._sorted[slice(*self._span(start))]}

    def _with_invisible(self, starts: set[bytes]) -> set[bytes]:
        """These, and with invisible characters behind them, as far as tokens begin so."""
        found = new = starts
        while new:
            new = {
                start + hidden
                for start in new
                for first, several in invisible().by_first.items()
                if self._some(start + bytes([first]))
                for hidden in several
                if self._some(start + hidden)
            }
            found = found | new
        return found

    def _some(self, start: bytes) -> bool:
        first, behind = self._span(start)
        return first < behind

    def _span(self, start: bytes) -> tuple[int, int]:
        """The places of the tokens that begin so."""
        first = bisect_left(self._keys, start)
        # No byte of UTF-8 is 0xFF, so a long row of them stands behind every text that begins so.
        return first, bisect_left(self._keys, start + b"\xff" * 8, first)

    def _read(self, state: State, text: bytes) -> tuple[State, bool]:
        """The state behind further text, and whether a word was completed in it."""
        complete = False
        for byte in text:
            key = state, byte
            if key not in self._moves:
                self._moves[key] = self._moved(state, byte)
            state, whole = self._moves[key]
            complete = complete or whole
        return state, complete

    def _moved(self, state: State, byte: int) -> tuple[State, bool]:
        found: set[Part] = set()
        complete = False
        for number, at, rest in state:
            left = {rest} if rest else self._words[number][at]
            found |= {(number, at, spelling) for spelling in left if spelling[0] == byte}
            if not rest:
                found |= {(number, ~at, hidden) for hidden in invisible().by_first.get(byte, ())}
        moved: set[Part] = set()
        for number, at, spelling in found | self._begins.get(byte, set()):
            if len(spelling) > 1:
                moved.add((number, at, spelling[1:]))
            elif at < 0:
                moved.add((number, ~at, b""))
            elif at + 1 == len(self._words[number]):
                complete = True
            else:
                moved.add((number, at + 1, b""))
        return frozenset(moved), complete


@dataclass(frozen=True)
class Invisible:
    """The characters that nobody sees (category Cf), in UTF-8 by their first byte, and all bytes that are in them."""

    by_first: dict[int, list[bytes]]
    bytes: frozenset[int]

    def none_in(self, text: str) -> str:
        """The text without such characters."""
        return "".join(character for character in text if unicodedata.category(character) != "Cf")


@cache
def invisible() -> Invisible:
    """These characters, looked for where Unicode has any."""
    by_first: dict[int, list[bytes]] = defaultdict(list)
    for code in chain(range(0x20000), range(0xE0000, 0xE0080)):
        if unicodedata.category(chr(code)) == "Cf":
            data = chr(code).encode()
            by_first[data[0]].append(data)
    return Invisible(dict(by_first), frozenset(byte for many in by_first.values() for byte in b"".join(many)))


def spellings(word: str) -> Word:
    """For each character of a word the texts in UTF-8 that count as it."""
    found = []
    for place, character in enumerate(word):
        same = _same(character)
        if place and (_loose(word[place - 1]) or _loose(character)):
            same |= {" " + other for other in same if not other.isspace()}
        found.append(frozenset(other.encode("utf-8", "replace") for other in same))
    return tuple(found)


def _same(character: str) -> set[str]:
    if character.isspace():
        return {" ", "\t", "\n", "\r\n", "\u00a0", "\u3000"}
    cases = {character, character.lower(), character.upper(), character.title()}
    cases |= {"\u017f"} if character == "s" else {"\u212a"} if character == "k" else set()
    cases |= {
        chr(ord(case) + 0xFEE0) for case in cases if len(case) == 1 and "!" <= case <= "~"
    }  # full width
    return cases | {unicodedata.normalize("NFD", case) for case in cases}


def _loose(character: str) -> bool:
    """Whether decoders may put a blank beside a character that the word does not have."""
    return is_unspaced(character) or unicodedata.category(character)[0] in "PS"


def token_texts(tokenizer: "Tokenizer", size: int) -> list[bytes]:
    """What each of `size` ids adds to a text, b"" where it is none."""
    if tokenizer.fast is not None:
        try:
            table = token_table(tokenizer.fast, size, ())
        except ModelError:
            pass
        else:
            return [table.texts.get(token, b"") for token in range(size)]
    # Decoders that join words otherwise (WordPiece, suffixes of word ends): by what they write behind another token.
    anchor = next((token for token in range(tokenizer.size) if tokenizer.decode([token]).isalnum()), 0)
    before = tokenizer.decode([anchor])
    count = min(size, tokenizer.size)
    both = (tokenizer.decode([anchor, token]) for token in range(count))
    return [text.removeprefix(before).encode("utf-8", "replace") for text in both] + [b""] * (size - count)
