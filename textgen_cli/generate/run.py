"""The flow of generate: records become requests, an engine answers, results go where they were asked for.

One prompt streams its text; many records go through text/batch.py. Knows no torch and no terminal: engines
are opened in engines.py.
"""

import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from textgen_cli.config import BatchConfig, GenerateConfig
from textgen_cli.errors import UsageError
from textgen_cli.events import Notice, Progress, Report, silent
from textgen_cli.generate import many, ranked
from textgen_cli.generate.engines import Opened, check, open_engine, talker
from textgen_cli.generate.fingerprint import fingerprint
from textgen_cli.generate.request import Chunk
from textgen_cli.generate.talk import Conversation
from textgen_cli.text import batch, records
from textgen_cli.text.batch import Result, Summary
from textgen_cli.text.inputs import Source, open_source
from textgen_cli.text.job import Job, open_job
from textgen_cli.text.records import Record


def run(config: GenerateConfig, prompt: str, report: Report) -> Iterator[Chunk]:
    """Generate from one prompt; chunks of sequence 0 first, then of 1, and so on.

    Raises what `model.load` raises; a sequence that fails raises its own error.
    """
    opened = _open_for_one(config, settle_seed(config.decoding.seed, report), report)
    requests = opened.prompter(Record(0, {"prompt": prompt}))
    keys = [(request.index, request.sequence) for request in requests]
    for chunk in in_order(keys, opened.engine.stream(requests)):
        if chunk.final and chunk.final.error:
            raise chunk.final.error
        yield ranked.as_lines(chunk)


def show(config: GenerateConfig, prompt: str, report: Report) -> str:
    """What the model would see of a prompt, as text with its special tokens."""
    opened = _open_for_one(config, 0, report)
    return opened.rendered(opened.prompter(Record(0, {"prompt": prompt}))[0])


def _open_for_one(config: GenerateConfig, seed: int, report: Report) -> Opened:
    check(config, plain=True)
    return open_engine(config, seed, report)


def conversation(config: GenerateConfig, report: Report) -> Conversation:
    """A conversation with the model, which is loaded once; settings may change under way."""
    check(config, plain=True)
    seed = settle_seed(config.decoding.seed, report)
    return Conversation(config.decoding, talker(config, report), seed, config.prompting.system)


def run_batch(config: GenerateConfig, prompt: str | None, stdout: BinaryIO, report: Report) -> Summary:
    """Generate for every record of the input, or for one prompt as a record, into the output file or stdout.

    The last Progress it reports, also when it is broken off, says how many records are written. Raises
    InputError (input), OutputError, BusyError, ResumeError (output file) and what `model.load` raises.
    """
    batching = config.batch
    limit = batch.parse_limit(batching.max_failures) if batching.max_failures else None
    form = _format(batching)
    check(config, plain=prompt is not None or form in ("text", "lines"))
    with ExitStack() as stack:
        source = None if prompt is not None else stack.enter_context(_source(batching, report))
        sink, pinned = _sink(config, form, source, prompt, stdout, report)
        if isinstance(sink, Job):
            stack.enter_context(sink)
            if sink.complete:
                return Summary(0, 0)
        if config.decoding.seed == "random":
            report(Notice(f"seed {pinned['seed']}"))
        meter = many.Meter(report, _total(config, form, source), time.monotonic)

        def opening() -> Opened:
            date = datetime.fromisoformat(pinned["date"])
            opened = open_engine(config, int(pinned["seed"]), report, date)
            meter.begin(sink.done)
            return opened

        found = sink.verify(_records(config, form, source, prompt))
        if config.prompting.show_prompt:
            groups = many.shown(found, opening)
        else:
            window = 1 if batching.rows == 1 else many.WINDOW
            groups = many.results(found, sink.done, window, opening)
        encode = records.line
        if not _writes_jsonl(batching):
            encode, groups = _plain_line, _told(groups, report)
        try:
            return batch.run_job(
                meter.counted(groups),
                sink,
                max_failures=limit,
                max_time=batching.max_time,
                encode=encode,
                report=meter,
            )
        finally:
            meter(Progress("generate", "records", float(sink.done), unit="records"))


