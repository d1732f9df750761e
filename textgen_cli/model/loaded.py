"""A model that is ready to run: all that the wings know of it. Imports no library of models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from textgen_cli.model.device import Placement
from textgen_cli.model.family import Family as Family
from textgen_cli.model.stamp import Stamp
from textgen_cli.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Model:
    """A network ready to run, with everything that belongs to it."""

    family: Family
    net: Any  # the transformers model, in eval mode on placement.device
    tokenizer: Tokenizer
    placement: Placement
    name: str
    revision: str  # commit of the Hub, or sha256 of a GGUF file, or "" for a plain folder
    folder: Path
    context: int | None  # longest input in tokens
    generation: dict[str, Any]  # the model's own generation settings, unchecked
    stamp: Stamp | None = None  # what finetune trained it for, where it did
    quantized: Literal["int8", "int4"] | None = None  # the form of its linear layers
