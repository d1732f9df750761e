"""The flow of `textgen download`: find the model, bring it into the cache or a folder, check it. Imports no torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from textgen_cli.config import DEFAULT_MODEL, DownloadConfig
from textgen_cli.download import place
from textgen_cli.errors import UsageError
from textgen_cli.events import Report
from textgen_cli.model import cache, catalog, contents, hub, lock, packaged
from textgen_cli.model.check import check_folder
from textgen_cli.model.selection import Wanted
from textgen_cli.model.snapshot import File
from textgen_cli.model.source import Located, locate, parse
from textgen_cli.model.weights import ADAPTER, INDEX, SINGLE


@dataclass(frozen=True)
class Fetched:
    """A model that is here, whole and compared with its hashes."""

    model: str  # as it was asked for
    source: str
    revision: str
    folder: Path
    files: tuple[File, ...]

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "model": self.model,
            "source": self.source,
            "revision": self.revision or None,
            "folder": str(self.folder),
            "bytes": sum(file.size for file in self.files),
            "files": [
                {"name": file.name, "size": file.size, _hash(file): file.digest} for file in self.files
            ],
        }


@dataclass(frozen=True)
class Planned:
    """What fetching a model would do."""

    model: str
    source: str
    revision: str
    files: tuple[tuple[File, bool], ...]  # with "is here"
    needed: int  # bytes to come
    free: int  # bytes on the disk where they would lie

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        files = [{"name": f.name, "size": f.size, _hash(f): f.digest, "here": here} for f, here in self.files]
        return {
            "model": self.model,
            "source": self.source,
            "revision": self.revision or None,
            "bytes": sum(file.size for file, _ in self.files),
            "needed": self.needed,
            "free": self.free,
            "files": files,
        }


def names(config: DownloadConfig, name: str | None) -> list[str]:
    """The models that a run is about: the one that is named, else all of a lock file, else the configured one."""
    if name is not None:
        return [name]
    if config.model.locked is not None and config.model.model == DEFAULT_MODEL:
        return list(lock.read(config.model.locked))
    return [config.model.model]


def run(config: DownloadConfig, report: Report) -> Fetched:
    """The model whole and checked; plain `from_pretrained` of transformers loads its folder.

    Raises UsageError, NetworkError, ModelError, SafetyError and OutputError.
    """
    if config.getting.chooses:
        located, files = _chosen(config, report)
    else:
        located = locate(config.model, report)
        files = tuple(contents.of(located))
    here = {file.name for file in files}
    if not config.getting.chooses or ("config.json" in here and here & {SINGLE, INDEX}):
        _check(located, here, report)
    if config.getting.lock is not None:
        pinned = contents.pinned(located)
        pinned = replace(pinned, files=files) if pinned.files else pinned
        lock.write(config.getting.lock, config.model.model, pinned)
    folder = located.folder
    if config.getting.to is not None:
        folder = place.copy(located, files, config.getting.to, config.model.cache_dir, report)
    return Fetched(config.model.model, located.source.kind, located.revision, folder, files)


def compiled(config: DownloadConfig, report: Report) -> Fetched:
    """The native code of a model for this machine, made where it is not there yet. Raises what `compile_model` does."""
    from textgen_cli.model.compile import compile_model

    folder = compile_model(config.model, report)
    located = locate(config.model, report)
    return Fetched(
        config.model.model, located.source.kind, located.revision, folder, tuple(contents.listed(folder))
    )


def _check(located: Located, names: set[str], report: Report) -> None:
    """Check a folder as the loader does; of an adapter only that it is one, since it goes with a base."""
    if ADAPTER in names and "config.json" not in names:
        return
    for notice in check_folder(located.folder).notices:
        report(notice)


def plan(config: DownloadConfig, report: Report) -> Planned:
    """What `run` would fetch, how much of it is here, and the room there is. Fetches nothing but lists.

    Raises UsageError, NetworkError, ModelError and SafetyError.
    """
    source, model = parse(config.model.model), config.model
    if source.kind == "hub" and model.locked is None:
        planned, _ = hub.plan(
            source.name,
            source.revision,
            _wanted(config),
            offline=model.offline,
            report=report,
            mirror=model.mirror,
        )
        files = tuple((file, file not in planned.missing) for file in planned.files)
        free = cache.free_space(planned.cached.home)
        return Planned(model.model, source.kind, planned.cached.commit, files, planned.needed, free)
    if source.kind == "catalog":
        return _plan_entry(catalog.CATALOG[source.name], config)
    raise UsageError("E-CONFLICT", "--dry-run", "is for models that come from the Hub or the catalogue")


def _plan_entry(entry: catalog.Entry, config: DownloadConfig) -> Planned:
    root = cache.root(config.model.cache_dir)
    here = cache.whole(packaged.folder_of(root, entry.member_sha256)) is not None
    member = File(entry.member, entry.member_size, entry.member_sha256)
    needed = 0 if here else packaged.room(entry)
    return Planned(
        entry.name, "catalog", entry.member_sha256, ((member, here),), needed, cache.free_space(root)
    )


def _wanted(config: DownloadConfig) -> Wanted:
    return Wanted(config.getting.include, config.getting.exclude, config.getting.all_files)


def _chosen(config: DownloadConfig, report: Report) -> tuple[Located, tuple[File, ...]]:
    """A repository's files that were chosen by name."""
    source, model = parse(config.model.model), config.model
    if source.kind != "hub":
        raise UsageError("E-CONFLICT", str(config.getting.chooses), "is for models of the Hub")
    planned, do = hub.plan(
        source.name,
        source.revision,
        _wanted(config),
        offline=model.offline,
        report=report,
        mirror=model.mirror,
    )
    found = do()
    return Located(found.folder, source, found.commit, found.repo), planned.files


def _hash(file: File) -> str:
    return "git" if file.is_git else "sha256"
