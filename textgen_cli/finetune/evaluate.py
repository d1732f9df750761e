"""What predictions on held-out examples are worth: figures by task, from what a network said and what is right.

One function and one entry in MEASURES for each task, and for each problem of a classifier. It knows no trainer beyond
the two hooks that transformers' has; what a network writes (translations, answers) is measured by answers.py.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from textgen_cli.finetune.collate import IGNORED
from textgen_cli.finetune.prepared import Prepared
from textgen_cli.text import metrics
from textgen_cli.text.metrics import ClassReport

CHUNK = 6_000_000  # logits in float32 at one time: 24 MB
THRESHOLD = 0.5  # from this probability on a label among several is predicted
LARGEST_LOSS = 700.0  # in nats; e to the power of more is no number

Logits = torch.Tensor | tuple[torch.Tensor, ...]
Figures = dict[str, float]
Tables = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """How a task is measured: what is kept of each batch's logits, and what all of it is worth."""

    keep: Callable[[Logits, Any], torch.Tensor]
    figures: Callable[[EvalPrediction, Sequence[str]], tuple[Figures, Tables]]
    best: str  # the figure by which one checkpoint is better than another
    more_is_better: bool = True


@dataclass
class Evaluation:
    """A Trainer's `compute_metrics`; `keep` is its `preprocess_logits_for_metrics`.

    `tables`: what the last call found that is no single figure: `confusion`, {right: {predicted: how often}}, and
    `classes`, {name: {precision, recall, f1, support}}.
    """

    measure: Measure
    labels: tuple[str, ...]
    tables: Tables = field(default_factory=dict)

    def keep(self, logits: Logits, labels: Any) -> torch.Tensor:
        """The little of a batch's logits that the figures need."""
        return self.measure.keep(logits, labels)

    def __call__(self, prediction: EvalPrediction) -> Figures:
        """Figures by name; those that are not defined are left out."""
        figures, self.tables = self.measure.figures(prediction, self.labels)
        return figures


def evaluation(prepared: Prepared) -> Evaluation:
    """What a Trainer measures while it trains for the task of this data."""
    return Evaluation(MEASURES[_kind(prepared)], prepared.labels)


def _kind(prepared: Prepared) -> str:
    if prepared.task == "token-classification":
        return "entities" if any(map(_is_of_entity, prepared.labels)) else "tags"
    return prepared.problem or prepared.task


def _is_of_entity(tag: str) -> bool:
    return tag == "O" or re.match(r"[BIESLUM]-.", tag) is not None


# --- what is kept of a batch


def _first(logits: Logits) -> torch.Tensor:
    return logits[0] if isinstance(logits, tuple) else logits


def _all(logits: Logits, labels: Any) -> torch.Tensor:
    return _first(logits)


def _largest(logits: Logits, labels: Any) -> torch.Tensor:
    return _first(logits).argmax(-1)


def _ends(logits: Logits, labels: Any) -> torch.Tensor:
    """The likeliest first and last token of each row, (B, 2), of its start and end logits (B, T) each."""
    return torch.stack([part.argmax(-1) for part in logits[:2]], dim=-1)


def _next(logits: Logits, labels: Any) -> torch.Tensor:
    """As `_same`, for networks whose logits at a place are of the next token."""
    return _likelihood(_first(logits)[:, :-1], labels[:, 1:])


def _same(logits: Logits, labels: Any) -> torch.Tensor:
    """The sum of surprisal in nats and the number of tokens of each row: (B, 2), in float64 where there is one."""
    return _likelihood(_first(logits), labels)


