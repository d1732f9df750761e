"""Log-likelihood of a target given its source, under encoder-decoder models; of choices for one source, too.

The target is tokenised as targets are and shifted as the model shifts it, so that the sum is the model's own loss:
every token counts, those the tokenizer adds (a language, the end) included. Sources are encoded once in a batch.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
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
from textgen_cli.score.request import Asked, Figures

BATCH_TOKENS = 4096
BATCH_ROWS = 64


@dataclass(frozen=True)
class Target:
    """A text to score: its tokens, and the characters of each (none where the tokenizer tells them not)."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Pairs:
    """One record as tokens: its source, and its target or choices."""

    source: tuple[int, ...]
    targets: list[Target]
    truncated: bool = False

    @property
    def size(self) -> int:
        """Tokens of a row; alike for all choices, so that they come into one batch and share the source."""
        return len(self.source) + max(len(target.ids) for target in self.targets)


class Seq2SeqScorer:
    """Scores texts given their sources under one encoder-decoder model."""

    def __init__(self, config: ScoringConfig, model: Model, rows: int | None, report: Report) -> None:
        self.config, self.model, self.rows, self.report = config, model, rows or BATCH_ROWS, report
        self.wanted = Wanted(detail=config.tokens, top=config.top or 0)
        self.encoder, self.decoder = model.net.get_encoder(), model.net.get_decoder()
        self.head = self._head()

    def score(
        self, asked: Sequence[Asked], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Figures | TextgenError]]:
        """Figures of every text, or of every choice under `choices` (there in nats, for what normalises them)."""
        texts: list[tuple[Asked, Pairs]] = []
        for one in asked:
            try:
                texts.append((one, self.encode(one)))
            except TextgenError as error:
                yield one.index, error
        owners = [number for number, (_, pairs) in enumerate(texts) for _ in pairs.targets]
        targets = [target for _, pairs in texts for target in pairs.targets]
        found = batched(
            [texts[owner][1].size for owner in owners],
            lambda batch: self._batch([(texts[owners[row]][1].source, targets[row].ids) for row in batch]),
            lambda row: texts[owners[row]][0].index not in done,
            self.model,
            self.report,
            tokens=BATCH_TOKENS if self.head.splits else self.head.positions,
            rows=self.rows,
        )
        for number, parts in gathered(owners, found):
            one, pairs = texts[number]
            yield one.index, parts if isinstance(parts, TextgenError) else self._figures(pairs, one, parts)

    # --- texts to tokens

    def encode(self, asked: Asked) -> Pairs:
        """A record's tokens. InputError where it has no source, an empty target, or too many tokens."""
        if asked.context is None:
            fact = "is missing: the source that the text is judged by"
            raise InputError(
                "E-FIELD", "context", fact, hint="--context names its field, or is the source itself"
            )
        limit = self.model.context
        whole = self.model.tokenizer.encode(asked.context)
        if not whole:
            raise InputError("E-EMPTY", "context", "has no tokens")
        source = self._cut(whole)
        if limit is not None and len(source) > limit:
            fact = f"{len(source):,} tokens, the model takes {limit:,}"
            raise InputError("E-CONTEXT", "context", fact, hint="--truncate right cuts its end")
        texts = (asked.text,) if asked.choices is None else asked.choices
        targets = [self.target(text) for text in texts]
        return Pairs(tuple(source), targets, truncated=len(source) < len(whole))

    def target(self, text: str) -> Target:
        if not text:
            raise InputError("E-EMPTY", self.config.text_field, "is empty")
        backend: Any = self.model.tokenizer.backend
        fast = self.model.tokenizer.fast is not None
        try:
            found = backend(text_target=text, truncation=False, return_offsets_mapping=fast)
        except KeyError as error:
            # M2M100's tokenizer without a target language.
            raise ModelError(
                "E-LANGUAGE", self.model.name, "its tokenizer names no target language"
            ) from error
        ids = list(found["input_ids"])
        limit = self.model.context
        if limit is not None and len(ids) > limit:
            fact = f"{len(ids):,} tokens, the model takes {limit:,}"
            raise InputError("E-CONTEXT", self.config.text_field, fact)
        spans = enumerate(found["offset_mapping"] if fast else ())
        # The end has no characters; it stands behind them.
        return Target(text, ids, [(a, b) if b or not at else (len(text),) * 2 for at, (a, b) in spans])

    def _cut(self, ids: list[int]) -> list[int]:
        """A source within the model's context where --truncate allows; what the tokenizer adds around it stays."""
        limit = self.model.context
        if limit is None or self.config.truncate is None or len(ids) <= limit:
            return ids
        special = set(self.model.tokenizer.backend.all_special_ids)
        head, tail = ids[: ids[0] in special], ids[len(ids) - (ids[-1] in special) :]
        room = limit - len(head) - len(tail)
        inner = ids[len(head) : len(ids) - len(tail)]
        return [
            *head,
            *(inner[len(inner) - room :] if self.config.truncate == "left" else inner[:room]),
            *tail,
        ]

    # --- tokens to measures

    def _head(self) -> Head:
        net = self.model.net
        ids = torch.ones((1, 4), dtype=torch.long, device=net.device)
        head = Head(net, [self.encoder, self.decoder], {"input_ids": ids, "decoder_input_ids": ids})
        head.prove(lambda: self._hidden([(1, 1, 1, 1)], ids))
        return head

    @torch.inference_mode()
    def _batch(self, rows: Sequence[tuple[tuple[int, ...], list[int]]]) -> list[Measured | TextgenError]:
        sources = [source for source, _ in rows]
        labels = self._padded([ids for _, ids in rows], -100)  # (B, T)
        where, inputs = labels >= 0, self.shifted(labels)
        if self.head.splits:
            chunks = self.head.logits(self._hidden(sources, inputs)[where])
        else:
            ids, mask = self._sources(sources)
            whole = self.model.net(
                input_ids=ids, attention_mask=mask, decoder_input_ids=inputs, use_cache=False
            )
            chunks = iter([whole.logits[where].float()])
        owners = where.nonzero()[:, 0].tolist()
        return measured(chunks, owners, labels[where], len(rows), self.wanted, self.model.name)

    def _hidden(self, sources: Sequence[tuple[int, ...]], inputs: torch.Tensor) -> torch.Tensor:
        """The decoder's hidden states (B, T, D) for its inputs (B, T); equal sources are encoded once."""
        distinct = {source: at for at, source in enumerate(dict.fromkeys(sources))}
        ids, mask = self._sources(list(distinct))
        memory = self.encoder(input_ids=ids, attention_mask=mask)[0]  # (sources, S, D)
        at = torch.tensor([distinct[source] for source in sources], device=ids.device)
        found: torch.Tensor = self.decoder(
            input_ids=inputs,
            encoder_hidden_states=memory[at],
            encoder_attention_mask=mask[at],
            use_cache=False,
        )[0]
        return found

    def _sources(self, sources: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded ids, and which of them are no padding."""
        ids = self._padded(sources, self.pad)
        lengths = torch.tensor([len(source) for source in sources], device=ids.device)
        return ids, (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()

    @property
    def pad(self) -> int:
        return int(self.model.tokenizer.backend.pad_token_id or 0)

    def _padded(self, rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        longest = max(map(len, rows))
        filled = [[*row, *[filler] * (longest - len(row))] for row in rows]
        return torch.tensor(filled, device=self.model.net.device)

    def shifted(self, labels: torch.Tensor) -> torch.Tensor:
        """The decoder's inputs for these labels, by the model's own rule."""
        net = self.model.net
        if hasattr(net, "prepare_decoder_input_ids_from_labels"):
            found: torch.Tensor = net.prepare_decoder_input_ids_from_labels(labels=labels)
            return found
        # M2M100 and its kin have the rule in their forward only.
        start = labels.new_full((len(labels), 1), net.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, self.pad)

    # --- measures to figures

    def _figures(self, pairs: Pairs, asked: Asked, parts: Sequence[Measured]) -> Figures:
        unit = figures.unit(self.config)
        if asked.choices is not None:
            told: Figures = {
                "choices": [_choice(t, part) for t, part in zip(pairs.targets, parts, strict=True)]
            }
            return told | ({"truncated": True} if pairs.truncated else {})
        target, part = pairs.targets[0], parts[0]
        found = figures.likelihood(part.log_probability, target.text, unit)
        end = self.model.tokenizer.backend.eos_token_id
        found |= {"eos": end is not None and end in target.ids, "unit": unit}
        if pairs.truncated:
            found["truncated"] = True
        if self.config.tokens:
            found |= figures.details(
                self.config, self.model.tokenizer, target.text, target.ids, target.spans, parts, 0, unit
            )
        return found


def _choice(target: Target, part: Measured) -> Figures:
    size = len(target.text.encode("utf-8", "replace"))
    total = math.fsum(part.log_probability)
    return {"text": target.text, "log_likelihood": total, "tokens": len(target.ids), "bytes": size}
