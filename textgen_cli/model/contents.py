"""What a model on disk is made of: its files with their hashes, as its publisher or we ourselves wrote them down.

Knows where each kind of source keeps its record, and reads files only where there is none.
"""

from pathlib import Path

from textgen_cli.errors import ModelError
from textgen_cli.model import cache, snapshot
from textgen_cli.model.check import LOADABLE
from textgen_cli.model.lock import Pinned
from textgen_cli.model.snapshot import Cached, File
from textgen_cli.model.source import Located


def of(located: Located) -> list[File]:
    """The files of a model and their hashes; of a plain folder those that loading opens, hashed now.

    Raises ModelError E-READ.
    """
    if located.files:
        return list(located.files)
    if located.source.kind == "hub":
        home, commit = located.folder.parents[1], located.folder.name
        return snapshot.recorded(Cached(home, commit))
    return (listed(located.folder) if located.revision else []) or of_folder(located.folder)


def listed(folder: Path) -> list[File]:
    """The files of a folder that our cache published, as its manifest has them; none where it is not whole."""
    manifest = cache.whole(folder) or {"files": {}}
    return [File(name, facts["size"], facts["sha256"]) for name, facts in manifest["files"].items()]


def of_folder(folder: Path) -> list[File]:
    """The files of a folder that loading opens, hashed now. ModelError E-READ."""
    try:
        paths = sorted(path for path in folder.iterdir() if LOADABLE.fullmatch(path.name) and path.is_file())
        return [File(path.name, path.stat().st_size, cache.sha256(path)) for path in paths]
    except OSError as error:
        raise ModelError("E-READ", str(folder), (error.strerror or str(error)).lower()) from error


def pinned(located: Located) -> Pinned:
    """A model as a lock file has it. What is converted here is pinned by the hash of what it was converted from."""
    kind = located.source.kind
    files = tuple(of(located)) if kind in ("hub", "modelscope", "folder") else ()
    return Pinned(kind, located.source.name, located.revision, files)