def _likelihood(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """logits (B, T, V), labels (B, T)."""
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    found = torch.zeros(len(labels), 2, dtype=exact, device=logits.device)
    places = max(1, CHUNK // logits.shape[-1])
    for number, (row, right) in enumerate(zip(logits, labels, strict=True)):
        known = right != IGNORED
        for part, ids in zip(row[known].split(places), right[known].split(places), strict=True):
            found[number, 0] += torch.nn.functional.cross_entropy(part.float(), ids, reduction="sum")
        found[number, 1] = known.sum()
    return found


# --- what all of it is worth


def _perplexity(prediction: EvalPrediction, labels: Sequence[str]) -> tuple[Figures, Tables]:
    """Of all tokens alike, whatever batch they stood in."""
    nats, tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    loss = nats / tokens if tokens else math.nan
    return ({"perplexity": math.exp(loss)} if loss < LARGEST_LOSS else {}), {}


def _single_label(prediction: EvalPrediction, labels: Sequence[str]) -> tuple[Figures, Tables]:
    made = [labels[number] for number in np.asarray(prediction.predictions).argmax(-1)]
    right = [labels[number] for number in np.asarray(prediction.label_ids).reshape(-1)]
    report = metrics.class_report(right, made)
    figures = {"accuracy": metrics.accuracy(right, made), "macro_f1": report.macro.f1}
    figures |= {"micro_f1": report.micro.f1, "matthews": metrics.matthews(right, made)}
    confusion = {name: dict.fromkeys(labels, 0) for name in labels}
    for one, other in zip(right, made, strict=True):
        confusion[one][other] += 1
    return figures, {"confusion": confusion, "classes": _classes(report)}


def _multi_label(prediction: EvalPrediction, labels: Sequence[str]) -> tuple[Figures, Tables]:
    # A probability of 0.5 is a logit of 0.
    made = _names(np.asarray(prediction.predictions) >= math.log(THRESHOLD / (1 - THRESHOLD)), labels)
    right = _names(np.asarray(prediction.label_ids) >= THRESHOLD, labels)
    report = metrics.multilabel_report(right, made)
    figures = {"accuracy": metrics.accuracy(right, made), "macro_f1": report.macro.f1}
    return figures | {"micro_f1": report.micro.f1}, {"classes": _classes(report)}


def _names(chosen: Any, labels: Sequence[str]) -> list[set[str]]:
    return [{name for name, is_chosen in zip(labels, row, strict=True) if is_chosen} for row in chosen]


def _regression(prediction: EvalPrediction, labels: Sequence[str]) -> tuple[Figures, Tables]:
    made = np.asarray(prediction.predictions, dtype=np.float64).reshape(-1).tolist()
    right = np.asarray(prediction.label_ids, dtype=np.float64).reshape(-1).tolist()
    found = {
        "mean_squared_error": metrics.mean_squared_error(right, made),
        "mean_absolute_error": metrics.mean_absolute_error(right, made),
        "pearson": metrics.pearson(right, made),
        "spearman": metrics.spearman(right, made),
    }
    return {name: value for name, value in found.items() if value is not None}, {}


def _entities(prediction: EvalPrediction, labels: Sequence[str]) -> tuple[Figures, Tables]:
    """Entities by conlleval's rules; right are their type and both ends alone."""
    right, made = _word_tags(prediction, labels)
    micro = (report := metrics.entity_report(right, made)).micro
    figures = {"accuracy": metrics.accuracy(_joined(right), _joined(made)), "precision": micro.precision}
    return figures | {"recall": micro.recall, "f1": micro.f1}, {"classes": _classes(report)}


def _tags(prediction: EvalPrediction, labels: Sequence[str]) -> tuple[Figures, Tables]:
    """Tags that mark no entities, such as parts of speech."""
    right, made = map(_joined, _word_tags(prediction, labels))
    report = metrics.class_report(right, made)
    figures = {"accuracy": metrics.accuracy(right, made), "macro_f1": report.macro.f1}
    return figures, {"classes": _classes(report)}


def _word_tags(prediction: EvalPrediction, labels: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    """The right and the predicted tags of each row's words: a word's first token alone has a label."""
    right, made = [], []
    for ids, guesses in zip(prediction.label_ids, prediction.predictions, strict=True):
        known = np.asarray(ids) != IGNORED
        right.append([labels[number] for number in np.asarray(ids)[known]])
        made.append([labels[number] for number in np.asarray(guesses)[known]])
    return right, made


def _joined(rows: Sequence[Sequence[str]]) -> list[str]:
    return [tag for tags in rows for tag in tags]


def _windows(prediction: EvalPrediction, labels: Sequence[str]) -> tuple[Figures, Tables]:
    """The share of windows whose first and last token are both right."""
    right = np.stack([np.asarray(part).reshape(-1) for part in prediction.label_ids], axis=-1)
    return {"window_accuracy": float((np.asarray(prediction.predictions) == right).all(-1).mean())}, {}


def _classes(report: ClassReport) -> dict[str, Mapping[str, float]]:
    return {name: vars(scores) for name, scores in report.classes.items()}


MEASURES: dict[str, Measure] = {
    "clm": Measure(_next, _perplexity, "perplexity", more_is_better=False),
    "chat": Measure(_next, _perplexity, "perplexity", more_is_better=False),
    "mlm": Measure(_same, _perplexity, "perplexity", more_is_better=False),
    "seq2seq": Measure(_same, _perplexity, "perplexity", more_is_better=False),
    "single_label_classification": Measure(_all, _single_label, "accuracy"),
    "multi_label_classification": Measure(_all, _multi_label, "micro_f1"),
    "regression": Measure(_all, _regression, "mean_squared_error", more_is_better=False),
    "entities": Measure(_largest, _entities, "f1"),
    "tags": Measure(_largest, _tags, "accuracy"),
    "question-answering": Measure(_ends, _windows, "window_accuracy"),
}
