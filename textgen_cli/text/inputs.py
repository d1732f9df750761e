"""Opened inputs: a file or standard input as a stream of bytes that is known not to change while it is read.

Owns the errors of opening and reading, and the hash of a file. Knows nothing of what the bytes mean.
"""

import hashlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from textgen_cli.errors import InputError, OutputError
from textgen_cli.events import Notice, Report, silent
from textgen_cli.text import disk
from textgen_cli.text.disk import reason

PIECE = 1 << 20  # bytes read at once


class Source:
    """An input: its name, `stat` and bytes. Close it, or use it as a context manager."""

    def __init__(self, name: str, fd: int, *, owned: bool, report: Report) -> None:
        self.name = name
        self.stat = os.fstat(fd)
        self._raw = _Raw(name, fd, self.stat, owned, report)
        self.stream: BinaryIO = cast(BinaryIO, io.BufferedReader(self._raw, PIECE))

    def sha256(self) -> str | None:
        """The digest of a regular file's bytes; reading then proves that they are still the same at its end.

        None for a pipe, whose bytes are not known yet. Call it before reading.
        """
        return self._raw.digest()

    def lines(self) -> int | None:
        """How many lines of a regular file hold more than blanks; None for a pipe. Does not move reading."""
        return self._raw.lines()

    def close(self) -> None:
        self.stream.close()

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_source(where: Path | int, *, report: Report = silent) -> Source:
    """Open a file, or a descriptor such as 0 for standard input.

    Raises InputError when it is absent, closed, a directory or not readable. Reading raises OutputError
    E-READ (exit 8) when the disk fails, InputError E-INPUT-CHANGED when a file shrinks or changes; of a file
    that grows only the size seen now is read, with a warning.
    """
    name = "stdin" if where == 0 else str(where)
    try:
        if isinstance(where, int):
            source = Source(name, where, owned=False, report=report)
        else:
            source = Source(name, os.open(where, os.O_RDONLY), owned=True, report=report)
    except OSError as error:
        if isinstance(where, int):
            raise InputError("E-STDIN-CLOSED", name, "is closed") from error
        raise InputError("E-INPUT", name, reason(error)) from error
    if stat.S_ISDIR(source.stat.st_mode):
        source.close()
        raise InputError("E-INPUT", name, "is a directory")
    return source


class _Raw(io.RawIOBase):
    """The bytes of a descriptor, of a regular file no more than it has now."""

    def __init__(self, name: str, fd: int, info: os.stat_result, owned: bool, report: Report) -> None:
        self._name, self._fd, self._owned, self._report = name, fd, owned, report
        self._left: int | None = None  # bytes to come; None where only their end can tell
        self._start = self._end = 0
        # Files of the kernel say size 0 and have bytes: they are read like pipes.
        if stat.S_ISREG(info.st_mode) and info.st_size:
            self._start = os.lseek(fd, 0, os.SEEK_CUR)
            self._end = max(info.st_size, self._start)
            self._left = self._end - self._start
        self._known: str | None = None
        self._hash = hashlib.sha256()
        self._over = False

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if self._owned and not self.closed:
            disk.close(self._fd)
        super().close()

    def digest(self) -> str | None:
        if self._left is not None and self._known is None:
            whole = hashlib.sha256()
            for piece in self._pieces():
                whole.update(piece)
            self._known = whole.hexdigest()
        return self._known

    def lines(self) -> int | None:
        if self._left is None:
            return None
        found, rest = 0, b""  # `rest`: whether the line under way holds anything
        for piece in self._pieces():
            first, *others = piece.split(b"\n")
            rest = rest or first.strip()
            if others:
                found += bool(rest) + sum(1 for line in others[:-1] if line and not line.isspace())
                rest = others[-1].strip()
        return found + bool(rest)

    def _pieces(self) -> Iterator[bytes]:
        """The file's bytes, without moving where reading is."""
        at = self._start
        while at < self._end:
            piece = self._read(lambda at=at: os.pread(self._fd, min(PIECE, self._end - at), at))
            if not piece:
                raise self._changed("shrank while it was read")
            yield piece
            at += len(piece)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._left is not None:
            view = view[: self._left]
        size: int = self._read(lambda: os.readv(self._fd, [view])) if view else 0
        if not size:
            self._finish()
        elif self._left is not None:
            self._left -= size
            if self._known is not None:
                self._hash.update(view[:size])
        return size

    def _read(self, call: Any) -> Any:
        try:
            return call()
        except OSError as error:
            raise OutputError("E-READ", self._name, reason(error)) from error

    def _finish(self) -> None:
        if self._left is None or self._over:
            return
        self._over = True
        if self._left:
            raise self._changed("shrank while it was read")
        if self._known not in (None, self._hash.hexdigest()):
            raise self._changed("changed while it was read")
        if os.fstat(self._fd).st_size > self._end:
            fact = "grew while it was read: what came later is left out"
            self._report(Notice(f"{self._name}: {fact}", "W-INPUT-GREW"))

    def _changed(self, fact: str) -> InputError:
        return InputError("E-INPUT-CHANGED", self._name, fact)
