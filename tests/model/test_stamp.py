"""The stamp of a finetuned model: what is obeyed of it, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parts.models import MOODS, TAGS, TEXT

from textgen_cli.config import GenerateConfig, ModelConfig, PromptConfig
from textgen_cli.errors import ModelError, UsageError
from textgen_cli.events import silent
from textgen_cli.generate.engines import open_engine
from textgen_cli.model.load import load
from textgen_cli.model.stamp import STAMP, Stamp, read_stamp
from textgen_cli.text.records import Record

Small = Callable[..., Path]


def stamped(folder: Path, tmp_path: Path, **fields: Any) -> str:
    """A copy of a model's folder with a stamp."""
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / STAMP).write_text(json.dumps(fields))
    return str(copy)


@pytest.mark.parametrize(
    ("purpose", "task", "architecture", "expected"),
    [
        ("score", "text-classification", "bert-classifier", 20),
        ("generate", "token-classification", "bert-tagger", 20),
        ("finetune", "text-classification", "bert-classifier", 128),  # may learn longer ones
        ("score", "clm", "llama", 128),
    ],
)
def test_inputs_of_classifiers_are_no_longer_than_in_training(
    purpose: Any, task: str, architecture: str, expected: int, small_model: Small, tmp_path: Path
) -> None:
    name = stamped(small_model(architecture), tmp_path, task=task, max_length=20)
    assert load(ModelConfig(model=name), purpose, silent).context == expected


@pytest.mark.parametrize(
    ("fields", "fact"),
    [
        ({"labels": ["sad", "glad", "neither"]}, None),
        ({"labels": []}, None),
        ({"problem": None, "labels": list(MOODS.values())}, None),
        ({"labels": ["glad", "sad", "neither"]}, "labels"),
        ({"labels": ["sad", "glad"]}, "labels"),
        ({"problem": "regression"}, "problem_type"),
        ({"max_length": 1}, "max_length"),
        ({"max_length": True}, "max_length"),
        ({"labels": "sad"}, "labels"),
        ({"labels": [1]}, "labels"),
        ({"base": 3}, "base"),
        ({"versions": {"torch": 2}}, "versions"),
        ({"source_template": "no field"}, "source_template"),
    ],
)
def test_a_stamp_must_agree_with_the_config(
    fields: dict[str, Any], fact: str | None, small_model: Small, tmp_path: Path
) -> None:
    name = stamped(small_model("bert-classifier"), tmp_path, task="text-classification", **fields)
    if fact is None:
        assert load(ModelConfig(model=name), "score", silent).stamp is not None
        return
    with pytest.raises(ModelError, match=fact) as caught:
        load(ModelConfig(model=name), "score", silent)
    assert caught.value.name == "E-STAMP"


def test_only_a_file_with_a_task_is_a_stamp(tmp_path: Path) -> None:
    assert read_stamp(tmp_path, "x") is None
    (tmp_path / STAMP).write_text(json.dumps({"format": 1, "files": {}, "max_length": "many"}))
    assert read_stamp(tmp_path, "x") is None
    (tmp_path / STAMP).write_text(json.dumps({"task": "clm", "max_length": 64, "run": "0", "labels": TAGS}))
    assert read_stamp(tmp_path, "x") == Stamp("clm", max_length=64, labels=tuple(TAGS))
    (tmp_path / STAMP).write_text("{")
    with pytest.raises(ModelError, match="E-STAMP"):
        read_stamp(tmp_path, "x")


@pytest.mark.parametrize(
    ("prompting", "expected"),
    [
        (PromptConfig(), f"to Pig Latin: {TEXT[0]}"),
        (PromptConfig(template="say: {text}"), f"say: {TEXT[0]}"),
        (PromptConfig(task="summarize"), f"summarize: {TEXT[0]}"),
    ],
)
def test_generate_puts_around_a_source_what_stood_there_in_training(
    prompting: PromptConfig, expected: str, small_model: Small, tmp_path: Path
) -> None:
    name = stamped(
        small_model("t5"), tmp_path, task="seq2seq", source_template="to Pig Latin: {text}", max_length=9
    )
    config = GenerateConfig(model=ModelConfig(model=name), prompting=prompting)
    opened = open_engine(config, 0, silent)
    (request,) = opened.prompter(Record(0, {"prompt": TEXT[0]}))
    assert request.prompt == expected


def test_a_conversation_is_none_for_such_a_model(small_model: Small, tmp_path: Path) -> None:
    name = stamped(small_model("t5"), tmp_path, task="seq2seq", source_template="x {text}")
    config = GenerateConfig(model=ModelConfig(model=name), prompting=PromptConfig(chat=True))
    with pytest.raises(UsageError, match="E-FAMILY"):
        open_engine(config, 0, silent)
