"""A batch's output file, complete or resumable at any instant: OUT.partial, OUT.state, lock, resume, commit.

OUT.partial holds output lines. OUT.state is the job's log (state.py) under a kernel lock: the fingerprint,
and points, each noted after the disk has what it speaks of. Resuming reads OUT.partial again up to the last
point, refuses it where its bytes are not as they were, drops what lies behind, and computes the rest anew: so
a record of several lines is kept whole or not at all. OUT appears by rename and nothing else is left then; a
finished file carries no fingerprint, so with `resume` an OUT that stands alone is taken as done, whatever the
options.

Knows nothing of models and prompts, nor what a line says.
"""

import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from textgen_cli.errors import BusyError, InternalError, OutputError, ResumeError, UsageError
from textgen_cli.events import Notice, Report, silent
from textgen_cli.text import disk, state
from textgen_cli.text.records import Record
from textgen_cli.text.state import Log, Point

LONGEST = 1.0  # seconds between two points at most, where the disk is quick
SHARE = 0.05  # of the time: what points may cost, and what a kill may lose
RESTART = "--restart starts over"


@dataclass(frozen=True)
class _At:
    """How far a job is. Replaced as a whole, so that a signal never sees half a step."""

    done: int = 0  # input records whose lines are in OUT.partial
    failed: int = 0
    size: int = 0  # bytes in OUT.partial
    output: Any = field(default_factory=hashlib.sha256)  # over these bytes
    input: Any = field(default_factory=hashlib.sha256)  # over the records done

    def point(self) -> Point:
        return Point(self.done, self.failed, self.size, self.output.hexdigest(), self.input.hexdigest())


