"""The stamp of a model that `textgen finetune` made: textgen.json in its folder, obeyed where the model is loaded.

Owns the fields that are obeyed, and whether they agree with config.json. A folder of the cache has a file of this
name too, which has no `task`. Imports nothing heavy.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from textgen_cli.errors import ModelError
from textgen_cli.model.weights import read_json

STAMP = "textgen.json"
# Tasks whose inputs are never longer than those the model was trained on.
BOUNDED = frozenset({"text-classification", "token-classification", "question-answering"})


@dataclass(frozen=True)
class Stamp:
    """What a model was trained for."""

    task: str
    base: str = ""  # the model it began with; "" from scratch
    revision: str = ""  # the base's commit or sha256
    labels: tuple[str, ...] = ()  # in the order of the network's outputs
    problem: str | None = None  # text-classification: `problem_type` of config.json
    source_template: str | None = None  # seq2seq: what stands around a source, which is {text}
    max_length: int | None = None  # tokens of an example at most
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def limit(self) -> int | None:
        """Tokens that an input may have; None where the stamp sets no limit."""
        return self.max_length if self.task in BOUNDED else None


def read_stamp(folder: Path, name: str) -> Stamp | None:
    """The stamp of a model's folder, None where it has none; ModelError E-STAMP for one that is broken.

    `name`: how messages name the model.
    """
    if not (folder / STAMP).is_file():
        return None
    found = read_json(folder / STAMP, "E-STAMP")
    if "task" not in found:
        return None
    for key, is_good in _CHECKS.items():
        if found.get(key) is not None and not is_good(found[key]):
            raise ModelError("E-STAMP", name, f"{key} of {STAMP} has no value that finetune writes")
    known = {key: found[key] for key in _CHECKS if found.get(key) is not None}
    return Stamp(**known | {"labels": tuple(found.get("labels", ()))})


def check_stamp(stamp: Stamp, config: Mapping[str, Any], name: str) -> None:
    """ModelError E-STAMP where config.json speaks of other labels, or of another problem, than the stamp."""
    if stamp.labels and _label_names(config.get("id2label")) != list(stamp.labels):
        raise ModelError("E-STAMP", name, f"labels of config.json are not those of {STAMP}")
    if stamp.problem is not None and config.get("problem_type") != stamp.problem:
        fact = f"problem_type is {config.get('problem_type')} in config.json, {stamp.problem} in {STAMP}"
        raise ModelError("E-STAMP", name, fact)


def _label_names(table: Any) -> list[str]:
    if not isinstance(table, dict) or not all(str(key).isdecimal() for key in table):
        return []
    return [str(table[key]) for key in sorted(table, key=int)]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "task": _is_text,
    "base": _is_text,
    "revision": _is_text,
    "labels": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "problem": _is_text,
    "source_template": lambda value: _is_text(value) and "{text}" in value,
    "max_length": lambda value: type(value) is int and value > 1,
    "versions": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
}
