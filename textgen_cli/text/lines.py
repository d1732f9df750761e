"""Bytes of an input -> its lines, as bytes and as text.

Owns what a line may be: its size and its encoding. A line that is too long is passed over in memory that does not grow.
"""

import json
from collections.abc import Iterator
from typing import BinaryIO

from textgen_cli.errors import InputError

LINE_LIMIT = 16 << 20  # bytes of one record
SKIP_LIMIT = 1 << 30  # bytes of one line after which the input is no text at all
PIECE = 1 << 16  # bytes read at once

BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"


class Bad(Exception):
    """Why one record cannot be read: a code and a fact. Never leaves the readers."""

    def at(self, place: str) -> InputError:
        return InputError(self.args[0], place, self.args[1])


def lines(stream: BinaryIO, name: str) -> Iterator[tuple[bytes | None, int]]:
    """(line with its end, bytes it took), split at byte 0x0A only; None for a line over LINE_LIMIT."""
    first = True
    while piece := stream.readline(PIECE):
        line: bytes | None = piece
        size = len(piece)
        if first:
            check_encoding(piece, name)
        if size == PIECE and not piece.endswith(b"\n"):
            line, size = _long_line(stream, piece, name)
        if first and line is not None:
            line = line.removeprefix(BOM)
        first = False
        yield line, size


def _long_line(stream: BinaryIO, head: bytes, name: str) -> tuple[bytes | None, int]:
    """The whole of a line that does not fit one piece; what is over the limit is read and dropped."""
    parts, size = [head], len(head)
    while piece := stream.readline(PIECE):
        size += len(piece)
        if size <= LINE_LIMIT:
            parts.append(piece)
        else:
            parts.clear()
        if size > SKIP_LIMIT:
            raise InputError("E-LINE-TOO-LONG", name, f"a line has more than {SKIP_LIMIT:,} bytes: no text")
        if piece.endswith(b"\n"):
            break
    return (b"".join(parts) if size <= LINE_LIMIT else None), size


def check_encoding(head: bytes, name: str) -> None:
    """InputError for UTF-16 and UTF-32, told by their byte order mark or by where the NULs stand."""
    if any(head[:4]) and not json.detect_encoding(head[:4]).startswith("utf-8"):
        raise InputError(
            "E-ENCODING", name, "is UTF-16 or UTF-32, not UTF-8", hint="convert it: iconv -f UTF-16 -t UTF-8"
        )


def decode(line: bytes) -> str:
    """A line as text; Bad where it is no UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        at = error.start
        raise Bad("E-UTF8", f"byte 0x{line[at]:02x} at offset {at} is not UTF-8") from None


def too_long(size: int) -> Bad:
    """What is said of a line of so many bytes."""
    return Bad("E-LINE-TOO-LONG", f"has {size:,} bytes, limit {LINE_LIMIT:,}")


def without_end(text: str) -> str:
    """A line without its end, LF or CRLF."""
    return text.removesuffix("\n").removesuffix("\r")
