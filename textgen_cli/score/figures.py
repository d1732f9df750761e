"""Figures of a scored text: sums, rates and what is told of each token and word, in the unit asked for.

The formulas: perplexity = exp(-log-likelihood in nats / tokens); bits per byte = -log-likelihood in bits / bytes of
the text in UTF-8. Knows no model and no batch.
"""

import math
from collections.abc import Sequence
from typing import Any

from textgen_cli.config import ScoringConfig
from textgen_cli.errors import ModelError
from textgen_cli.model.tokenizer import Tokenizer
from textgen_cli.score.measures import Measured
from textgen_cli.score.request import Figures
from textgen_cli.text.segments import assign, segments

SCALE = {"nats": 1.0, "bits": 1 / math.log(2)}


def unit(config: ScoringConfig) -> str:
    """The unit of log-likelihoods and entropies."""
    return "bits" if config.bits else "nats"


def exponential(nats: float) -> float | None:
    """e^nats; None where that is more than a number can hold."""
    try:
        return math.exp(nats)
    except OverflowError:
        return None


def likelihood(logs: Sequence[float], text: str, unit: str) -> Figures:
    """Sums and rates of log-probabilities in nats over the text they are the tokens of."""
    total = math.fsum(logs)
    size, characters = len(text.encode("utf-8", "replace")), len(text)
    bits = -total / math.log(2)
    return {
        "log_likelihood": total * SCALE[unit],
        "tokens": len(logs),
        "perplexity": exponential(-total / len(logs)),
        "bits_per_byte": bits / size if size else None,
        "bits_per_character": bits / characters if characters else None,
        "bytes": size,
        "characters": characters,
    }


AGAINST = ("log_likelihood", "tokens", "perplexity", "bits_per_byte")


def difference(found: Figures, other: Figures) -> Figures:
    """A second model's figures of the same text, and how many bits a byte more the first one takes."""
    first, second = found["bits_per_byte"], other["bits_per_byte"]
    apart = None if first is None or second is None else first - second
    return {"against": {name: other[name] for name in AGAINST}, "bits_per_byte_difference": apart}


def details(
    config: ScoringConfig,
    tokenizer: Tokenizer,
    text: str,
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    parts: Sequence[Measured],
    silent: int,
    unit: str,
) -> Figures:
    """`token_scores` and `word_scores`, as far as they are asked for.

    ids: the text's tokens; spans: the characters of `text` that each stands for; the first `silent` of them have no
    log-probability. Raises ModelError E-TOKENIZER where words are asked for and the tokenizer tells no offsets.
    """
    found: Figures = {}
    logs: list[float | None] = [None] * silent
    logs += [value * SCALE[unit] for part in parts for value in part.log_probability]
    if config.tokens:
        found["token_scores"] = _tokens(tokenizer, ids, spans, logs, parts, silent, unit)
    if config.words:
        if not spans:
            raise ModelError(
                "E-TOKENIZER", tokenizer.name, "tells not where its tokens stand, which --words needs"
            )
        found["word_scores"] = words(text, spans, logs)
    return found


def _tokens(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    logs: Sequence[float | None],
    parts: Sequence[Measured],
    silent: int,
    unit: str,
) -> list[dict[str, Any]]:
    scale = SCALE[unit]
    ranks = [None] * silent + [value for part in parts for value in part.rank]
    entropies = [None] * silent + [value * scale for part in parts for value in part.entropy]
    tops = [value for part in parts for value in part.top]
    told = []
    for at, token in enumerate(ids):
        start, end = spans[at] if spans else (None, None)
        entry: dict[str, Any] = {"token": tokenizer.spell(token), "start": start, "end": end}
        entry |= {"log_probability": logs[at], "rank": ranks[at], "entropy": entropies[at]}
        if tops and at >= silent:
            entry["top"] = [
                {"token": tokenizer.spell(other), "log_probability": value * scale}
                for other, value in tops[at - silent]
            ]
        told.append(entry)
    return told


def words(text: str, spans: Sequence[tuple[int, int]], logs: Sequence[float | None]) -> list[dict[str, Any]]:
    """The log-likelihood of each word: the sum over its tokens, the blanks before it included."""
    found = segments(text)
    sums: list[list[float]] = [[] for _ in found]
    counts = [0] * len(found)
    for owner, value in zip(assign(spans, found), logs, strict=True):
        if owner is not None:
            counts[owner] += 1
            sums[owner] += [] if value is None else [value]
    return [
        {
            "word": text[start:end],
            "start": start,
            "end": end,
            "log_likelihood": math.fsum(values) if values else None,
            "tokens": count,
        }
        for (start, end), values, count in zip(found, sums, counts, strict=True)
    ]
