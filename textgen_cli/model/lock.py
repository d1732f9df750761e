"""Lock files: which models a job runs, to the byte, as `textgen download --lock` writes it and `--locked` obeys it.

Owns the form of the file. What a model is made of, and how it is fetched, others know.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textgen_cli.errors import ModelError, UsageError
from textgen_cli.model.snapshot import File, is_inside
from textgen_cli.model.wire import COMMIT
from textgen_cli.text import disk

FORMAT = 1
SIZE_LIMIT = 1 << 26  # bytes
HASHES = {"sha256": 64, "git": 40}  # their names in the file, and their lengths


@dataclass(frozen=True)
class Pinned:
    """One model: where it is from, which state of it, and its files where their hashes are those of the publisher."""

    source: str
    name: str  # of the repository, package, file or folder
    revision: str  # commit, or sha256 of what was fetched; "" for a plain folder
    files: tuple[File, ...] = ()  # none: the revision pins all


def read(path: Path) -> dict[str, Pinned]:
    """The models of a lock file by the names they were locked under. UsageError E-LOCK for a file that is none."""
    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise UsageError("E-LOCK", str(path), "is too long for a lock file")
        found = json.loads(path.read_bytes())
        if found["format"] != FORMAT:
            raise UsageError(
                "E-LOCK", str(path), f"is of format {found['format']}, this program knows {FORMAT}"
            )
        return {str(name): _pinned(entry) for name, entry in found["models"].items()}
    except OSError as error:
        raise UsageError("E-LOCK", str(path), (error.strerror or str(error)).lower()) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError("E-LOCK", str(path), "is no file of textgen download --lock") from error


def write(path: Path, name: str, pinned: Pinned) -> None:
    """Put a model into a lock file, in place of the one of that name; the others stay. UsageError, OutputError."""
    known = read(path) if path.exists() else {}
    models = {key: _entry(value) for key, value in sorted({**known, name: pinned}.items())}
    text = json.dumps({"format": FORMAT, "models": models}, indent=1, ensure_ascii=False)
    disk.write_whole(path, (text + "\n").encode())


def find(path: Path, name: str, default: str) -> tuple[str, Pinned]:
    """The model of that name; where the default is asked for and is not there, the one that the file holds.

    Raises ModelError E-LOCKED where the file does not hold it.
    """
    known = read(path)
    if name not in known and name == default and len(known) == 1:
        name = next(iter(known))
    if name not in known:
        names = ", ".join(known)
        raise ModelError("E-LOCKED", name, f"is not in {path}", hint=f"it holds {names}" if known else None)
    return name, known[name]


def compare(name: str, pinned: Pinned, revision: str, files: Iterable[File]) -> None:
    """Raise ModelError E-LOCKED where a model that was found is not the one that is pinned."""
    if revision != pinned.revision:
        raise ModelError(
            "E-LOCKED", name, f"is {revision[:12] or 'a folder'}, locked is {pinned.revision[:12]}"
        )
    here, wanted = ({file.name: file for file in some} for some in (files, pinned.files))
    for file in sorted(here.keys() | wanted.keys()) if wanted else ():
        if here.get(file) != wanted.get(file):
            what = (
                "is missing"
                if file not in here
                else "is not locked"
                if file not in wanted
                else "is another one"
            )
            raise ModelError("E-LOCKED", name, f"{file} {what}")


def _entry(pinned: Pinned) -> dict[str, Any]:
    files = {file.name: {"size": file.size, _kind(file): file.digest} for file in pinned.files}
    entry: dict[str, Any] = {"source": pinned.source, "name": pinned.name, "revision": pinned.revision}
    return entry | ({"files": files} if files else {})


def _kind(file: File) -> str:
    return "git" if file.is_git else "sha256"


def _pinned(entry: Mapping[str, Any]) -> Pinned:
    source, name, revision = (entry[key] for key in ("source", "name", "revision"))
    if not all(isinstance(text, str) for text in (source, name, revision)):
        raise ValueError("not texts")
    if source == "hub" and not COMMIT.fullmatch(revision):
        raise ValueError("not a commit")
    files = tuple(_file(name, facts) for name, facts in entry.get("files", {}).items())
    return Pinned(source, name, revision, files)


def _file(name: str, facts: Mapping[str, Any]) -> File:
    (kind,) = HASHES.keys() & facts.keys()
    size, digest = facts["size"], facts[kind]
    if (
        not is_inside(name)
        or type(size) is not int
        or not re.fullmatch(rf"[0-9a-f]{{{HASHES[kind]}}}", digest)
    ):
        raise ValueError("not a file")
    return File(name, size, digest)
