"""What `--verify`, `--remove` and `--clean` do to the models that are here."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textgen_cli.config import DownloadConfig, ModelConfig
from textgen_cli.download import inventory, place
from textgen_cli.download.inventory import Kept
from textgen_cli.errors import BusyError, ModelError, OutputError, TextgenError
from textgen_cli.events import Progress, Report
from textgen_cli.model import cache, client, contents, hub, packaged, snapshot
from textgen_cli.model.check import check_folder
from textgen_cli.model.snapshot import Cached
from textgen_cli.model.source import locate, parse


@dataclass(frozen=True)
class Verified:
    """What was found when a model's files were read again."""

    model: str
    revision: str
    folder: Path
    files: int  # compared with a hash
    problem: TextgenError | None

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        error = self.problem.record() if self.problem else None
        return {"model": self.model, "revision": self.revision or None, "files": self.files, "ok": error is None,
                "error": error, "folder": str(self.folder)}  # fmt: skip


@dataclass(frozen=True)
class Removed:
    """Something that is taken away, or would be."""

    what: str
    bytes: int
    path: Path

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"what": self.what, "bytes": self.bytes, "path": str(self.path)}


# --- verify


def verify(config: DownloadConfig, name: str | None, report: Report) -> Iterator[Verified]:
    """Read every file of a model, or of all that are here, and compare it with its hash.

    A file that is damaged is taken out of the cache, so that nothing uses it. Raises ModelError E-NOT-HERE.
    """
    if (name is not None and parse(name).kind in ("folder", "gguf")) or config.model.locked is not None:
        yield _verify_located(config, name or config.model.model, report)
        return
    found = inventory.kept(config.model) if name is None else inventory.named(config.model, name)
    if name is not None and not found:
        raise _not_here(name)
    for one in found:
        report(Progress("verify", one.model))
        yield _verified(one)


def _verify_located(config: DownloadConfig, name: str, report: Report) -> Verified:
    """A model that is not in a list of ours: a folder, or what a lock file pins."""
    try:
        located = locate(config.model, report)
        check_folder(located.folder)
        count = len(contents.of(located)) if located.revision or config.model.locked else 0
    except ModelError as error:
        return Verified(name, "", Path(name), 0, error)
    return Verified(name, located.revision, located.folder, count, None)


def _verified(one: Kept) -> Verified:
    try:
        count = _compare(one)
    except ModelError as error:
        return Verified(one.model, one.revision, one.folder, 0, error)
    return Verified(one.model, one.revision, one.folder, count, None)


def _compare(one: Kept) -> int:
    """The number of files that were compared. ModelError E-HASH for the first that differs."""
    if one.source == "hub":
        home, count = one.folder.parents[1], 0
        for others in (False, True):
            cached = Cached(home, one.revision, others)
            files = snapshot.recorded(cached) or ([] if others else snapshot.adopted(cached.folder))
            snapshot.verify(cached, files, listed=not others and snapshot.is_listed(cached), again=True)
            count += len(files)
        return count
    if one.source == "folder":
        check_folder(one.folder)
        return 0
    try:
        return cache.verify(one.folder)
    except ModelError:
        with contextlib.suppress(OSError):
            (one.folder / cache.MANIFEST).unlink()  # not whole any more: the next run makes it anew
        raise


# --- remove


def remove(config: DownloadConfig, name: str) -> list[Removed]:
    """Take a model out of the cache: one revision where the name has one, else all. With `dry_run` only tell.

    Raises ModelError E-NOT-HERE, BusyError where somebody is fetching it, OutputError E-WRITE.
    """
    found = inventory.named(config.model, name)
    if not found:
        raise _not_here(name)
    gone = [Removed(f"{one.model}@{one.revision[:12]}", one.bytes, one.folder) for one in found]
    if config.getting.dry_run:
        return gone
    for one in found:
        _take_away(one)
    return gone


def _take_away(one: Kept) -> None:
    with cache.writing(one.folder):
        if one.source == "hub":
            home = one.folder.parents[1]
            locks = (home.parent / ".locks" / home.name).glob("*.lock")
            if any(map(cache.is_locked, locks)):
                raise BusyError("E-BUSY", one.model, "is being fetched by another process")
            client.delete(one.model, one.revision)
            for others in (False, True):
                Cached(home, one.revision, others).record.unlink(missing_ok=True)
            return
        if cache.is_locked(Path(f"{one.folder}.lock")):
            raise BusyError("E-BUSY", one.model, "is being fetched by another process")
        (one.folder / cache.MANIFEST).unlink(missing_ok=True)  # first, so that half of it never counts
        shutil.rmtree(one.folder)


def _not_here(name: str) -> ModelError:
    return ModelError("E-NOT-HERE", name, "is not in the cache", hint="textgen download --list shows what is")


# --- clean


def clean(config: DownloadConfig) -> list[Removed]:
    """Take away what no run will use: parts of downloads, staging folders, old conversions, content without a name.

    What a process holds is left alone. With `dry_run` only tell. Raises OutputError E-WRITE.
    """
    found = list(_leftovers(config.model))
    for one in found if not config.getting.dry_run else ():
        try:
            if one.path.is_dir() and not one.path.is_symlink():
                shutil.rmtree(one.path)
            else:
                one.path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError("E-WRITE", str(one.path), (error.strerror or str(error)).lower()) from error
    return found


def _leftovers(config: ModelConfig) -> Iterator[Removed]:
    yield from _of_hub()
    root = cache.root(config.cache_dir)
    for kind in inventory.OURS:
        for path in sorted(
            [*(root / kind).glob("*"), *(root / kind).glob("*/*"), *(root / kind).glob("*/.*")]
        ):
            yield from _of_ours(path)
        for path in sorted((root / kind).glob(".*")):
            yield from _of_ours(path)
    for path, origin in place.noted(config.cache_dir):
        if not Path(origin["folder"]).is_dir():
            yield Removed(f"note of {origin['folder']}, which is gone", path.stat().st_size, path)


def _of_ours(path: Path) -> Iterator[Removed]:
    hidden = re.fullmatch(r"\.(.+?)\.(?:[0-9a-f]{8}\.staging|parts)", path.name)
    if hidden and path.is_dir() and not cache.is_locked(path.with_name(f"{hidden[1]}.lock")):
        yield Removed("what an interrupted run left", inventory.measured(path)[0], path)
    old = re.fullmatch(r"[0-9a-f]{64}-(\d+)", path.name)
    if old and path.is_dir() and not cache.is_locked(Path(f"{path}.lock")):
        if int(old[1]) < packaged.CONVERSION:
            yield Removed("a conversion by an older version", inventory.measured(path)[0], path)
        elif cache.whole(path) is None:
            yield Removed("a conversion that is not whole", inventory.measured(path)[0], path)


def _of_hub() -> Iterator[Removed]:
    """Parts of files, and blobs that no snapshot of their repository names."""
    for home in sorted(client.cache_folder().glob("models--*")):
        named = {path.resolve() for path in (home / "snapshots").rglob("*") if path.is_symlink()}
        for blob in sorted((home / "blobs").glob("*")):
            if cache.is_locked(
                hub.lock_of(blob.with_name(blob.name.removeprefix("etag.").partition(".")[0]))
            ):
                continue
            if blob.name.endswith(".incomplete"):
                yield Removed("part of a file", blob.stat().st_size, blob)
            elif blob.is_file() and blob.resolve() not in named:
                yield Removed("content that no model has", blob.stat().st_size, blob)
