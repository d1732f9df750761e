"""Which scorer answers: the one place that chooses, by the family of the model.

What can be refused is refused before a model loads. Scorers are imported where they are opened.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from textgen_cli.config import ScoreConfig, ScoringConfig, option_name
from textgen_cli.errors import UsageError
from textgen_cli.events import Notice, Report
from textgen_cli.score.request import Scorer

if TYPE_CHECKING:
    from textgen_cli.model.load import Model


def open_scorer(config: ScoreConfig, report: Report, *, detail: bool = False) -> Scorer:
    """The scorer that the command line asks for, ready to answer; `detail`: it tells of tokens where it can.

    Raises UsageError for options that mean nothing to the model's family, and what `model.load` raises.
    """
    if config.scoring.watermark is not None:
        return _watermarked(config.scoring.watermark, config, report)
    from textgen_cli.model.lean import load

    model = load(config.model, "score" if config.explaining.explain is None else "explain", report)
    _refuse(config.scoring, model)
    if detail and model.family in LIKELIHOOD and not _chooses(config.scoring):
        config = replace(config, scoring=replace(config.scoring, tokens=True))
    if config.scoring.pairs:
        return _pairs(config, model, report)
    if config.scoring.against is None:
        scorer = SCORERS[model.family](config, model, report)
        return scorer if config.explaining.explain is None else _explained(config, scorer, model, report)
    if _chooses(config.scoring):
        raise UsageError("E-CONFLICT", "--against", "cannot be used with choices")
    other_config = replace(config.model, model=config.scoring.against, adapter=(), quantize=None)
    other = load(other_config, "score", report)
    _refuse(config.scoring, other)
    return _against(config, model, other, report)


def _pairs(config: ScoreConfig, model: "Model", report: Report) -> Scorer:
    from textgen_cli.score.pairs import PairScorer

    return PairScorer(SCORERS[model.family](config, model, report))


def _watermarked(key: str, config: ScoreConfig, report: Report) -> Scorer:
    from textgen_cli.model.watermark import reader
    from textgen_cli.score.watermarked import WatermarkScorer

    return WatermarkScorer(key, *reader(config.model, report))


def _explained(config: ScoreConfig, scorer: Scorer, model: "Model", report: Report) -> Scorer:
    from textgen_cli.explain.methods import Explainer
    from textgen_cli.score.choices import ChoiceScorer
    from textgen_cli.score.explained import ExplainedScorer

    encoder = scorer.likelihoods if isinstance(scorer, ChoiceScorer) else scorer
    return ExplainedScorer(scorer, encoder, Explainer(config.explaining, model, report))


def _against(config: ScoreConfig, model: "Model", other: "Model", report: Report) -> Scorer:
    """Two models side by side; their distributions are compared where they speak of the same tokens."""
    from textgen_cli.score.against import AgainstScorer
    from textgen_cli.score.causal import CausalScorer

    alike = model.tokenizer.backend.get_vocab() == other.tokenizer.backend.get_vocab()
    if alike and model.family == other.family == "causal":
        return CausalScorer(config.scoring, model, config.batch.rows, report, other)
    if model.family == other.family == "causal":
        report(Notice(f"{model.name} and {other.name} have other vocabularies: no kl_divergence", "W-VOCAB"))
    scorers = (SCORERS[each.family](config, each, report) for each in (model, other))
    return AgainstScorer(*scorers)


# --- one function a family


def _causal(config: ScoreConfig, model: "Model", report: Report) -> Scorer:
    from textgen_cli.score.causal import CausalScorer
    from textgen_cli.score.choices import ChoiceScorer
    from textgen_cli.score.tree import TreeScorer

    if _chooses(config.scoring):
        return ChoiceScorer(config.scoring, TreeScorer(config.scoring, model, config.batch.rows, report))
    return CausalScorer(config.scoring, model, config.batch.rows, report)


def _masked(config: ScoreConfig, model: "Model", report: Report) -> Scorer:
    from textgen_cli.score.masked import MaskedScorer

    return MaskedScorer(config.scoring, model, config.batch.rows, report)


def _seq2seq(config: ScoreConfig, model: "Model", report: Report) -> Scorer:
    from textgen_cli.score.choices import ChoiceScorer
    from textgen_cli.score.seq2seq import Seq2SeqScorer

    scorer = Seq2SeqScorer(config.scoring, model, config.batch.rows, report)
    return ChoiceScorer(config.scoring, scorer) if _chooses(config.scoring) else scorer


def _labels(config: ScoreConfig, model: "Model", report: Report) -> Scorer:
    from textgen_cli.score.labels import LabelScorer

    return LabelScorer(config.scoring, model, config.batch.rows, report)


def _entities(config: ScoreConfig, model: "Model", report: Report) -> Scorer:
    from textgen_cli.score.labels import EntityScorer

    return EntityScorer(config.scoring, model, config.batch.rows, report)


def _answers(config: ScoreConfig, model: "Model", report: Report) -> Scorer:
    raise UsageError(
        "E-FAMILY",
        model.name,
        "answers questions about a text",
        hint="use generate --task qa --question TEXT",
    )


SCORERS: dict[str, Callable[[ScoreConfig, "Model", Report], Scorer]] = {
    "causal": _causal,
    "masked": _masked,
    "seq2seq": _seq2seq,
    "sequence-classification": _labels,
    "token-classification": _entities,
    "question-answering": _answers,
}

LIKELIHOOD = ("causal", "seq2seq", "masked")
# Options that speak to some families only.
MEANT_FOR: dict[str, tuple[str, ...]] = {
    "tokens": LIKELIHOOD,
    "bits": LIKELIHOOD,
    "pairs": ("causal", "masked"),
    "against": ("causal", "seq2seq"),
    "choices": ("causal", "seq2seq"),
    "labels": ("causal", "seq2seq"),
    "template": ("causal", "seq2seq"),
    "template_file": ("causal", "seq2seq"),
    "delimiter": ("causal",),
    "words": ("causal", "masked"),
    "bos": ("causal",),
    "window": ("causal",),
    "stride": ("causal",),
    "pll": ("masked",),
    "context": ("causal", "seq2seq", "masked", "sequence-classification"),
    "truncate": ("causal", "seq2seq", "sequence-classification"),
}


def _chooses(scoring: ScoringConfig) -> bool:
    return scoring.choices is not None or scoring.labels is not None


def _refuse(scoring: ScoringConfig, model: "Model") -> None:
    """UsageError for an option that this model would not obey: say so rather than ignore it."""
    default = ScoringConfig()
    for name, families in MEANT_FOR.items():
        if getattr(scoring, name) != getattr(default, name) and model.family not in families:
            fact = f"means nothing to a {model.family} model such as {model.name}"
            raise UsageError("E-FAMILY", option_name(name), fact)
    if model.family == "causal" and scoring.truncate == "right":
        fact = f"cuts what {model.name} is asked about"
        raise UsageError("E-FAMILY", "--truncate right", fact, hint="--truncate left cuts the context")
    sources = (scoring.context, scoring.template, scoring.template_file)
    stands_alone = sources == (None, None, None) and not _chooses(scoring)
    if model.family == "causal" and scoring.truncate is not None and stands_alone:
        fact = "cuts a context, and there is none"
        raise UsageError(
            "E-CONFLICT", "--truncate", fact, hint="a text alone goes through windows: --window, --stride"
        )
    if scoring.gold is not None and model.family in LIKELIHOOD and not _chooses(scoring):
        raise UsageError(
            "E-CONFLICT", "--gold", "needs --choices or --labels with a model such as " + model.name
        )
