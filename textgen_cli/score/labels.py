"""Scorers of classifiers: one judgement of a whole text, or one of each of its words.

Token classifiers: a word's first token decides for it. Knows no batches.
"""

import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from textgen_cli.config import ScoringConfig
from textgen_cli.errors import InputError, ModelError, TextgenError
from textgen_cli.events import Report
from textgen_cli.model.classifier import Window, framed, is_regression, label_names, probabilities, windows
from textgen_cli.model.heads import Row, judged
from textgen_cli.model.load import Model
from textgen_cli.score.request import Asked, Figures
from textgen_cli.text.metrics import entity_spans
from textgen_cli.text.segments import Span, assign, segments

WINDOW = 512  # tokens judged at once by a token classifier that states no limit
THRESHOLD = 0.5  # from this probability on a label among several is predicted


class LabelScorer:
    """A sequence classifier: single label, several labels, or numbers; a context stands before the text."""

    def __init__(self, config: ScoringConfig, model: Model, rows: int | None, report: Report) -> None:
        self.model, self.rows, self.report = model, rows, report
        self.names, self.field = label_names(model), config.text_field
        self.truncates = config.truncate is not None
        if config.truncate is not None:
            model.tokenizer.backend.truncation_side = config.truncate

    def score(
        self, asked: Sequence[Asked], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Figures | TextgenError]]:
        """`prediction` and `labels`, or `value` (`values` by name) of a regression; `truncated` where it was cut.

        A text that is longer than the model takes, or gives no token, has an InputError.
        """
        opened: list[tuple[int, Row, bool]] = []
        for one in asked:
            try:
                opened.append((one.index, *self.encode(one)))
            except InputError as error:
                yield one.index, error
        rows = [row for _, row, _ in opened]
        wanted = [index not in done for index, _, _ in opened]
        for number, found in judged(self.model, rows, self.rows, wanted.__getitem__, self.report):
            index, _, truncated = opened[number]
            if isinstance(found, TextgenError):
                yield index, found
            else:
                yield index, self._figures(found) | ({"truncated": True} if truncated else {})

    def encode(self, one: Asked) -> tuple[Row, bool]:
        """The row of a text or pair, and whether it was cut to fit."""
        backend: Any = self.model.tokenizer.backend
        texts = (one.text,) if one.context is None else (one.context, one.text)
        encoded = backend(*texts, truncation=False)
        size, limit = len(encoded["input_ids"]), self.model.context
        if not size:
            raise InputError(
                "E-EMPTY", self.field, f"gives no token, and {self.model.name} adds none of its own"
            )
        too_long = limit is not None and size > limit
        if too_long:
            if not self.truncates:
                raise InputError("E-CONTEXT", self.field, f"{size:,} tokens, the model takes {limit:,}")
            encoded = backend(*texts, truncation="longest_first", max_length=limit)
        return Row(encoded["input_ids"], encoded.get("token_type_ids")), too_long

    def _figures(self, logits: torch.Tensor) -> Figures:
        """Figures of one text's logits (L,)."""
        if is_regression(self.model):
            values = logits.tolist()
            return (
                {"value": values[0]}
                if len(values) == 1
                else {"values": dict(zip(self.names, values, strict=True))}
            )
        labels = probabilities(self.model, logits)
        if self.model.net.config.problem_type == "multi_label_classification":
            return {"prediction": [name for name, p in labels.items() if p >= THRESHOLD], "labels": labels}
        if len(labels) == 1:
            return {"value": labels[self.names[0]]}
        return {"prediction": self.names[int(logits.argmax())], "labels": labels}


@dataclass(frozen=True)
class _Word:
    """Characters from `start` to `end` that are judged as one, by the token `first`; None: it has none."""

    start: int
    end: int
    first: int | None


@dataclass
class _Text:
    """A text on its way: its own tokens, and what they were judged to be."""

    asked: Asked
    ids: list[int]
    offsets: list[Span]
    head: int  # tokens that the tokenizer puts before them
    labels: list[int]
    probabilities: list[float]
    left: int  # windows still to come
    failed: bool = False


