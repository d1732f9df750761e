"""Settings of `textgen score`: what is asked of a model about a text, and by which convention."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from textgen_cli.config.explain import ExplainConfig, check_gradients
from textgen_cli.config.shared import BatchConfig, ModelConfig, check_key, check_range, option_name
from textgen_cli.errors import UsageError

Normalization = Literal["raw", "token", "byte", "pmi"]


@dataclass(frozen=True)
class ScoringConfig:
    """What is asked, and the convention the figures follow."""

    text_field: str = "text"  # the field of a record that is scored
    context: str | None = None  # what stands before the text and is not scored: a FIELD of records, or TEXT
    choices: str | None = None  # field with a list of continuations to choose from
    labels: str | None = None  # a,b,c: the same continuations for every record
    template: str | None = None  # the context, with {named} fields
    template_file: Path | None = None
    pairs: bool = False  # each record is two texts: which is likelier
    second: Path | None = None  # the other texts of the pairs, one a line, where the input has the first ones
    delimiter: str | None = None  # between context and text; None: nothing, one space before a choice
    normalization: Normalization = "raw"  # what the pick among choices goes by
    gold: str | None = None  # field with the right answer
    tokens: bool = False  # report every token
    words: bool = False  # report every word
    top: int | None = None  # alternatives reported for each token
    bits: bool = False  # bits instead of nats
    bos: Literal["auto", "always", "never", "first"] = "auto"  # a token that begins the text, in every window
    window: int | None = None  # tokens the model sees at once; None: its context
    stride: int | None = None  # tokens scored in each window behind the first; None: half a window
    # How masked models score; None: within_word_l2r, but of pairs original, as those are published.
    pll: Literal["original", "within_word_l2r"] | None = None
    truncate: Literal["left", "right"] | None = None  # where a context or text that is too long is cut
    against: str | None = None  # a second model to compare with
    watermark: str | None = None  # look for the watermark of this key, and for nothing else

    def __post_init__(self) -> None:
        self._check_watermark()
        check_range(self, "top", 1, 1000)
        check_range(self, "window", 2, 10_000_000)
        check_range(self, "stride", 1, 10_000_000)
        if self.window and self.stride and self.stride > self.window:
            raise UsageError(
                "E-CONFLICT", "--stride", f"must be <= --window {self.window}, not {self.stride}"
            )
        given = [n for n in ("choices", "labels") if getattr(self, n) is not None]
        if len(given) > 1:
            raise UsageError("E-CONFLICT", "--labels", "cannot be used with --choices")
        self._check_pairs()
        sources = [n for n in ("context", "template", "template_file") if getattr(self, n) is not None]
        if len(sources) > 1:
            raise UsageError("E-CONFLICT", option_name(sources[1]), f"cannot be used with --{sources[0]}")
        chooses = self.choices is not None or self.labels is not None
        ignored = [n for n in ("tokens", "words", "against", "stride") if chooses and getattr(self, n)]
        if ignored:
            raise UsageError("E-CONFLICT", option_name(ignored[0]), "cannot be used with choices")
        if self.normalization != "raw" and not chooses:
            raise UsageError("E-CONFLICT", "--normalization", "needs --choices or --labels")
        if self.delimiter is not None and not chooses and not sources:
            raise UsageError("E-CONFLICT", "--delimiter", "needs a context")
        if self.top is not None and not self.tokens:
            raise UsageError("E-CONFLICT", "--top", "needs --tokens")
        self._check_labels()

    def _check_labels(self) -> None:
        """Two at least, and each its own: a label that is dropped would change every probability."""
        labels = self.label_list()
        if self.labels is not None and len(labels) < 2:
            raise UsageError("E-RANGE", "--labels", "must name two labels at least, as in good,bad")
        for place, label in enumerate(labels):
            if not label:
                raise UsageError("E-RANGE", "--labels", "has an empty label")
            if label in labels[:place]:
                raise UsageError("E-RANGE", "--labels", f"names {label!r} twice")

    def _check_pairs(self) -> None:
        """A pair is all of its record."""
        apart = (
            "context",
            "template",
            "template_file",
            "choices",
            "labels",
            "gold",
            "tokens",
            "words",
            "against",
        )
        if self.pairs and (unread := [n for n in apart if getattr(self, n)]):
            raise UsageError("E-CONFLICT", option_name(unread[0]), "cannot be used with --pairs")
        if self.pairs and self.text_field != type(self).text_field:
            raise UsageError(
                "E-CONFLICT", "--text-field", "cannot be used with --pairs, whose fields are known"
            )
        if self.second is not None and not self.pairs:
            raise UsageError("E-CONFLICT", "--second", "needs --pairs")

    def _check_watermark(self) -> None:
        """A watermark is read from the text alone, and no network is asked."""
        check_key(self.watermark)
        for leaf in fields(self) if self.watermark is not None else ():
            if leaf.name not in ("text_field", "watermark") and getattr(self, leaf.name) != leaf.default:
                raise UsageError("E-CONFLICT", "--watermark", f"cannot be used with {option_name(leaf.name)}")

    def label_list(self) -> tuple[str, ...]:
        """The labels of --labels; none where it is not given."""
        return () if self.labels is None else tuple(label.strip() for label in self.labels.split(","))


@dataclass(frozen=True)
class ScoreConfig:
    """`textgen score`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    explaining: ExplainConfig = field(default_factory=ExplainConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    summary: bool = False  # print the corpus figures alone
    html: Path | None = None  # the coloured text as a page
    no_stdin: bool = False  # leave standard input alone
    verbose: bool = False  # tell what is chosen and done

    def __post_init__(self) -> None:
        check_gradients(self.explaining, self.model)
        for name in ("watermark", "against", "pairs"):
            if self.explaining.explain is not None and getattr(self.scoring, name):
                raise UsageError("E-CONFLICT", "--explain", f"cannot be used with {option_name(name)}")
        for name in ("adapter", "quantize"):
            if self.scoring.watermark is not None and getattr(self.model, name):
                fact = f"cannot be used with {option_name(name)}: no weights are loaded"
                raise UsageError("E-CONFLICT", "--watermark", fact)
        if self.explaining.explain is not None and self.summary and self.batch.output is None:
            raise UsageError("E-CONFLICT", "--explain", "cannot be used with --summary", hint="add -o FILE")
