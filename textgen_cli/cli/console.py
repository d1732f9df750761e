"""The streams: stdout for data, stderr for people. What is a terminal, and what may be written to it.

It owns descriptors 1 and 2 and how progress is drawn; it does not know what the data mean.
"""

import io
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

from textgen_cli.cli import signals
from textgen_cli.errors import OutputError, TextgenError
from textgen_cli.events import Event, Measured, Notice, Progress
from textgen_cli.text.sanitize import Sanitizer, clip, redact, visible

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

SHOW_CURSOR = b"\x1b[?25h"
PLAIN_INTERVAL = 3.0  # seconds between two plain progress lines
PATIENCE = 1.0  # seconds that a full stderr may take to drain before the text for people is dropped
LOOKED_AT = 10_000  # characters of a text that are searched for secrets before it is cut
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "TEXTGEN_API_KEY")

_closed: frozenset[int] = frozenset()


class _Stdout(io.FileIO):
    """Descriptor 1 whose failures are ours: a gone reader is SIGPIPE, a full disk an OutputError."""

    def write(self, data: Any) -> int:
        try:
            while (count := super().write(data)) is None:
                select.select([], [self], [])  # the descriptor was made non-blocking by somebody else
            return count
        except BrokenPipeError:
            signals.interrupt(signal.SIGPIPE)
        except OSError as error:
            discard_stdout()
            raise OutputError("E-WRITE", "stdout", (error.strerror or str(error)).lower()) from error


def open_streams(closed: frozenset[int]) -> None:
    """Make the standard streams UTF-8 whatever the locale, and stdout fail in our words.

    `closed`: the descriptors that were closed when the program started.
    """
    global _closed
    _closed = closed
    raw = io.BufferedWriter(_Stdout(1, "w", closefd=False))
    sys.stdout = io.TextIOWrapper(raw, "utf-8", "replace", newline="\n")
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - likewise


def was_closed(descriptor: int) -> bool:
    """Whether the descriptor was closed when the program started."""
    return descriptor in _closed


def discard_stdout() -> None:
    """Lead descriptor 1 to the null device: what could not be written shall not fail again at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def require_stdout() -> None:
    """Refuse to work for a closed stdout.

    Raises:
        OutputError: stdout was closed when the program started.
    """
    if was_closed(1):
        raise OutputError("E-STDOUT-CLOSED", "stdout", "is closed, the result could not be written")


class Output:
    """Data on stdout: byte for byte into a pipe or file, sanitised onto a terminal."""

    def __init__(self, before_terminal: Callable[[], None] = lambda: None) -> None:
        require_stdout()
        sys.stdout.flush()
        # Unbuffered: what a signal interrupts is neither lost in a buffer nor written twice from it.
        self._raw = cast(io.BufferedWriter, sys.stdout.buffer).raw
        self._sanitizer = Sanitizer() if sys.stdout.isatty() else None
        self._before_terminal = before_terminal

    def write(self, text: str) -> None:
        """Write the text at once; a character that is no Unicode scalar value becomes "?"."""
        if self._sanitizer is not None:
            self._before_terminal()
            text = self._sanitizer.feed(text)
        data = memoryview(text.encode("utf-8", "replace"))
        while data:
            data = data[self._raw.write(data) :]

    def lines(self) -> BinaryIO:
        """This output as a stream of UTF-8 bytes."""
        return cast(BinaryIO, _Lines(self))


class _Lines(io.RawIOBase):
    """Whole lines of bytes for an Output, as a stream that a batch writes to."""

    def __init__(self, output: "Output") -> None:
        self._output = output

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._output.write(bytes(data).decode("utf-8", "replace"))
        return len(data)


def safe(text: str) -> str:
    """Text of any origin for a message: one line, secrets covered, control characters shown, cut."""
    return clip(_redacted(text[:LOOKED_AT]))


def _redacted(text: str) -> str:
    return redact(text, (os.environ.get(name, "") for name in SECRET_VARIABLES))


def tell(text: str) -> None:
    """Write to stderr for people; a stderr that fails or is full never matters."""
    data = text.encode("utf-8", "replace")
    try:
        # A pipe that is ready takes 512 bytes at least without blocking (POSIX).
        while data and select.select([], [2], [], PATIENCE)[1]:
            data = data[os.write(2, data[:512]) :]
    except OSError:
        pass


def tell_error(error: TextgenError) -> None:
    """The two lines of an error: what, and at most one thing to do."""
    tell(f"textgen: error: [{error.name}] {safe(error.subject)}: {safe(error.fact)}\n")
    if error.hint:
        tell(f"textgen: hint: {safe(error.hint)}\n")


def tell_traceback(text: str) -> None:
    """A traceback, for TEXTGEN_DEBUG."""
    tell(visible(_redacted(text)))


class _ForgivingStderr(io.TextIOBase):
    """A file for Rich on descriptor 2 that never fails."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        tell(text)
        return len(text)

    def isatty(self) -> bool:
        return os.isatty(2)

    def fileno(self) -> int:
        return 2


