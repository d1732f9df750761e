"""How right predictions are: figures over pairs of a right answer and a prediction.

Plain values in, numbers out: knows no model, no record and no rounding. Where a share has no denominator
(nothing was predicted, nothing was to be found) it is 0, as in scikit-learn and seqeval.
"""

import math
import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Scores:
    """Precision, recall and their harmonic mean; `support`: how many there were to find."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class ClassReport:
    """Scores of each class by its name, and their means.

    micro: over all decisions; macro: every class alike; weighted: every class by its support.
    """

    micro: Scores
    macro: Scores
    weighted: Scores
    classes: dict[str, Scores]


# --- one class of several


def accuracy(gold: Sequence[object], predicted: Sequence[object]) -> float:
    """The share of predictions that are right, of one pair at least."""
    return statistics.fmean(right == made for right, made in zip(gold, predicted, strict=True))


def class_report(gold: Sequence[str], predicted: Sequence[str]) -> ClassReport:
    """Scores of one class a record; the classes are those that occur on either side."""
    return multilabel_report([{right} for right in gold], [{made} for made in predicted])


def matthews(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """Matthews' correlation coefficient for any number of classes; 0 where either side names one class alone."""
    rights, made = Counter(gold), Counter(predicted)
    total = len(gold)
    hits = sum(right == guess for right, guess in zip(gold, predicted, strict=True))
    chance = sum(rights[name] * made[name] for name in rights)
    spread = (total**2 - sum(n**2 for n in rights.values())) * (total**2 - sum(n**2 for n in made.values()))
    return (hits * total - chance) / math.sqrt(spread) if spread else 0.0


def brier(gold: Sequence[str], probabilities: Sequence[Mapping[str, float]]) -> float:
    """The Brier score, summed over the classes and so from 0 (certain and right) to 2 (certain and wrong).

    With two classes that is twice the score of one class's probability alone. `probabilities`: of every class a model
    knows, by name; a right answer it does not know had probability 0.
    """
    return statistics.fmean(_squares(*pair) for pair in zip(gold, probabilities, strict=True))


def _squares(right: str, probabilities: Mapping[str, float]) -> float:
    known = math.fsum((p - (name == right)) ** 2 for name, p in probabilities.items())
    return known + (right not in probabilities)


# --- any number of classes


def multilabel_report(gold: Sequence[Collection[str]], predicted: Sequence[Collection[str]]) -> ClassReport:
    """Scores of a set of classes a record; the classes are those that occur on either side."""
    hits: Counter[str] = Counter()
    rights: Counter[str] = Counter()
    made: Counter[str] = Counter()
    for right, guess in zip(map(set, gold), map(set, predicted), strict=True):
        hits.update(right & guess)
        rights.update(right)
        made.update(guess)
    return report(hits, rights, made)


def report(hits: Counter[str], rights: Counter[str], made: Counter[str]) -> ClassReport:
    """Scores from counts by class: rightly predicted, to be predicted, predicted."""
    names = sorted(rights.keys() | made.keys())
    classes = {name: _scores(hits[name], rights[name], made[name]) for name in names}
    support = rights.total()
    return ClassReport(
        micro=_scores(hits.total(), support, made.total()),
        macro=_mean(classes.values(), [1] * len(classes), support),
        weighted=_mean(classes.values(), [scores.support for scores in classes.values()], support),
        classes=classes,
    )


def _scores(hits: int, rights: int, made: int) -> Scores:
    f1 = 2 * hits / (rights + made) if rights + made else 0.0
    return Scores(hits / made if made else 0.0, hits / rights if rights else 0.0, f1, rights)


def _mean(several: Collection[Scores], weights: Sequence[int], support: int) -> Scores:
    if not any(weights):
        return Scores(0.0, 0.0, 0.0, support)
    precision, recall, f1 = (
        statistics.fmean([getattr(scores, name) for scores in several], weights)
        for name in ("precision", "recall", "f1")
    )
    return Scores(precision, recall, f1, support)


# --- numbers


def mean_squared_error(gold: Sequence[float], predicted: Sequence[float]) -> float | None:
    """The mean of squared differences, of one pair at least; None where it is more than a number can hold."""
    return _finite(lambda: statistics.fmean(d * d for d in _differences(gold, predicted)))


def mean_absolute_error(gold: Sequence[float], predicted: Sequence[float]) -> float | None:
    """The mean of differences without their sign, of one pair at least; None as `mean_squared_error`."""
    return _finite(lambda: statistics.fmean(map(abs, _differences(gold, predicted))))


