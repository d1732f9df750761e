"""The bytes of files from a server to the disk, across failures, kills and servers that lie.

Owns the part of a file that is here so far, which the next run goes on with; the hash; what is too slow and
when to give up; how far several files are. It knows no HTTP library and no site: a Body is opened for it, and
`hub.py` and `modelscope.py` give finished parts their names.

Bounds: six tries that bring less than a megabyte each, pauses of at most 8 s between them (or what the server
asks for, up to 5 minutes), and 1,000 bytes a second over half a minute.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from textgen_cli.errors import ModelError, NetworkError
from textgen_cli.events import Progress
from textgen_cli.model import wire
from textgen_cli.model.snapshot import CHUNK, File, hasher, mismatch

WORKERS = 8  # files at one time
PAUSES = (1.0, 2.0, 4.0, 8.0, 8.0)  # seconds between tries
UNREACHED = 2  # pauses for a server that was not reached at all yet
GAIN = 1 << 20  # bytes; a try that brings as much does not count
LEAST_RATE = 1000  # bytes a second, measured over ...
WINDOW = 30.0  # ... so many seconds


@dataclass(frozen=True)
class Body:
    """What a server sends of a file: bytes from `start` on."""

    start: int  # -1: not what was asked for
    total: int | None  # of the whole file, where the server says so
    etag: str | None  # a strong one, by which the server knows the file again
    chunks: Iterator[bytes]


def answered(status: int, headers: Mapping[str, str], chunks: Iterator[bytes], asked: int) -> Body:
    """What an answer without error is, to a request for the bytes from `asked` on; header names in any case."""
    found = headers.get("etag", "")
    etag = found if found.startswith('"') else None  # a weak one does not vouch for bytes
    if headers.get("content-encoding", "identity").lower() != "identity":
        return Body(0, None, None, chunks)  # its ranges are not those of the file
    if status != 206:
        return Body(0, None, etag, chunks)
    start, total = wire.content_range(headers.get("content-range", "")) or (-1, None)
    return Body(start if start == asked else -1, total, etag, chunks)


def refused() -> Body:
    """Where the server has no such range: the part that is here is longer than the file, or not of it."""
    return Body(0, -1, None, iter(()))


Opener = Callable[[int, str | None], AbstractContextManager[Body]]
"""From a byte on, if the file still has that ETag; raises wire.Passing for what is worth another try."""


class Stopped(Exception):
    """The work was called off."""


class Part:
    """A file that is still growing, and its hash; what an earlier run left is the beginning."""

    def __init__(self, path: Path, file: File) -> None:
        self.path, self.file = path, file
        self.stream = path.open("r+b" if path.exists() else "x+b", buffering=0)
        self.inherited = self.size = os.fstat(self.stream.fileno()).st_size
        if self.size > file.size:
            self.restart()
        self.hash = hasher(file)
        self.stream.seek(0)
        while chunk := self.stream.read(CHUNK):
            self.hash.update(chunk)

    @property
    def note(self) -> Path:
        """Where the server's ETag stands while the part lies here."""
        return self.path.with_name(f"etag.{self.path.name}")

    @property
    def etag(self) -> str | None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            found = self.note.read_text("ascii")
            return found if re.fullmatch(r'"[!#-~]{1,200}"', found) else None
        return None

    def restart(self) -> None:
        """Throw away what is here."""
        self.stream.seek(0)
        self.stream.truncate()
        self.note.unlink(missing_ok=True)
        self.inherited = self.size = 0
        self.hash = hasher(self.file)

    def append(self, chunk: bytes) -> None:
        data = memoryview(chunk)
        while data:
            data = data[self.stream.write(data) :]
        self.hash.update(chunk)
        self.size += len(chunk)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def fetch(
    file: File, path: Path, open_body: Opener, moved: Callable[[int], None], stopped: Callable[[], bool]
) -> None:
    """Fill the file `path` with what `file` names, whole, hashed and on the disk; goes on where it was left.

    `moved` is told of bytes that came (or were thrown away). Raises NetworkError, keeping the part;
    ModelError E-HASH, removing it; OSError; Stopped.
    """
    part = Part(path, file)
    with part.stream:
        try:
            moved(part.size)
            if not _filled(part, open_body, moved, stopped) and part.inherited:
                moved(-part.size)  # what an earlier run left was not of this file
                part.restart()
                _filled(part, open_body, moved, stopped)
        except (NetworkError, Stopped):
            if not part.size:
                part.remove()
            raise
        os.fsync(part.stream.fileno())
        part.note.unlink(missing_ok=True)
    if part.hash.hexdigest() != file.digest:
        part.remove()
        raise ModelError("E-HASH", file.name, mismatch(part.hash.hexdigest(), file), hint="run it again")


