"""The bytes that each token of a fast tokenizer adds to the text, as constrained decoding needs them.

Byte-level BPE (GPT-2, Llama 3, Qwen), SentencePiece with byte fallback (Llama 2, Mistral, Gemma) and without
(T5, mBART, NLLB). A tokenizer whose text isn't the sum of its tokens (WordPiece, `</w>` suffixes) is refused.
It knows nothing of grammars or models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

from textgen_cli.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROBE = 'Hello, wörld! {"a": [1, 2.5],\n\t"b c": "你好 🙂"} It\'s naïve.'


@dataclass(frozen=True)
class TokenTable:
    """What llguidance asks of a tokenizer; `tokens[i]` is b"" for ids that are never text."""

    tokens: list[bytes]  # one entry an id, V of them
    special_token_ids: list[int]  # never text; the end tokens among them
    eos_token_id: int | None  # None: the model has no end token
    eos_ids: tuple[int, ...]
    blank_first: bool  # decoding drops one blank from the start of the text
    tokenizer: Tokenizer
    bos_token_id: None = None
    is_tokenizer_wrapper: bool = True

    def __call__(self, text: str) -> list[int]:
        """The tokens that llguidance forces where only one text can follow; [] where there are none.

        What the tokenizer says counts only if it spells the text: it may put a blank first, normalize, or
        take `<|im_end|>` for the special token.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids if self._spells(ids, text.encode()) else self._longest_match(text.encode())

    def _spells(self, ids: list[int], text: bytes) -> bool:
        # Special tokens are no text: `texts` lacks them.
        return all(i in self.texts for i in ids) and b"".join(self.texts[i] for i in ids) == text

    def _longest_match(self, text: bytes) -> list[int]:
        ids = []
        while text:
            sizes = range(min(self.longest, len(text)), 0, -1)
            found = next((self.ids[text[:size]] for size in sizes if text[:size] in self.ids), None)
            if found is None:
                return []
            ids.append(found)
            text = text[len(self.tokens[found]) :]
        return ids

    @cached_property
    def texts(self) -> dict[int, bytes]:
        special = set(self.special_token_ids)
        return {i: text for i, text in enumerate(self.tokens) if text and i not in special}

    @cached_property
    def ids(self) -> dict[bytes, int]:
        return {text: i for i, text in self.texts.items()}

    @cached_property
    def longest(self) -> int:
        return max(map(len, self.ids), default=0)


def token_table(tokenizer: Tokenizer, n_vocab: int, eos_ids: Iterable[int]) -> TokenTable:
    """The bytes of `n_vocab` tokens; ids beyond the tokenizer stay empty. Raises ModelError E-CONSTRAINT."""
    decoders = list(_decoders(tokenizer))
    spell = _speller(decoders)
    added = tokenizer.get_added_tokens_decoder()
    ends = tuple(token for token in eos_ids if 0 <= token < n_vocab)
    special = {token for token, entry in added.items() if entry.special}
    pieces = tokenizer.get_vocab(with_added_tokens=True)
    tokens = [b""] * max(n_vocab, max(pieces.values(), default=0) + 1)
    for piece, token in pieces.items():
        tokens[token] = spell(piece)
    blank_first = any(map(_drops_first_blank, decoders))
    _verify(tokenizer, tokens, special, blank_first=blank_first)
    return TokenTable(
        tokens=tokens[:n_vocab],
        special_token_ids=sorted(token for token in special | set(ends) if token < n_vocab),
        eos_token_id=ends[0] if ends else None,
        eos_ids=ends,
        blank_first=blank_first,
        tokenizer=tokenizer,
    )


def _refusal(fact: str) -> ModelError:
    return ModelError("E-CONSTRAINT", "tokenizer", fact, hint="use another model, or drop the constraint")


def _decoders(tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """The steps of the tokenizer's decoder, sequences flattened."""
    if tokenizer.decoder is None:
        raise _refusal("has no decoder, so its tokens cannot be constrained")
    stack: list[dict[str, Any]] = [json.loads(tokenizer.decoder.__getstate__())]
    while stack:
        step = stack.pop()
        if step["type"] == "Sequence":
            stack.extend(reversed(step["decoders"]))
        else:
            yield step


def _speller(decoders: list[dict[str, Any]]) -> Callable[[str], bytes]:
    """How a token's name in the vocabulary becomes its bytes."""
    kinds = {step["type"] for step in decoders}
    if kinds == {"ByteLevel"}:
        return _spell_byte_level
    blanks = {blank for step in decoders if (blank := _blank(step))}
    if len(blanks) != 1 or not kinds <= {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}:
        raise _refusal(f"decodes by {', '.join(sorted(kinds))}, which cannot be constrained")
    return partial(_spell_piece, blank=blanks.pop(), byte_fallback="ByteFallback" in kinds)


def _spell_byte_level(piece: str) -> bytes:
    try:
        return bytes(map(_alphabet().__getitem__, piece))
    except KeyError:  # an added token, spelled in plain text
        return piece.encode()


def _spell_piece(piece: str, *, blank: str, byte_fallback: bool) -> bytes:
    if byte_fallback and (match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece)):
        return bytes([int(match[1], 16)])
    return piece.replace(blank, " ").encode()


def _blank(step: Mapping[str, Any]) -> str | None:
    """The sign that a decoder's step turns into a blank."""
    if step["type"] == "Metaspace":
        return str(step["replacement"])
    if step["type"] == "Replace" and step["content"] == " ":
        sign: str | None = step["pattern"].get("String")
        return sign
    return None


def _drops_first_blank(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step["prepend_scheme"] != "never")
    return bool(step["type"] == "Strip" and step["content"] == " " and step["start"] > 0)


@cache
def _alphabet() -> dict[str, int]:
    """Byte-level BPE's letters: printable Latin-1 stands for itself, the other bytes from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _verify(tokenizer: Tokenizer, tokens: list[bytes], special: set[int], *, blank_first: bool) -> None:
    """Raise unless a sample's tokens, put together, are what the tokenizer decodes."""
    ids = tokenizer.encode(PROBE, add_special_tokens=False).ids
    text = b"".join(tokens[i] for i in ids if i not in special).decode(errors="replace")
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    if decoded not in (text, text.removeprefix(" ") if blank_first else text):
        raise _refusal("decodes to something other than the sum of its tokens, so it cannot be constrained")
