"""What is made of the log-likelihoods of choices: probabilities and a pick under four normalisations.

raw: the log-likelihood; token: per token; byte: per byte of the choice in UTF-8 (lm-evaluation-harness's acc_bytes);
pmi: less the choice's log-likelihood without a context (its acc_mutual_info; Holtzman et al. 2021). Probabilities are
the softmax over the choices. Knows no model: a scorer gives the log-likelihoods.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from textgen_cli.config import ScoringConfig
from textgen_cli.errors import InputError, TextgenError
from textgen_cli.score.figures import SCALE, unit
from textgen_cli.score.request import Asked, Figures, Scorer

# From a choice's figures to the number that probabilities and the pick go by.
NORMALIZATIONS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "raw": lambda choice: float(choice["log_likelihood"]),
    "token": lambda choice: float(choice["log_likelihood"] / choice["tokens"]),
    "byte": lambda choice: float(choice["log_likelihood"] / choice["bytes"]),
    "pmi": lambda choice: float(choice["log_likelihood"] - choice["unconditional_log_likelihood"]),
}


class ChoiceScorer:
    """Turns another scorer's `choices` into probabilities, picks and, where gold is known, their correctness."""

    def __init__(self, config: ScoringConfig, likelihoods: Scorer) -> None:
        self.config, self.likelihoods = config, likelihoods
        self.alone: dict[str, float | TextgenError] = {}

    def score(
        self, asked: Sequence[Asked], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Figures | TextgenError]]:
        """Figures of every record's choices."""
        by_index = {one.index: one for one in asked}
        self._learn({choice for one in asked for choice in one.choices or ()})
        for index, found in self.likelihoods.score(asked, done):
            yield index, found if isinstance(found, TextgenError) else self._judged(by_index[index], found)

    def _learn(self, choices: Collection[str]) -> None:
        """The log-likelihood of choices that stand alone, each once.

        Nothing is remembered from earlier records: a resumed run, which does not see them, must form the same batches.
        """
        questions = [Asked(number, "", "", (choice,)) for number, choice in enumerate(sorted(choices))]
        self.alone = {}
        for index, found in self.likelihoods.score(questions):
            alone = found if isinstance(found, TextgenError) else found["choices"][0]["log_likelihood"]
            self.alone[(questions[index].choices or ("",))[0]] = alone

    def _judged(self, asked: Asked, found: Figures) -> Figures | TextgenError:
        choices = found["choices"]
        rules = self._rules(choices)
        wanted, told_in = self.config.normalization, unit(self.config)
        if wanted not in rules:
            return InputError("E-EMPTY", "choices", "cannot be judged without a context", hint="--bos always")
        predictions = {name: _judge(choices, name, rule) for name, rule in rules.items()}
        told: Figures = {"prediction": predictions[wanted], "predictions": predictions, **found}
        told |= {"normalization": wanted, "unit": told_in}
        for choice in choices:
            for name in ("log_likelihood", "unconditional_log_likelihood"):
                if name in choice:
                    choice[name] *= SCALE[told_in]
        if self.config.gold is None:
            return told
        gold = place_of(asked.gold, [choice["text"] for choice in choices])
        if gold is None:
            return InputError(
                "E-FIELD", self.config.gold, f"{asked.gold!r} is neither a choice nor the number of one"
            )
        return told | _correctness(choices, predictions, gold)

    def _rules(self, choices: Sequence[Figures]) -> dict[str, Callable[[Mapping[str, Any]], float]]:
        """The normalisations that can be told: none by PMI where a choice cannot stand alone."""
        alone = [self.alone.get(choice["text"]) for choice in choices]
        for choice, value in zip(choices, alone, strict=True):
            if isinstance(value, float):
                choice["unconditional_log_likelihood"] = value
        known = all(isinstance(value, float) for value in alone)
        return {name: rule for name, rule in NORMALIZATIONS.items() if known or name != "pmi"}


def _judge(choices: Sequence[Figures], name: str, rule: Callable[[Mapping[str, Any]], float]) -> str:
    """Add each choice's probability under a normalisation; returns the pick, the first of the best."""
    values = [rule(choice) for choice in choices]
    for choice, probability in zip(choices, softmax(values), strict=True):
        choice.setdefault("probability", {})[name] = probability
    return str(choices[max(range(len(values)), key=values.__getitem__)]["text"])


def _correctness(choices: Sequence[Figures], predictions: Mapping[str, str], gold: int) -> Figures:
    """Whether each pick is right, and the Brier score of its probabilities, summed over the choices."""
    brier = {
        name: math.fsum(
            (choice["probability"][name] - (number == gold)) ** 2 for number, choice in enumerate(choices)
        )
        for name in predictions
    }
    right = choices[gold]["text"]
    return {"correct": {name: pick == right for name, pick in predictions.items()}, "brier": brier}


def softmax(values: Sequence[float]) -> list[float]:
    """Probabilities in proportion to e^value."""
    most = max(values)
    weights = [math.exp(value - most) for value in values]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def place_of(gold: Any, texts: Sequence[str]) -> int | None:
    """Which of the texts is the right one: the gold field holds it, or its number from 0; None: it holds neither."""
    if isinstance(gold, str) and gold in texts:
        return texts.index(gold)
    if isinstance(gold, str) and re.fullmatch(r"[0-9]{1,9}", gold):  # a cell of CSV
        gold = int(gold)
    if isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(texts):
        return gold
    return None
