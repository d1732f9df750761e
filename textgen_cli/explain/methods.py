"""The methods of `--explain`, each one function and one entry: a case in, the fields of its explanation out.

Fields are ready for JSON: no NaN, no infinity. What a case is, generate and score tell.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from textgen_cli.config import ExplainConfig, Method
from textgen_cli.errors import UsageError
from textgen_cli.events import Report
from textgen_cli.explain import attribution
from textgen_cli.explain.attention import attended
from textgen_cli.explain.case import Case, Measure, Row, Target
from textgen_cli.explain.lens import said
from textgen_cli.explain.network import Network
from textgen_cli.model.load import Model

Fields = dict[str, Any]
DIGITS = 6  # of the numbers of a matrix


@dataclass
class Explainer:
    """Explains the answers of one model by one method."""

    config: ExplainConfig
    model: Model
    report: Report

    def __post_init__(self) -> None:
        self.network = Network(self.model)

    def __call__(self, case: Case) -> Fields:
        """The explanation of one answer.

        Raises ModelError (E-EXPLAIN: this network gives no such thing; E-NAN), OutOfMemory, UsageError.
        """
        assert self.config.explain is not None
        found: Fields = {"method": self.config.explain, "target": case.said}
        if self.config.contrasts and case.rather_said is not None:
            found["contrast"] = case.rather_said
        return found | METHODS[self.config.explain](self, case)

    # --- what the methods share

    def tokens(self, case: Case) -> Fields:
        """The text in the parts that weights are given to: tokens, those without weight too, or words."""
        if self.config.explain_unit == "word":
            spans = [_span(case, places) for places in case.units(words=True)]
            texts = [case.text[start:end] for start, end in spans]
            return {"unit": "word", "text": case.text, "tokens": texts, "offsets": [list(s) for s in spans]}
        spell = self.model.tokenizer.spell
        offsets = [None if span is None else list(span) for span in case.spans]
        return {
            "unit": "token", "text": case.text, "tokens": [spell(token) for token in case.ids], "offsets": offsets,
        }  # fmt: skip

    def attribute(self, case: Case, method: attribution.Attribute) -> Fields:
        """Weights by a method of attribution: of the whole answer, and of each of its tokens where that is wanted."""
        contrast, each = self.config.contrasts, self.config.explain_target == "each"
        rows, others = list(case.rows), list(case.rather) if contrast else []
        if others and each:
            fact = "cannot be used with the contrast of two texts, whose tokens are others"
            raise UsageError("E-CONFLICT", "--explain-target each", fact)
        runners = self.network.runners_up(rows) if contrast and not others else []
        # A difference of log-odds would tell of the other labels too.
        measure: Measure = "log_probability" if contrast and case.measure == "log_odds" else case.measure
        units = case.units(words=self.config.explain_unit == "word")
        parts = [[*rows, *others, *runners]]
        if each:
            pairs = zip(rows, runners, strict=True) if runners else ((row,) for row in rows)
            parts = [part for pair in pairs for part in _single(pair)]
        told = method(self.network, parts, measure, units, self.report)
        found: Fields = {"contrast": self.name(runners)} if runners else {}
        found |= {"measure": measure, "score": sum(part.score for part in told)} | self.tokens(case)
        weights = [self._by_unit(case, units, part.weights) for part in told]
        found["weights"] = [None if own[0] is None else sum(own) for own in zip(*weights, strict=True)]
        for name in told[0].figures:
            found[name] = sum(part.figures[name] for part in told)
        if each:
            found["steps"] = [
                {"target": self.name(part[:1])}
                | ({"contrast": self.name(part[1:])} if runners else {})
                | {"score": one.score, "weights": own}
                for part, one, own in zip(parts, told, weights, strict=True)
            ]
        return found

    def name(self, rows: Sequence[Row]) -> str:
        """The answers of rows as text."""
        tokens = [target.token for row in rows for target in row.targets]
        if self.network.labels:
            return ", ".join(str(self.model.net.config.id2label[token]) for token in tokens)
        return str(self.model.tokenizer.backend.decode(tokens, clean_up_tokenization_spaces=False))

    def _by_unit(
        self, case: Case, units: Sequence[Sequence[int]], weights: torch.Tensor
    ) -> list[float | None]:
        """A weight for each word, or for each token: None for one that is not weighed."""
        if self.config.explain_unit == "word":
            return [weights[list(places)].sum().item() for places in units]
        found: list[float | None] = [None] * len(case.ids)
        for (place,) in units:
            found[place] = weights[place].item()
        return found


def _single(pair: Sequence[Row]) -> list[list[Row]]:
    """Rows that belong together, one target at a time."""
    return [[replace(row, targets=(row.targets[at],)) for row in pair] for at in range(len(pair[0].targets))]


def _span(case: Case, places: Sequence[int]) -> tuple[int, int]:
    """The characters from a word's first token to its last, blanks before it left out."""
    own = [span for place in places if (span := case.spans[place]) is not None]
    start, end = min(a for a, _ in own), max(b for _, b in own)
    bare = case.text[start:end].lstrip()
    return (end - len(bare) if bare else start), end


