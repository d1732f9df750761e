"""The real face with commands that provoke what a test needs: run as a program of its own."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from textgen_cli.__main__ import open_missing_descriptors

closed = open_missing_descriptors()

from textgen_cli.cli import console  # noqa: E402
from textgen_cli.cli.app import app, run  # noqa: E402
from textgen_cli.cli.generate import EXAMPLE  # noqa: E402
from textgen_cli.cli.inputs import whole_text  # noqa: E402
from textgen_cli.cli.signals import Interrupted, interruptible  # noqa: E402
from textgen_cli.errors import BusyError, ModelError, OutOfMemory, ResumeError, SafetyError  # noqa: E402
from textgen_cli.events import Notice, Progress  # noqa: E402


class OutOfMemoryError(RuntimeError):
    """Named as torch's class is."""


ERRORS: dict[str, BaseException] = {
    "model": ModelError("E-GGUF", "file.gguf", "array is longer than the file", hint="fetch it again"),
    "safety": SafetyError("E-CODE", "org/name", "holds code"),
    "busy": BusyError("E-LOCKED", "out", "is held"),
    "resume": ResumeError("E-JOB", "out", "differs"),
    "oom": OutOfMemory("E-MEMORY", "batch", "too large"),
    "hostile": ModelError("E-X", "a\x1b]52;c;x\x07\nb", "\u202e" + "long " * 100, hint="\x9bm"),
    "secret": ModelError("E-X", "https://me:pass-word@host/x", "hf_abcdefgh123 and own-secret-value"),
    "bug": ValueError("what\x1b[2J"),
    "memory": MemoryError(),
    "torch-memory": OutOfMemoryError("CUDA out of memory"),
    "cpu-memory": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    "foreign-pipe": BrokenPipeError(32, "Broken pipe"),
    "system-exit": SystemExit("a library leaves"),
}


@app.command(name="raise")
def _raise(name: str) -> None:
    raise ERRORS[name]


@app.command()
def lines(count: int) -> None:
    """Write numbered lines; say on stderr how many were written before the end."""
    output = console.Output()
    done = 0
    try:
        for done in range(count):
            output.write(f"line {done}\n")
    finally:
        if marker := os.environ.get("MARKER"):
            Path(marker).write_text(str(done))


@app.command()
def show(text: str) -> None:
    """Write each of the pieces, which are separated by |, with Python's escapes."""
    with console.reporter(verbose=False) as report:
        output = console.Output(before_terminal=report.hide)
        for piece in text.split("|"):
            report(Progress("generate", "x"))
            output.write(piece.encode().decode("unicode_escape"))


@app.command()
def work(verbose: Annotated[bool, typer.Option("-v")] = False, seconds: float = 0.0) -> None:
    """Report events, then wait."""
    with console.reporter(verbose) as report:
        report(Notice("chose the CPU \x1b[2J"))
        for done in range(5):
            report(Progress("download", "model [b]x[/b]", done * 1e6, 4e6, "bytes"))
            time.sleep(seconds / 5)
        report(Notice("the file is old", name="W-OLD"))
        report(Progress("load", "model"))
        time.sleep(0.15 if seconds else 0)


@app.command()
def prompt(argument: Annotated[str | None, typer.Argument()] = None, no_stdin: bool = False) -> None:
    """Write the prompt that generate would use, and what is left on standard input."""
    with console.reporter(verbose=False) as report:
        whole = whole_text(argument, "prompt", EXAMPLE, no_stdin, report)
        report.hide()
        console.Output().write(json.dumps(whole))


@app.command()
def talk() -> None:
    """Answer Ctrl-C and go on; leave on anything else."""
    while True:
        try:
            with interruptible():
                console.Output().write("waiting\n")
                time.sleep(30)
        except KeyboardInterrupt:
            console.Output().write("stopped\n")


@app.command()
def hold(folder: Path, swallow: bool = False, slow: bool = False) -> None:
    """Wait for a signal; remove the file `ready` on the way out."""
    ready = folder / "ready"
    try:
        ready.touch()
        time.sleep(30)
    except (KeyboardInterrupt, Interrupted):
        if not swallow:
            raise
    finally:
        ready.unlink()
        if slow:
            (folder / "cleaning").touch()
            time.sleep(30)


sys.exit(run(sys.argv[1:], closed))
