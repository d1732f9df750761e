"""The figures of a corpus, folded from output lines one by one: memory does not grow with the lines.

Rates are over the corpus, not means of the records' rates: perplexity = exp(sum of -log-likelihoods / sum of tokens).
Standard errors take the records as the sample (ratio estimator; for perplexity by the delta method).
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from textgen_cli.config import ScoringConfig
from textgen_cli.score.choices import place_of
from textgen_cli.score.figures import SCALE, exponential, unit
from textgen_cli.score.pairs import Preferences
from textgen_cli.score.sums import Pairs, Ratio
from textgen_cli.text import metrics

Line = Mapping[str, Any]

# What a scorer's figures begin with. A line's figures run from the last of them to its end: fields of the input that
# bear such names stand before.
FIRST = frozenset(("log_likelihood", "pseudo_log_likelihood", "prediction", "value", "values", "entities"))
FIRST |= {"log_likelihoods", "pseudo_log_likelihoods", "watermarked"}


def own(line: Line) -> Line:
    """The figures of an output line, without the input's fields."""
    names = list(line)
    start = next((at for at in range(len(names) - 1, -1, -1) if names[at] in FIRST), len(names))
    return {name: line[name] for name in names[start:]}


class Corpus:
    """What is summed up; `add` takes every output line in turn."""

    def __init__(self, config: ScoringConfig) -> None:
        self.gold = config.gold
        self.records = self.failed = self.unusable = 0
        self.parts: list[Likelihood | Answers | Labels | Numbers | Entities | Preferences | Marks] = [
            Likelihood("log_likelihood", config),
            Likelihood("pseudo_log_likelihood", config),
            Answers(),
            Labels(),
            Numbers(),
            Entities(),
            Preferences(),
            Marks(),
        ]

    def add(self, line: Line) -> None:
        """Count one output line; a right answer that is none of its kind is told of by `gold_unusable`."""
        self.records += 1
        if list(line)[-1:] == ["error"]:
            self.failed += 1
            return
        figures = own(line)
        # A field of the input that bears a figure's name was renamed.
        gold = self.gold if self.gold not in figures else f"input_{self.gold}"
        right = None if gold is None else line.get(gold)
        told = [part.add(figures, right) for part in self.parts]
        self.unusable += False in told or (gold is not None and right is None)

    def figures(self) -> dict[str, Any]:
        """The figures of all lines so far; those that nothing was found for are absent."""
        found: dict[str, Any] = {"records": self.records, "failed": self.failed}
        if self.unusable:
            found["gold_unusable"] = self.unusable
        for part in self.parts:
            found |= part.figures()
        return found


class Likelihood:
    """Perplexity and bits per byte of all texts together."""

    def __init__(self, name: str, config: ScoringConfig) -> None:
        self.name, self.unit = name, unit(config)
        self.prefix = name.removesuffix("log_likelihood")
        self.by_token, self.by_byte, self.by_character = Ratio(), Ratio(), Ratio()
        self.against = Ratio()
        self.divergence = Ratio()

    def add(self, line: Line, right: Any) -> bool:
        if self.name not in line:
            return True
        nats = -float(line[self.name]) / SCALE[self.unit]
        self.by_token.add(nats, line["tokens"])
        if line.get("bytes"):
            self.by_byte.add(nats / math.log(2), line["bytes"])
            self.by_character.add(nats / math.log(2), line["characters"])
        if line.get("bits_per_byte_difference") is not None:
            self.against.add(line["bits_per_byte_difference"] * line["bytes"], line["bytes"])
        if "kl_divergence" in line:
            self.divergence.add(line["kl_divergence"] * line["tokens"], line["tokens"])
        return True

    def figures(self) -> dict[str, Any]:
        mean = self.by_token.value()
        if mean is None:
            return {}
        perplexity, error = exponential(mean), self.by_token.error()
        found: dict[str, Any] = {
            self.name: -self.by_token.top * SCALE[self.unit],
            "tokens": round(self.by_token.bottom),
            f"{self.prefix}perplexity": perplexity,
        }
        if perplexity is not None and error is not None:
            found[f"{self.prefix}perplexity_stderr"] = perplexity * error
        rates = {"bits_per_byte": self.by_byte, "bits_per_character": self.by_character}
        rates |= {"bits_per_byte_difference": self.against, "kl_divergence": self.divergence}
        for name, ratio in rates.items():
            found |= with_error(name, ratio)
        if self.by_byte.count:
            found |= {"bytes": round(self.by_byte.bottom), "characters": round(self.by_character.bottom)}
        return found | {"unit": self.unit}


