"""The flow of many records, the same for every wing: input -> records -> results -> output file or stdout.

Owns which form an input has, where results go, and how fast it is told to be. What a result is, the wing tells;
knows nothing of models.
"""

import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from textgen_cli.config import BatchConfig
from textgen_cli.errors import UsageError
from textgen_cli.events import Event, Notice, Progress, Report
from textgen_cli.text import batch, records
from textgen_cli.text.batch import Result, Summary
from textgen_cli.text.inputs import Source, open_source
from textgen_cli.text.job import Job, open_job
from textgen_cli.text.records import Record
from textgen_cli.text.windows import in_order, windows

WINDOW = 512  # records that are sorted by length and computed together
WINDOW_BYTES = 32 << 20  # what these may come to, so that memory holds windows of the longest lines too

Opened = TypeVar("Opened")
Pinned = dict[str, Any]


@dataclass(frozen=True)
class Wing:
    """What differs between the wings whose results are lines."""

    stage: str  # the word for what is done
    field: str  # what plain input fills: a prompt, a text
    # The job's fingerprint from (form, the record given as an argument, sha256 of the input's bytes).
    fingerprint: Callable[[str, dict[str, Any] | None, str | None], dict[str, Any]]
    # Results that become ready together, in input order, behind the first `done` records.
    compute: Callable[[Iterator[Record], int, Pinned, "Meter"], Iterator[list[Result]]]
    encode: Callable[[dict[str, Any]], bytes] | None = None  # None: JSONL
    form: str | None = None  # of the input, a key of `forms.READERS`; None: what `format_of` says
    seen: Callable[[dict[str, Any]], None] | None = (
        None  # told every output line, of a job's earlier lives too
    )


def run(
    wing: Wing,
    batching: BatchConfig,
    given: dict[str, Any] | None,
    stdout: BinaryIO,
    report: Report,
    pinned: Pinned,
) -> Summary:
    """Compute every record of the input, or the one `given`, into the output file or stdout.

    `pinned`: what must stay as it was when a job is resumed. The last Progress reported, also when it is broken
    off, says how many records are written. Raises InputError (input), OutputError, BusyError, ResumeError (output
    file) and what the wing raises.
    """
    limit = batch.parse_limit(batching.max_failures) if batching.max_failures else None
    form = wing.form or format_of(batching)
    with ExitStack() as stack:
        source = None if given is not None else stack.enter_context(_source(batching, report))
        if batching.unique_ids:
            _check_ids(wing, batching, form, report)
        sink: Job | batch.Stream = batch.Stream(stdout)
        if batching.output is not None:
            sink = stack.enter_context(_job(wing, batching, form, given, source, pinned, report))
            pinned = pinned | sink.pinned
            if wing.seen is not None:
                _tell_again(sink.out if sink.complete else sink.partial, wing.seen)
            if sink.complete:
                return Summary(0, 0)
        meter = Meter(report, _total(batching, form, source))
        found = sink.verify(records.warned(_records(wing, batching, form, source, given), report))
        groups = wing.compute(found, sink.done, pinned, meter)
        if wing.encode is not None and batching.output is None:
            groups = _told(groups, report)
        try:
            return batch.run_job(
                meter.counted(groups),
                sink,
                max_failures=limit,
                max_time=batching.max_time,
                encode=_encoder(wing, batching),
                stage=wing.stage,
                report=meter,
            )
        finally:
            meter(Progress(wing.stage, "records", float(sink.done), unit="records"))


def format_of(batching: BatchConfig) -> str:
    """The form of the input, a key of `forms.READERS`: as an option says, else as its name says."""
    for form in ("lines", "csv"):
        if getattr(batching, form):
            return form
    named = records.format_of(batching.input) if batching.input else "text"
    return "jsonl" if batching.jsonl and named == "text" else named


def window(batching: BatchConfig) -> int:
    """Records that are sorted by length and computed together."""
    return 1 if batching.rows == 1 else WINDOW


def writes_jsonl(batching: BatchConfig) -> bool:
    """Whether results are JSON objects and not lines for people."""
    return batching.jsonl or batching.output is not None


def results(
    records: Iterable[Record],
    done: int,
    size: int,
    opening: Callable[[], Opened],
    compute: Callable[[Opened, list[Record], frozenset[int]], Iterator[tuple[int, Result]]],
) -> Iterator[list[Result]]:
    """Results that become ready together, in input order, behind the `done` first records.

    `size`: records of a window. `opening` is called when the first record is there: an empty input loads no model.
    `compute` gives (record index, result) of a window's records in any order; those whose indices it is told are
    done already, and count only for what is computed together.
    """
    opened: Opened | None = None
    for start, members in windows(records, size, done, cost=_cost, budget=WINDOW_BYTES):
        if opened is None:
            opened = opening()
            gc.freeze()  # what is loaded by now stays: no collection needs to walk it again
        first = max(start, done)
        places = {record.index: place for place, record in enumerate(members, start)}
        finished = frozenset(index for index, place in places.items() if place < first)
        placed = ([(places[index], result)] for index, result in compute(opened, members, finished))
        yield from in_order(placed, first)


