"""Models from the Hugging Face Hub or a mirror of it, in the cache that all its tools share.

Owns the way of a repository: which commit, which files, what is here already, the rest several files at once.
The client stands in `client.py`, the bytes of a file in `transfer.py`, the cache's layout in `snapshot.py`.

huggingface_hub 2.4 itself fetches each file under a random name which it removes on failure, so that a run that
is killed begins anew at byte 0. Here a part keeps the name of its hash, and the next run goes on with it.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from textgen_cli.errors import NetworkError
from textgen_cli.events import Notice, Report
from textgen_cli.model import client, snapshot, together, transfer
from textgen_cli.model.cache import check_space, is_locked, writing
from textgen_cli.model.client import Place
from textgen_cli.model.selection import Wanted, choose, loadable
from textgen_cli.model.snapshot import Cached, File
from textgen_cli.model.wire import COMMIT

DIGEST_64 = re.compile("[0-9a-f]{64}")
WAIT = 0.1  # seconds between two looks at a lock
PART = ".textgen.incomplete"  # the ending by which the Hub's tools know what is left of a download


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository on disk, every file of it compared with its hash."""

    folder: Path
    commit: str
    repo: str


@dataclass(frozen=True)
class Plan:
    """What fetching would do."""

    cached: Cached
    files: tuple[File, ...]
    missing: tuple[File, ...]  # those of the files that are not here yet
    refused: tuple[str, ...] = ()  # names that were meant and are never fetched

    @property
    def needed(self) -> int:
        """Bytes to come: what is here of a file need not come again."""
        return sum(file.size - min(file.size, _have(self.cached, file)) for file in self.missing)


def fetch(
    repo: str, revision: str | None, *, offline: bool, report: Report, mirror: str | None = None
) -> Snapshot:
    """Bring a model of the Hub into the cache, or find it there; only the files that loading needs.

    A commit that is whole in the cache opens no connection; a branch or tag costs one request. Where that
    fails for want of a network and the cache has an older answer, it is used with a warning.

    Raises NetworkError, UsageError, SafetyError E-PICKLE, ModelError (E-HASH, E-WEIGHTS, E-ADAPTER) and
    OutputError (E-SPACE, E-WRITE, E-NO-HOME).
    """
    cached, where = whereabouts(repo, revision, offline=offline, report=report, mirror=mirror)
    if where is not None:
        named = revision is None or not COMMIT.fullmatch(revision)
        if not snapshot.whole(cached, listed=True):
            _complete(where, _plan(where, cached, Wanted()), report)
            if named:
                _drop_parts(cached.home)
        if named:
            snapshot.write_ref(cached.home, revision or "main", cached.commit)
    return Snapshot(cached.folder, cached.commit, repo)


def whereabouts(
    repo: str, revision: str | None, *, offline: bool, report: Report, mirror: str | None = None
) -> tuple[Cached, Place | None]:
    """The commit that a revision means, and where to ask for what is not here; None: it is whole in the cache.

    Raises NetworkError, UsageError and ModelError E-HASH as `fetch` does.
    """
    home = home_of(repo)
    pinned = revision if revision and COMMIT.fullmatch(revision) else None
    known = pinned or snapshot.ref(home, revision or "main")
    if offline or client.is_offline():
        if known and snapshot.whole(Cached(home, known), listed=False):
            return Cached(home, known), None
        raise offline_error(repo)
    if pinned and snapshot.whole(Cached(home, pinned), listed=True):
        return Cached(home, pinned), None
    where = client.place(repo, mirror, report)
    try:
        commit = _resolve(where, revision, patient=known is None)
    except NetworkError as error:
        if (
            error.name not in ("E-NETWORK", "E-RATE")
            or not known
            or not snapshot.whole(Cached(home, known), listed=False)
        ):
            raise
        report(Notice(f"{repo}: {error.fact}; using commit {known[:12]} from the cache", "W-CACHED-REVISION"))
        return Cached(home, known), None
    return Cached(home, commit), where


def plan(
    repo: str,
    revision: str | None,
    wanted: Wanted,
    *,
    offline: bool,
    report: Report,
    mirror: str | None = None,
) -> tuple[Plan, Callable[[], Snapshot]]:
    """What fetching these files of a repository would do, and the function that does it.

    Raises what `fetch` raises; NetworkError E-OFFLINE, for only the Hub knows which files there are.
    """
    home = home_of(repo)
    if offline or client.is_offline():
        raise offline_error(repo, "which files it has, only the Hub can tell")
    where = client.place(repo, mirror, report)
    commit = _resolve(where, revision, patient=True)
    planned = _plan(where, Cached(home, commit, others=not wanted.is_default), wanted)

    def do() -> Snapshot:
        _complete(where, planned, report)
        if revision is None or not COMMIT.fullmatch(revision):
            snapshot.write_ref(home, revision or "main", commit)
        return Snapshot(planned.cached.folder, commit, repo)

    return planned, do


def fetch_exactly(
    repo: str, commit: str, files: Sequence[File], *, offline: bool, report: Report, mirror: str | None = None
) -> Snapshot:
    """Bring exactly these files of a commit into the cache, whatever the server says of them.

    Raises NetworkError, ModelError E-HASH, OutputError.
    """
    cached = Cached(home_of(repo), commit, others=True)
    missing = tuple(file for file in files if not snapshot.present(cached, file))
    if missing and (offline or client.is_offline()):
        raise offline_error(repo, f"{missing[0].name} is not in the cache")
    if missing:
        _complete(client.place(repo, mirror, report), Plan(cached, tuple(files), missing), report)
    snapshot.verify(cached, list(files), listed=False)
    return Snapshot(cached.folder, commit, repo)


