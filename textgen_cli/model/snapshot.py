"""Is a snapshot in the Hub's cache what its commit says? Hashes, and a record that saves hashing at each run.

Owns the reading of a repository's folder in the cache (blobs, refs, snapshots, laid out by huggingface_hub)
and our record beside it. Knows no network and does not import that library.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textgen_cli.errors import ModelError, OutputError
from textgen_cli.model.check import LOADABLE
from textgen_cli.model.weights import ADAPTER, INDEX, SINGLE
from textgen_cli.model.wire import COMMIT, DIGEST

CHUNK = 1 << 20  # bytes read at once while hashing


@dataclass(frozen=True)
class File:
    """A file of a commit; the digest is 64 hex digits (sha256) or 40 (git blob)."""

    name: str
    size: int  # bytes
    digest: str

    @property
    def is_git(self) -> bool:
        """Whether the digest is git's hash of a blob and not a sha256."""
        return len(self.digest) == 40


@dataclass(frozen=True)
class Cached:
    """One commit of one repository in the cache; the folder may be absent or incomplete."""

    home: Path  # CACHE/models--org--name
    commit: str
    others: bool = False  # files that somebody chose, whose record is apart from that of what loading needs

    @property
    def folder(self) -> Path:
        return self.home / "snapshots" / self.commit

    @property
    def record(self) -> Path:
        return self.home / "textgen" / f"{self.commit}{'.others' if self.others else ''}.json"

    def blob(self, file: File) -> Path:
        """Where the content of a file lies."""
        return self.home / "blobs" / file.digest


# Names that some system takes for something else than a file of its folder.
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def is_inside(name: str) -> bool:
    """Whether a name from outside can only mean a file inside a folder, on any system."""
    parts = name.split("/")
    return all(
        part.isprintable() and part not in ("", ".", "..") and len(part.encode("utf-8", "replace")) <= 240
        and not re.search(r'[\\:*?"<>|]|[. ]$', part) and not _DEVICE.fullmatch(part)
        for part in parts
    ) and len(parts) <= 16  # fmt: skip


def ref(home: Path, revision: str) -> str | None:
    """The commit that a branch or tag meant when it was last resolved; None where unknown or damaged."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        commit = (home / "refs" / revision).read_text(encoding="ascii").strip()
        if COMMIT.fullmatch(commit):
            return commit
    return None


def write_ref(home: Path, revision: str, commit: str) -> None:
    """Remember what a branch or tag means; a cache that cannot be written keeps its old answer."""
    if ref(home, revision) != commit:
        _write(home / "refs" / revision, commit)


def whole(cached: Cached, *, listed: bool) -> bool:
    """Whether the snapshot is in the cache, every file matching its hash; hashes only what changed.

    With `listed` only a snapshot counts that was compared with the commit's list of files; without, one that
    another program left will do, if it has a config and weights and its files match their blobs' names.
    Raises ModelError E-HASH for a damaged file, after removing it.
    """
    stored = _read(cached.record)
    files = _files(stored)
    if files and stored.get("listed") is True:
        if any(not (cached.folder / file.name).exists() for file in files):
            return False
    elif listed or not (files := adopted(cached.folder)):
        return False
    verify(cached, files, listed=stored.get("listed") is True)
    return True


def present(cached: Cached, file: File) -> bool:
    """Whether the file is in the snapshot; a link to nothing is not."""
    return (cached.folder / file.name).exists()


def recorded(cached: Cached) -> list[File]:
    """The files that were compared with their hashes; none where nothing is known of them."""
    return _files(_read(cached.record))


def is_listed(cached: Cached) -> bool:
    """Whether the files that were compared are all that the commit's list names."""
    return _read(cached.record).get("listed") is True


def place(cached: Cached, file: File) -> None:
    """Give a file whose content lies in the cache its name in the snapshot. Raises OSError."""
    link = cached.folder / file.name
    link.parent.mkdir(parents=True, exist_ok=True)
    target = os.path.relpath(cached.blob(file), link.parent)
    if link.is_symlink() and os.readlink(link) == target:
        return
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(target)
    except OSError:  # a disk without links
        os.replace(cached.blob(file), link)


