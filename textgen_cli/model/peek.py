"""A repository's files read where they lie, before anything is fetched: small ones whole, of weights the headers.

What is in the cache already is read there. A whole file is compared with its hash; of the beginning of a large one
there is no hash, so what is told of it is what the server says. Nothing is kept.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from textgen_cli.errors import ModelError, NetworkError
from textgen_cli.events import Progress, Report
from textgen_cli.model import client, gguf, hub, snapshot, together, transfer
from textgen_cli.model.selection import loadable
from textgen_cli.model.snapshot import Cached, File
from textgen_cli.model.weights import (
    HEADER_LIMIT,
    INDEX,
    JSON_LIMIT,
    Tensor,
    gathered,
    parse_header,
    parse_json,
    shards_of,
)
from textgen_cli.model.wire import Passing

WORKERS = 8  # headers read at one time

T = TypeVar("T")


@dataclass(frozen=True)
class Shelf:
    """The files of one commit."""

    repo: str
    cached: Cached
    where: client.Place | None  # None: all is in the cache, and no connection is opened
    files: Mapping[str, File]

    def loadable(self) -> list[File]:
        """The files that loading needs; raises what `selection.loadable` raises."""
        return loadable(self.repo, list(self.files.values()))

    def read(self, name: str, limit: int = JSON_LIMIT) -> bytes | None:
        """A whole file; None where there is none or it has more bytes than the limit.

        Raises ModelError E-HASH, E-READ, NetworkError.
        """
        file = self.files.get(name)
        if file is None or file.size > limit:
            return None
        raw = self._begun(file, lambda take: take(file.size))
        hashed = snapshot.hasher(file)
        hashed.update(raw)
        if hashed.hexdigest() != file.digest:
            raise ModelError("E-HASH", name, snapshot.mismatch(hashed.hexdigest(), file), hint="run it again")
        return raw

    def json(self, name: str, error_name: str) -> dict[str, Any] | None:
        """A whole JSON file; None where there is none. ModelError with the given name where it is no JSON object."""
        raw = self.read(name)
        if raw is None and name in self.files:
            raise ModelError(error_name, name, f"is larger than {JSON_LIMIT:,} bytes")
        return None if raw is None else parse_json(name, raw, error_name)

    def tensors(self, report: Report) -> dict[str, Tensor]:
        """What the headers of all weights say. Raises what `weights.gathered` raises, NetworkError."""
        names = {file.name for file in self.loadable()}
        index: dict[str, Any] = (self.json(INDEX, "E-SHARD") or {}) if INDEX in names else {}
        headers = self._headers(shards_of(index), report) if index else {}
        _, found = gathered(
            self.repo,
            names,
            index=lambda: index,
            header=lambda name: headers.get(name) or self._header(self.files[name]),
        )
        return found

    def gguf(self, file: File) -> gguf.Header:
        """What the header of a GGUF file says. Raises ModelError E-GGUF, NetworkError."""
        read = functools.partial(gguf.read, file.name, file.size)
        return self._begun(file, read, limit=gguf.MAX_HEADER)

    def _headers(self, names: list[str], report: Report) -> dict[str, dict[str, Tensor]]:
        """The headers of several files, several at one time."""
        found: dict[str, dict[str, Tensor]] = {}

        def work(name: str, tell: Callable[[Any], None], stopped: threading.Event) -> None:
            if not stopped.is_set():
                tell((name, self._header(self.files[name])))

        for name, header in together.each([name for name in names if name in self.files], work, WORKERS):
            found[name] = header
            report(Progress("read", self.repo, len(found), len(names), "headers"))
        return found

    def _header(self, file: File) -> dict[str, Tensor]:
        read = functools.partial(parse_header, file.name, file.size)
        return self._begun(file, read, limit=HEADER_LIMIT + 8)

    def _begun(
        self, file: File, read: Callable[[Callable[[int], bytes]], T], *, limit: int | None = None
    ) -> T:
        """What `read` makes of a file, given a function that takes the next bytes from its beginning on.

        `limit`: so many bytes are asked for at most, and the connection is closed where less will do.
        """
        path = self.cached.folder / file.name
        if path.is_file():
            try:
                with path.open("rb") as opened:
                    return read(opened.read)
            except OSError as error:
                raise ModelError("E-READ", file.name, (error.strerror or str(error)).lower()) from error
        if self.where is None:
            raise ModelError("E-READ", file.name, "is not in the cache")
        where, until = self.where, min(limit, file.size) if limit else None

        def ask() -> T:
            with client.body(where, self.cached.commit, file.name, 0, None, until=until) as body:
                if body.start != 0:
                    raise Passing(
                        "E-NETWORK", file.name, "the server sends another part than it was asked for"
                    )
                if body.total not in (None, file.size):
                    raise NetworkError(
                        "E-REMOTE", file.name, "the server sends a file of another size than listed"
                    )
                return read(_taker(transfer.paced(body.chunks, file.name), file))

        return client.call(ask, where, self.cached.commit)


def _taker(chunks: Iterator[bytes], file: File) -> Callable[[int], bytes]:
    """A function that takes so many next bytes of a file's stream, fewer only at the end of the file."""
    kept = bytearray()
    left = file.size  # bytes that are still to be taken

    def take(count: int) -> bytes:
        nonlocal left
        wanted = min(count, left)
        while len(kept) < wanted and (chunk := next(chunks, None)) is not None:
            kept.extend(chunk)
        if len(kept) < wanted:
            raise Passing("E-NETWORK", file.name, "the server stops in the middle")
        found = bytes(kept[:wanted])
        del kept[:wanted]
        left -= wanted
        return found

    return take


def shelf(
    repo: str,
    revision: str | None,
    *,
    offline: bool,
    report: Report,
    mirror: str | None = None,
    deep: bool = False,
) -> Shelf:
    """The files of what a revision means now; `deep`: those in folders, too.

    Raises what `hub.whereabouts` and `hub.listing` raise.
    """
    cached, where = hub.whereabouts(repo, revision, offline=offline, report=report, mirror=mirror)
    if where is None:
        files = snapshot.recorded(cached) or snapshot.adopted(cached.folder)
    else:
        files = hub.listing(where, cached.commit, deep=deep)
    return Shelf(repo, cached, where, {file.name: file for file in files})
