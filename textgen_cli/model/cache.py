"""The cache: folders that appear whole or not at all, whatever is killed, full or shared.

Owns where the cache lies, the lock of one folder, the staging folder beside it and the manifest that says
a folder is whole. Knows nothing of what is inside a folder.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from textgen_cli import __version__
from textgen_cli.errors import ModelError, OutputError
from textgen_cli.events import Notice, Progress, Report

MANIFEST = "textgen.json"
FORMAT = 1  # of the manifest
MAX_MANIFEST = 16 << 20  # bytes
RECORDED = ("transformers", "torch", "safetensors", "gguf")  # packages whose version a manifest notes


def root(cache_dir: Path | None) -> Path:
    """The cache folder: the given one, else the platform's for textgen (XDG_CACHE_HOME is respected).

    Raises OutputError E-NO-HOME where the user has no home folder.
    """
    try:
        if cache_dir is not None:
            return cache_dir.expanduser()
        # Without HOME and an entry in the password file platformdirs leaves "~" as it is, and this raises.
        folder = platformdirs.user_cache_path("textgen", appauthor=False).expanduser()
    except RuntimeError:
        folder = Path()
    if not folder.is_absolute():
        fact, hint = "there is no home folder to keep models in", "set HOME, XDG_CACHE_HOME or --cache-dir"
        raise OutputError("E-NO-HOME", "cache", fact, hint=hint)
    return folder


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into OutputError E-WRITE about `path`; those of connections stay."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        fact = error.strerror or str(error)
        raise OutputError("E-WRITE", str(path), fact[:1].lower() + fact[1:]) from error


@contextmanager
def publish(target: Path, *, report: Report, origin: dict[str, Any]) -> Iterator[Path | None]:
    """Fill `target` through a staging folder, which takes its name when the block leaves normally.

    Yields None where `target` is whole already: there is nothing to do. Only one process fills it; another
    one waits, says so by Progress("wait"), and then finds it whole. After an exception nothing is left.
    `origin` goes into the manifest; its "name", if any, is what waiting is reported for.

    Raises OutputError E-WRITE where the folder cannot be written, also for an OSError of the block.
    """
    _warn_if_shared(target.parent, report)
    if whole(target) is not None:
        yield None
        return
    name = str(origin.get("name", target.name))
    with writing(target), contextlib.ExitStack() as stack:
        _make(target.parent)
        _lock(target, stack, report, name)
        if whole(target) is not None:
            yield None
            return
        staging = _staging(target, stack)
        yield staging
        report(Progress("save", name))
        _seal(staging, origin)
        _take_place(staging, target)


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A staging folder beside `target`, a folder of the user's, whose name it takes when the block ends normally.

    One process at a time; after an exception nothing is left. Raises OutputError E-WRITE, E-EXISTS where something
    is there already.
    """
    with writing(target), contextlib.ExitStack() as stack:
        _make(target.parent)
        place = os.open(target.parent, os.O_RDONLY)
        stack.callback(os.close, place)
        fcntl.flock(place, fcntl.LOCK_EX)  # on the folder itself: no lock file of ours is left in it
        if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
            hint = "remove it, or name another folder"
            raise OutputError("E-EXISTS", str(target), "is there already and holds something else", hint=hint)
        staging = _staging(target, stack)
        yield staging
        for path in _files(staging):
            _sync(path)
        _take_place(staging, target)


def whole(folder: Path) -> dict[str, Any] | None:
    """The manifest, if every file it lists is a regular file inside the folder with its size; else None."""
    try:
        manifest = _read_manifest(folder)
        if manifest["format"] != FORMAT:
            return None
        for name, facts in manifest["files"].items():
            if _file(folder, name).st_size != facts["size"]:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest


def verify(folder: Path) -> int:
    """Read every file of a published folder again and compare its sha256 with the manifest; returns their number.

    Raises ModelError E-HASH naming the file.
    """
    manifest = whole(folder)
    if manifest is None:
        raise ModelError("E-HASH", folder.name, "is not whole: a file is missing or has another size")
    for name, facts in manifest["files"].items():
        actual = sha256(folder / name)
        if actual != facts.get("sha256"):
            raise ModelError("E-HASH", name, f"sha256 is {actual}, expected {facts.get('sha256')}")
    return len(manifest["files"])


