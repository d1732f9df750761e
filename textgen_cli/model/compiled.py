"""A compiled model as it lies in the cache: where it lies, what it needs, and a network that runs it.

Knows torch and tokenizers, and no library of models: that is what makes it start at once. How it is
made stands in compile.py.
"""

import hashlib
import json
import os
import platform
import stat
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from textgen_cli.config import ModelConfig
from textgen_cli.errors import ModelError, OutOfMemory, OutputError, SafetyError
from textgen_cli.events import Report
from textgen_cli.model import cache, device, reading
from textgen_cli.model.device import Placement
from textgen_cli.model.loaded import Model
from textgen_cli.model.plain_tokenizer import PlainTokenizer
from textgen_cli.model.source import identity
from textgen_cli.model.tokenizer import Tokenizer

COMPILATION = 2  # counted up when a compilation writes something else for the same model
PLACE = "compiled"  # below the cache's root
FACTS, WEIGHTS, TOKENIZER = "compiled.json", "weights.safetensors", "tokenizer.json"
TOGETHER = 16  # tokens that one call of the last takes at most
BUCKET = 256  # positions by which the room for keys and values grows, doubled each time
# The graphs: a whole prompt from its beginning; one token behind a past; a few at once behind it.
PROMPT, STEP, CHECK = GRAPHS = "prompt", "step", "check"


def folder_of(config: ModelConfig, placement: Placement, report: Report) -> Path:
    """Where the compiled form of a model for this machine lies, whether it is there or not.

    Named by all that its code and its weights depend on: the model's identity, the format of its weights, torch
    and transformers, and what this processor can do.
    """
    key = {
        "compilation": COMPILATION,
        "model": identity(config, report),
        "dtype": str(placement.dtype),
        "quantize": config.quantize,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "machine": platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "can": {name: value for name, value in torch.cpu.get_capabilities().items() if value is True},
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache.root(config.cache_dir) / PLACE / name[:40]


def find(config: ModelConfig, report: Report) -> Path | None:
    """The compiled form of a model in the cache, whole and for this machine; None where there is none.

    Raises SafetyError E-COMPILED where others could have written it, and what `locate` raises.
    """
    # Where nothing was ever compiled, a model's name is not looked up a second time.
    if not _any(config):
        return None
    placement = device.place(config, "generate")
    if placement.device.type != "cpu" or config.adapter:
        return None
    folder = folder_of(config, placement, report)
    if cache.whole(folder) is None:
        return None
    for path in (folder, *folder.iterdir()):
        status = path.stat()
        # Its code is run: nobody else may have been able to put it there.
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            fact = "belongs to another user, or others may write it"
            raise SafetyError("E-COMPILED", str(path), fact, hint="--engine eager does without it")
    return folder


def _any(config: ModelConfig) -> bool:
    """Whether the cache holds a compiled model at all."""
    try:
        return any((cache.root(config.cache_dir) / PLACE).glob(f"*/{FACTS}"))
    except OutputError:  # no home folder, so no cache
        return False


def open_model(folder: Path, config: ModelConfig) -> Model:
    """A compiled model, ready to run; raises ModelError E-COMPILED where it cannot be used, and OutOfMemory."""
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_bytes())
        plain: Any = PlainTokenizer(folder / TOKENIZER, facts["tokenizer"])
        tokenizer = Tokenizer(plain, facts["name"])
        net = Network(folder, facts)
    except (OSError, ValueError, KeyError, RuntimeError, ModelError, SafetyError, MemoryError) as error:
        if device.out_of_memory(error):
            raise OutOfMemory("E-MEMORY", folder.name, "does not fit into memory") from error
        fact = str(error).strip().partition("\n")[0] or type(error).__name__
        hint = "textgen download --compile makes it anew after its folder is removed"
        raise ModelError("E-COMPILED", str(folder), fact, hint=hint) from error
    return Model(
        family="causal",
        net=net,
        tokenizer=tokenizer,
        placement=device.place(config, "generate"),
        name=facts["name"],
        revision=facts["revision"],
        folder=folder,
        context=facts["context"],
        generation=facts["generation"],
    )


