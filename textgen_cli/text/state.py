"""The log of a job under way (OUT.state): its lines, and what they prove. Pure values; job.py owns the files.

A line is a header {"textgen": 1, "fingerprint": …, "pinned": …}, after which all before it is void, the
holder's {"pid": N}, or a point. A last line without LF was cut off and counts as not written.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from textgen_cli.text.records import Record

FIRST = b'{"textgen": 1'  # how every log begins
NOTHING = hashlib.sha256().hexdigest()


@dataclass(frozen=True)
class Point:
    """What stood on the disk at one moment: the results of the first `n` records, in so many `bytes`."""

    n: int = 0  # input records done
    failed: int = 0  # of these, records whose result is an error
    bytes: int = 0
    sha256: str = NOTHING  # of these bytes
    input: str = NOTHING  # of the n records read: see `seal`


@dataclass(frozen=True)
class Log:
    """A log as it was read."""

    fingerprint: dict[str, Any] | None = None  # None: no header, so nothing was begun
    pinned: dict[str, Any] = field(default_factory=dict)  # what the job's first life drew or saw
    points: list[Point] = field(default_factory=list)  # n and bytes grow
    pid: int | None = None  # who holds or held it last
    size: int = 0  # bytes of whole lines
    foreign: bool = False  # not a log of ours
    damaged: bool = False  # a log with a line that makes no sense


def header(fingerprint: dict[str, Any], pinned: dict[str, Any] | None = None) -> bytes:
    """The line that begins a job."""
    return _line({"textgen": 1, "fingerprint": fingerprint, "pinned": pinned or {}})


def holder(pid: int) -> bytes:
    """The line that says who has the lock."""
    return _line({"pid": pid})


def point(at: Point) -> bytes:
    """The line of a point."""
    return _line(asdict(at))


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def read_log(fd: int) -> Log:
    """The log behind an open descriptor. OSError where it cannot be read."""
    with open(fd, "rb", closefd=False) as stream:
        stream.seek(0)
        start = stream.read(len(FIRST))
        if not FIRST.startswith(start):
            return Log(foreign=True)
        stream.seek(0)
        fingerprint, pid, size = None, None, 0
        pinned: dict[str, Any] = {}
        points: list[Point] = []
        for line in stream:
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                if "textgen" in entry:
                    fingerprint, points = dict(entry["fingerprint"]), []
                    pinned = dict(entry.get("pinned", {}))
                elif "pid" in entry:
                    pid = int(entry["pid"])
                else:
                    _add(points, Point(**entry))
            except (ValueError, TypeError, KeyError):
                return Log(damaged=True, pid=pid)
            size += len(line)
    return Log(fingerprint, pinned, points, pid, size)


def read_holder(path: Path) -> int | None:
    """The pid that a log names last; None where it cannot be known."""
    try:
        with path.open("rb") as stream:
            return read_log(stream.fileno()).pid
    except OSError:
        return None


def _add(points: list[Point], new: Point) -> None:
    """A job resumed at a point goes on from there: what an earlier life noted after it is void."""
    while points and points[-1].n >= new.n:
        points.pop()
    points.append(new)


def reread(fd: int, points: list[Point]) -> tuple[Point, Any, Point | None]:
    """Hash a file up to the last of the points that it reaches.

    Returns that point, the sha256 object there, and the first point that does not hold, else None.
    """
    digest, at, good = hashlib.sha256(), 0, Point()
    size = os.fstat(fd).st_size
    for new in points:
        if new.bytes > size:
            break
        while at < new.bytes:
            piece = os.pread(fd, min(1 << 20, new.bytes - at), at)
            if not piece:
                return good, digest, new
            digest.update(piece)
            at += len(piece)
        if digest.hexdigest() != new.sha256:
            return good, digest, new
        good = new
    return good, digest, None


def seal(record: Record) -> bytes:
    """What of a record decides its result, as bytes to hash: not how it was spelled in the input."""
    return json.dumps([record.index, record.fields, record.error]).encode()


def difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first field, in the new one's order, that two fingerprints do not share: `a.b was 1, is now 2`."""
    before, now = dict(_flat(old)), dict(_flat(new))
    for name in [*now, *before]:
        was, is_now = before.get(name, "absent"), now.get(name, "absent")
        if was != is_now:
            return f"{name} was {_short(was)}, is now {_short(is_now)}"
    return None


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Values as JSON, where 1, 1.0 and true differ and a tuple is a list."""
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value, ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"