def check_space(folder: Path, needed: int, subject: str) -> None:
    """Raise OutputError E-SPACE unless the disk of a folder, which need not be there, has room for so many bytes."""
    free = free_space(folder)
    if needed > free:
        raise OutputError(
            "E-SPACE", subject, f"needs {needed:,} bytes, the disk of {folder} has {free:,} free"
        )


def free_space(folder: Path) -> int:
    """Bytes that are free where a folder is or would be."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(existing).free


def is_locked(path: Path) -> bool:
    """Whether a process holds this lock."""
    if not path.exists():
        return False
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except (filelock.Timeout, OSError):
        return True
    lock.release()
    return False


def sha256(path: Path) -> str:
    """The sha256 of a file in hex digits. Raises ModelError E-READ."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError("E-READ", path.name, error.strerror or str(error)) from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if _file(folder, MANIFEST).st_size > MAX_MANIFEST:
        raise ValueError("manifest is too long")
    manifest = json.loads(path.read_bytes())
    if not manifest["files"]:
        raise ValueError("manifest lists no file")
    return dict(manifest)


def _file(folder: Path, name: str) -> os.stat_result:
    """The status of a regular file that lies inside the folder, also after its symlinks are followed."""
    path = (folder / name).resolve(strict=True)
    status = path.stat()
    if not path.is_relative_to(folder.resolve(strict=True)) or not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{name} is not a file of this folder")
    return status


def _warn_if_shared(folder: Path, report: Report) -> None:
    """Whoever can write into the cache can change what the next run loads."""
    with contextlib.suppress(OSError):
        if folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            report(Notice(f"cache folder {folder} is writable by other users", "W-CACHE-MODE"))


def _make(folder: Path) -> None:
    """Make a folder and its parents, none of them writable by others whatever the umask says."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(mode=0o755, exist_ok=True)


def _lock(target: Path, stack: contextlib.ExitStack, report: Report, name: str) -> None:
    """Hold the kernel's lock on `<target>.lock` until the stack unwinds."""
    lock = filelock.FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        report(Progress("wait", name))
        lock.acquire(poll_interval=0.1)
    stack.callback(lock.release)


def _staging(target: Path, stack: contextlib.ExitStack) -> Path:
    """A fresh folder beside `target` for as long as the stack; those of killed runs are removed."""
    prefix, suffix = f".{target.name}.", ".staging"
    for entry in target.parent.iterdir():
        if entry.name.startswith(prefix) and entry.name.endswith(suffix):
            shutil.rmtree(entry, ignore_errors=True)
    staging = target.parent / f"{prefix}{secrets.token_hex(4)}{suffix}"
    stack.callback(shutil.rmtree, staging, ignore_errors=True)
    staging.mkdir()
    return staging


def _seal(staging: Path, origin: dict[str, Any]) -> None:
    """Write the manifest, give every file its mode and bring all of it to the disk."""
    # The kernel applied the umask to the staging folder; asking for the umask itself would have to set it.
    mode = staging.stat().st_mode & 0o666
    files = {}
    for path in _files(staging):
        files[path.relative_to(staging).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest = {"format": FORMAT, "origin": origin, "files": files, "versions": _versions()}
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for path in _files(staging):
        path.chmod(mode)
        _sync(path)
    for folder, _, _ in os.walk(staging):
        _sync(Path(folder))


def _files(folder: Path) -> list[Path]:
    return sorted(Path(place, name) for place, _, names in os.walk(folder) for name in names)


def _versions() -> dict[str, str]:
    versions = {"textgen": __version__}
    for package in RECORDED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _take_place(staging: Path, target: Path) -> None:
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.exists():
        # A rename cannot replace a folder that holds something: aside first, so that no half is ever seen.
        aside = target.parent / f".{target.name}.{secrets.token_hex(4)}.staging"
        target.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    staging.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
