"""The tasks of finetune as data: which fields a row has, what makes it good, and what is kept of it.

A new task is one function and one entry of TASKS. Knows no files, no tokenizer and no model.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from textgen_cli.config.finetune import DataConfig
from textgen_cli.errors import InputError
from textgen_cli.finetune.labels import kind_of, name_of

Example = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")


class _Bad(Exception):
    """What is wrong with a row, as a fact. Never leaves this module."""


@dataclass(frozen=True)
class Part:
    """A field that a task looks for."""

    name: str
    names: tuple[str, ...]  # what it may be called, the first that is there counts
    option: Literal["text_field", "pair_field", "label_field"] | None = None  # a setting that names it
    kinds: tuple[type, ...] = (str,)  # what its values are, for guessing
    optional: bool = False


@dataclass(frozen=True)
class Task:
    """What a task learns from."""

    shapes: tuple[tuple[Part, ...], ...]  # the sets of fields it takes, the first that fits counts
    example: Callable[[Mapping[str, Any]], Example]  # values by part -> what is kept; raises _Bad
    schema: pa.Schema  # of what is kept, the label of a text still as JSON
    key: tuple[str, ...]  # columns: examples that are alike in them are held out together, or not at all


@dataclass(frozen=True)
class Binding:
    """A task with the fields it was found in."""

    task: str
    fields: dict[str, str] = field(default_factory=dict)  # part -> field

    def __str__(self) -> str:
        return f"{self.task} from {', '.join(self.fields.values())}"


# --- which task and which fields


def bind(rows: Iterable[Mapping[str, Any]], data: DataConfig) -> Binding:
    """The task, named or told by the fields of the first rows, and where its parts stand.

    Text alone is `clm`: that it may be `mlm` as well is for the model to tell. Raises InputError E-TASK where several
    tasks or none fit, E-FIELD where the named one does not.
    """
    sample = _sample(rows)
    wanted = [data.task] if data.task is not None else [name for name in TASKS if name != "mlm"]
    found = [binding for name in wanted if (binding := _fit(name, sample, data, data.task is None))]
    found = [one for one in found if not any(_covers(other, one) for other in found)]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(sample) or "no fields"
    if found:
        fact = f"rows with {shown} fit {' and '.join(one.task for one in found)}"
        raise InputError("E-TASK", "data", fact, hint="say which with --task")
    if data.task is None:
        hint = "name it with --task, and its fields with --text-field and --label-field"
        raise InputError("E-TASK", "data", f"rows with {shown} fit no task", hint=hint)
    fact = f"rows with {shown} lack what {data.task} needs: {needs(data.task)}"
    hint = "--text-field, --pair-field and --label-field name the fields"
    raise InputError("E-FIELD", "data", fact, hint=hint)


def needs(task: str) -> str:
    """The fields of a task in words."""
    shapes = (
        " and ".join(part.names[0] for part in shape if not part.optional) for shape in TASKS[task].shapes
    )
    return ", or ".join(shapes)


def _sample(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Every field of the rows with its first value that is any."""
    sample: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            if sample.get(name) is None:
                sample[name] = value
    return sample


def _fit(name: str, sample: Mapping[str, Any], data: DataConfig, guess: bool) -> Binding | None:
    for shape in TASKS[name].shapes:
        fields = _fields(shape, sample, data, guess)
        if fields is not None:
            return Binding(name, fields)
    return None


def _fields(
    shape: tuple[Part, ...], sample: Mapping[str, Any], data: DataConfig, guess: bool
) -> dict[str, str] | None:
    given = {name for name in ("text_field", "pair_field", "label_field") if getattr(data, name) is not None}
    if given - {part.option for part in shape}:
        return None
    fields = {}
    for part in shape:
        names = (getattr(data, part.option),) if part.option in given else part.names
        at = next((name for name in names if name in sample), None)
        if at is None and part.optional and part.option not in given:
            continue
        if at is None or (guess and sample[at] is not None and not isinstance(sample[at], part.kinds)):
            return None
        fields[part.name] = at
    return fields


def _covers(larger: Binding, smaller: Binding) -> bool:
    """Whether a task explains the same fields and more."""
    return set(larger.fields.values()) > set(smaller.fields.values())


