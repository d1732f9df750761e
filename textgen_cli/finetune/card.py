"""The model card: README.md with what Hugging Face's Hub reads at its head, and the same for people below.

It knows nothing of files but the one it writes; what may be told was decided by report.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textgen_cli import __version__
from textgen_cli.finetune.report import Told, compared, summary
from textgen_cli.model.catalog import CATALOG
from textgen_cli.text import disk
from textgen_cli.text.figures import flat, shown
from textgen_cli.text.sanitize import clip

CARD = "README.md"
CELL = 200  # characters of a cell

# Task -> the Hub's name of it.
PIPELINES = {
    "clm": "text-generation",
    "chat": "text-generation",
    "mlm": "fill-mask",
    "seq2seq": "text2text-generation",
    "text-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
}
# Task -> what one writes to use the model in FOLDER.
USES = {
    "clm": 'textgen generate -m ./FOLDER "Once upon a time"',
    "chat": 'textgen generate -m ./FOLDER --chat "Hello"',
    "mlm": 'textgen generate -m ./FOLDER "The capital of France is [MASK]."',
    "seq2seq": 'textgen generate -m ./FOLDER "A text."',
    "text-classification": 'textgen score -m ./FOLDER "A text."',
    "token-classification": 'textgen score -m ./FOLDER "A text."',
    "question-answering": 'textgen generate -m ./FOLDER --task qa --question "Who?" "A text."',
}


def write_card(folder: Path, told: Told) -> None:
    """Write README.md into a folder. OutputError E-WRITE."""
    disk.write_whole(folder / CARD, card(told).encode("utf-8", "replace"))


def card(told: Told) -> str:
    """The whole text."""
    data = [[part.name, part.rows, part.sha256] for part in told.data]
    settings = [[name, value] for name, value in flat(told.settings)]
    versions = [[name, version] for name, version in told.versions.items()]
    parts = [
        front_matter(told),
        f"# {_cell(told.name)}\n\n{_cell(summary(told))}; trained by textgen {__version__} for {told.task}.",
        *_section("Held-out data", ["figure", "before", "after"], compared(told)),
        *_section("Training data", ["file", "rows", "sha256"], data),
        f"## Use\n\n```sh\n{_use(told)}\n```",
        *_section("Settings", ["setting", "value"], settings),
        *_section("Versions", ["package", "version"], versions),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(told: Told) -> str:
    """What the Hub reads: YAML, whose strings are written as JSON has them."""
    head: dict[str, Any] = {"library_name": "peft" if told.adapter else "transformers"}
    head["pipeline_tag"] = PIPELINES[told.task]
    head["tags"] = ["textgen", told.task]
    if told.hub:
        head["base_model"] = told.base
    if figures := {name: value for name, value in told.after.items() if name != "loss"}:
        kept = [
            {"type": name, "value": value, "name": name.replace("_", " ")} for name, value in figures.items()
        ]
        result = {"task": {"type": head["pipeline_tag"]}, "dataset": _dataset(told), "metrics": kept}
        head["model-index"] = [{"name": told.name, "results": [result]}]
    return "\n".join(["---", *_yaml(head), "---"])


def _dataset(told: Told) -> dict[str, str]:
    names = ", ".join(part.name for part in told.data)
    return {"name": f"held-out part of {names}", "type": "custom"}


def _yaml(value: Any, depth: int = 0) -> list[str]:
    """The lines of a mapping, of lists and mappings inside it and of plain values."""
    indent = "  " * depth
    lines = []
    for name, item in value.items():
        if isinstance(item, Mapping):
            lines += [f"{indent}{name}:", *_yaml(item, depth + 1)]
        elif isinstance(item, list):
            lines.append(f"{indent}{name}:")
            for one in item:
                first, *rest = (
                    _yaml(one, depth + 1) if isinstance(one, Mapping) else [indent + "  " + _scalar(one)]
                )
                lines += [f"{indent}- {first.strip()}", *rest]
        else:
            lines.append(f"{indent}{name}: {_scalar(item)}")
    return lines


def _scalar(value: Any) -> str:
    # YAML takes 1e-05 for a text, since it has no point.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text


def _use(told: Told) -> str:
    line = USES[told.task].replace("FOLDER", _folder(told))
    base = told.base if told.hub or told.base in CATALOG else f"./{told.base}"
    if not told.adapter:
        return line
    codes = f" --quantize {told.quantize}" if told.quantize else ""
    return line.replace(f"-m ./{_folder(told)}", f"-m {base}{codes} --adapter ./{_folder(told)}")


def _folder(told: Told) -> str:
    """The folder's name as a shell takes it."""
    plain = all(letter.isalnum() or letter in "._-" for letter in told.name)
    return told.name if plain and told.name else "FOLDER"


def _section(title: str, head: list[str], rows: list[list[Any]]) -> list[str]:
    """A heading with a table; nothing without rows."""
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join("| " + " | ".join(_cell(shown(value)) for value in line) + " |" for line in lines)
    return [f"## {title}\n\n{table}"]


def _cell(text: str) -> str:
    """Text of any origin on one line of Markdown; no letter of it makes markup or a cell's end."""
    drawn = clip(text, CELL)
    return "".join(f"\\{letter}" if letter in "|<>[]*_#" else letter for letter in drawn)
