"""From records to requests: chats, system messages, templates, tasks."""

from pathlib import Path
from typing import Any

import pytest

from textgen_cli.config import PromptConfig
from textgen_cli.errors import InputError, UsageError
from textgen_cli.generate.prompts import Prompter, asked_for
from textgen_cli.generate.request import derive_seed
from textgen_cli.text.presets import Preset, Reader
from textgen_cli.text.records import Record

INSTRUCT, BASE = Reader("causal", instruct=True), Reader("causal")
HI = {"role": "user", "content": "hi"}


def ask(fields: dict[str, Any], reader: Reader = BASE, count: int = 1, **config: Any) -> Any:
    prompting = PromptConfig(**config)
    return Prompter(prompting, asked_for(prompting), reader, 5, count)(Record(3, fields))


def test_each_sequence_has_a_stream_of_its_own() -> None:
    found = ask({"prompt": "a"}, count=3)
    assert [(one.index, one.sequence, one.prompt) for one in found] == [(3, n, "a") for n in range(3)]
    assert [one.seed for one in found] == [derive_seed(5, 3, n) for n in range(3)]
    assert len({one.seed for one in found}) == 3


@pytest.mark.parametrize(
    ("fields", "config", "messages"),
    [
        ({"prompt": "hi"}, {"chat": True}, [HI]),
        ({"prompt": "hi"}, {"system": "S"}, [{"role": "system", "content": "S"}, HI]),
        ({"messages": [HI]}, {}, [HI]),
        ({"messages": [HI]}, {"system": "S"}, [{"role": "system", "content": "S"}, HI]),
        (
            {"messages": [{"role": "system", "content": "own"}, HI]},
            {"system": "S"},
            [{"role": "system", "content": "own"}, HI],
        ),
        ({"messages": [HI]}, {"task": "chat"}, [HI]),
        ({"prompt": "hi"}, {"task": "chat", "system": "S"}, [{"role": "system", "content": "S"}, HI]),
        ({"w": "hi"}, {"template": "{w}", "system": "S"}, [{"role": "system", "content": "S"}, HI]),
    ],
)
def test_messages(fields: dict[str, Any], config: dict[str, Any], messages: list[dict[str, str]]) -> None:
    (found,) = ask(fields, INSTRUCT, **config)
    assert list(found.messages) == messages


@pytest.mark.parametrize(
    "fields", [{}, {"prompt": 5}, {"messages": []}, {"messages": "hi"}, {"messages": [5]}]
)
def test_unusable_records(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        ask(fields)


@pytest.mark.parametrize(
    ("config", "plain", "says"),
    [
        ({"to": "French"}, False, "--to"),
        ({"from_": "French", "template": "{to}"}, False, "--from"),
        ({"question": "why", "task": "story"}, False, "--question"),
        ({"task": "qa", "template": "x"}, False, "--template"),
        ({"task": "qa"}, True, "needs --question"),
        ({"task": "translate"}, True, "needs --to"),
        ({"template": "{a} {text}"}, True, "{a}"),
        ({"template": "{"}, False, "template"),
        ({"template_file": Path("/absent")}, False, "/absent"),
    ],
)
def test_what_nobody_reads_or_gives(config: dict[str, Any], plain: bool, says: str) -> None:
    with pytest.raises(UsageError) as error:
        asked_for(PromptConfig(**config), plain=plain)
    assert says in f"{error.value.subject} {error.value.fact}"


@pytest.mark.parametrize(
    "config",
    [
        {"task": "translate", "to": "French"},
        {"task": "qa", "question": "why"},
        {"template": "{text} to {to=French}"},
        {"template": "{prompt} {to}", "to": "French"},
        {},
    ],
)
def test_enough_is_given(config: dict[str, Any]) -> None:
    asked = asked_for(PromptConfig(**config), plain=True)
    if "task" in config:
        assert isinstance(asked, Preset) and asked.name == config["task"]
        assert (
            asked_for(PromptConfig(task=config["task"]), plain=False) is asked
        )  # records may bring the rest
    else:
        assert asked == config.get("template")


def test_a_template_file_is_the_template(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("\ufeffSay {word}\n", encoding="utf-8")
    assert ask({"word": "x"}, template_file=path)[0].prompt == "Say x"
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="UTF-8 at byte 0"):
        ask({"word": "x"}, template_file=path)