def _cost(record: Record) -> int:
    return record.size


def _source(batching: BatchConfig, report: Report) -> Source:
    where: Path | int = 0 if batching.input is None or batching.input == Path("-") else batching.input
    return open_source(where, report=report)


def _records(
    wing: Wing, batching: BatchConfig, form: str, source: Source | None, given: dict[str, Any] | None
) -> Iterator[Record]:
    if source is None:
        return iter([Record(0, given or {})])
    number, of = batching.sharding()
    found = records.read(source.stream, form, name=source.name, strict=batching.strict, field=wing.field)
    return records.shard(found, number, of)


def _check_ids(wing: Wing, batching: BatchConfig, form: str, report: Report) -> None:
    """A pass over the input of its own, before a job or a model is opened."""
    if batching.input is None or not batching.input.is_file():
        raise UsageError("E-CONFLICT", "--unique-ids", "needs a file to read twice", hint="give -i FILE")
    with _source(batching, report) as source:
        records.check_unique_ids(_records(wing, batching, form, source, None))


def _total(batching: BatchConfig, form: str, source: Source | None) -> int | None:
    """How many records there are, where that is cheap to know."""
    number, of = batching.sharding()
    count = 1 if source is None or form == "text" else None
    if source is not None and form in ("jsonl", "lines"):
        count = source.lines()
    return None if count is None else (count + of - number) // of


def _job(
    wing: Wing,
    batching: BatchConfig,
    form: str,
    given: dict[str, Any] | None,
    source: Source | None,
    pinned: Pinned,
    report: Report,
) -> Job:
    assert batching.output is not None
    if batching.output.suffix.lower() in (".csv", ".tsv"):
        raise UsageError("E-FORMAT", f"-o {batching.output}", "results are JSONL", hint="name it .jsonl")
    return open_job(
        batching.output,
        lambda: wing.fingerprint(form, given, source.sha256() if source else None),
        pinned=pinned,
        resume=batching.resume,
        restart=batching.restart,
        source=source.stat if source else None,
        report=report,
    )


def _encoder(wing: Wing, batching: BatchConfig) -> Callable[[dict[str, Any]], bytes]:
    """A line as bytes; encoded it is as good as written, and told."""
    encode = records.line if wing.encode is None or batching.output is not None else wing.encode
    seen = wing.seen
    if seen is None:
        return encode

    def told(fields: dict[str, Any]) -> bytes:
        seen(fields)
        return encode(fields)

    return told


def _tell_again(written: Path, seen: Callable[[dict[str, Any]], None]) -> None:
    """Tell the lines that stand already."""
    if written.exists():
        with written.open("rb") as file:
            for line in file:
                seen(json.loads(line))


def _told(groups: Iterable[list[Result]], report: Report) -> Iterator[list[Result]]:
    """Say which records failed, where the output has no place for it."""
    for group in groups:
        for result in group:
            if result.failed:
                error = result.outputs[0]["error"]
                fact = f"record {result.record.index}: [{error['code']}] {error['message']}"
                report(Notice(fact, name="W-RECORD"))
        yield group


class Meter:
    """A Report that adds to the progress of a batch how fast it goes and how long the rest will take."""

    def __init__(
        self,
        report: Report,
        total: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report, self._total, self._clock = report, total, clock
        self._since: float | None = None  # the model is there
        self._before = self._done = self._tokens = 0

    def begin(self, done: int) -> None:
        """Count from now on, `done` records being there already."""
        self._since, self._before = self._clock(), done

    def counted(self, groups: Iterable[list[Result]]) -> Iterator[list[Result]]:
        """Pass results on."""
        for group in groups:
            self._tokens += sum(result.tokens for result in group)
            yield group

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress) and event.unit == "records":
            total = None if self._total is None else float(self._total)
            event = Progress(event.stage, event.subject, event.done, total, event.unit, self._detail(event))
        self._report(event)

    def _detail(self, event: Progress) -> str:
        seconds = 0.0 if self._since is None else self._clock() - self._since
        done = event.done - self._before
        if seconds <= 0 or done <= 0:
            return ""
        said = f"{_rate(done / seconds)} records/s"
        if self._tokens:
            said += f", {_rate(self._tokens / seconds)} tokens/s"
        if self._total is None or event.done >= self._total:
            return said
        left = round((self._total - event.done) * seconds / done)
        hours, minutes = divmod(left // 60, 60)
        clock = f"{hours}:{minutes:02}:{left % 60:02}" if hours else f"{minutes}:{left % 60:02}"
        return f"{said}, {clock} left"


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"
