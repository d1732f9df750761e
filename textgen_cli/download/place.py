"""`--to DIR`: a model in a folder of the user's own, whole or not at all; and which of these folders there are.

The folder holds the model's files and nothing of ours. A note in our cache says what it was made from.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from textgen_cli.errors import ModelError
from textgen_cli.events import Progress, Report
from textgen_cli.model import cache, snapshot
from textgen_cli.model.snapshot import File
from textgen_cli.model.source import Located

PIECE = 1 << 26  # bytes copied between two reports
NO_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


def copy(located: Located, files: Sequence[File], to: Path, root: Path | None, report: Report) -> Path:
    """Copy a model into the folder `to`, each file compared with its hash; done already is done.

    On a disk that can share blocks (Btrfs, XFS) it takes no room. Raises OutputError (E-EXISTS, E-SPACE, E-WRITE),
    ModelError E-HASH.
    """
    target = to.expanduser().absolute()
    if _is_copy(target, files):
        return target
    total = sum(file.size for file in files)
    cache.check_space(target.parent, total, str(to))
    with cache.replaced(target) as staging:
        done = 0
        for file in files:
            copied = staging / file.name
            copied.parent.mkdir(parents=True, exist_ok=True)
            for count in _copied(located.folder / file.name, copied):
                done += count
                report(Progress("copy", located.label, done, total, "bytes"))
            if snapshot.digest(copied, git=file.is_git) != file.digest:
                raise ModelError("E-HASH", file.name, "is damaged in the cache", hint="download --verify")
    note(root, target, {"model": located.label, "revision": located.revision, "form": "copy"})
    return target


def _is_copy(target: Path, files: Sequence[File]) -> bool:
    with contextlib.suppress(OSError):
        return bool(files) and all(
            (target / file.name).stat().st_size == file.size
            and snapshot.digest(target / file.name, git=file.is_git) == file.digest
            for file in files
        )
    return False


def _copied(source: Path, target: Path) -> Iterator[int]:
    """Copy a file; yields the bytes of each piece."""
    with source.open("rb", buffering=0) as old, target.open("xb", buffering=0) as new:
        try:
            while count := os.copy_file_range(old.fileno(), new.fileno(), PIECE):
                yield count
        except (AttributeError, OSError) as error:  # not on macOS, nor on every file system
            if isinstance(error, OSError) and error.errno not in NO_RANGE:
                raise
            old.seek(0)
            new.truncate(0)
            new.seek(0)
            shutil.copyfileobj(old, new, PIECE)
            yield os.fstat(new.fileno()).st_size


# --- notes


def note(root: Path | None, folder: Path, origin: dict[str, Any]) -> None:
    """Remember what a folder of the user's was made from; a cache that cannot be written goes without it."""
    path = _notes(root) / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"folder": str(folder), **origin}), "utf-8")
        part.replace(path)


def noted(root: Path | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The notes and what they say, the folder they are about being there or not."""
    with contextlib.suppress(OSError):
        for path in sorted(_notes(root).glob("*.json")):
            with contextlib.suppress(OSError, ValueError):
                found = json.loads(path.read_bytes())
                if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
                    yield path, {"model": "", "revision": "", "form": "", "folder": "", **found}


def _notes(root: Path | None) -> Path:
    return cache.root(root) / "copies"
