"""A training under way on disk: DIR.partial with its lock, its fingerprint and checkpoints that are whole or absent.

A checkpoint is written beside, synced, listed with the hash of every file and then renamed. Knows no torch and
nothing of what the files hold.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textgen_cli.errors import BusyError, OutputError, ResumeError, UsageError
from textgen_cli.text import disk
from textgen_cli.text.state import difference, header, holder, read_holder

STAMP = "textgen.json"  # marks a finished folder as ours
RUN, LOCK, MANIFEST = "run.json", "lock", "manifest.json"
RESTART = "use --restart to begin anew"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files are those that its manifest lists."""

    step: int
    folder: Path


class Store:
    """The working folder of one training, held by this process."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = partial_of(out)

    def checkpoints(self) -> list[Path]:
        """The folders of finished saves, by step, the newest last; clocks play no part."""
        with disk.guard(self.folder):
            found = [
                (_step(path), path) for path in self.folder.iterdir() if _CHECKPOINT.fullmatch(path.name)
            ]
        return [path for _, path in sorted(found)]

    def newest(self, *, previous: bool = False) -> Found | None:
        """The checkpoint to go on from; None where there is none yet.

        `previous`: pass over damaged ones. Raises ResumeError E-CHECKPOINT for a damaged newest one.
        """
        for folder in reversed(self.checkpoints()):
            fault = damage(folder)
            if fault is None:
                return Found(_step(folder), folder)
            if not previous:
                hint = "use --resume-previous for the one before it"
                raise ResumeError("E-CHECKPOINT", str(folder), fault, hint=hint)
        return None

    def staged(self, step: int) -> Path:
        """Where the checkpoint of `step` is written before it has its name."""
        return self.folder / f".saving-{step}"

    @contextmanager
    def saving(self, step: int) -> Iterator[Path]:
        """A folder to write the checkpoint of `step` into, which appears under its name when the block ends."""
        staged, final = self.staged(step), self.folder / f"checkpoint-{step}"
        with disk.guard(final):
            remove(staged)
            staged.mkdir()
        try:
            yield staged
            with disk.guard(final):
                seal(staged, step)
                remove(final)
                staged.replace(final)
                disk.sync_folder(final)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise

    def rotate(self, keep: int, best: int | None) -> None:
        """Remove all but the newest `keep` checkpoints and that of the step `best`."""
        for folder in self.checkpoints()[:-keep]:
            if _step(folder) != best:
                with disk.guard(folder):
                    remove(folder)

    def publish(self, staged: Path) -> None:
        """Give the finished folder its name, in place of a former one of ours, and remove what it was made from."""
        with disk.guard(self.out):
            sync_tree(staged)
            if self.out.exists() and any(self.out.iterdir()):
                self.out.replace(self.folder / ".replaced")
            staged.replace(self.out)
            disk.sync_folder(self.out)
        self.clear()

    def clear(self) -> None:
        """Remove the working folder, what tells that it is ours last."""
        with disk.guard(self.folder):
            for path in self.folder.iterdir():
                if path.name not in (RUN, LOCK):
                    remove(path)
            for name in (RUN, LOCK):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()


def partial_of(out: Path) -> Path:
    """Where a training works until its folder is whole."""
    return out.with_name(out.name + ".partial")


def tidy(out: Path) -> None:
    """Remove what a kill left beside a finished folder. BusyError E-LOCKED where another process trains there."""
    store = Store(out)
    if disk.there(store.folder):
        with _locked(store):
            store.clear()


def check_output(out: Path, *, resume: bool, restart: bool, locked: bool = False) -> None:
    """Refuse an output folder that is not ours to write. Nothing is created or changed.

    Raises UsageError E-EXISTS, BusyError E-LOCKED (unless we hold it: `locked`) and OutputError E-WRITE.
    """
    with disk.guard(out):
        names = _names(out)
        if names and STAMP not in names:
            raise UsageError("E-EXISTS", str(out), "holds other files", hint="choose another -o")
        if names and not (resume or restart):
            raise UsageError(
                "E-EXISTS", str(out), "holds a finished model", hint=f"move it away, or {RESTART}"
            )
        partial = partial_of(out)
        inside = _names(partial)
        if inside and RUN not in inside and not _only_begun(inside):
            raise UsageError(
                "E-EXISTS", str(partial), "is not a training of textgen", hint="choose another -o"
            )
        if RUN in inside and not (resume or restart):
            hint = f"use --resume to go on, or {RESTART.removeprefix('use ')}"
            if not locked:
                with _locked(Store(out)):
                    pass
            raise UsageError("E-EXISTS", str(partial), "holds an unfinished training", hint=hint)


def _names(folder: Path) -> set[str]:
    if not disk.there(folder):
        return set()
    if not folder.is_dir():
        raise UsageError("E-EXISTS", str(folder), "is not a folder", hint="choose another -o")
    return {path.name for path in folder.iterdir()}


def _only_begun(inside: set[str]) -> bool:
    """Whether a kill before the first word left nothing but our own litter."""
    return all(name == LOCK or name.startswith(f".{RUN}.") for name in inside)


@contextmanager
def open_store(out: Path, fingerprint: dict[str, Any], *, resume: bool, restart: bool) -> Iterator[Store]:
    """Hold the working folder of a training, after `check_output`.

    Raises BusyError E-LOCKED, ResumeError E-RESUME (names the first setting that differs), OutputError E-WRITE.
    """
    store = Store(out)
    with disk.guard(store.folder):
        store.folder.mkdir(parents=True, exist_ok=True)
    with _locked(store):
        check_output(out, resume=resume, restart=restart, locked=True)
        if restart:
            _empty(store.folder)
        _litter(store.folder)
        settings = store.folder / RUN
        begun = settings.exists()
        if begun:
            _compare(settings, out, fingerprint)
        else:
            disk.write_whole(
                settings, json.dumps({"textgen": 1, "fingerprint": fingerprint}, indent=1).encode()
            )
        try:
            yield store
        except UsageError:
            if not begun:  # what was refused is no training to go on with
                with suppress(OutputError):
                    store.clear()
            raise


@contextmanager
def _locked(store: Store) -> Iterator[None]:
    path = store.folder / LOCK
    try:
        with disk.guard(path):
            fd = disk.open_locked(path, 0o600, lock=True)
    except OutputError as error:
        if not isinstance(error.__cause__, BlockingIOError):
            raise
        pid = read_holder(path)
        by = f"process {pid}" if pid else "another process"
        raise BusyError("E-LOCKED", str(store.out), f"{by} trains into it") from error
    try:
        with disk.guard(path):
            os.truncate(fd, 0)
            disk.write_all(fd, header({}) + holder(os.getpid()))
        yield
    finally:
        os.close(fd)


def _compare(settings: Path, out: Path, fingerprint: dict[str, Any]) -> None:
    try:
        old = json.loads(settings.read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError("E-RESUME-STATE", str(settings), "is damaged", hint=RESTART) from error
    differs = difference(old, json.loads(json.dumps(fingerprint)))
    if differs:
        raise ResumeError("E-RESUME", str(out), differs, hint=RESTART)


def _empty(folder: Path) -> None:
    with disk.guard(folder):
        for path in folder.iterdir():
            if path.name != LOCK:
                remove(path)


def _litter(folder: Path) -> None:
    """Remove what a kill left: saves that did not end, removals that did not end."""
    with disk.guard(folder):
        for path in folder.iterdir():
            if path.name.startswith(".") or path.name == "final":
                remove(path)


def remove(path: Path) -> None:
    """Remove a file or folder, a checkpoint in such a way that none is ever seen in part. OSError where it fails."""
    if not disk.there(path):
        return
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    if not path.name.startswith("."):
        gone = path.with_name(f".gone-{path.name}")
        if gone.exists():
            shutil.rmtree(gone)
        path = path.replace(gone)
    shutil.rmtree(path)


def seal(folder: Path, step: int) -> None:
    """List every file with its size and hash in a manifest and bring all to the disk. OSError where it fails."""
    files = {path.name: _entry(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"textgen": 1, "step": step, "files": files}, indent=1))
    sync_tree(folder)


def sync_tree(folder: Path) -> None:
    """Bring the files of a folder and their names to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    disk.sync_folder(folder / MANIFEST)  # the names in it; Path would drop a dot behind it
    disk.sync_folder(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None: it is as it was written."""
    try:
        listed = json.loads((folder / MANIFEST).read_bytes())
        files, step = dict(listed["files"]), int(listed["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or damaged"
    if step != _step(folder):
        return f"{MANIFEST} is that of step {step}"
    names = {path.name for path in folder.iterdir()} - {MANIFEST}
    for name in sorted(names ^ files.keys()):
        return f"{name} is missing" if name in files else f"{name} is not in {MANIFEST}"
    for name, entry in files.items():
        try:
            found = _entry(folder / name)
        except OSError as error:
            return f"{name}: {disk.reason(error)}"
        if found != entry:
            return f"{name} has sha256 {found['sha256'][:12]}…, not {str(entry.get('sha256'))[:12]}… ({MANIFEST})"
    return None


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _step(folder: Path) -> int:
    match = _CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else -1
