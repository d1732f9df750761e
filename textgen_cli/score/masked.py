"""Pseudo-log-likelihood under masked models: each token is masked in turn and judged by all the others.

`original` masks the token alone (Salazar et al. 2020); `within_word_l2r` also the later tokens of its word, so that
a word is not given away by its own pieces (Kauf & Ivanova 2023). Special tokens are shown and never judged.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from textgen_cli.config import ScoringConfig
from textgen_cli.errors import InputError, ModelError, TextgenError
from textgen_cli.events import Report
from textgen_cli.model.head import Head
from textgen_cli.model.load import Model
from textgen_cli.model.rows import batched, gathered
from textgen_cli.score import figures
from textgen_cli.score.measures import Measured, Wanted, measured
from textgen_cli.score.pairs import shared
from textgen_cli.score.request import Asked, Figures

BATCH_TOKENS = 4096
BATCH_ROWS = 256
WINDOW = 512  # tokens at once where a model names no limit


@dataclass(frozen=True)
class Encoded:
    """A text as tokens, its context before it; `places` are those that are judged."""

    ids: list[int]
    words: list[int | None]  # the word of each token; None: none
    spans: list[tuple[int, int]]  # characters of each token, counted from the text's first
    places: list[int]
    head: int  # special tokens that begin every window
    tail: int  # and end it


class MaskedScorer:
    """Scores texts, with or without a context, under one masked model."""

    def __init__(self, config: ScoringConfig, model: Model, rows: int | None, report: Report) -> None:
        self.config, self.model, self.rows, self.report = config, model, rows or BATCH_ROWS, report
        self.pll = config.pll or ("original" if config.pairs else "within_word_l2r")
        self.limit = model.context or WINDOW
        self.wanted = Wanted(detail=config.tokens, top=config.top or 0)
        backend: Any = model.tokenizer.backend
        if backend.mask_token_id is None:
            raise ModelError("E-TOKENIZER", model.name, "has no mask token")
        if model.tokenizer.fast is None and (self.pll == "within_word_l2r" or config.words):
            fact = "its tokenizer tells not where words begin"
            raise ModelError("E-TOKENIZER", model.name, fact, hint="use --pll original without --words")
        self.mask: int = backend.mask_token_id
        # Unknown tokens stand for text.
        self.special = set(backend.all_special_ids) - {backend.unk_token_id}
        self.head = self._head()

    def score(
        self, asked: Sequence[Asked], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Figures | TextgenError]]:
        """Figures of every text; the masked copies of all of them are computed together, those of like length."""
        texts: list[tuple[Asked, Encoded]] = []
        for one in asked:
            try:
                texts.append((one, self._common(one, self.encode(one))))
            except TextgenError as error:
                yield one.index, error
        owners = [number for number, (_, text) in enumerate(texts) for _ in text.places]
        places = [place for _, text in texts for place in text.places]
        found = batched(
            [min(len(texts[owner][1].ids), self.limit) for owner in owners],
            lambda batch: self._batch([(texts[owners[row]][1], places[row]) for row in batch]),
            lambda row: texts[owners[row]][0].index not in done,
            self.model,
            self.report,
            tokens=BATCH_TOKENS if self.head.splits else self.head.positions,
            rows=self.rows,
            alike=True,  # some architectures see padding, whatever the mask says (FNet, ConvBERT)
        )
        for number, parts in gathered(owners, found):
            one, text = texts[number]
            yield one.index, parts if isinstance(parts, TextgenError) else self._figures(one, text, parts)

    def _common(self, asked: Asked, text: Encoded) -> Encoded:
        """Of a pair only the places whose tokens the other text has too: what differs is not what is judged."""
        if asked.pair is None:
            return text
        first, second = (
            self.encode(replace(asked, text=one)).ids for one in (asked.pair.first, asked.pair.second)
        )
        in_first, in_second = shared(first, second)
        both = in_first if asked.text == asked.pair.first else in_second
        places = [place for place in text.places if place in both]
        if not places:
            raise InputError("E-PAIRS", "pair", "its texts have no token in common")
        return replace(text, places=places)

    # --- text to masked copies

    def encode(self, asked: Asked) -> Encoded:
        """The tokens of a text and which are judged. InputError where there are none, or no room for them."""
        if not asked.text:
            raise InputError("E-EMPTY", self.config.text_field, "is empty")
        context = asked.context or ""
        # Those at a context's end go to the text, as with causal models.
        blanks = len(context) - len(context.rstrip())
        fast = self.model.tokenizer.fast is not None
        if context and not fast:
            raise ModelError("E-TOKENIZER", self.model.name, "its tokenizer tells not where a context ends")
        backend: Any = self.model.tokenizer.backend
        found = backend(
            context + asked.text,
            truncation=False,
            return_offsets_mapping=fast,
            return_special_tokens_mask=True,
        )
        ids, added = list(found["input_ids"]), list(found["special_tokens_mask"])
        spans = [(a - len(context), b - len(context)) for a, b in found["offset_mapping"]] if fast else []
        places = [
            place
            for place, token in enumerate(ids)
            if not added[place] and token not in self.special and (not context or spans[place][1] > -blanks)
        ]
        if not places:
            raise InputError("E-EMPTY", self.config.text_field, "has no token of its own")
        own = [place for place, special in enumerate(added) if not special]
        head, tail = own[0], len(ids) - own[-1] - 1
        if len(ids) > self.limit <= head + tail:
            raise InputError(
                "E-CONTEXT", self.config.text_field, f"{len(ids):,} tokens, the model takes {self.limit:,}"
            )
        words = found.word_ids() if fast else [None] * len(ids)
        return Encoded(ids, words, [(max(0, a), max(0, b)) for a, b in spans], places, head, tail)

    def copy(self, text: Encoded, place: int) -> tuple[list[int], int]:
        """The text with a place masked, and where that stands; of a long text the window with it in the middle."""
        ids, start, width = text.ids, text.head, len(text.ids) - text.head - text.tail
        if len(ids) > self.limit:
            width = self.limit - text.head - text.tail
            start = min(max(place - width // 2, text.head), len(ids) - text.tail - width)
        inner = ids[start : start + width]
        end = place + 1
        if self.pll == "within_word_l2r" and text.words[place] is not None:
            while end < start + width and text.words[end] == text.words[place]:
                end += 1
        inner[place - start : end - start] = [self.mask] * (end - place)
        return [*ids[: text.head], *inner, *ids[len(ids) - text.tail :]], text.head + place - start

    # --- masked copies to measures

    def _head(self) -> Head:
        net = self.model.net
        ids = torch.full((1, 8), self.mask, device=net.device)
        probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        head = Head(net, [net.base_model], probe)
        head.prove(lambda: net.base_model(**probe)[0])
        return head

    @torch.inference_mode()
    def _batch(self, rows: Sequence[tuple[Encoded, int]]) -> list[Measured | TextgenError]:
        net = self.model.net
        copies = [self.copy(*row) for row in rows]
        ids = torch.tensor([ids for ids, _ in copies], device=net.device)  # (B, T)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        every = torch.arange(len(rows), device=net.device)
        at = torch.tensor([place for _, place in copies], device=net.device)
        targets = torch.tensor([text.ids[place] for text, place in rows], device=net.device)
        if self.head.splits:
            chunks = self.head.logits(net.base_model(**inputs)[0][every, at])
        else:
            chunks = iter([net(**inputs).logits[every, at].float()])
        return measured(chunks, range(len(rows)), targets, len(rows), self.wanted, self.model.name)

    # --- measures to figures

    def _figures(self, asked: Asked, text: Encoded, parts: Sequence[Measured]) -> Figures:
        logs = [part.log_probability[0] for part in parts]
        total, unit = math.fsum(logs), figures.unit(self.config)
        found: Figures = {
            "pseudo_log_likelihood": total * figures.SCALE[unit],
            "tokens": len(logs),
            "pseudo_perplexity": figures.exponential(-total / len(logs)),
            "pll": self.pll,
            "unit": unit,
        }
        if len(text.ids) > self.limit:
            found["window"] = self.limit
        if self.config.tokens or self.config.words:
            ids = [text.ids[place] for place in text.places]
            spans = [text.spans[place] for place in text.places] if text.spans else []
            found |= figures.details(
                self.config, self.model.tokenizer, asked.text, ids, spans, parts, 0, unit
            )
        return found