def offline_error(repo: str, fact: str = "is not in the cache") -> NetworkError:
    """The error for what cannot be had without a connection."""
    return NetworkError("E-OFFLINE", repo, f"{fact}, and --offline or HF_HUB_OFFLINE is set")


def home_of(repo: str) -> Path:
    """Where a repository lies in the cache, whether it is there or not."""
    return client.cache_folder() / f"models--{repo.replace('/', '--')}"


# --- the steps


def _resolve(where: Place, revision: str | None, *, patient: bool) -> str:
    """The commit that a revision means now."""
    commit = client.commit_of(where, revision, patient=patient)
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise NetworkError("E-REMOTE-HEADER", where.repo, "the server names no commit for it")
    if revision and COMMIT.fullmatch(revision) and commit != revision:
        fact = f"the server answers commit {commit[:12]} for {revision[:12]}"
        raise NetworkError("E-REMOTE", where.repo, fact)
    return commit


def _plan(where: Place, cached: Cached, wanted: Wanted) -> Plan:
    """The files of a commit that are wanted, and which of them are missing."""
    listed = listing(where, cached.commit, deep=not wanted.is_default)
    files, refused = (
        (loadable(where.repo, listed), []) if wanted.is_default else choose(where.repo, listed, wanted)
    )
    missing = [file for file in files if not snapshot.present(cached, file)]
    return Plan(cached, tuple(files), tuple(missing), tuple(refused))


def listing(where: Place, commit: str, *, deep: bool = False) -> list[File]:
    """The files of a commit, as the server lists them; `deep`: those in folders, too. NetworkError."""
    return [_file(where.repo, *entry) for entry in client.tree(where, commit, deep=deep)]


def _file(repo: str, name: str, size: Any, digest: Any, is_sha256: bool) -> File:
    form = DIGEST_64 if is_sha256 else COMMIT
    if type(size) is not int or size < 0 or not isinstance(digest, str) or not form.fullmatch(digest):
        raise NetworkError("E-REMOTE-HEADER", repo, f"the server lists {name!r} without a size and a hash")
    return File(name, size, digest)


def _complete(where: Place, planned: Plan, report: Report) -> None:
    """Fetch what the snapshot lacks, several files at once, and record what was compared with its hash."""
    cached, repo = planned.cached, where.repo
    check_space(cached.home, planned.needed, repo)
    if planned.refused:
        names = ", ".join(planned.refused[:3]) + ("" if len(planned.refused) <= 3 else ", …")
        report(Notice(f"{repo}: left out what can run code: {names}", "W-LEFT-OUT"))
    for event in transfer.gathered(_fetched(where, cached, planned.missing), repo, planned.missing):
        report(event)
    fresh = frozenset(file.name for file in planned.missing)
    snapshot.verify(cached, list(planned.files), listed=not cached.others, fresh=fresh)


def _drop_parts(home: Path) -> None:
    """Remove what interrupted runs left of files that the branch has no more; what a process is fetching stays."""
    for part in (home / "blobs").glob(f"*{PART}"):
        digest = part.name.removeprefix("etag.").removesuffix(PART)
        if not is_locked(lock_of(part.with_name(digest))):
            with writing(part):
                part.unlink(missing_ok=True)


def _fetched(where: Place, cached: Cached, files: Sequence[File]) -> Iterator[tuple[File, int | None]]:
    """The files with the number of bytes that came, or, less than 0, were thrown away; None: another process has it."""

    def work(file: File, tell: Callable[[Any], None], stopped: threading.Event) -> None:
        _bring(where, cached, file, lambda count: tell((file, count)), stopped)

    yield from together.each(files, work, transfer.WORKERS)


def _bring(
    where: Place, cached: Cached, file: File, tell: Callable[[int | None], None], stopped: threading.Event
) -> None:
    """Bring one file into the cache, or wait for the process that does; then give it its name."""
    blob = cached.blob(file)
    lock = filelock.FileLock(lock_of(blob))
    with writing(blob):
        blob.parent.mkdir(parents=True, exist_ok=True)
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, lambda: tell(None), stopped)
        try:
            if not _is_here(blob, file):
                part = blob.with_name(blob.name + PART)
                transfer.fetch(file, part, _opener(where, cached.commit, file), tell, stopped.is_set)
                os.replace(part, blob)
            else:
                tell(file.size)
            snapshot.place(cached, file)
        finally:
            lock.release()


def _opener(where: Place, commit: str, file: File) -> transfer.Opener:
    return lambda start, etag: client.body(where, commit, file.name, start, etag)


def lock_of(blob: Path) -> Path:
    """The lock that the Hub's own tools hold while they fetch a blob."""
    home = blob.parents[1]
    return home.parent / ".locks" / home.name / f"{blob.name}.lock"


def _acquire(lock: filelock.BaseFileLock, waiting: Callable[[], None], stopped: threading.Event) -> None:
    told = False
    while not stopped.is_set():
        try:
            lock.acquire(timeout=WAIT if told else 0)
        except filelock.Timeout:
            if not told:
                waiting()
            told = True
        else:
            return
    raise transfer.Stopped


def _is_here(blob: Path, file: File) -> bool:
    """Whether another revision or process has brought the same content; a damaged one does not count."""
    if not blob.is_file() or blob.stat().st_size != file.size:
        return False
    return snapshot.digest(blob, git=file.is_git) == file.digest


def _have(cached: Cached, file: File) -> int:
    """Bytes of a file that are here already: of its content, or of a part of it."""
    blob = cached.blob(file)
    for path in (blob, blob.with_name(blob.name + PART)):
        if path.is_file():
            return path.stat().st_size
    return 0