def example(binding: Binding, fields: Mapping[str, Any]) -> Example | str:
    """What is kept of a row; a fact where it is bad."""
    values = {part: fields.get(name) for part, name in binding.fields.items()}
    for part, name in binding.fields.items():
        if values[part] is None:
            return f"{name} is {'empty' if name in fields else 'missing'}"
    try:
        found = TASKS[binding.task].example(values)
        json.dumps(found, ensure_ascii=False).encode()
    except _Bad as bad:
        return _named(str(bad), binding)
    except UnicodeEncodeError:
        return "an escape is half of a surrogate pair: no character"
    return found


def _named(fact: str, binding: Binding) -> str:
    """A fact that speaks of the field as the row has it."""
    part, _, rest = fact.partition(" ")
    stem = part.partition("[")[0]
    return f"{binding.fields[stem]}{part[len(stem) :]} {rest}" if stem in binding.fields else fact


# --- one function a task


def _text(values: Mapping[str, Any], part: str) -> str:
    value = values[part]
    if not isinstance(value, str):
        raise _Bad(f"{part} is {kind_of(value)}, not a text")
    if not value.strip():
        raise _Bad(f"{part} is empty")
    return value


def _plain(values: Mapping[str, Any]) -> Example:
    return {"text": _text(values, "text")}


def _chat(values: Mapping[str, Any]) -> Example:
    if "messages" not in values:
        pair = [("user", _text(values, "prompt")), ("assistant", _text(values, "completion"))]
        return {"messages": [{"role": role, "content": content} for role, content in pair]}
    messages = values["messages"]
    if not isinstance(messages, list) or not messages:
        raise _Bad("messages is not a list of messages")
    for number, message in enumerate(messages):
        _check_message(f"messages[{number}]", message)
    if messages[-1]["role"] != "assistant":
        raise _Bad(f"messages[{len(messages) - 1}] is of role {messages[-1]['role']}; the last is an answer")
    return {"messages": [{"role": one["role"], "content": one["content"]} for one in messages]}