Shapes = Sequence[
    Sequence[Sequence[int]]
]  # of each layer: (heads, width) of its keys, the same of its values


def past_of(shapes: Shapes, room: int) -> list[torch.Tensor]:
    """Keys (1, H, S, D) of all layers, then their values, with room for S tokens; empty."""
    return [
        torch.zeros(1, heads, room, width)
        for side in (0, 1)
        for heads, width in (pair[side] for pair in shapes)
    ]


class Network:
    """The compiled graphs with their weights and a past that grows; it answers what is asked of any network."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        tensors = dict(reading.tensors([folder / WEIGHTS], torch.float32))
        self.graphs = {name: _Graph(folder / f"{name}.so", facts["constants"], tensors) for name in GRAPHS}
        self.config = SimpleNamespace(is_encoder_decoder=False, **facts["config"])
        self.device = torch.device("cpu")
        self.shapes: Shapes = facts["shapes"]
        self._tables = {
            name: SimpleNamespace(weight=torch.empty(facts[name], 0)) for name in ("rows", "width")
        }
        self.ids: list[int] = []  # whose keys and values are held
        self.room = 0
        self._past: list[torch.Tensor] = []

    def get_input_embeddings(self) -> Any:
        return self._tables["rows"]

    def get_output_embeddings(self) -> Any:
        return self._tables["width"]

    def logits(self, ids: Sequence[int], guess: Sequence[int] = ()) -> torch.Tensor:
        """(1 + G, V) float32: what may follow `ids`, and what each of G guessed tokens behind them.

        Only what the call before has not computed is computed now.
        """
        ids = list(ids)
        every, known = [*ids, *guess], _common(self.ids, ids[:-1])
        self._grow(len(every))
        found: list[torch.Tensor] = []
        if known == 0 and len(ids) > 1:
            found.append(self.graphs[PROMPT](torch.tensor([ids]), self._past))
            known = len(ids)
        for start in range(known, len(every), TOGETHER):
            part = every[start : start + TOGETHER]
            at = torch.arange(start, start + len(part))
            graph = self.graphs[STEP if len(part) == 1 else CHECK]
            rows = graph(torch.tensor([part]), [at, *self._past])  # (len(part), V)
            found.append(rows[max(0, len(ids) - 1 - start) :])
        self.ids = every
        return torch.cat(found)

    def _grow(self, length: int) -> None:
        """Room for so many tokens: twice as much each time, so that a context that is not used costs nothing."""
        if length <= self.room:
            return
        room = max(self.room, BUCKET)
        while room < length:
            room *= 2
        grown = past_of(self.shapes, room)
        for new, old in zip(grown, self._past, strict=False):
            new[:, :, : self.room] = old
        self.room, self._past = room, grown


class _Graph:
    """One compiled graph: tensors in, logits (T, V) out; it writes keys and values into the past it is given."""

    def __init__(self, path: Path, names: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        self._runner = runner_of(path)
        self._constants = {inner: tensors[names[outer]] for inner, outer in names_of(self._runner).items()}
        self._runner.update_constant_buffer(self._constants, False, True, True)

    def __call__(self, ids: torch.Tensor, rest: Sequence[torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = self._runner.run([ids, *rest])[0]
        return found


def runner_of(path: Path) -> Any:
    """What runs a graph, still without its weights."""
    return torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)


def names_of(runner: Any) -> dict[str, str]:
    """The name that a weight has in a graph -> the one it had in the network."""
    found: dict[str, str] = runner.get_constant_names_to_original_fqns()
    return found


def _common(known: Sequence[int], ids: Sequence[int]) -> int:
    """How many leading ids are the same; found by halves, since slices are compared without Python's help."""
    least, most = 0, min(len(known), len(ids))
    if known[:most] == ids[:most]:
        return most
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if known[least:middle] == ids[least:middle] else (least, middle - 1)
    return least