def _source(config: BatchConfig, report: Report) -> Source:
    where: Path | int = 0 if config.input is None or config.input == Path("-") else config.input
    return open_source(where, report=report)


def _records(
    config: GenerateConfig, form: str, source: Source | None, prompt: str | None
) -> Iterator[Record]:
    if source is None:
        return iter([Record(0, {"prompt": prompt})])
    number, of = config.batch.sharding()
    found = records.read(source.stream, form, name=source.name, strict=config.batch.strict)
    return records.shard(found, number, of)


def _total(config: GenerateConfig, form: str, source: Source | None) -> int | None:
    """How many records there are, where that is cheap to know."""
    number, of = config.batch.sharding()
    count = 1 if source is None or form == "text" else None
    if source is not None and form in ("jsonl", "lines"):
        count = source.lines()
    return None if count is None else (count + of - number) // of


def _format(config: BatchConfig) -> str:
    for form in ("lines", "csv"):
        if getattr(config, form):
            return form
    named = records.format_of(config.input) if config.input else "text"
    return "jsonl" if config.jsonl and named == "text" else named


def _sink(
    config: GenerateConfig,
    form: str,
    source: Source | None,
    prompt: str | None,
    stdout: BinaryIO,
    report: Report,
) -> tuple[Job | batch.Stream, dict[str, Any]]:
    """Where results go, and what holds for the whole job: the number it draws from and its date."""
    seed = settle_seed(config.decoding.seed, silent)
    pinned = {"seed": seed, "date": datetime.now().isoformat()}  # noqa: DTZ005 - templates mean local time
    batching = config.batch
    if batching.output is None:
        return batch.Stream(stdout), pinned
    if config.prompting.show_prompt:
        raise UsageError("E-CONFLICT", "--show-prompt", "cannot be used with -o", hint="drop -o")
    if batching.output.suffix.lower() in (".csv", ".tsv"):
        raise UsageError("E-FORMAT", f"-o {batching.output}", "results are JSONL", hint="name it .jsonl")
    job = open_job(
        batching.output,
        lambda: fingerprint(config, form, prompt, source.sha256() if source else None, report),
        pinned=pinned,
        resume=batching.resume,
        restart=batching.restart,
        source=source.stat if source else None,
        report=report,
    )
    return job, pinned | job.pinned


def _writes_jsonl(config: BatchConfig) -> bool:
    return config.jsonl or config.output is not None


def _plain_line(fields: dict[str, Any]) -> bytes:
    """A text alone with a line end; a failed record is an empty line."""
    return str("" if "error" in fields else fields["text"]).encode("utf-8", "replace") + b"\n"


def _told(groups: Iterable[list[Result]], report: Report) -> Iterator[list[Result]]:
    """Say which records failed, where the output has no place for it."""
    for group in groups:
        for result in group:
            if result.failed:
                error = result.outputs[0]["error"]
                fact = f"record {result.record.index}: [{error['code']}] {error['message']}"
                report(Notice(fact, name="W-RECORD"))
        yield group


def settle_seed(seed: str, report: Report) -> int:
    """The number a run draws from; `random` picks one and says it."""
    if seed != "random":
        return int(seed)
    drawn = secrets.randbits(63)
    report(Notice(f"seed {drawn}"))
    return drawn


def in_order(keys: Iterable[tuple[int, int]], chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Chunks of interleaved sequences, one sequence after another in the order of `keys` (index, sequence).

    The chunks of the sequence whose turn it is pass at once; the others wait.
    """
    waiting: dict[tuple[int, int], list[Chunk]] = {key: [] for key in keys}
    for chunk in chunks:
        waiting[chunk.index, chunk.sequence].append(chunk)
        while waiting:
            turn = next(iter(waiting))
            held, waiting[turn] = waiting[turn], []
            yield from held
            if not (held and held[-1].final):
                break
            del waiting[turn]
