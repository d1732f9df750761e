"""Tasks: which one the fields tell, what a good row is, and what labels are taken together."""

import json
from typing import Any

import pytest
from sklearn.utils.multiclass import type_of_target

from textgen_cli.config.finetune import DataConfig, FinetuneTask
from textgen_cli.errors import InputError
from textgen_cli.finetune.labels import LABEL_LIMIT, Labels, final_label, name_of
from textgen_cli.finetune.tasks import TASKS, Binding, bind, example, needs

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
GOOD: dict[str, dict[str, Any]] = {
    "clm": {"text": "words"},
    "mlm": {"text": "words"},
    "chat": {"messages": MESSAGES},
    "seq2seq": {"source": "a", "target": "b"},
    "text-classification": {"text": "a", "label": "good"},
    "token-classification": {"words": ["a", "b"], "tags": ["O", "B-X"]},
    "question-answering": {
        "question": "Who?",
        "context": "It was Ada.",
        "answers": [{"text": "Ada", "start": 7}],
    },
}


def test_every_task_of_the_settings_is_here() -> None:
    assert set(FinetuneTask.__args__) == set(TASKS) == set(GOOD)  # type: ignore[attr-defined]


@pytest.mark.parametrize("task", sorted(GOOD))
def test_a_task_is_told_by_its_fields(task: str) -> None:
    assert bind([GOOD[task]], DataConfig()).task == (task if task != "mlm" else "clm")
    assert bind([GOOD[task]], DataConfig(task=task)).task == task  # type: ignore[arg-type]


@pytest.mark.parametrize("task", sorted(GOOD))
def test_what_is_kept_fits_the_files(task: str) -> None:
    binding = bind([GOOD[task]], DataConfig(task=task))  # type: ignore[arg-type]
    found = example(binding, GOOD[task] | {"id": 7, "other": None})
    assert isinstance(found, dict)
    assert list(found) == TASKS[task].schema.names
    assert set(TASKS[task].key) <= set(found)


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        ([{"text": "a", "label": 1, "source": "web"}], {}, ("text-classification", {"text": "text", "label": "label"})),
        ([{"premise": "a", "hypothesis": "b", "label": 1}], {},
         ("text-classification", {"text": "premise", "pair": "hypothesis", "label": "label"})),
        ([{"prompt": "a", "completion": "b"}], {}, ("chat", {"prompt": "prompt", "completion": "completion"})),
        ([{"review": "a"}], {"text_field": "review"}, ("clm", {"text": "review"})),
        ([{"review": "a", "label": "x"}], {"text_field": "review"},
         ("text-classification", {"text": "review", "label": "label"})),
        ([{"review": "a", "stars": 5}], {"text_field": "review", "label_field": "stars"},
         ("text-classification", {"text": "review", "label": "stars"})),
        ([{"tokens": ["a"], "ner_tags": [0]}], {}, ("token-classification", {"words": "tokens", "tags": "ner_tags"})),
        ([{"talk": MESSAGES}], {"text_field": "talk"}, ("chat", {"messages": "talk"})),
        ([{"text": "a"}, {"text": "b", "label": "x"}], {},
         ("text-classification", {"text": "text", "label": "label"})),
        ([{"text": "a", "label": "x"}], {"task": "clm"}, ("clm", {"text": "text"})),
        ([{"instruction": "a", "output": "b"}],
         {"task": "chat", "text_field": "instruction", "label_field": "output"},
         ("chat", {"prompt": "instruction", "completion": "output"})),
    ],
)  # fmt: skip
def test_fields_bind(rows: list[dict[str, Any]], settings: Any, expected: tuple[str, dict[str, str]]) -> None:
    assert bind(rows, DataConfig(**settings)) == Binding(*expected)


