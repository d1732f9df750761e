"""The green-list watermark: which tokens a key favours behind which token, and whether a text shows it.

One rule for writing and reading (Kirchenbauer et al. 2023, arXiv 2301.10226; transformers' `lefthash`). The lists are
drawn on the CPU whatever the model runs on: the generators of other devices draw other lists.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import transformers

from textgen_cli.config import ModelConfig
from textgen_cli.errors import ModelError
from textgen_cli.events import Report
from textgen_cli.model.check import check_folder
from textgen_cli.model.load import load_tokenizer
from textgen_cli.model.source import locate
from textgen_cli.model.tokenizer import Tokenizer

RATIO = 0.25  # share of the vocabulary that is green behind a token
THRESHOLD = 1e-4  # a text with a smaller p-value is held to be watermarked


@dataclass(frozen=True)
class Evidence:
    """What a text tells of a watermark; `tokens`: the different pairs of neighbours that were looked at."""

    tokens: int
    green: int
    z: float  # standard deviations above what chance gives
    p_value: float  # the chance of so many green ones or more, by the binomial distribution


def hashing_key(key: str) -> int:
    """The number that a key stands for: odd, so that no two tokens share a seed in torch's 32 bits of it."""
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big") | 1


@functools.lru_cache(maxsize=512)
def green(number: int, token: int, vocabulary: int) -> torch.Tensor:
    """Which tokens (V,) are green behind `token`, under the number of a key."""
    generator = torch.Generator().manual_seed(number * token % (2**64 - 1))
    listed = torch.zeros(vocabulary, dtype=torch.bool)
    listed[torch.randperm(vocabulary, generator=generator)[: int(vocabulary * RATIO)]] = True
    return listed


class Marker(transformers.LogitsProcessor):
    """Adds `bias` to the scores of green tokens; it reads a row's last token alone, so that padding changes nothing."""

    def __init__(self, key: str, bias: float, vocabulary: int) -> None:
        self._number, self._bias, self._vocabulary = hashing_key(key), bias, vocabulary

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        lists = [green(self._number, token, self._vocabulary) for token in input_ids[:, -1].tolist()]
        listed = torch.stack(lists).to(scores.device)  # (B, V)
        scores[:, : self._vocabulary] += self._bias * listed
        return scores


def evidence(ids: Sequence[int], key: str, vocabulary: int) -> Evidence | None:
    """What token ids tell; each pair of neighbours counts once, however often it comes. None: there is no pair."""
    pairs = sorted(set(pairwise(ids)))
    if not pairs:
        return None
    number, count = hashing_key(key), len(pairs)
    hits = sum(bool(green(number, before, vocabulary)[token]) for before, token in pairs)
    z = (hits - RATIO * count) / math.sqrt(count * RATIO * (1 - RATIO))
    return Evidence(count, hits, z, _tail(hits, count, int(vocabulary * RATIO) / vocabulary))


def _tail(hits: int, count: int, chance: float) -> float:
    """P(X >= hits) of a binomial distribution, exactly but for rounding."""
    whole = math.lgamma(count + 1)
    terms = (
        math.exp(
            whole
            - math.lgamma(n + 1)
            - math.lgamma(count - n + 1)
            + n * math.log(chance)
            + (count - n) * math.log1p(-chance)
        )
        for n in range(hits, count + 1)
    )
    return min(1.0, math.fsum(terms))


def reader(config: ModelConfig, report: Report) -> tuple[Tokenizer, int]:
    """A model's tokenizer and the size of its vocabulary, without its weights; raises what finding a model raises."""
    located = locate(config, report)
    checked = check_folder(located.folder)
    if not checked.has_tokenizer:
        raise ModelError("E-TOKENIZER", located.label, "has no tokenizer")
    return load_tokenizer(located.folder, located.label), vocabulary_of(checked.config, located.label)


def vocabulary_of(config: dict[str, Any], name: str) -> int:
    """The number of tokens that a config.json states; ModelError E-VOCAB when it states none."""
    found = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(found, int) or found * RATIO < 1:
        raise ModelError("E-VOCAB", name, "its config.json states no size of the vocabulary")
    return found
