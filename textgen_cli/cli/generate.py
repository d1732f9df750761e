"""`textgen generate`: the prompt from argument and standard input, the text to standard output.

It knows how a prompt is put together and how texts are separated; not how they are made.
"""

import gc
import os
import select
from collections.abc import Generator
from pathlib import Path
from typing import Annotated

import typer

from textgen_cli.cli import signals
from textgen_cli.cli.console import Output, Reporter, reporter, require_stdout, tell, was_closed
from textgen_cli.cli.options import command
from textgen_cli.config import GenerateConfig
from textgen_cli.errors import InputError, RecordsFailed, UsageError
from textgen_cli.events import Event, Progress

PROMPT_LIMIT = 4 * 2**20  # bytes
EXAMPLES = """\
Examples:

textgen generate "Once upon a time"

textgen generate --chat "Name three rivers." --greedy -n 40

git diff | textgen generate --chat "Describe this change in one line."

textgen generate "Once upon a time" --max-length 50 --num-return-sequences 5 --no-repeat-ngram-size 2"""

PromptArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT", help="What to continue; piped text is added to it, `-` is piped text alone."
    ),
]


@command(GenerateConfig)
def generate(config: GenerateConfig, prompt: PromptArgument = None) -> None:
    """Continue a text, or answer a message with --chat; many of them with -i, --jsonl, --lines or --csv."""
    require_stdout()
    if config.decoding.logprobs is not None and not (config.batch.jsonl or config.batch.output):
        raise UsageError("E-CONFLICT", "--logprobs", "needs JSONL output", hint="add --jsonl or -o FILE")
    with reporter(config.verbose) as report:
        if _is_batch(config, prompt):
            _batch(config, prompt, report)
            return
        _check_single(config)
        if _is_conversation(config, prompt):
            _converse(config, report)
            return
        whole = whole_prompt(prompt, config.no_stdin, report)
        _lead_stdin_away()
        if config.prompting.show_prompt:
            _show(config, whole, report)
        else:
            _write(config, whole, report)


def _is_batch(config: GenerateConfig, prompt: str | None) -> bool:
    batch = config.batch
    return any((batch.input, batch.output, batch.jsonl, batch.lines, batch.csv))


def _check_single(config: GenerateConfig) -> None:
    """UsageError for an option of batches where there is a single text."""
    batch = config.batch
    given = {
        "--strict": batch.strict,
        "--max-failures": batch.max_failures,
        "--max-time": batch.max_time,
        "--shard": batch.shard,
    }
    for option, value in given.items():
        if value:
            raise UsageError("E-CONFLICT", option, "needs records", hint="-i, --lines, --jsonl or --csv")


def _is_conversation(config: GenerateConfig, prompt: str | None) -> bool:
    """Whether somebody sits there who can be talked with."""
    asked = config.prompting
    wanted = asked.chat or asked.task == "chat"
    plain = not (asked.show_prompt or asked.template or asked.template_file) and asked.task in (None, "chat")
    return wanted and plain and prompt is None and os.isatty(0) and os.isatty(1) and not config.no_stdin


def _converse(config: GenerateConfig, report: Reporter) -> None:
    from textgen_cli.cli.chat import converse
    from textgen_cli.generate.run import conversation

    converse(conversation(config, report), report)


def _show(config: GenerateConfig, prompt: str, report: Reporter) -> None:
    from textgen_cli.generate.run import show

    text = show(config, prompt, report)
    Output(before_terminal=report.hide).write(text + "\n")