def _filled(part: Part, open_body: Opener, moved: Callable[[int], None], stopped: Callable[[], bool]) -> bool:
    """Fill the part; whether its hash is the file's."""
    _fill(part, open_body, moved, stopped)
    return part.hash.hexdigest() == part.file.digest


def _fill(part: Part, open_body: Opener, moved: Callable[[int], None], stopped: Callable[[], bool]) -> None:
    """Append until the size is reached, with a pause after each try that fails."""
    tried, started = 0, part.size
    while part.size < part.file.size:
        before = part.size
        try:
            with open_body(part.size, part.etag if part.size else None) as body:
                _take(part, body, moved, stopped)
            if part.size < part.file.size:
                raise wire.Passing("E-NETWORK", part.file.name, "the server stops in the middle")
        except wire.Passing as error:
            tried = 0 if part.size - before >= GAIN else tried
            if tried >= (len(PAUSES) if error.reached or part.size > started else UNREACHED):
                raise _given_up(part, error) from error
            time.sleep(max(PAUSES[tried], error.asked))
            tried += 1


def _given_up(part: Part, error: wire.Passing) -> NetworkError:
    if not part.size:
        return error.final()
    fact = f"{error.fact}; got {part.size:,} of {part.file.size:,} bytes after {len(PAUSES) + 1} tries"
    hint = "what is here is kept: run it again to go on"
    return NetworkError(error.name, part.file.name, fact, hint=hint)


def _take(part: Part, body: Body, moved: Callable[[int], None], stopped: Callable[[], bool]) -> None:
    """Append a body where it belongs; one that belongs elsewhere is never spliced in."""
    name, size = part.file.name, part.file.size
    if body.start != part.size or body.total not in (None, size):
        moved(-part.size)
        part.restart()
        if body.start:
            raise wire.Passing("E-NETWORK", name, "the server sends another part than it was asked for")
    if part.size == 0 and body.etag:
        part.note.write_text(body.etag, "ascii")
    for chunk in paced(body.chunks, name):
        if stopped():
            raise Stopped
        if part.size + len(chunk) > size:
            part.remove()
            raise NetworkError(
                "E-REMOTE", name, f"the server sends more than the {size:,} bytes it announced"
            )
        part.append(chunk)
        moved(len(chunk))


def paced(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """The chunks, while they come fast enough; a server that trickles is one that stalls."""
    since, got = time.monotonic(), 0
    for chunk in chunks:
        got += len(chunk)
        now = time.monotonic()
        if now - since >= WINDOW:
            if got < LEAST_RATE * WINDOW:
                fact = f"the server sends less than {LEAST_RATE:,} bytes a second"
                raise wire.Passing("E-STALL", name, fact)
            since, got = now, 0
        yield chunk


# --- several files


def gathered(told: Iterator[tuple[File, int | None]], repo: str, files: Sequence[File]) -> Iterator[Progress]:
    """How far each file is, and all of them, from bytes that came (None: another process has the file)."""
    total, done = sum(file.size for file in files), dict[str, int]()
    begun, moved = time.monotonic(), 0
    if files:
        yield Progress("download", repo, 0, total, "bytes")
    for file, count in told:
        if count is None:
            yield Progress("wait", repo)
            continue
        moved += count if file.name in done else 0  # first comes what was here already
        done[file.name] = done.get(file.name, 0) + count
        if len(files) > 1:
            yield Progress("download", repo, done[file.name], file.size, "bytes", part=file.name)
        pace = _pace(moved / (time.monotonic() - begun + 1e-3), total - sum(done.values()))
        yield Progress("download", repo, sum(done.values()), total, "bytes", detail=pace)


def _pace(rate: float, left: int) -> str:
    """`12.3 MB/s, 40 s left`."""
    return f"{rate / 1e6:.1f} MB/s, {left / rate:,.0f} s left" if rate > 0 else ""
