"""What results depend on besides the input, as JSON values to compare when a job is resumed.

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
from textgen_cli.config import ModelConfig, split_weight
from textgen_cli.errors import UsageError
from textgen_cli.events import Report
from textgen_cli.model.source import identity

LIBRARIES = ("torch", "transformers", "tokenizers")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def of_model(model: ModelConfig, report: Report, libraries: Iterable[str] = ()) -> dict[str, Any]:
    """All of a loaded model that results depend on. `libraries`: others that take part.

    A model that is not here yet is fetched, since only then is it known which one it is. Raises what its
    source raises.
    """
    adapters = [split_weight(adapter) for adapter in model.adapter]
    return {
        "model": of_weights(model, model.model, report),
        "adapter": [[of_weights(model, name, report), weight] for name, weight in adapters],
        "quantize": model.quantize,
        **of_machine(model, [*(["peft"] if adapters else []), *libraries]),
    }


def of_machine(model: ModelConfig, libraries: Iterable[str] = ()) -> dict[str, Any]:
    """What computes. `libraries`: others that take part."""
    return {
        "device": model.device,
        "dtype": model.dtype,
        "threads": model.threads or _threads(),
        "machine": _machine(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in [*LIBRARIES, *libraries]},
    }


def of_program() -> dict[str, Any]:
    """The program that computes."""
    return {"textgen": __version__}


def of_weights(config: ModelConfig, name: str, report: Report) -> str:
    """Which weights a name means now."""
    return identity(replace(config, model=name, adapter=()), report)


def given(part: Any, files: tuple[str, ...] = (), secrets: tuple[str, ...] = ()) -> dict[str, Any]:
    """A part's settings that are not their class's defaults, the named `files` by content, `secrets` by a slow hash.

    Raises UsageError E-FILE for a file that cannot be read.
    """
    default = type(part)()
    found = {name: value for name, value in asdict(part).items() if value != getattr(default, name)}
    return {
        name: _sealed(value)
        if name in secrets
        else content(value)
        if name in files and not str(value).lstrip().startswith("{")
        else _plain(value)
        for name, value in found.items()
    }


def _sealed(secret: str) -> str:
    """A secret as it may be written down: always the same, and too slow to be found by trying words."""
    return hashlib.scrypt(secret.encode(), salt=b"textgen", n=1 << 14, r=8, p=1, dklen=16).hex()


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


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def content(path: str | Path) -> str:
    """A file's sha256. UsageError E-FILE where it cannot be read."""
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