def forgiving_stderr() -> IO[str]:
    """A file on descriptor 2 whose failures never matter."""
    return cast(IO[str], _ForgivingStderr())


def draws() -> bool:
    """Whether progress may be drawn: stderr is a terminal that can."""
    return os.isatty(2) and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


class Reporter:
    """A Report that shows events to people on stderr."""

    def __init__(self, verbose: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._verbose = verbose
        self._clock = clock
        self._draws = draws()
        self._bar: Bar | None = None
        self._shown: tuple[str, str, bool] | None = None  # stage, subject, whether the end is known
        self._told_at = -math.inf
        self._lock = threading.RLock()  # several threads may fetch

    def __call__(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, Notice):
                self._note(event)
            elif isinstance(event, Measured):
                pass  # figures of a training, which live.py shows
            elif self._draws:
                self._draw(event)
            elif self._verbose and not event.part and self._clock() - self._told_at >= PLAIN_INTERVAL:
                self._told_at = self._clock()
                tell(f"textgen: {_label(event)} {_amount(event)}".rstrip() + "\n")

    def hide(self) -> None:
        """Take the bar away for good, since text follows on the same terminal."""
        with self._lock:
            self.stop()
            self._draws = False

    def stop(self) -> None:
        """Take the bar away until the next event."""
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
            self._bar = self._shown = None
            signals.last_words = b""

    def _note(self, notice: Notice) -> None:
        line = worded(notice, self._verbose)
        if line is None:
            return
        if self._bar is None:
            tell(line + "\n")
        else:
            self._bar.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _draw(self, event: Progress) -> None:
        kind = (event.stage, event.subject, event.total is not None)
        if self._bar is None or kind != self._shown:
            self.stop()
            self._bar, self._shown = _new_bar(event), kind
            signals.last_words = SHOW_CURSOR
            self._bar.start()
        if event.part:
            self._draw_part(self._bar, event)
            return
        task = self._bar.task_ids[0]
        self._bar.update(task, completed=event.done, total=event.total, amount=_amount(event))

    def _draw_part(self, bar: "Bar", event: Progress) -> None:
        """A bar for each thing that is under way, below that of the whole; gone when it is done."""
        task = next((task.id for task in bar.tasks if task.fields.get("part") == event.part), None)
        if event.done == event.total:
            if task is not None:
                bar.remove_task(task)
        elif task is None:
            name = f"  {safe(event.part)}"
            bar.add_task(
                name, total=event.total, completed=int(event.done), amount=_amount(event), part=event.part
            )
        else:
            bar.update(task, completed=event.done, amount=_amount(event))


def worded(notice: Notice, verbose: bool) -> str | None:
    """A notice as a line for people; None where it is not to be shown."""
    if notice.name == "hint":  # a thing to try, for somebody who sits there
        return f"textgen: hint: {safe(notice.text)}" if os.isatty(2) else None
    if notice.name:
        return f"textgen: warning: [{notice.name}] {safe(notice.text)}"
    return f"textgen: {safe(notice.text)}" if verbose else None


def _new_bar(event: Progress) -> "Bar":
    # Rich's progress module is wanted by long work only, and costs a tenth of a second.
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bar

    columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}", markup=False)]
    if event.total is not None:
        columns.append(BarColumn())
    columns.append(TextColumn("{task.fields[amount]}", markup=False))
    console = Console(file=forgiving_stderr(), force_terminal=True)
    bar = Bar(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    bar.add_task(_label(event), total=event.total, amount="")
    return bar


def _label(event: Progress) -> str:
    return f"{event.stage} {safe(event.subject)}".rstrip()


def _amount(event: Progress) -> str:
    """`12.3/98.2 MB`, `40/128 tokens`, or nothing where only the stage matters."""
    if not event.unit or not event.done:
        return ""
    scale, unit, form = (1e6, "MB", ".1f") if event.unit == "bytes" else (1.0, event.unit, ".0f")
    total = "" if event.total is None else f"/{event.total / scale:{form}}"
    detail = f", {safe(event.detail)}" if event.detail else ""
    return f"{event.done / scale:{form}}{total} {unit}{detail}"


@contextmanager
def reporter(verbose: bool) -> Iterator[Reporter]:
    """A Reporter whose bar is gone when the block ends, however it ends."""
    report = Reporter(verbose)
    try:
        yield report
    finally:
        report.hide()
