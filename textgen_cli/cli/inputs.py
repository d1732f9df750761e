"""What a command is given: a text from argument and standard input, or many records; and how a batch ended.

Shared by the commands that read texts. It knows which options speak of input, not what becomes of it.
"""

import os
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from textgen_cli.cli import signals
from textgen_cli.cli.console import Reporter, tell, was_closed
from textgen_cli.config import BatchConfig
from textgen_cli.errors import InputError, RecordsFailed, UsageError
from textgen_cli.events import Event, Progress, Report
from textgen_cli.text.batch import Summary

TEXT_LIMIT = 4 * 2**20  # bytes


def is_batch(batch: BatchConfig) -> bool:
    """Whether records are meant and not a single text."""
    return any((batch.input, batch.output, batch.jsonl, batch.lines, batch.csv))


def check_single(batch: BatchConfig) -> None:
    """UsageError for an option of batches where there is a single text."""
    given = {
        "--strict": batch.strict,
        "--unique-ids": batch.unique_ids,
        "--max-failures": batch.max_failures,
        "--max-time": batch.max_time,
        "--shard": batch.shard,
    }
    for option, value in given.items():
        if value:
            raise UsageError("E-CONFLICT", option, "needs records", hint="-i, --lines, --jsonl or --csv")


def batch_argument(batch: BatchConfig, argument: str | None, what: str, no_stdin: bool) -> str | None:
    """The text argument that is a batch's only record; None: its records come from a file or standard input.

    Raises UsageError where there is no input, or one that contradicts another, InputError where it is closed.
    """
    given = None if argument in (None, "-") else _argument(argument or "", what)
    options: dict[str, object] = {"-i": batch.input, "--lines": batch.lines, "--csv": batch.csv}
    options["--shard"] = batch.shard
    for option, value in options.items():
        if given is not None and value:
            raise UsageError("E-CONFLICT", option, f"cannot be used with a {what} argument")
    if given is not None or batch.input not in (None, Path("-")):
        return given
    if no_stdin:
        raise UsageError("E-CONFLICT", "--no-stdin", "leaves no input", hint=f"give -i FILE or a {what}")
    if os.isatty(0):
        raise UsageError(
            "E-USAGE", "input", "there is none", hint=f"give -i FILE, a {what}, or pipe records in"
        )
    if was_closed(0):
        raise InputError("E-STDIN-CLOSED", "stdin", "is closed, and no input is given")
    return None


@contextmanager
def obeyed(batch: BatchConfig, report: Reporter) -> Iterator[tuple[Report, Callable[[Summary], None]]]:
    """(a report to hand on, what to call with the batch's end) while a batch runs.

    An interrupted batch says how far its file is; one with failures, or stopped by a limit, raises RecordsFailed.
    """
    written: list[Progress] = []
    ends: list[Summary] = []

    def watch(event: Event) -> None:
        if isinstance(event, Progress) and event.unit == "records":
            written[:] = [event]
        report(event)

    try:
        yield watch, ends.append
    except (KeyboardInterrupt, signals.Interrupted):
        report.stop()
        if batch.output is not None:
            _tell_interrupted(written)
        raise
    report.stop()
    for summary in ends:
        _raise_failures(summary, batch)


def _raise_failures(summary: Summary, batch: BatchConfig) -> None:
    if not (summary.failed or summary.stopped):
        return
    facts = ["failed"] if summary.failed else []
    facts += [f"stopped by --{summary.stopped}"] if summary.stopped else []
    many = f"{summary.records} records"
    subject = f"{summary.failed} of {many}" if summary.failed else many
    resume = "--resume goes on" if summary.stopped and batch.output else None
    raise RecordsFailed("E-RECORDS", subject, ", ".join(facts), hint=resume)


def _tell_interrupted(written: list[Progress]) -> None:
    done, total = (written[-1].done, written[-1].total) if written else (0.0, None)
    of = "" if total is None else f" of {total:.0f}"
    resume = "; resume with --resume" if done else ""
    tell(f"textgen: interrupted: {done:.0f}{of} records written{resume}\n")


def whole_text(argument: str | None, what: str, example: str, no_stdin: bool, report: Report) -> str:
    """The text from the argument and standard input: argument, blank line, piped text.

    `what`: a prompt, a text; `example`: a command that gives one.

    Raises:
        UsageError: there is neither, and nobody would be asked for it.
        InputError: it is empty, too long or no UTF-8, or standard input is closed.
    """
    if argument == "-":
        if no_stdin:
            raise UsageError("E-CONFLICT", "-", "reads standard input, which --no-stdin leaves alone")
        argument = None
    given = None if argument is None else _argument(argument, what)
    if no_stdin or os.isatty(0):
        if given is None:
            raise UsageError(
                "E-USAGE", " ".join(example.split()[:2]), f"no {what}", hint=f"give one: {example}"
            )
        return given
    if was_closed(0):
        if given is None:
            raise InputError("E-STDIN-CLOSED", "stdin", f"is closed, and no {what} is given")
        return given
    report(Progress("read", "standard input"))
    piped = _utf8(_read(what), "stdin")
    # The line end of the last line belongs to the line, as in $(command).
    piped = piped.removesuffix("\n").removesuffix("\r")
    if not piped and given is None:
        raise InputError("E-EMPTY", "stdin", f"is empty, and no {what} is given")
    return "\n\n".join(filter(None, (given, piped)))


def _read(what: str) -> bytes:
    """All of descriptor 0, up to the limit."""
    data = bytearray()
    try:
        while True:
            select.select([0], [], [])  # somebody may have made the descriptor non-blocking
            piece = os.read(0, 2**16)
            if not piece:
                return bytes(data)
            data += piece
            if len(data) > TEXT_LIMIT:
                raise InputError("E-TOO-LONG", "stdin", f"a {what} has at most {TEXT_LIMIT} bytes")
    except OSError as error:
        raise InputError("E-READ", "stdin", (error.strerror or str(error)).lower()) from error


def _argument(text: str, subject: str) -> str:
    """An argument's bytes as UTF-8, whatever the locale took them for."""
    try:
        return _utf8(os.fsencode(text), subject)
    except UnicodeEncodeError:
        return text  # from a settings file: it never was bytes in the locale's encoding


def _utf8(data: bytes, subject: str) -> str:
    """The text of these bytes; a byte order mark at its start is no part of it."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError("E-UTF8", subject, f"is not UTF-8 at byte {error.start}") from error


def lead_stdin_away() -> None:
    """Lead descriptor 0 to the null device: no library may take answers or records from it."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