# --- one function a method


def _gradient(explainer: Explainer, case: Case) -> Fields:
    return explainer.attribute(case, attribution.gradient)


def _integrated(explainer: Explainer, case: Case) -> Fields:
    return explainer.attribute(case, attribution.integrated_gradients)


def _occlusion(explainer: Explainer, case: Case) -> Fields:
    return explainer.attribute(case, attribution.occlusion)


def _attention(explainer: Explainer, case: Case) -> Fields:
    """`weights`: the mean of the rows that give the answer; `matrix`: of every place, `queries`, what it looks at."""
    which = explainer.config.attention
    found = attended(explainer.network, case.rows, case.measure)
    shown = _Columns(explainer, case)
    matrix = found.chosen(which)
    fields: Fields = {"attention": which} | explainer.tokens(case)
    fields["weights"] = shown.columns(matrix[list(found.asking)]).mean(0).tolist()
    fields["queries"] = shown.queries()
    fields["matrix"] = _rounded(shown(matrix))
    if which == "all":
        fields["layers"] = [[_rounded(shown(head)) for head in layer] for layer in found.weights]
    return fields


class _Columns:
    """Attention of tokens (Q, S) as attention of what is shown: columns of a word add up, its rows are averaged."""

    def __init__(self, explainer: Explainer, case: Case) -> None:
        self.explainer, self.case = explainer, case
        self.units = case.units(words=True) if explainer.config.explain_unit == "word" else None
        self.apart = bool(case.answer) or len(case.rows) > 1  # the rows are no places of the text

    def columns(self, weights: torch.Tensor) -> torch.Tensor:
        if self.units is None:
            return weights
        return torch.stack([weights[:, places].sum(1) for places in self.units], dim=1)

    def __call__(self, weights: torch.Tensor) -> torch.Tensor:
        weights = self.columns(weights)
        if self.units is None or self.apart:
            return weights
        return torch.stack([weights[places].mean(0) for places in self.units])

    def queries(self) -> list[str]:
        """What each row is."""
        spell = self.explainer.model.tokenizer.spell
        if self.case.answer:
            return [spell(token) for token in self.case.answer]
        if len(self.case.rows) > 1:
            return [spell(row.targets[0].token) for row in self.case.rows]
        return list(self.explainer.tokens(self.case)["tokens"])


def _rounded(matrix: torch.Tensor) -> list[list[float]]:
    return [[float(f"{value:.{DIGITS}g}") for value in row] for row in matrix.tolist()]


def _lens(explainer: Explainer, case: Case) -> Fields:
    """`steps`: of each target, what every layer would have said, from the embeddings (0) to the whole network."""

    def spell(token: int) -> str:
        return explainer.name([Row((), (Target(0, token),))])

    steps = []
    for row in case.rows:
        for target, layers in zip(row.targets, said(explainer.network, row), strict=True):
            told = [asdict(layer) | {"token": spell(layer.token)} for layer in layers]
            steps.append({"target": spell(target.token), "layers": told})
    return explainer.tokens(case) | {"steps": steps}


METHODS: dict[Method, Callable[[Explainer, Case], Fields]] = {
    "attention": _attention,
    "gradient": _gradient,
    "integrated-gradients": _integrated,
    "occlusion": _occlusion,
    "logit-lens": _lens,
    "contrast": _gradient,
}