@pytest.mark.parametrize(
    ("rows", "settings", "code", "says"),
    [
        ([{"text": "a", "label": "x", "prompt": "p", "completion": "c"}], {}, "E-TASK",
         "chat and text-classification"),
        ([{"a": "x", "b": "y"}], {"text_field": "a", "label_field": "b"}, "E-TASK", "seq2seq and text-classification"),
        ([{"body": "x"}], {}, "E-TASK", "rows with body fit no task"),
        ([{"text": "x"}], {"pair_field": "other"}, "E-TASK", "fit no task"),
        ([{}], {}, "E-TASK", "no fields"),
        ([{"text": "x"}], {"task": "chat"}, "E-FIELD", "messages, or prompt and completion"),
        ([{"text": "x", "label": 1}], {"task": "text-classification", "label_field": "stars"}, "E-FIELD", "lack"),
    ],
)  # fmt: skip
def test_fields_that_fit_several_tasks_or_none(
    rows: list[dict[str, Any]], settings: Any, code: str, says: str
) -> None:
    with pytest.raises(InputError) as caught:
        bind(rows, DataConfig(**settings))
    assert caught.value.name == code
    assert all(word in caught.value.fact for word in says.split(" and "))
    assert caught.value.hint is not None
    assert "--task" in caught.value.hint or code == "E-FIELD"


def test_a_task_says_what_it_needs() -> None:
    assert needs("chat") == "messages, or prompt and completion"
    assert needs("text-classification") == "text and label"


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("clm", {"text": " \n"}, "text is empty"),
    ("clm", {"text": 7}, "text is a number, not a text"),
    ("clm", {"text": None}, "text is empty"),
    ("clm", {"other": "x"}, "text is missing"),
    ("clm", {"text": "\ud800"}, "surrogate"),
    ("chat", {"messages": []}, "messages is not a list of messages"),
    ("chat", {"messages": "hi"}, "messages is not a list of messages"),
    ("chat", {"messages": ["hi"]}, "messages[0] is a str, not an object"),
    ("chat", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0] has role 'robot', not one of"),
    ("chat", {"messages": [{"role": "user", "content": ["x"]}]}, "messages[0] has no text as its content"),
    ("chat", {"messages": MESSAGES[:1]}, "messages[0] is of role user; the last is an answer"),
    ("chat", {"messages": [*MESSAGES, {"role": "assistant", "content": " "}]}, "messages[2] is an empty answer"),
    ("chat", {"messages": [MESSAGES[0], MESSAGES[1] | {"tool_calls": [1]}]}, "messages[1] has a key 'tool_calls'"),
    ("seq2seq", {"source": "a"}, "target is missing"),
    ("seq2seq", {"source": "a", "target": ""}, "target is empty"),
    ("text-classification", {"text": "a", "label": ""}, "label is empty"),
    ("text-classification", {"text": "a", "label": {}}, "label is an object"),
    ("text-classification", {"text": "a", "label": float("nan")}, "label is nan, no number"),
    ("text-classification", {"text": "a", "label": ["x", "x"]}, "label has a name twice"),
    ("text-classification", {"text": "a", "label": ["x", None]}, "label is null"),
    ("text-classification", {"text": ["a"], "label": "x"}, "text is a list, not a text"),
    ("token-classification", {"words": [], "tags": []}, "words is not a list that holds something"),
    ("token-classification", {"words": ["a", "b"], "tags": ["O"]}, "words are 2, tags 1"),
    ("token-classification", {"words": ["a", " "], "tags": ["O", "O"]}, "words[1] is empty"),
    ("token-classification", {"words": ["a"], "tags": [1.5]}, "tags[0] is a number, not a name"),
    ("question-answering", GOOD["question-answering"] | {"answers": "Ada"}, "answers is a str, not a list"),
    ("question-answering", GOOD["question-answering"] | {"answers": [{"text": "Ada"}]}, "answers[0] has no start"),
    ("question-answering", GOOD["question-answering"] | {"answers": [{"text": "Ada", "start": 6}]},
     "answers[0] is 'Ada', but at 6 of the context stands ' Ad'"),
    ("question-answering", GOOD["question-answering"] | {"answers": [{"text": "", "start": 6}]},
     "answers[0] has no text"),
    ("question-answering", GOOD["question-answering"] | {"answers": {"text": ["Ada"]}}, "two lists"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "fields", "fact"), BAD)
def test_a_bad_row_is_a_fact_that_names_the_field(task: str, fields: dict[str, Any], fact: str) -> None:
    binding = bind([GOOD[task]], DataConfig(task=task))  # type: ignore[arg-type]
    found = example(binding, fields)
    assert isinstance(found, str)
    assert fact in found


