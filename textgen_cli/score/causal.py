"""Log-likelihood under causal models: of texts by sliding window, of what follows a context, of choices.

The boundary between context and text follows lm-evaluation-harness: blanks at the context's end go to the text, both
are tokenised together, and the text's tokens begin where the context's own, tokenised alone, end.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from textgen_cli.config import ScoringConfig
from textgen_cli.errors import InputError, TextgenError, UsageError
from textgen_cli.events import Report
from textgen_cli.model.load import Model
from textgen_cli.model.rows import gathered
from textgen_cli.model.tokenizer import Tokenizer
from textgen_cli.score import figures
from textgen_cli.score.measures import Measured, Wanted
from textgen_cli.score.network import Network
from textgen_cli.score.passes import Row, measure
from textgen_cli.score.request import Asked, Figures
from textgen_cli.score.windows import Convention, windows

WINDOW = 2048  # tokens at once where a model names no limit


@dataclass(frozen=True)
class Encoded:
    """A text as tokens: `first` is where what is scored begins, `shift` where its characters do."""

    ids: list[int]
    offsets: list[tuple[int, int]]  # characters of each token, in context and text together
    first: int = 0
    shift: int = 0
    truncated: bool = False


def encode(tokenizer: Tokenizer, context: str, text: str) -> Encoded:
    """Context and text as tokens, split by the rule above; no token is added."""
    backend: Any = tokenizer.backend
    tells = tokenizer.fast is not None
    found = backend(context + text, add_special_tokens=False, return_offsets_mapping=tells, truncation=False)
    ids = list(found["input_ids"])
    spans = [(int(start), int(end)) for start, end in found["offset_mapping"]] if tells else []
    if not context:
        return Encoded(ids, spans)
    # What is alone before the blanks may be cut otherwise than in the whole; it counts as it is alone.
    before = list(backend(context.rstrip(), add_special_tokens=False, truncation=False)["input_ids"])
    return Encoded([*before, *ids[len(before) :]], spans, len(before), len(context))


class CausalScorer:
    """Scores texts, with or without a context, under one causal model, or under two of one vocabulary."""

    def __init__(
        self,
        config: ScoringConfig,
        model: Model,
        rows: int | None,
        report: Report,
        against: Model | None = None,
    ) -> None:
        models = [each for each in (model, against) if each is not None]
        limits = [each.context for each in models if each.context is not None]
        # One window for both.
        self.model = replace(model, context=min(limits, default=None))
        self.config, self.rows, self.report = config, rows, report
        self.networks = [Network(each.net) for each in models]
        self.wanted = Wanted(detail=config.tokens, top=config.top or 0)

    def score(
        self, asked: Sequence[Asked], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Figures | TextgenError]]:
        """Figures of every text, a window's worth computed together with those of other texts."""
        texts: list[tuple[Asked, Encoded, Convention]] = []
        for one in asked:
            try:
                encoded, rule = self.encode(one)
                texts.append((one, encoded, rule))
            except TextgenError as error:
                if isinstance(error, UsageError):
                    raise
                yield one.index, error
        rows = [list(_rows(encoded, rule)) for _, encoded, rule in texts]
        owners = [number for number, own in enumerate(rows) for _ in own]
        measured = measure(
            self.networks,
            [row for own in rows for row in own],
            self.wanted,
            model=self.model,
            max_rows=self.rows,
            needed=lambda row: texts[owners[row]][0].index not in done,
            report=self.report,
        )
        for number, parts in gathered(owners, measured):
            one, encoded, rule = texts[number]
            if isinstance(parts, TextgenError):
                yield one.index, parts
            else:
                yield one.index, self._figures(one, encoded, rule, parts)

    # --- text to tokens

    def encode(self, asked: Asked) -> tuple[Encoded, Convention]:
        """The tokens of a text and how they are judged. InputError where nothing can be."""
        if not asked.text:
            raise InputError("E-EMPTY", self.config.text_field, "is empty")
        rule = convention(self.config, self.model, alone=not (asked.context or "").strip())
        encoded = encode(self.model.tokenizer, asked.context or "", asked.text)
        if encoded.first >= len(encoded.ids):
            raise InputError("E-EMPTY", self.config.text_field, "has no token of its own behind the context")
        if asked.context:
            encoded = self._fit(encoded, rule)
        if rule.start is None and len(encoded.ids) < 2:
            fact = "has one token and nothing before it"
            raise InputError("E-EMPTY", self.config.text_field, fact, hint="--bos always puts one there")
        return encoded, rule

    def _fit(self, encoded: Encoded, rule: Convention) -> Encoded:
        """The same where context and text fit one window together; cut, where that is allowed."""
        over = len(encoded.ids) - 1 + (rule.start is not None) - rule.window
        if over <= 0:
            return encoded
        if self.config.truncate == "left" and over < encoded.first:
            kept = encoded.ids[over:], encoded.offsets[over:]
            return Encoded(*kept, encoded.first - over, encoded.shift, truncated=True)
        tokens = len(encoded.ids) + (rule.start is not None)
        fact = f"{tokens:,} tokens with the context, the window takes {rule.window:,}"
        hint = (
            "--truncate left cuts the context"
            if over < encoded.first
            else "only texts without a context slide"
        )
        raise InputError("E-CONTEXT", self.config.text_field, fact, hint=hint)

    # --- measures to figures

    def _figures(
        self, asked: Asked, encoded: Encoded, rule: Convention, parts: Sequence[Measured]
    ) -> Figures:
        """The fields of one text."""
        logs = [value for part in parts for value in part.log_probability]
        silent = len(encoded.ids) - encoded.first - len(logs)  # a first token that nothing stands before
        context = asked.context or ""
        scored = context[len(context.rstrip()) :] + asked.text  # the blanks between are scored with the text
        if silent and encoded.offsets:
            scored = scored[max(0, encoded.offsets[encoded.first][1] - encoded.shift) :]
        unit = figures.unit(self.config)
        found = figures.likelihood(logs, scored, unit)
        found |= {"bos": rule.start is not None, "window": rule.window, "stride": rule.stride}
        found["unit"] = unit
        if encoded.truncated:
            found["truncated"] = True
        if len(self.networks) > 1:
            others = [value for part in parts for value in part.other]
            found |= figures.difference(found, figures.likelihood(others, scored, unit))
            apart = math.fsum(value for part in parts for value in part.divergence) / len(logs)
            found["kl_divergence"] = apart * figures.SCALE[unit]
        if self.config.tokens or self.config.words:
            spans = [
                (max(0, a - encoded.shift), max(0, b - encoded.shift))
                for a, b in encoded.offsets[encoded.first :]
            ]
            ids = encoded.ids[encoded.first :]
            found |= figures.details(
                self.config, self.model.tokenizer, asked.text, ids, spans, parts, silent, unit
            )
        return found


