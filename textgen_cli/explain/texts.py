"""Where tokens stand in the text they were made of, or that they make. Knows no network."""

from collections.abc import Sequence
from typing import Any

from textgen_cli.model.tokenizer import Tokenizer
from textgen_cli.text.segments import Span


def read(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[Span | None]]:
    """The text of tokens, and the characters of each; None for a special one, of which masks alone are seen.

    A character of several tokens belongs to the last of them.
    """
    backend: Any = tokenizer.backend
    special = set(backend.all_special_ids) - {backend.unk_token_id}
    stream = tokenizer.stream()
    text, spans = "", list[Span | None]()
    for at, token in enumerate(ids):
        if token in special:
            text += f" {tokenizer.spell(token)}" if token == backend.mask_token_id else ""
            spans.append(None)
            continue
        piece = stream.feed(token)
        if at == len(ids) - 1:
            piece += stream.end()
        spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, spans


def tokenized(tokenizer: Tokenizer, *texts: str) -> tuple[str, list[Span | None]] | None:
    """The texts as one, a line each, and the characters of each token the tokenizer makes of them.

    None where the tokenizer does not tell.
    """
    if tokenizer.fast is None:
        return None
    backend: Any = tokenizer.backend
    found = backend(*texts, truncation=False, return_offsets_mapping=True, return_special_tokens_mask=True)
    starts = [0]
    for text in texts:
        starts.append(starts[-1] + len(text) + 1)
    spans: list[Span | None] = []
    rows = zip(found["offset_mapping"], found["special_tokens_mask"], found.sequence_ids(0), strict=True)
    for (start, end), added, number in rows:
        shift = starts[number or 0]
        spans.append(None if added else (start + shift, end + shift))
    return "\n".join(texts), spans


def placed(tokenizer: Tokenizer, ids: Sequence[int], *texts: str) -> tuple[str, tuple[Span | None, ...]]:
    """Text and characters of tokens: in the texts they come from where these give so many, else in what they make."""
    found = tokenized(tokenizer, *texts) if texts else None
    if found is None or len(found[1]) != len(ids):
        found = read(tokenizer, ids)
    return found[0], tuple(found[1])