class EntityScorer:
    """A token classifier: named entities with their places, and a tag for each word.

    A word's first token decides for it. Tags are of the words of `segments`; entities run over the tokenizer's own
    words where it marks what continues one (WordPiece parts words from punctuation), else over the same.

    A text longer than the model is read in windows that overlap by half or more; the middle of what two share
    divides them. So each token is judged once, and sees a quarter of a window at least on either side, unless the
    text ends there.
    """

    def __init__(self, config: ScoringConfig, model: Model, rows: int | None, report: Report) -> None:
        if model.tokenizer.fast is None:
            raise ModelError("E-TOKENIZER", model.name, "tells no offsets, which entities need")
        self.model, self.rows, self.report = model, rows, report
        self.names = label_names(model)
        pieces = model.tokenizer.fast.model
        self.prefix: str = getattr(pieces, "continuing_subword_prefix", None) or ""  # as WordPiece's ##

    def score(
        self, asked: Sequence[Asked], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Figures | TextgenError]]:
        """`entities`, {text, type, start, end, score} each, and `tags`, the label of each word of `segments`.

        Words that one token holds share its tag; one of which the tokenizer leaves nothing has O.
        """
        rows: list[Row] = []
        owners: list[tuple[_Text, Window]] = []
        for one in asked:
            text, seen, own = self._open(one)
            rows += own
            owners += [(text, window) for window in seen]
            if not seen:
                yield one.index, self._figures(text)
        wanted = [text.asked.index not in done for text, _ in owners]
        for number, found in judged(self.model, rows, self.rows, wanted.__getitem__, self.report):
            text, window = owners[number]
            if text.failed:
                continue
            if isinstance(found, TextgenError):
                text.failed = True
                yield text.asked.index, found
                continue
            _keep(text, window, found)
            if not text.left:
                yield text.asked.index, self._figures(text)

    def _open(self, one: Asked) -> tuple[_Text, list[Window], list[Row]]:
        """A text, its windows and their rows; none where it has no token of its own."""
        encoded: Any = self.model.tokenizer.backend(
            one.text, truncation=False, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        whole = framed(encoded)
        seen = windows(whole.count, (self.model.context or WINDOW) - whole.frame)
        rows = [whole.row(window.start, window.end) for window in seen]
        own = slice(whole.head, whole.head + whole.count)
        ids, offsets = encoded["input_ids"][own], encoded["offset_mapping"][own]
        none = [0] * whole.count, [0.0] * whole.count
        return _Text(one, ids, offsets, whole.head, *none, len(seen)), seen, rows

    def _figures(self, text: _Text) -> Figures:
        words = _blank_words(text)
        tags = self._tags(text, words)
        judged_words = self._pieced_words(text) if self.prefix else _joined_words(words)
        entities = [
            self._entity(text, kind, judged_words[first : last + 1])
            for kind, first, last in entity_spans(self._tags(text, judged_words))
        ]
        return {"entities": entities, "tags": tags}

    def _tags(self, text: _Text, words: Sequence[_Word]) -> list[str]:
        return ["O" if word.first is None else self.names[text.labels[word.first]] for word in words]

    def _entity(self, text: _Text, kind: str, words: Sequence[_Word]) -> dict[str, Any]:
        start, end = words[0].start, words[-1].end
        score = statistics.fmean(text.probabilities[word.first] for word in words if word.first is not None)
        return {"text": text.asked.text[start:end], "type": kind, "start": start, "end": end, "score": score}

    def _pieced_words(self, text: _Text) -> list[_Word]:
        """The words of a tokenizer that marks what continues one."""
        pieces: Any = self.model.tokenizer.backend.convert_ids_to_tokens(text.ids)
        found: list[_Word] = []
        for at, (piece, (start, end)) in enumerate(zip(pieces, text.offsets, strict=True)):
            if found and piece.startswith(self.prefix):
                found[-1] = replace(found[-1], end=end)
            else:
                found.append(_Word(start, end, at))
        return found


def _keep(text: _Text, window: Window, logits: torch.Tensor) -> None:
    """Take over what a window decides. logits (T, L), added tokens included."""
    best = logits.softmax(-1).max(-1)
    seen = slice(text.head + window.first - window.start, text.head + window.last - window.start)
    text.labels[window.first : window.last] = best.indices[seen].tolist()
    text.probabilities[window.first : window.last] = best.values[seen].tolist()
    text.left -= 1


def _blank_words(text: _Text) -> list[_Word]:
    """The words of `segments`, each with the first token that holds a character of it."""
    words = segments(text.asked.text)
    firsts: list[int | None] = [None] * len(words)
    for at, (owner, (_, end)) in enumerate(zip(assign(text.offsets, words), text.offsets, strict=True)):
        place = owner or 0
        while place < len(words) and words[place][0] < end:
            firsts[place] = at if firsts[place] is None else firsts[place]
            place += 1
    return [_Word(start, end, first) for (start, end), first in zip(words, firsts, strict=True)]


def _joined_words(words: Sequence[_Word]) -> list[_Word]:
    """The words with those made one that a single token holds."""
    found: list[_Word] = []
    for word in words:
        if found and word.first is not None and word.first == found[-1].first:
            found[-1] = replace(found[-1], end=word.end)
        else:
            found.append(word)
    return found