class Job:
    """One output file under way. Made by `open_job`; use it as a context manager.

    Leaving without `commit` keeps OUT.partial and OUT.state for a resume, or removes them when no record is
    done. Every failure of the disk is an OutputError E-WRITE that counts the records written.
    """

    def __init__(self, out: Path, report: Report) -> None:
        self.out, self.report = out, report
        self.partial, self.state = Path(f"{out}.partial"), Path(f"{out}.state")
        self.replaces = False  # what stands as OUT makes way at the end
        self.complete = False  # OUT stands; nothing is left to do
        self.pinned: dict[str, Any] = {}  # as the job's first life had it
        self._fds: dict[Path, int] = {}
        self._at, self._sealed = _At(), Point()
        self._log_size = 0  # bytes of whole lines in OUT.state
        self._verified = True  # the records done before were read again and are the same
        self._trusted = True  # no sync has failed; after one, later ones prove nothing
        self._started = self._last = time.monotonic()
        self._cost = 0.0  # seconds the last point took

    @property
    def done(self) -> int:
        """Input records whose results are written."""
        return self._at.done

    @property
    def failed(self) -> int:
        """Of these, records whose result is an error."""
        return self._at.failed

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._leave()
        else:
            # What is under way says more than a second failure of the same disk.
            with suppress(OutputError):
                self._leave()

    def verify(self, records: Iterable[Record]) -> Iterator[Record]:
        """Pass all input records on; ResumeError where those done before are not the ones now read."""
        past, digest = self._sealed.n, hashlib.sha256()
        seen = 0
        for record in records:
            if seen < past:
                digest.update(state.seal(record))
                seen += 1
                if seen == past:
                    self._check_input(digest)
            yield record
        if seen < past:
            fact = f"has {seen} records now, {past} were done before"
            raise ResumeError("E-RESUME", "input", fact, hint=RESTART)

    def append(self, record: Record, lines: Sequence[bytes], *, failed: bool = False) -> None:
        """Write all output lines of the next input record at once."""
        if not self._verified:
            raise InternalError("E-INTERNAL", str(self.out), "appended to before the input was verified")
        data = b"".join(lines)
        self._write(self.partial, data)
        at = self._at
        output, records = at.output.copy(), at.input.copy()
        output.update(data)
        records.update(state.seal(record))
        self._at = _At(at.done + 1, at.failed + failed, at.size + len(data), output, records)

    def point(self, *, force: bool = False) -> None:
        """Bring what is written to the disk and note it: when `force`, or when it is time to."""
        now = time.monotonic()
        wait = max(self._cost / SHARE, min(LONGEST, SHARE * (now - self._started)))
        if self.done == self._sealed.n or not (force or now - self._last >= wait):
            return
        at = self._at
        with self._guard(self.partial):
            try:
                os.fsync(self._fds[self.partial])
            except OSError:
                self._trusted = False
                raise
        self._sealed = at.point()
        self._note(state.point(self._sealed))
        self._last = time.monotonic()
        self._cost = self._last - now

    def commit(self) -> None:
        """Make OUT appear, whole and on the disk, and remove the rest."""
        self.point(force=True)
        with self._guard(self.out):
            if not disk.same(self._fds[self.partial], self.partial):
                raise OutputError("E-WRITE", str(self.partial), "was moved or replaced")
            if disk.there(self.out) and not self.replaces:
                raise UsageError("E-EXISTS", str(self.out), "appeared while the job ran", hint="move it away")
            self._close(self.partial)
            self.partial.rename(self.out)
            disk.sync_folder(self.out)
        self._finish()

    def _finish(self) -> None:
        self._remove(self.state)
        self.complete = True
        with self._guard(self.state):
            self._close(self.state)

    def _leave(self) -> None:
        """Cut off a line under way, seal what is whole, let go of the files."""
        try:
            if self.partial in self._fds and self.done and self._trusted:
                with self._guard(self.partial):
                    os.ftruncate(self._fds[self.partial], self._at.size)
                self._cut_log()
                self.point(force=True)
            elif self.partial in self._fds and not self.done:
                self._remove(self.partial)
                self._remove(self.state)
        finally:
            with self._guard(self.out):
                self._close(self.partial)
                self._close(self.state)

    # --- start

    def _lock(self, wanted: bool) -> None:
        with self._guard(self.out):
            try:
                # Not group-writable whatever the umask: who writes here decides what is resumed.
                self._fds[self.state] = disk.open_locked(self.state, 0o644, lock=wanted)
            except BlockingIOError as error:
                pid = state.read_holder(self.state)
                held = f"held by pid {pid}" if pid else "held by another process"
                raise BusyError("E-LOCKED", str(self.out), held) from error

    def _begin(self, fingerprint: dict[str, Any]) -> None:
        """Start from nothing; what an earlier job left is void once the header is written."""
        self._cut_log()
        self._note(state.header(fingerprint, self.pinned))
        self._note(state.holder(os.getpid()))
        self._remove(self.partial)
        with self._guard(self.out):
            os.fsync(self._fds[self.state])
            self._fds[self.partial] = disk.open_new(self.partial, 0o666)
            disk.sync_folder(self.out)

    def _resume(self, points: list[Point]) -> None:
        with self._guard(self.partial):
            fd = self._fds[self.partial] = disk.open_old(self.partial)
            good, output, bad = state.reread(fd, points)
            if bad is not None:
                raise self._corrupt(good.n, bad.n - 1)
            dropped = os.fstat(fd).st_size - good.bytes
            os.ftruncate(fd, good.bytes)
        if dropped:
            fact = f"dropped {dropped} bytes after record {good.n}, not known to be whole"
            self.report(Notice(f"[W-TORN-TAIL] {self.partial}: {fact}"))
        self._at = _At(good.n, good.failed, good.bytes, output)
        self._sealed, self._verified = good, not good.n
        self._cut_log()
        self._note(state.holder(os.getpid()))
        # Noted again: later points, which the file no longer reaches, are void now.
        self._note(state.point(good))

    def _corrupt(self, first: int, last: int) -> ResumeError:
        which = f"record {first}" if first == last else f"one of the records {first} to {last}"
        fact = f"{which} is not as it was written"
        return ResumeError("E-RESUME-CORRUPT", str(self.partial), fact, hint=RESTART)

    def _check_input(self, digest: Any) -> None:
        if digest.hexdigest() != self._sealed.input:
            fact = f"differs within the {self._sealed.n} records done before"
            raise ResumeError("E-RESUME", "input", fact, hint=RESTART)
        self._at, self._verified = replace(self._at, input=digest), True

    def _abandon(self, fresh: bool) -> None:
        """Let go after a start that failed; what was there before stays."""
        with suppress(OutputError):
            if fresh:
                if self.partial in self._fds:
                    self._remove(self.partial)
                self._remove(self.state)
        for path in list(self._fds):
            with suppress(OSError):
                self._close(path)

    # --- the disk

    def _cut_log(self) -> None:
        """Drop a line of OUT.state that was not written to its end."""
        with self._guard(self.state):
            os.ftruncate(self._fds[self.state], self._log_size)

    def _note(self, line: bytes) -> None:
        self._write(self.state, line)
        self._log_size += len(line)

    def _write(self, path: Path, data: bytes) -> None:
        with self._guard(path):
            disk.write_all(self._fds[path], data)

    def _close(self, path: Path) -> None:
        fd = self._fds.pop(path, None)
        if fd is not None:
            disk.close(fd)

    def _remove(self, path: Path) -> None:
        with self._guard(path), suppress(FileNotFoundError):
            path.unlink()

    @contextmanager
    def _guard(self, path: Path) -> Iterator[None]:
        with disk.guard(path, self.done):
            try:
                yield
            except OSError as error:
                self._trusted = self._trusted and error.errno != errno.EIO
                raise


