"""What the bytes of a batch depend on, as JSON values to compare when it is resumed.

Files count by their content, models by their identity; nothing is loaded, and torch is not imported.
"""

import hashlib
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from textgen_cli import __version__
from textgen_cli.config import GenerateConfig, ModelConfig, split_weight
from textgen_cli.errors import UsageError
from textgen_cli.events import Report
from textgen_cli.model.source import identity

LIBRARIES = ("torch", "transformers", "tokenizers")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def fingerprint(
    config: GenerateConfig, form: str, prompt: str | None, source: str | None, report: Report
) -> dict[str, Any]:
    """All that the bytes depend on. `form`: the input's format; `source`: its sha256, None for a pipe.

    A model that is not here yet is fetched, since only then is it known which one it is. Raises what its
    source raises, and UsageError E-FILE for an option's file that cannot be read.
    """
    found: dict[str, Any] = {"textgen": __version__}
    found |= _of_endpoint(config) if config.endpoint.endpoint is not None else _of_model(config, report)
    found["decoding"] = _given(config.decoding, files=("bad_words",))
    if config.decoding.draft_model is not None and config.endpoint.endpoint is None:
        found["decoding"]["draft_model"] = _identity(config.model, config.decoding.draft_model, report)
    found["prompting"] = _given(config.prompting, files=("template_file",))
    found["constraint"] = _given(config.constraint, files=("json_schema", "grammar"))
    found |= {"format": form, "shard": config.batch.shard, "batch_size": config.batch.batch_size}
    return found | {"input": source if prompt is None else {"prompt": prompt}}


def _of_endpoint(config: GenerateConfig) -> dict[str, Any]:
    asked = config.endpoint
    found = {"endpoint": asked.endpoint, "model": config.model.model}
    return found | {"endpoint_server": asked.endpoint_server, "split_sequences": asked.split_sequences}


def _of_model(config: GenerateConfig, report: Report) -> dict[str, Any]:
    model = config.model
    adapters = [split_weight(adapter) for adapter in model.adapter]
    return {
        "model": _identity(model, model.model, report),
        "adapter": [[_identity(model, name, report), weight] for name, weight in adapters],
        "quantize": model.quantize,
        "device": model.device,
        "dtype": model.dtype,
        "threads": model.threads or _threads(),
        "machine": _machine(),
        "python": platform.python_version(),
        "libraries": dict(_versions(config)),
    }


def _identity(config: ModelConfig, name: str, report: Report) -> str:
    return identity(replace(config, model=name, adapter=()), report)


def _threads() -> dict[str, str] | int:
    """What decides how many threads compute where the user does not: variables, else the cores to use."""
    named = {name: os.environ[name] for name in THREADS if os.environ.get(name)}
    if "OMP_NUM_THREADS" in named:
        return named
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return {**named, "cores": str(cores)} if named else cores


def _machine() -> str:
    """The kind of processor and accelerators: another one rounds otherwise."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cards = sorted(map(_card, Path("/proc/driver/nvidia/gpus").glob("*/information")))
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if cards and seen is not None:
        cards.append(f"CUDA_VISIBLE_DEVICES={seen}")
    return ", ".join([platform.machine(), *filter(None, [cpu or platform.processor()]), *cards])


def _card(information: Path) -> str:
    try:
        return information.read_text(errors="replace").partition("\n")[0].partition(":")[2].strip()
    except OSError:
        return "accelerator"


def _versions(config: GenerateConfig) -> Iterable[tuple[str, str | None]]:
    """The libraries that take part."""
    used = [*LIBRARIES]
    used += ["peft"] if config.model.adapter else []
    used += ["torchao"] if config.model.quantize else []
    used += ["llguidance"] if any(asdict(config.constraint).values()) else []
    for name in used:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, None


def _given(part: Any, files: tuple[str, ...]) -> dict[str, Any]:
    """A part's settings that are not their class's defaults, the named files by their content."""
    default = type(part)()
    found = {name: value for name, value in asdict(part).items() if value != getattr(default, name)}
    return {
        name: _content(value) if name in files and not str(value).lstrip().startswith("{") else _plain(value)
        for name, value in found.items()
    }


def _content(path: str | Path) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        fact = (error.strerror or str(error)).lower()
        raise UsageError("E-FILE", str(path), fact) from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
