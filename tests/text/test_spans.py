"""The answer span search against a double loop."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textgen_cli.text.spans import Answer, answered, best_spans, null_score

LOGITS = st.floats(-20, 20).map(lambda x: round(x, 1))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], list[float], list[tuple[int, int]], list[bool], int, int]:
    size = draw(st.integers(1, 12))

    def row(elements: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(elements, min_size=size, max_size=size))

    widths = row(st.integers(0, 3))
    ends = [sum(widths[: i + 1]) for i in range(size)]
    offsets = [(end - width, end) for end, width in zip(ends, widths, strict=True)]
    return (
        row(LOGITS),
        row(LOGITS),
        offsets,
        row(st.booleans()),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 6)),
    )


@settings(deadline=None)
@given(cases())
def test_equals_the_double_loop(
    case: tuple[list[float], list[float], list[tuple[int, int]], list[bool], int, int],
) -> None:
    start, end, offsets, in_context, longest, count = case
    found = []
    for i in range(len(start)):
        for j in range(len(start)):
            inside = all(in_context[i : j + 1])
            if i <= j < i + longest and inside and offsets[j][1] > offsets[i][0]:
                found.append(
                    ((-start[i] - end[j], i, j), Answer(offsets[i][0], offsets[j][1], start[i] + end[j]))
                )
    expected = [answer for _, answer in sorted(found, key=lambda pair: pair[0])][:count]
    assert best_spans(start, end, offsets, in_context, max_answer_tokens=longest, count=count) == expected


def test_no_context_no_answer() -> None:
    assert best_spans([1.0], [1.0], [(0, 3)], [False]) == []
    assert not answered(None, 0.0)


@pytest.mark.parametrize(
    ("null", "threshold", "expected"),
    [(2.9, 0.0, True), (3.0, 0.0, True), (3.1, 0.0, False), (3.1, 0.2, True), (2.9, -1, False)],
)
def test_squad2_rule(null: float, threshold: float, expected: bool) -> None:
    assert answered(Answer(0, 2, 3.0), null, threshold=threshold) is expected
    assert null_score([null, 9.0], [0.0, 9.0]) == null
