"""Figures against scikit-learn, scipy and seqeval, and SQuAD's rules as tables."""

import random
from typing import Any

import pytest
import seqeval.metrics
import seqeval.metrics.sequence_labeling
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.preprocessing import MultiLabelBinarizer

from textgen_cli.text import metrics
from textgen_cli.text.metrics import ClassReport, Scores

CLASSES = st.sampled_from("abcd")
PAIRS = st.lists(st.tuples(CLASSES, CLASSES), min_size=1, max_size=30)
close = pytest.approx


def table(scores: Scores) -> list[float]:
    return [scores.precision, scores.recall, scores.f1]


def check_means(report: ClassReport, expected: Any) -> None:
    """`expected(average)`: the other side's precision, recall, F1 for a mean, or for each class with None."""
    for average in ("micro", "macro", "weighted"):
        assert table(getattr(report, average)) == close([float(x) for x in expected(average)[:3]])
    columns = [list(column) for column in zip(*expected(None), strict=True)]
    assert [[*table(scores), scores.support] for scores in report.classes.values()] == [
        close(column) for column in columns
    ]


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(deadline=None)
@given(PAIRS)
def test_one_class_equals_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    gold, predicted = map(list, zip(*pairs, strict=True))
    assert metrics.accuracy(gold, predicted) == close(sklearn.metrics.accuracy_score(gold, predicted))
    assert metrics.matthews(gold, predicted) == close(sklearn.metrics.matthews_corrcoef(gold, predicted))
    report = metrics.class_report(gold, predicted)
    assert list(report.classes) == sorted({*gold, *predicted})
    check_means(
        report,
        lambda average: sklearn.metrics.precision_recall_fscore_support(
            gold, predicted, average=average, zero_division=0
        ),
    )
    assert report.micro.support == len(pairs)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sets(CLASSES), st.sets(CLASSES)), min_size=1, max_size=20))
def test_several_classes_equal_scikit_learn(pairs: list[tuple[set[str], set[str]]]) -> None:
    gold, predicted = map(list, zip(*pairs, strict=True))
    named = sorted(set().union(*gold, *predicted))
    report = metrics.multilabel_report(gold, predicted)
    assert list(report.classes) == named
    if not named:
        nothing = Scores(0.0, 0.0, 0.0, 0)
        assert report == ClassReport(nothing, nothing, nothing, {})
        return
    columns = MultiLabelBinarizer(classes=[*named, "none"])  # one column alone would be another problem
    matrices = columns.fit_transform(gold), columns.transform(predicted)
    check_means(
        report,
        lambda average: sklearn.metrics.precision_recall_fscore_support(
            *matrices, average=average, labels=range(len(named)), zero_division=0
        ),
    )


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(1, 9), min_size=3, max_size=3))))
def test_brier_equals_scikit_learn(rows: list[tuple[str, list[int]]]) -> None:
    rows = [*rows, ("a", [1, 1, 1])]
    gold = [right for right, _ in rows]
    shares = [[x / sum(weights) for x in weights] for _, weights in rows]
    named = [dict(zip("abc", row, strict=True)) for row in shares]
    expected = sklearn.metrics.brier_score_loss(gold, shares, labels=list("abc"), scale_by_half=False)
    assert metrics.brier(gold, named) == close(expected)


