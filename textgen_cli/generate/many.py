"""A batch: records in, one line a sequence out, in input order, resumable.

Records go to the engine in windows, so that what is computed together depends on the input alone. Knows no
torch and no terminal; the files are text/job.py's.
"""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from textgen_cli.errors import TextgenError, UsageError
from textgen_cli.events import Event, Progress, Report
from textgen_cli.generate.engines import Opened
from textgen_cli.generate.request import Chunk, Completion, Request
from textgen_cli.text.batch import Result, failure, joined
from textgen_cli.text.records import Record
from textgen_cli.text.windows import in_order, windows

WINDOW = 512  # records that are sorted by length and batched together


def results(
    records: Iterable[Record], done: int, window: int, open_engine: Callable[[], Opened]
) -> Iterator[list[Result]]:
    """Results that become ready together, in input order, behind the `done` first records.

    The engine is opened when the first record is there: an empty input loads no model.
    """
    opened: Opened | None = None
    for start, members in windows(records, window, done):
        if opened is None:
            opened = open_engine()
            gc.freeze()  # what is loaded by now stays: no collection needs to walk it again
        first = max(start, done)
        yield from in_order(_window(opened, members, start, first), first)


def shown(records: Iterable[Record], open_engine: Callable[[], Opened]) -> Iterator[list[Result]]:
    """For each record what the model would see of it, as its `text`."""
    opened: Opened | None = None
    for record in records:
        opened = opened or open_engine()
        asked = _asked(opened, record)
        if not isinstance(asked, Result):
            asked = Result(record, [joined(record.fields, {"text": opened.rendered(asked[0])})])
        yield [asked]


def _asked(opened: Opened, record: Record) -> list[Request] | Result:
    """The requests of a record, or its failure. What is wrong with the command line is raised."""
    if record.error is not None:
        return failure(record, record.error)
    try:
        return opened.prompter(record)
    except UsageError:
        raise
    except TextgenError as error:
        return failure(record, error)


def _window(
    opened: Opened, members: Sequence[Record], start: int, first: int
) -> Iterator[list[tuple[int, Result]]]:
    """(position, result) of each record of a window as it becomes whole."""
    places = {record.index: place for place, record in enumerate(members, start)}
    requests: list[Request] = []
    count: dict[int, int] = {}
    failed: list[tuple[int, Result]] = []
    for record in members:
        asked = _asked(opened, record)
        if isinstance(asked, Result):
            failed.append((places[record.index], asked))
        else:
            requests += asked
            count[record.index] = len(asked)
    yield failed
    finished = frozenset(index for index, place in places.items() if place < first)
    by_index = {record.index: record for record in members}
    if len(finished) < len(members) and requests:
        for index, ended in _ended(opened.engine.stream(requests, finished), count):
            yield [(places[index], _result(by_index[index], ended))]


def _ended(
    chunks: Iterable[Chunk], count: dict[int, int]
) -> Iterator[tuple[int, list[tuple[str, Completion]]]]:
    """Each record's (text, completion) pairs in the order of its sequences, once all have ended."""
    texts: dict[tuple[int, int], list[str]] = defaultdict(list)
    ended: dict[int, dict[int, tuple[str, Completion]]] = defaultdict(dict)
    for chunk in chunks:
        key = chunk.index, chunk.sequence
        texts[key].append(chunk.text)
        if chunk.final:
            ended[chunk.index][chunk.sequence] = "".join(texts.pop(key)), chunk.final
            if len(ended[chunk.index]) == count[chunk.index]:
                yield chunk.index, [pair for _, pair in sorted(ended.pop(chunk.index).items())]


def _result(record: Record, ended: Sequence[tuple[str, Completion]]) -> Result:
    wrong = next((final.error for _, final in ended if final.error), None)
    if isinstance(wrong, UsageError):
        raise wrong
    if wrong:
        return failure(record, wrong)
    many = len(ended) > 1
    return Result(
        record,
        [output(record.fields, text, final, n if many else None) for n, (text, final) in enumerate(ended)],
    )


def output(
    fields: dict[str, Any], text: str, final: Completion, sequence: int | None = None
) -> dict[str, Any]:
    """One output line: the input's fields, then what was generated."""
    ours: dict[str, Any] = {} if sequence is None else {"sequence": sequence}
    ours |= {"text": text, "finish_reason": final.finish_reason}
    ours |= {"prompt_tokens": final.prompt_tokens, "completion_tokens": final.completion_tokens}
    if final.logprobs is not None:
        ours["logprobs"] = final.logprobs
    return joined(fields, ours | final.extra)


class Meter:
    """A Report that adds to the progress of a batch how fast it goes and how long the rest will take."""

    def __init__(self, report: Report, total: int | None, clock: Callable[[], float]) -> None:
        self._report, self._total, self._clock = report, total, clock
        self._since: float | None = None  # the model is there
        self._before = self._done = self._tokens = 0

    def begin(self, done: int) -> None:
        """Count from now on, `done` records being there already."""
        self._since, self._before = self._clock(), done

    def counted(self, groups: Iterable[list[Result]]) -> Iterator[list[Result]]:
        """Pass results on."""
        for group in groups:
            lines = (fields for result in group if not result.failed for fields in result.outputs)
            self._tokens += sum(fields.get("completion_tokens") or 0 for fields in lines)
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