def _check_message(place: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise _Bad(f"{place} is {kind_of(message)}, not an object with role and content")
    more = sorted(key for key in message.keys() - {"role", "content"} if message[key] is not None)
    if more:
        raise _Bad(f"{place} has a key {more[0]!r}, which no training here reads")
    if message.get("role") not in ROLES:
        raise _Bad(f"{place} has role {message.get('role')!r}, not one of {', '.join(ROLES)}")
    content = message.get("content")
    if not isinstance(content, str):
        raise _Bad(f"{place} has no text as its content")
    if message["role"] == "assistant" and not content.strip():
        raise _Bad(f"{place} is an empty answer")


def _pairs(values: Mapping[str, Any]) -> Example:
    return {"source": _text(values, "source"), "target": _text(values, "target")}


def _labelled(values: Mapping[str, Any]) -> Example:
    """The label stays JSON until those of all rows are known."""
    pair = values.get("pair", "")
    if not isinstance(pair, str):
        raise _Bad(f"pair is {kind_of(pair)}, not a text")
    label = _listed(values["label"])
    for one in label if isinstance(label, list) else [label]:
        if isinstance(one, float) and not math.isfinite(one):
            raise _Bad(f"label is {one}, no number")
        if not isinstance(one, str | int | float) or (isinstance(one, str) and not one.strip()):
            raise _Bad(f"label is {'empty' if isinstance(one, str) else kind_of(one)}, not a name or number")
    if isinstance(label, list) and len({name_of(one) for one in label}) != len(label):
        raise _Bad("label has a name twice")
    return {"text": _text(values, "text"), "pair": pair, "label": json.dumps(label, ensure_ascii=False)}


def _listed(label: Any) -> Any:
    """A list that a cell of CSV holds as JSON; all else as it is."""
    if not (isinstance(label, str) and label.startswith("[") and label.endswith("]")):
        return label
    try:
        found = json.loads(label)
    except (ValueError, RecursionError):
        return label  # a name in brackets
    return found if isinstance(found, list) else label


def _tagged(values: Mapping[str, Any]) -> Example:
    words, tags = values["words"], values["tags"]
    for part in ("words", "tags"):
        if not isinstance(values[part], list) or not values[part]:
            raise _Bad(f"{part} is not a list that holds something")
    if len(words) != len(tags):
        raise _Bad(f"words are {len(words)}, tags {len(tags)}")
    for number, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            raise _Bad(
                f"words[{number}] is {'empty' if isinstance(word, str) else kind_of(word)}, not a word"
            )
    for number, tag in enumerate(tags):
        if isinstance(tag, bool) or not isinstance(tag, str | int) or tag == "":
            raise _Bad(f"tags[{number}] is {'empty' if tag == '' else kind_of(tag)}, not a name")
    return {"words": words, "tags": [str(tag) for tag in tags]}


def _answered(values: Mapping[str, Any]) -> Example:
    question, context = _text(values, "question"), _text(values, "context")
    answers = [_answer(number, one, context) for number, one in enumerate(_answers(values["answers"]))]
    return {"question": question, "context": context, "answers": answers}


def _answers(answers: Any) -> list[Any]:
    """Answers as a list of objects; also from one object of lists, as tables keep them."""
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start", answers.get("start"))
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise _Bad("answers has no two lists text and answer_start of one length")
        return [{"text": text, "start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(answers, list):
        raise _Bad(f"answers is {kind_of(answers)}, not a list")
    return answers


def _answer(number: int, answer: Any, context: str) -> Example:
    place = f"answers[{number}]"
    if not isinstance(answer, dict):
        raise _Bad(f"{place} is {kind_of(answer)}, not an object with text and start")
    text, start = answer.get("text"), answer.get("start", answer.get("answer_start"))
    if not isinstance(text, str) or not text.strip():
        raise _Bad(f"{place} has no text")
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise _Bad(f"{place} has no start, a number of characters")
    there = context[start : start + len(text)]
    if there != text:
        raise _Bad(f"{place} is {text[:40]!r}, but at {start} of the context stands {there[:40]!r}")
    return {"text": text, "start": start}


_STRING = pa.string()
_TEXT = pa.schema([("text", _STRING)])
_MESSAGE = pa.struct([("role", _STRING), ("content", _STRING)])
_ANSWER = pa.struct([("text", _STRING), ("start", pa.int64())])

TASKS: dict[str, Task] = {
    "clm": Task(((Part("text", ("text", "content"), "text_field"),),), _plain, _TEXT, ("text",)),
    "mlm": Task(((Part("text", ("text", "content"), "text_field"),),), _plain, _TEXT, ("text",)),
    "chat": Task(
        (
            (Part("messages", ("messages",), "text_field", (list,)),),
            (
                Part("prompt", ("prompt",), "text_field"),
                Part("completion", ("completion", "response"), "label_field"),
            ),
        ),
        _chat,
        pa.schema([("messages", pa.list_(_MESSAGE))]),
        ("messages",),
    ),
    "seq2seq": Task(
        ((Part("source", ("source",), "text_field"), Part("target", ("target",), "label_field")),),
        _pairs,
        pa.schema([("source", _STRING), ("target", _STRING)]),
        ("source",),
    ),
    "text-classification": Task(
        (
            (
                Part("text", ("text", "sentence", "sentence1", "premise"), "text_field"),
                Part("pair", ("pair", "text_pair", "sentence2", "hypothesis"), "pair_field", optional=True),
                Part("label", ("label", "labels"), "label_field", (str, int, float, list)),
            ),
        ),
        _labelled,
        pa.schema([("text", _STRING), ("pair", _STRING), ("label", _STRING)]),
        ("text", "pair"),
    ),
    "token-classification": Task(
        (
            (
                Part("words", ("words", "tokens"), "text_field", (list,)),
                Part("tags", ("tags", "ner_tags", "pos_tags"), "label_field", (list,)),
            ),
        ),
        _tagged,
        pa.schema([("words", pa.list_(_STRING)), ("tags", pa.list_(_STRING))]),
        ("words",),
    ),
    "question-answering": Task(
        (
            (
                Part("question", ("question",)),
                Part("context", ("context",), "text_field"),
                Part("answers", ("answers",), "label_field", (list, dict)),
            ),
        ),
        _answered,
        pa.schema([("question", _STRING), ("context", _STRING), ("answers", pa.list_(_ANSWER))]),
        ("context",),
    ),
}
