"""A lasting copy of a model in another form: weights in another dtype, with adapters merged, or in 8 or 4 bits.

Owns what such a folder holds: safetensors, the model's own tokenizer and settings, and nothing that runs code.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from textgen_cli.config import Dtype, ModelConfig
from textgen_cli.errors import ModelError
from textgen_cli.events import Progress, Report
from textgen_cli.model import load, quantize
from textgen_cli.model.check import LOADABLE, check_folder
from textgen_cli.model.source import Located, locate
from textgen_cli.model.stamp import STAMP
from textgen_cli.model.weights import INDEX, SINGLE, read_header, read_json

STORED: dict[str, Dtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def stored_dtype(folder: Path) -> Dtype:
    """The dtype that most weights of a checked folder have. ModelError E-QUANTIZE where it is none of a plain model."""
    sizes: dict[str, int] = {}
    for path in check_folder(folder).weights:
        for tensor in read_header(path).values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.end - tensor.begin
    most = max(sizes, key=lambda kind: sizes[kind])
    if most not in STORED:
        raise ModelError("E-QUANTIZE", folder.name, f"has weights of type {most}, of which no copy is made")
    return STORED[most]


def write(config: ModelConfig, folder: Path, report: Report) -> Located:
    """Write the model with `config`'s dtype, adapters and quantisation into an empty folder, for good.

    Raises what `load` raises, OSError.
    """
    located = locate(config, report)
    net = load.bare(config, report)
    report(Progress("save", located.label))
    changes: dict[str, Any] = {"dtype": str(net.dtype).removeprefix("torch.")}
    if config.quantize:
        quantize.apply(net, config.quantize, located.label, report)
        changes["quantization_config"] = quantize.settings(config.quantize)
        save_file(_state(net), folder / SINGLE, metadata={"format": "pt"})
    else:
        net.save_pretrained(folder)
    _copy_rest(located.folder, folder)
    _edit(folder / "config.json", changes)
    check_folder(folder)
    return located


def _state(net: Any) -> dict[str, Any]:
    """The tensors of a network by name, those that are tied to another one left out: loading ties them again."""
    tied = {
        target
        for target in getattr(net, "all_tied_weights_keys", {})
        if not isinstance(net.get_submodule(target.rpartition(".")[0]), quantize.QuantizedLinear)
    }
    return {name: tensor.contiguous() for name, tensor in net.state_dict().items() if name not in tied}


def _copy_rest(source: Path, folder: Path) -> None:
    """The tokenizer and the settings, as they are; a manifest of the cache is not the model's."""
    for path in source.iterdir():
        if not LOADABLE.fullmatch(path.name) or path.suffix == ".safetensors" or path.name == INDEX:
            continue
        if path.name == STAMP and "task" not in read_json(path, "E-STAMP"):
            continue
        shutil.copyfile(path, folder / path.name)


def _edit(path: Path, changes: dict[str, Any]) -> None:
    config = {**read_json(path, "E-CONFIG"), **changes}
    config.pop("torch_dtype", None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