def convention(config: ScoringConfig, model: Model, *, alone: bool) -> Convention:
    """How texts are judged; `alone`: nothing stands before them.

    `auto` begins a text as the model's tokenizer does, and one that stands alone in any case, so that its first
    token counts. Raises UsageError for a window larger than the model's context, a stride larger than the window,
    or a token that is not there.
    """
    backend: Any = model.tokenizer.backend
    limit = model.context
    window = config.window or limit or WINDOW
    if limit is not None and window > limit:
        raise UsageError("E-RANGE", "--window", f"must be <= {limit}, the context of {model.name}")
    stride = config.stride or max(1, window // 2)
    if stride > window:
        raise UsageError("E-RANGE", "--stride", f"must be <= {window}, the window of {model.name}")
    bos: int | None = backend.bos_token_id
    start = bos if bos is not None else backend.eos_token_id
    if config.bos == "always" and start is None:
        raise UsageError("E-TOKENIZER", "--bos", f"{model.name} has no token that begins a text")
    if config.bos == "never" or (config.bos == "auto" and not (alone or _begins(backend, bos))):
        start = None
    return Convention(window, stride, start, each=config.bos != "first")


def _begins(backend: Any, bos: int | None) -> bool:
    """Whether the tokenizer itself puts a beginning token before every text."""
    return bos is not None and list(backend("a")["input_ids"][:1]) == [bos]


def _rows(encoded: Encoded, rule: Convention) -> Iterator[Row]:
    ids = encoded.ids
    for window in windows(len(ids), rule, encoded.first):
        start = [rule.start] if window.starts and rule.start is not None else []
        yield Row([*start, *ids[window.shown : window.end - 1]], ids[window.scored : window.end])
