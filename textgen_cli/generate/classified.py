"""`--safety-model` on generate: a sequence classifier that judges whole texts, beside the lists.

Owns what is judged at once, and which stretch of a text a verdict means. What becomes of it stands in guarded.py.
"""

from collections.abc import Sequence
from functools import lru_cache

from textgen_cli.config import SafetyConfig
from textgen_cli.errors import TextgenError, UsageError
from textgen_cli.events import Report
from textgen_cli.model.classifier import is_regression, label_names, probabilities, views
from textgen_cli.model.heads import judged
from textgen_cli.model.loaded import Model
from textgen_cli.text.safety import Judged, Label, Match
from textgen_cli.text.segments import Span, sentences

_KEPT = (
    64  # verdicts: the sequences of a record share their prompt, the turns of a conversation all before them
)

Verdict = dict[str, float]  # the probability of each label asked for


def classifier(model: Model, asked: SafetyConfig, report: Report) -> "Classifier":
    """The loaded model as the judge that is asked for; UsageError for one that is no classifier or lacks a label."""
    option, name = "--safety-model", model.name
    if model.family != "sequence-classification":
        raise UsageError("E-FAMILY", option, f"{name} is a {model.family} model, no sequence classifier")
    if is_regression(model):
        raise UsageError("E-FAMILY", option, f"{name} gives a value on a scale, no probabilities of labels")
    known, labels = label_names(model), asked.label_list()
    for label in labels:
        if label not in known:
            hint = f"its labels: {', '.join(known)}"
            raise UsageError("E-LABEL", f"--safety-labels {label}", f"is no label of {name}", hint=hint)
    return Classifier(model, labels, asked.safety_threshold, report)


class Classifier:
    """A loaded sequence classifier; a text is unsafe where one of `labels` has the probability `threshold` or more.

    Each text is computed alone, so that no other record has a part in its verdict. One that is longer than the model
    takes is as unsafe as the worst of its windows, which overlap by half.
    """

    def __init__(self, model: Model, labels: Sequence[str], threshold: float, report: Report) -> None:
        self._model, self._labels, self._threshold, self._report = model, labels, threshold, report
        self._known = lru_cache(_KEPT)(self._probabilities)

    def judge(self, text: str, before: str = "", *, blocks: bool = False) -> Judged:
        """The verdict on a text, alone and behind what it continues, whichever is worse.

        With `blocks` its matches are those of its sentences that are unsafe by themselves, if what is left without
        them is safe; else the whole text. Raises ModelError and OutOfMemory where it cannot be judged.
        """
        if not text.strip():
            return Judged()
        found = self._worse(text, before)
        unsafe = self._unsafe(found)
        parts: list[tuple[Span, Verdict]] = [((0, len(text)), unsafe)]
        if unsafe and blocks:
            parts = self._parts(text, before) or parts
        matches = [
            Match(Label(self._model.name, label, probability), *span)
            for span, verdict in parts
            for label, probability in verdict.items()
        ]
        return Judged(matches, found)

    def _parts(self, text: str, before: str) -> list[tuple[Span, Verdict]]:
        """The sentences that make a text unsafe, each with its verdict; [] where they are not all of it."""
        judged_parts = [
            ((start, end), self._unsafe(self._known(text[start:end]))) for start, end in sentences(text)
        ]
        parts = [(span, unsafe) for span, unsafe in judged_parts if unsafe]
        left = " ".join(text[start:end] for (start, end), unsafe in judged_parts if not unsafe)
        return [] if left and self._unsafe(self._worse(left, before)) else parts

    def _worse(self, text: str, before: str) -> Verdict:
        alone = self._known(text)
        both = self._known(before + text) if before else alone
        return {label: max(alone[label], both[label]) for label in self._labels}

    def _unsafe(self, found: Verdict) -> Verdict:
        return {label: probability for label, probability in found.items() if probability >= self._threshold}

    def _probabilities(self, text: str) -> Verdict:
        """The highest probability of each label over what the model sees of a text."""
        worst = dict.fromkeys(self._labels, 0.0)
        for _, found in judged(self._model, views(self._model, text), None, lambda _: True, self._report):
            if isinstance(found, TextgenError):
                raise found
            shares = probabilities(self._model, found)
            worst = {label: max(worst[label], shares[label]) for label in self._labels}
        return worst
