"""Running a batch: results in input order into a job's file or a stream, until done or a limit is met.

generate and score share it. Knows nothing of how a result comes about.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from textgen_cli.errors import OutputError, TextgenError, UsageError
from textgen_cli.events import Progress, Report, silent
from textgen_cli.text import records
from textgen_cli.text.disk import reason
from textgen_cli.text.records import Record

FIRST = 100  # records that a percentage is taken of at least


@dataclass(frozen=True)
class Result:
    """What one input record gave: its output lines in order, all of them or one error line."""

    record: Record
    outputs: Sequence[dict[str, Any]]
    failed: bool = False
    tokens: int = 0  # that were generated or scored for it


def failure(record: Record, error: TextgenError | dict[str, str]) -> Result:
    """The result of a record that failed: its fields, then `error`."""
    said = error.record() if isinstance(error, TextgenError) else error
    return Result(record, [joined(record.fields, {"error": said})], failed=True)


def joined(fields: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The input's fields, then ours; a field that bears a name of ours is kept as `input_<name>`."""
    kept = {}
    for name, value in fields.items():
        free = name
        while free in ours or (free != name and free in fields):
            free = f"input_{free}"
        kept[free] = value
    return {**kept, **ours}


@dataclass(frozen=True)
class Limit:
    """How many records may fail: a number, or a percentage of the records so far (of 100 while fewer)."""

    count: int | None = None
    percent: float | None = None

    def exceeded(self, failed: int, done: int) -> bool:
        """Whether so many failed records are too many. A function of the input's order alone."""
        if self.percent is not None:
            return failed * 100 > self.percent * max(done, FIRST)
        return self.count is not None and failed > self.count


def parse_limit(text: str) -> Limit:
    """`N` or `P%`. UsageError where it is neither."""
    if re.fullmatch(r"[0-9]{1,18}", text):
        return Limit(count=int(text))
    if re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,6})?%", text) and float(text[:-1]) <= 100:
        return Limit(percent=float(text[:-1]))
    raise UsageError("E-RANGE", "--max-failures", f"must be a number or a percentage, not {text!r}")


@dataclass(frozen=True)
class Summary:
    """How a batch ended."""

    records: int  # input records done, earlier runs included
    failed: int  # of these, records whose result is an error
    stopped: str = ""  # "" when all is done, else max-failures or max-time; a job can then be resumed


class Sink(Protocol):
    """Where results go: a Job or a Stream."""

    @property
    def done(self) -> int: ...
    @property
    def failed(self) -> int: ...
    def verify(self, records: Iterable[Record]) -> Iterator[Record]: ...
    def append(self, record: Record, lines: Sequence[bytes], *, failed: bool = False) -> None: ...
    def point(self) -> None: ...
    def commit(self) -> None: ...


class Stream:
    """Results to standard output: each record flushed, nothing kept, nothing to resume."""

    def __init__(self, stream: BinaryIO, name: str = "stdout") -> None:
        self.stream, self.name = stream, name
        self.done = self.failed = 0

    def verify(self, records: Iterable[Record]) -> Iterator[Record]:
        """Pass the records on."""
        return iter(records)

    def append(self, record: Record, lines: Sequence[bytes], *, failed: bool = False) -> None:
        """Write a record's lines. BrokenPipeError where nobody reads on, OutputError E-WRITE otherwise."""
        try:
            self.stream.write(b"".join(lines))
            self.stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError("E-WRITE", self.name, reason(error)) from error
        self.done += 1
        self.failed += failed

    def point(self) -> None:
        """Nothing: what was flushed is gone."""

    def commit(self) -> None:
        """Nothing: see `point`."""


def run_job(
    groups: Iterable[Sequence[Result]],
    sink: Sink,
    *,
    max_failures: Limit | None = None,
    max_time: float | None = None,
    encode: Callable[[dict[str, Any]], bytes] = records.line,
    stage: str = "generate",
    total: int | None = None,
    report: Report = silent,
    clock: Callable[[], float] = time.monotonic,
) -> Summary:
    """Write results as they come and commit when they end.

    `groups`: the results that become ready together, in input order, beginning behind `sink.done`. After each
    group, never inside one, the file is brought to the disk and the time (`max_time`, seconds) is looked at.
    The record that exceeds `max_failures` is the last one written. Stopped early, a job is left resumable.
    """
    limit = max_failures or Limit()
    start, stopped = clock(), ""
    if limit.exceeded(sink.failed, sink.done):
        return Summary(sink.done, sink.failed, "max-failures")
    for group in groups:
        for result in group:
            sink.append(result.record, [encode(fields) for fields in result.outputs], failed=result.failed)
            if limit.exceeded(sink.failed, sink.done):
                return Summary(sink.done, sink.failed, "max-failures")
        sink.point()
        report(
            Progress(stage, "records", float(sink.done), None if total is None else float(total), "records")
        )
        if max_time is not None and clock() - start >= max_time:
            stopped = "max-time"
            break
    if not stopped:
        sink.commit()
    return Summary(sink.done, sink.failed, stopped)