class Marks:
    """How many texts bear the watermark that was looked for."""

    def __init__(self) -> None:
        self.looked = self.found = 0

    def add(self, line: Line, right: Any) -> bool:
        if "watermarked" in line:
            self.looked += 1
            self.found += bool(line["watermarked"])
        return True

    def figures(self) -> dict[str, Any]:
        return {"watermarked": self.found} if self.looked else {}


def with_error(name: str, ratio: Ratio) -> dict[str, Any]:
    """A ratio and its standard error, as far as there are any."""
    value, error = ratio.value(), ratio.error()
    found = {} if value is None else {name: value}
    return found if error is None else {**found, f"{name}_stderr": error}


class Answers:
    """How often the pick among choices is right, by normalisation, and the Brier score of the probabilities."""

    def __init__(self) -> None:
        self.right: dict[str, Ratio] = {}
        self.brier: dict[str, Ratio] = {}

    def add(self, line: Line, right: Any) -> bool:
        for name, correct in (line.get("correct") or {}).items():
            self.right.setdefault(name, Ratio()).add(float(correct), 1)
            self.brier.setdefault(name, Ratio()).add(line["brier"][name], 1)
        return True

    def figures(self) -> dict[str, Any]:
        if not self.right:
            return {}
        found: dict[str, Any] = {"accuracy": {}, "brier": {}}
        for name in self.right:
            found["accuracy"] |= with_error(name, self.right[name])
            found["brier"] |= with_error(name, self.brier[name])
        return found


class Labels:
    """How often a classifier's labels are right, by counts alone; which labels it gave."""

    def __init__(self) -> None:
        self.several = False
        self.predicted: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()
        self.rights: Counter[str] = Counter()
        self.made: Counter[str] = Counter()
        self.exact, self.brier = Ratio(), Ratio()

    def add(self, line: Line, right: Any) -> bool:
        """Count one line; False where its right answer is neither a label nor (of several) a list of such."""
        if "choices" in line or "labels" not in line:
            return True
        self.several = isinstance(line["prediction"], list)
        made = set(line["prediction"] if self.several else [line["prediction"]])
        self.predicted.update(made)
        if right is None:
            return True
        right = _listed(right) if self.several else right
        told = right if isinstance(right, list) and self.several else [right]
        names = [_label(one, list(line["labels"])) for one in told]
        theirs = {name for name in names if name is not None}
        if None in names:
            return False
        for counter, found in ((self.hits, theirs & made), (self.rights, theirs), (self.made, made)):
            counter.update(found)
        self.exact.add(float(theirs == made), 1)
        if not self.several:
            self.brier.add(metrics.brier(list(theirs), [line["labels"]]), 1)
        return True

    def figures(self) -> dict[str, Any]:
        if not self.predicted and not self.exact.count:
            return {}
        found: dict[str, Any] = {"predictions": dict(self.predicted.most_common())}
        if not self.exact.count:
            return found
        report = metrics.report(self.hits, self.rights, self.made)
        found |= with_error("accuracy", self.exact)
        found |= {"macro_f1": report.macro.f1, "micro_f1": report.micro.f1}
        if not self.several:
            found["matthews"] = self._matthews()
            found |= with_error("brier", self.brier)
        return found | {"classes": _classes(report)}

    def _matthews(self) -> float:
        """As `metrics.matthews`, from counts."""
        total, hits = self.exact.count, self.hits.total()
        chance = sum(count * self.made[name] for name, count in self.rights.items())
        spread = (total**2 - sum(n**2 for n in self.rights.values())) * (
            total**2 - sum(n**2 for n in self.made.values())
        )
        return (hits * total - chance) / math.sqrt(spread) if spread else 0.0