def pearson(gold: Sequence[float], predicted: Sequence[float]) -> float | None:
    """Pearson's correlation, from -1 to 1; None where either side has fewer than two different values."""
    # The library sees no constant where rounding moves the mean away from it, hence the question.
    if len(set(gold)) < 2 or len(set(predicted)) < 2:
        return None
    return statistics.correlation(_scaled(gold), _scaled(predicted))


def spearman(gold: Sequence[float], predicted: Sequence[float]) -> float | None:
    """Spearman's correlation of the ranks, ties sharing their mean rank; None as `pearson`."""
    return pearson(_ranks(gold), _ranks(predicted))


def _scaled(values: Sequence[float]) -> list[float]:
    """The values as parts of the largest: their squares can be held."""
    largest = max(map(abs, values))
    return [value / largest for value in values]


def _differences(gold: Sequence[float], predicted: Sequence[float]) -> Iterator[float]:
    return (made - right for right, made in zip(gold, predicted, strict=True))


def _finite(compute: Callable[[], float]) -> float | None:
    try:
        value = compute()
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def _ranks(values: Sequence[float]) -> list[float]:
    ranks = [0.0] * len(values)
    below = 0
    for _, tied in groupby(sorted(range(len(values)), key=values.__getitem__), key=values.__getitem__):
        places = list(tied)
        for place in places:
            ranks[place] = below + (len(places) + 1) / 2
        below += len(places)
    return ranks


# --- entities

# What the first letter of a tag says: does an entity begin here, does it end here? As in IOB2, BIOES, BILOU, BMES.
_BEGINS, _ENDS = frozenset("BSU"), frozenset("ESLU")
_TAG = re.compile(r"([BIESLUM])(?:-(.*))?", re.DOTALL)


def entity_spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The entities of one sequence of tags: (type, first word, last word).

    By conlleval's lenient rules, which are seqeval's default: an I- behind O or another type begins an entity too. A
    tag without prefix other than O is inside an entity of that type; a prefix alone has the type `_`.
    """
    found: list[tuple[str, int, int]] = []
    open_type, open_at, ended = "", 0, True
    for place, tag in enumerate([*tags, "O"]):
        prefix, kind = split_tag(tag)
        goes_on = not ended and kind == open_type and prefix not in _BEGINS
        if goes_on:
            ended = prefix in _ENDS
            continue
        if open_type:
            found.append((open_type, open_at, place - 1))
        open_type, open_at, ended = kind, place, prefix in _ENDS
    return found


def split_tag(tag: str) -> tuple[str, str]:
    """`B-PER` -> B and PER; O and the empty tag have no type."""
    if tag in ("O", ""):
        return "O", ""
    match = _TAG.fullmatch(tag)
    return (match[1], match[2] or "_") if match else ("I", tag)


def entity_report(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> ClassReport:
    """Scores of entities by type, from the tags of each record's words; right are type and both ends alone."""
    hits: Counter[str] = Counter()
    rights: Counter[str] = Counter()
    made: Counter[str] = Counter()
    for right, guess in zip(gold, predicted, strict=True):
        theirs, ours = set(entity_spans(right)), set(entity_spans(guess))
        hits.update(kind for kind, _, _ in theirs & ours)
        rights.update(kind for kind, _, _ in theirs)
        made.update(kind for kind, _, _ in ours)
    return report(hits, rights, made)


# --- answers to questions

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))


def normalized(answer: str) -> str:
    """An answer as SQuAD compares it: lower case, without punctuation and English articles, blanks made one."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(gold: Sequence[str], predicted: str) -> float:
    """1 where the prediction equals one of the right answers once normalised, else 0.

    No right answer, or none but empty ones: the question cannot be answered, and only an empty prediction is right.
    """
    return float(normalized(predicted) in _answers(gold))


def token_f1(gold: Sequence[str], predicted: str) -> float:
    """The F1 of the words that prediction and right answer share, for the right answer where it is best.

    An empty answer on either side is right only against another.
    """
    return max(_overlap(right.split(), normalized(predicted).split()) for right in _answers(gold))


def _answers(gold: Iterable[str]) -> list[str]:
    """The right answers, normalised; those that leave nothing count only where no other is there."""
    return [text for text in map(normalized, gold) if text] or [""]


def _overlap(right: Sequence[str], made: Sequence[str]) -> float:
    if not right or not made:
        return float(right == made)
    shared = (Counter(right) & Counter(made)).total()
    return 2 * shared / (len(right) + len(made))