def verify(
    cached: Cached,
    files: list[File],
    *,
    listed: bool,
    fresh: frozenset[str] = frozenset(),
    again: bool = False,
) -> None:
    """Compare files with their hashes and record it, so that an untouched file is not read again.

    `fresh`: names of files that were compared while they came; `again`: read the untouched ones, too.
    Raises ModelError E-HASH for a bad file, after removing it from the cache.
    """
    stored = _read(cached.record)
    stamps = {file.name: stored["files"][file.name].get("stamp") for file in _files(stored)}
    known = {file.name: file for file in _files(stored)}
    entries: dict[str, Any] = {}
    for file in files:
        stamp = _stamp(cached.folder / file.name)
        is_known = stamp is not None and stamp == stamps.get(file.name) and known[file.name] == file
        if file.name not in fresh and (again or not is_known):
            _check(cached.folder / file.name, file)
        entries[file.name] = {"size": file.size, "digest": file.digest, "stamp": stamp}
    if entries != stored.get("files") or stored.get("listed") is not listed:
        _write(cached.record, json.dumps({"listed": listed, "files": entries}, indent=1))


def _check(path: Path, file: File) -> None:
    try:
        size = path.stat().st_size
        actual = digest(path, git=file.is_git) if size == file.size else None
    except OSError as error:
        raise OutputError("E-READ", str(path), (error.strerror or str(error)).lower()) from error
    if actual == file.digest:
        return
    _remove(path)
    fact = mismatch(actual, file) if actual else f"{size:,} bytes, expected {file.size:,}"
    raise ModelError(
        "E-HASH", file.name, fact, hint="the file was removed; run the command again to fetch it anew"
    )


def digest(path: Path, *, git: bool) -> str:
    """The file's sha256, or its hash as a git blob, in hex."""
    with path.open("rb") as file:
        state = _state(os.fstat(file.fileno()).st_size, git=git)
        while chunk := file.read(CHUNK):
            state.update(chunk)
    return state.hexdigest()


def hasher(file: File) -> "hashlib._Hash":
    """A hash that ends as the file's digest once it has seen all of its bytes."""
    return _state(file.size, git=file.is_git)


def _state(size: int, *, git: bool) -> "hashlib._Hash":
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if git else hashlib.sha256()


def mismatch(actual: str, file: File) -> str:
    """What to say of a file with another hash than its own."""
    return f"{'git hash' if file.is_git else 'sha256'} {actual}, expected {file.digest}"


def _remove(path: Path) -> None:
    """Take a bad file out of the snapshot together with the blob behind it."""
    try:
        if path.is_symlink():
            (path.parent / os.readlink(path)).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError("E-WRITE", str(path), "is damaged and cannot be removed") from error


def adopted(folder: Path) -> list[File]:
    """The files that another program put into a snapshot, their hashes taken from the names of the blobs."""
    files = []
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            name = os.path.basename(os.readlink(path)) if path.is_symlink() and path.exists() else ""
            if LOADABLE.fullmatch(path.name) and DIGEST.fullmatch(name):
                files.append(File(path.name, path.stat().st_size, name))
    names = {file.name for file in files}
    model = "config.json" in names and names & {SINGLE, INDEX}
    return files if model or names >= {"adapter_config.json", ADAPTER} else []


def _stamp(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}  # no record, or one that says nothing: the files are hashed again
    return found if isinstance(found, dict) else {}


def _files(stored: dict[str, Any]) -> list[File]:
    entries = stored.get("files")
    if not isinstance(entries, dict) or not all(_is_sound(name, entry) for name, entry in entries.items()):
        return []
    return [File(name, entry["size"], entry["digest"]) for name, entry in entries.items()]


def _is_sound(name: str, entry: Any) -> bool:
    if not isinstance(entry, dict) or not is_inside(name):
        return False
    size, digest = entry.get("size"), entry.get("digest")
    return type(size) is int and isinstance(digest, str) and DIGEST.fullmatch(digest) is not None


def _write(path: Path, text: str) -> None:
    """Write a small file whole; a cache that is read-only or full goes without it."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