def test_brier_by_hand() -> None:
    assert metrics.brier(["a"], [{"a": 1.0, "b": 0.0}]) == 0
    assert metrics.brier(["a"], [{"a": 0.0, "b": 1.0}]) == 2
    assert metrics.brier(["a", "a"], [{"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 0.0}]) == 0.25
    assert metrics.brier(["c"], [{"a": 0.0, "b": 1.0}]) == 2  # a class the model does not know


NUMBERS = st.one_of(st.integers(-3, 3).map(float), st.floats(-100, 100).map(lambda x: round(x, 3)))


@settings(deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30))
def test_numbers_equal_scipy(pairs: list[tuple[float, float]]) -> None:
    gold, predicted = map(list, zip(*pairs, strict=True))
    assert metrics.mean_squared_error(gold, predicted) == close(
        sklearn.metrics.mean_squared_error(gold, predicted)
    )
    assert metrics.mean_absolute_error(gold, predicted) == close(
        sklearn.metrics.mean_absolute_error(gold, predicted)
    )
    if min(len(set(gold)), len(set(predicted))) < 2:
        assert metrics.pearson(gold, predicted) is None
        assert metrics.spearman(gold, predicted) is None
        return
    assert metrics.pearson(gold, predicted) == close(stats.pearsonr(gold, predicted)[0], abs=1e-9)
    assert metrics.spearman(gold, predicted) == close(stats.spearmanr(gold, predicted)[0], abs=1e-9)


def test_a_correlation_of_constants_is_none() -> None:
    assert metrics.pearson([0.1] * 3, [1.0, 2.0, 3.0]) is None  # 0.1 has no exact mean
    assert metrics.spearman([1.0, 2.0, 3.0], [0.1] * 3) is None


def test_numbers_too_large_give_none() -> None:
    assert metrics.mean_squared_error([1e200, 1.0], [1.0, 2.0]) is None
    assert metrics.mean_absolute_error([1e308, -1e308], [-1e308, 1e308]) is None
    expected = stats.pearsonr([1.0, 0.0, 0.0], [1.0, 2.0, 3.0])[0]
    for large in (1e200, 1e-200, 1e308):
        assert metrics.pearson([large, 0.0, 0.0], [1.0, 2.0, 3.0]) == close(expected)
    assert metrics.spearman([1e200, 1.0, 2.0], [3.0, 1.0, 2.0]) == close(1)


TAGS = st.sampled_from(
    ["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("PER", "LOC", "A-B")), "B", "I"]
)


@settings(deadline=None, max_examples=300)
@given(st.lists(TAGS, max_size=12))
def test_spans_equal_seqeval(tags: list[str]) -> None:
    assert metrics.entity_spans(tags) == seqeval.metrics.sequence_labeling.get_entities(tags)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.parametrize("seed", range(40))
def test_entities_equal_seqeval(seed: int) -> None:
    draw = random.Random(seed)
    kinds = ["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG"]
    gold = [draw.choices(kinds, k=draw.randint(0, 8)) for _ in range(draw.randint(1, 12))]
    predicted = [[draw.choice(kinds) if draw.random() < 0.3 else tag for tag in tags] for tags in gold]
    gold.append(["B-PER"])  # seqeval knows no means of nothing
    predicted.append(["B-PER"])
    report = metrics.entity_report(gold, predicted)
    expected = seqeval.metrics.classification_report(gold, predicted, output_dict=True, zero_division=0)
    names = {"micro": "micro avg", "macro": "macro avg", "weighted": "weighted avg"}
    ours = {names[name]: getattr(report, name) for name in names} | report.classes
    assert ours.keys() == expected.keys()
    for name, scores in ours.items():
        row = expected[name]
        theirs = [row["precision"], row["recall"], row["f1-score"], row["support"]]
        assert [*table(scores), scores.support] == close([float(x) for x in theirs]), name


def test_no_entities_at_all() -> None:
    report = metrics.entity_report([["O", "O"], []], [["O", "O"], []])
    assert report.micro == Scores(0.0, 0.0, 0.0, 0) and report.classes == {}


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        (["PER", "PER", "O", "PER", "LOC"], [("PER", 0, 1), ("PER", 3, 3), ("LOC", 4, 4)]),  # no prefixes
        (["B-PER", "L-PER", "U-PER", "I-PER"], [("PER", 0, 1), ("PER", 2, 2), ("PER", 3, 3)]),  # BILOU
        (["B-PER", "M-PER", "E-PER", "S-LOC"], [("PER", 0, 2), ("LOC", 3, 3)]),  # BMES
        ([], []),
    ],
)
def test_forms_that_seqeval_lacks(tags: list[str], spans: list[tuple[str, int, int]]) -> None:
    assert metrics.entity_spans(tags) == spans


@pytest.mark.parametrize(
    ("gold", "predicted", "exact", "f1"),
    [
        (["Denver Broncos"], "The Denver Broncos!", 1, 1),
        (["Denver Broncos"], "denver  BRONCOS", 1, 1),
        (["Denver Broncos"], "Broncos", 0, 2 / 3),
        (["Denver Broncos", "Broncos"], "the Broncos", 1, 1),  # the best of several
        (["a cat and a dog"], "cat, dog", 0, 4 / 5),
        (["the the cat"], "cat cat", 0, 2 / 3),  # a word counts as often as both have it
        (["another"], "other", 0, 0),  # articles are whole words
        (["U.S."], "US", 1, 1),
        (["it's"], "its", 1, 1),
        (["snow-white"], "snowwhite", 1, 1),  # punctuation goes without a blank
        (["snow–white"], "snowwhite", 0, 0),  # and only that of ASCII
        (["42"], "43", 0, 0),
        ([], "", 1, 1),  # unanswerable
        ([], "something", 0, 0),
        ([""], "", 1, 1),
        (["", "yes"], "", 0, 0),  # an empty answer beside others does not count
        (["yes"], "", 0, 0),
        (["the"], "", 1, 1),  # nothing is left of it
    ],
)
def test_answers_as_squad_has_it(gold: list[str], predicted: str, exact: float, f1: float) -> None:
    assert metrics.exact_match(gold, predicted) == exact
    assert metrics.token_f1(gold, predicted) == close(f1)


def test_pairs_must_match() -> None:
    for measure in (metrics.accuracy, metrics.class_report, metrics.entity_report, metrics.multilabel_report):
        with pytest.raises(ValueError, match="zip"):
            measure(["a"], ["a", "b"])