def _batch(config: GenerateConfig, prompt: str | None, report: Reporter) -> None:
    """Many records, or one as JSONL: the input is a file, standard input, or the prompt argument."""
    from textgen_cli.generate.run import run_batch

    given = None if prompt in (None, "-") else _argument(prompt or "", "prompt")
    _check_input(config, given)
    reads_stdin = given is None and config.batch.input in (None, Path("-"))
    if reads_stdin and config.no_stdin:
        raise UsageError("E-CONFLICT", "--no-stdin", "leaves no input", hint="give -i FILE or a prompt")
    if reads_stdin and os.isatty(0):
        raise UsageError(
            "E-USAGE", "textgen generate", "no input", hint="give -i FILE, a prompt, or pipe records in"
        )
    if reads_stdin and was_closed(0):
        raise InputError("E-STDIN-CLOSED", "stdin", "is closed, and no input is given")
    written: list[Progress] = []

    def watch(event: Event) -> None:
        if isinstance(event, Progress) and event.unit == "records":
            written[:] = [event]
        report(event)

    try:
        summary = run_batch(config, given, Output(before_terminal=report.hide).lines(), watch)
    except (KeyboardInterrupt, signals.Interrupted):
        report.stop()
        if config.batch.output is not None:
            _tell_interrupted(written)
        raise
    report.stop()
    if summary.failed or summary.stopped:
        facts = (["failed"] if summary.failed else []) + (
            [f"stopped by --{summary.stopped}"] if summary.stopped else []
        )
        resume = "--resume goes on" if summary.stopped and config.batch.output else None
        subject = (
            f"{summary.failed} of {summary.records} records"
            if summary.failed
            else f"{summary.records} records"
        )
        raise RecordsFailed("E-RECORDS", subject, ", ".join(facts), hint=resume)


def _check_input(config: GenerateConfig, prompt: str | None) -> None:
    """UsageError where a prompt argument meets options that speak of an input."""
    given: dict[str, object] = {
        "-i": config.batch.input,
        "--lines": config.batch.lines,
        "--csv": config.batch.csv,
    }
    given["--shard"] = config.batch.shard
    for option, value in given.items():
        if prompt is not None and value:
            raise UsageError("E-CONFLICT", option, "cannot be used with a prompt argument")


def _tell_interrupted(written: list[Progress]) -> None:
    done, total = (written[-1].done, written[-1].total) if written else (0.0, None)
    of = "" if total is None else f" of {total:.0f}"
    resume = "; resume with --resume" if done else ""
    tell(f"textgen: interrupted: {done:.0f}{of} records written{resume}\n")


def _write(config: GenerateConfig, prompt: str, report: Reporter) -> None:
    """Write each text as it comes, a line end behind it and a blank line between two."""
    from textgen_cli.generate.run import run

    output = Output(before_terminal=report.hide)
    current = None
    chunks = run(config, prompt, report)
    try:
        for chunk in chunks:
            if current is None:  # everything heavy is imported and loaded by now: collect again
                gc.freeze()
                gc.enable()
            between = "\n" if current is not None and chunk.sequence != current else ""
            current = chunk.sequence
            output.write(between + chunk.text + ("\n" if chunk.final else ""))
    finally:
        if isinstance(chunks, Generator):
            chunks.close()  # stop computing at once when the reader is gone


def whole_prompt(argument: str | None, no_stdin: bool, report: Reporter) -> str:
    """The prompt from the argument and standard input: argument, blank line, piped text.

    Raises:
        UsageError: there is neither, and nobody would be asked for it.
        InputError: it is empty, too long or no UTF-8, or standard input is closed.
    """
    if argument == "-":
        if no_stdin:
            raise UsageError("E-CONFLICT", "-", "reads standard input, which --no-stdin leaves alone")
        argument = None
    given = None if argument is None else _argument(argument, "prompt")
    if no_stdin or os.isatty(0):
        if given is None:
            raise UsageError(
                "E-USAGE",
                "textgen generate",
                "no prompt",
                hint='give one: textgen generate "Once upon a time"',
            )
        return given
    if was_closed(0):
        if given is None:
            raise InputError("E-STDIN-CLOSED", "stdin", "is closed, and no prompt is given")
        return given
    report(Progress("read", "standard input"))
    piped = _utf8(_read(), "stdin")
    # The line end of the last line belongs to the line, as in $(command).
    piped = piped.removesuffix("\n").removesuffix("\r")
    if not piped and given is None:
        raise InputError("E-EMPTY", "stdin", "is empty, and no prompt is given")
    return "\n\n".join(filter(None, (given, piped)))


def _read() -> bytes:
    """All of descriptor 0, up to the limit."""
    data = bytearray()
    try:
        while True:
            select.select([0], [], [])  # somebody may have made the descriptor non-blocking
            piece = os.read(0, 2**16)
            if not piece:
                return bytes(data)
            data += piece
            if len(data) > PROMPT_LIMIT:
                raise InputError("E-TOO-LONG", "stdin", f"a prompt has at most {PROMPT_LIMIT} bytes")
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


def _lead_stdin_away() -> None:
    """Lead descriptor 0 to the null device: no library may take answers or records from it."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