def _label(right: Any, labels: Sequence[str]) -> str | None:
    """The label that is right: the gold field holds it, or its number from 0; None where it holds neither."""
    if isinstance(right, int) and not isinstance(right, bool) and str(right) in labels:
        return str(right)
    place = place_of(right, labels)
    return None if place is None else labels[place]


def _listed(right: Any) -> Any:
    """A list that a cell of CSV holds as JSON; all else as it is."""
    if isinstance(right, str) and right.startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(right)
    return right


class Numbers:
    """How near a regression's numbers are, each of several by its name."""

    def __init__(self) -> None:
        self.pairs: dict[str, Pairs] = {}

    def add(self, line: Line, right: Any) -> bool:
        """Count one line; False where its right answer is no number (of several: not one for each)."""
        if "value" in line:
            rights, values = {"": right}, {"": line["value"]}
        elif "values" in line:
            values = line["values"]
            rights = right if isinstance(right, dict) else {}
            if isinstance(right, list) and len(right) == len(values):
                rights = dict(zip(values, right, strict=True))
        else:
            return True
        if right is None:
            return True
        numbers = {name: _number(rights.get(name)) for name in values}
        for name, number in numbers.items():
            if number is not None:
                self.pairs.setdefault(name, Pairs()).add(number, values[name])
        return None not in numbers.values()

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, pairs in self.pairs.items():
            for figure, value in pairs.figures().items():
                if name:
                    found.setdefault(figure, {})[name] = value
                else:
                    found[figure] = value
        return found


def _number(right: Any) -> float | None:
    """A finite number, also one that is told as text; None for all else."""
    if isinstance(right, bool) or not isinstance(right, str | int | float):
        return None
    try:
        value = float(right)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _classes(report: metrics.ClassReport) -> dict[str, Any]:
    return {
        name: {
            "precision": scores.precision,
            "recall": scores.recall,
            "f1": scores.f1,
            "support": scores.support,
        }
        for name, scores in report.classes.items()
    }


class Entities:
    """How well a token classifier finds entities, by conlleval's rules; which types it found."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()
        self.rights: Counter[str] = Counter()
        self.made: Counter[str] = Counter()
        self.right, self.exact = Ratio(), Ratio()

    def add(self, line: Line, right: Any) -> bool:
        """Count one line; False where its right answer is not a tag for each word."""
        if "entities" not in line:
            return True
        self.found.update(entity["type"] for entity in line["entities"])
        if right is None:
            return True
        tags, right = line["tags"], _listed(right)
        if (
            not isinstance(right, list)
            or len(right) != len(tags)
            or not all(isinstance(t, str) for t in right)
        ):
            return False
        theirs, ours = (set(metrics.entity_spans(each)) for each in (right, tags))
        for counter, spans in ((self.hits, theirs & ours), (self.rights, theirs), (self.made, ours)):
            counter.update(kind for kind, _, _ in spans)
        for gold, made in zip(right, tags, strict=True):
            self.right.add(float(gold == made), 1)
        self.exact.add(float(right == tags), 1)
        return True

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = {"entities": dict(self.found.most_common())} if self.found else {}
        accuracy = self.right.value()
        if accuracy is None:
            return found
        report = metrics.report(self.hits, self.rights, self.made)
        micro = report.micro
        found |= {"accuracy": accuracy, **with_error("exact_match", self.exact)}
        found |= {"precision": micro.precision, "recall": micro.recall, "f1": micro.f1}
        return found | {"macro_f1": report.macro.f1, "classes": _classes(report)}