def open_job(
    out: Path,
    fingerprint: dict[str, Any] | Callable[[], dict[str, Any]],
    *,
    pinned: dict[str, Any] | None = None,
    resume: bool = False,
    restart: bool = False,
    source: os.stat_result | None = None,
    lock: bool = True,
    report: Report = silent,
) -> Job:
    """Begin, resume or restart the job that writes `out`; `resume` where nothing stands yet begins.

    `fingerprint`: all that the output depends on, as JSON values, or what tells it once the lock is held.
    `pinned`: what a job keeps from its first life on, as its date; a resumed one has `Job.pinned` from there.
    `source`: the input's stat. To be called before a model is loaded.

    Raises UsageError E-EXISTS, E-SAME-FILE, BusyError E-LOCKED, E-NO-LOCKS, ResumeError E-RESUME,
    E-RESUME-STATE, E-RESUME-CORRUPT, OutputError E-WRITE, E-NAME-TOO-LONG.
    """
    job, fresh = Job(out, report), False
    try:
        with job._guard(out):
            if source is not None:
                _refuse_source(job, source)
            if not restart and disk.there(out) and not disk.there(job.partial) and not disk.there(job.state):
                return _complete(job, resume)
        job._lock(lock)
        with job._guard(job.state):
            fresh = not os.fstat(job._fds[job.state]).st_size
            log = state.read_log(job._fds[job.state])
            job.pinned = dict(pinned or {})
            _start(job, fingerprint, log, resume=resume, restart=restart)
    except BaseException:
        job._abandon(fresh)
        raise
    return job


def _start(
    job: Job,
    told: dict[str, Any] | Callable[[], dict[str, Any]],
    log: Log,
    *,
    resume: bool,
    restart: bool,
) -> None:
    """Decide, under the lock, what the files that stand there mean."""
    there, begun = disk.there(job.out), disk.there(job.partial)
    last = log.points[-1] if log.points else Point()
    nothing = log.fingerprint is None and not log.damaged
    if log.foreign:
        raise UsageError("E-EXISTS", str(job.state), "is no state file of textgen", hint="use another name")
    if not restart and there and not begun and (nothing or job.out.lstat().st_size == last.bytes):
        # Another process ended while this one came for the lock, or one was killed just after the rename.
        _complete(job, resume)
        job._finish()
        return
    job.replaces = restart or bool(log.pinned.get("replaces"))
    if there and not job.replaces:
        raise UsageError("E-EXISTS", str(job.out), "stands beside unfinished work", hint="move it away")
    for path, stands in ((job.out, there), (job.partial, begun)):
        if stands:
            with job._guard(path):
                disk.check_gives_way(path)
    if not (resume or restart or (nothing and not begun)):
        hint = "use --resume, --restart or another name"
        raise UsageError("E-EXISTS", str(job.partial), "holds an unfinished job", hint=hint)
    job._log_size = log.size
    fingerprint = told() if callable(told) else told
    if restart:
        job.pinned["replaces"] = True  # what stands there stays until this job is whole
        job._begin(fingerprint)
    elif nothing and not begun:
        job._begin(fingerprint)
    else:
        _continue(job, fingerprint, log, begun)


def _continue(job: Job, fingerprint: dict[str, Any], log: Log, begun: bool) -> None:
    if log.fingerprint is None:
        raise ResumeError("E-RESUME-STATE", str(job.state), "is missing or damaged", hint=RESTART)
    differs = state.difference(log.fingerprint, fingerprint)
    if differs:
        raise ResumeError("E-RESUME", str(job.out), differs, hint=RESTART)
    job.pinned = log.pinned
    if begun:
        job._resume(log.points)
    elif log.points:
        raise ResumeError("E-RESUME-STATE", str(job.partial), "is missing", hint=RESTART)
    else:
        job._begin(fingerprint)


def _complete(job: Job, resume: bool) -> Job:
    if not resume:
        hint = "use --resume, --restart or another name"
        raise UsageError("E-EXISTS", str(job.out), "exists", hint=hint)
    if not stat.S_ISREG(job.out.lstat().st_mode):
        raise UsageError("E-EXISTS", str(job.out), "is not a regular file")
    job.complete = True
    return job


def _refuse_source(job: Job, source: os.stat_result) -> None:
    for path in (job.out, job.partial, job.state):
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), source):
                raise UsageError("E-SAME-FILE", str(path), "is the input", hint="choose another -o")
