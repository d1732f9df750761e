"""The finished folder: weights, tokenizer, settings and a stamp; nothing that runs code, nothing about this machine.

It is written in a staging folder that the caller gives its name. Knows no trainer.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from textgen_cli import __version__
from textgen_cli.errors import InternalError, OutputError
from textgen_cli.finetune.checkpoint import STAMP, remove
from textgen_cli.finetune.prepared import Prepared
from textgen_cli.finetune.report import model_name
from textgen_cli.finetune.ways import Base, save_net
from textgen_cli.text import disk

LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "datasets")
# What remembers where a file lay on the machine that wrote it.
PLACES = (
    "name_or_path",
    "_name_or_path",
    "vocab_file",
    "merges_file",
    "tokenizer_file",
    "special_tokens_map_file",
)


def write_model(base: Base, stamp: Mapping[str, Any], folder: Path) -> None:
    """Write the model into a new folder. OutputError E-WRITE where the disk fails."""
    with writing(folder):
        remove(folder)
        folder.mkdir(parents=True)
        save_net(base.net, folder)
        base.tokenizer.backend.save_pretrained(folder)
        if base.folder is not None and not base.adapter and base.net.can_generate():
            _keep_generation(base.folder, folder)
        _forget_places(folder)
        (folder / STAMP).write_text(json.dumps(stamp, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in folder.iterdir():  # some libraries let nobody else read what they write
            path.chmod((folder / STAMP).stat().st_mode)
    _check(folder)


def _keep_generation(source: Path, folder: Path) -> None:
    """The base's own settings of decoding, or none where it has none: those that loading leaves with the network are
    empty, and a file of them would hide what config.json says, such as the token that a decoder begins with."""
    settings = source / "generation_config.json"
    if settings.is_file():
        shutil.copyfile(settings, folder / settings.name)
    else:
        (folder / settings.name).unlink(missing_ok=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what a full or broken disk raises, in whichever library, into OutputError E-WRITE."""
    try:
        with disk.guard(folder):
            yield
    except SafetensorError as error:
        raise OutputError("E-WRITE", str(folder), str(error).partition("\n")[0]) from error


def stamp_of(base: Base, prepared: Prepared, length: int, prefix: str, run: str) -> dict[str, Any]:
    """What textgen itself wants to know of the model later.

    `prefix`: what stands before every source; `run`: the hash of all that decided the training.
    """
    literal = prefix.replace("{", "{{").replace("}", "}}")
    return {
        "textgen": __version__,
        "task": prepared.task,
        "base": "" if base.fresh else model_name(base.name),
        "revision": base.revision,
        "labels": list(prepared.labels),
        "problem": prepared.problem,
        "quantize": base.quantized if base.adapter else None,
        "max_length": length,
        "source_template": f"{literal}{{text}}" if prefix else None,
        "data": prepared.sha256,
        "run": run,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The libraries that took part."""
    return {"textgen": __version__} | {name: version(name) for name in LIBRARIES}


def _forget_places(folder: Path) -> None:
    for path in folder.glob("*.json"):
        if path.name == "tokenizer.json":
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in found.items() if key not in PLACES or _is_here(value, folder)}
        if kept != found:
            path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_here(value: Any, folder: Path) -> bool:
    return isinstance(value, str) and (folder / value).is_file() and "/" not in value


def _check(folder: Path) -> None:
    """A folder that holds a pickle or tells of this machine must not leave it."""
    here = str(folder.parent.parent)
    for path in folder.iterdir():
        if re.search(r"\.(bin|pt|pth|pkl|pickle|ckpt)$", path.name):
            raise InternalError("E-INTERNAL", path.name, "is a pickle in a finished folder")
        told = path.suffix == ".json" and path.name != "tokenizer.json"
        if told and here != "/" and here in path.read_text(encoding="utf-8"):
            raise InternalError("E-INTERNAL", path.name, "names a folder of this machine")