def test_a_fact_names_the_field_as_the_row_has_it() -> None:
    binding = Binding("text-classification", {"text": "review", "label": "stars"})
    assert example(binding, {"review": "", "stars": 1}) == "review is empty"
    assert example(binding, {"review": "x", "stars": {}}) == "stars is an object, not a name or number"


def test_answers_are_taken_from_lists_of_a_table_too() -> None:
    binding = bind([GOOD["question-answering"]], DataConfig())
    fields = GOOD["question-answering"] | {"answers": {"text": ["Ada"], "answer_start": [7]}}
    assert example(binding, fields) == GOOD["question-answering"]
    assert example(binding, fields | {"answers": []}) == GOOD["question-answering"] | {"answers": []}


def test_prompt_and_completion_become_messages() -> None:
    binding = bind([{"prompt": "hi", "completion": "ho"}], DataConfig())
    assert example(binding, {"prompt": "hi", "completion": "ho"}) == {"messages": MESSAGES}


# ---- labels


def together(values: list[Any]) -> Labels:
    labels = Labels()
    assert [labels.add(value) for value in values] == [None] * len(values)
    return labels


@pytest.mark.parametrize(
    ("values", "problem", "kind"),
    [
        (["good", "bad", "good"], "single_label_classification", "binary"),
        (["a", "b", "c"], "single_label_classification", "multiclass"),
        ([0, 1, 2, 1], "single_label_classification", "multiclass"),
        (list(range(50)), "single_label_classification", "multiclass"),
        ([n / 7 for n in range(1, 30)], "regression", "continuous"),
        ([f"{n}.5" for n in range(30)], "regression", None),
        ([1.0, 2.0, 3.0, 4.0, 5.0], "single_label_classification", "multiclass"),
        ([True, False], "single_label_classification", "binary"),
        ([["a"], ["a", "b"], []], "multi_label_classification", None),
    ],
)
def test_the_values_tell_the_problem(values: list[Any], problem: str, kind: str | None) -> None:
    assert together(values).problem == problem
    if kind is not None:
        assert type_of_target(values) == kind


@pytest.mark.parametrize(
    ("values", "fact"),
    [
        ([n + 0.5 for n in range(20)] + ["n/a"], "1 of 21 labels are no numbers, such as 'n/a'"),
        ([str(n) for n in range(LABEL_LIMIT + 5)], "more than 10,000 different labels"),
    ],
)
def test_labels_that_are_neither_classes_nor_a_scale(values: list[Any], fact: str) -> None:
    with pytest.raises(InputError) as caught:
        together(values).problem  # noqa: B018 - it is a property
    assert caught.value.name == "E-LABELS"
    assert fact in caught.value.fact


def test_a_scale_may_have_any_number_of_values() -> None:
    assert together([n / 3 for n in range(LABEL_LIMIT * 2)]).problem == "regression"


def test_a_list_among_names_is_a_bad_row() -> None:
    labels = together(["a"])
    assert labels.add(["b"]) == "label is a list, those before are not"
    assert labels.counts == {"a": 1}
    assert together([["a"]]).add("b") == "label is a str, those before are lists"


@pytest.mark.parametrize(
    ("label", "problem", "expected"),
    [
        ("a", "single_label_classification", "a"),
        (3, "single_label_classification", "3"),
        (3.0, "single_label_classification", "3"),
        (True, "single_label_classification", "true"),
        (["a", 2], "multi_label_classification", ["a", "2"]),
        (3, "regression", 3.0),
        ("3.5", "regression", 3.5),
    ],
)
def test_a_label_in_its_final_form(label: Any, problem: str, expected: Any) -> None:
    found = final_label(json.loads(json.dumps(label)), problem)
    assert found == expected
    assert type(found) is type(expected)
    if problem == "single_label_classification":
        assert name_of(label) == found


@pytest.mark.parametrize(
    ("cell", "kept"),
    [
        ('["a", "b"]', ["a", "b"]),
        ("[]", []),
        ("[a]", "[a]"),
        ("a", "a"),
    ],
)
def test_a_list_of_labels_in_a_cell_of_csv_is_a_list(cell: str, kept: Any) -> None:
    binding = Binding("text-classification", {"text": "text", "label": "label"})
    found = example(binding, {"text": "x", "label": cell})
    assert isinstance(found, dict) and json.loads(found["label"]) == kept
