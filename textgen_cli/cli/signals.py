"""Signals: the first one cleans up, then the process dies of that very signal.

It owns the handlers of SIGINT, SIGTERM and SIGHUP and the death by signal; SIGPIPE arrives here as a
failed write. It knows no command and no stream but the terminal's cursor.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

# Seconds in which a repeated signal is the same request: `timeout` sends SIGTERM to the process and again
# to its group, a closing terminal sends SIGHUP twice. Later repeats mean: now.
ECHO = {signal.SIGINT: 0.05, signal.SIGTERM: 1.0, signal.SIGHUP: 1.0}

# What the terminal must hear even when the process dies at once: a drawn bar hides the cursor.
last_words = b""

_received: int | None = None
_received_at = 0.0


class Interrupted(BaseException):
    """SIGTERM, SIGHUP or a gone reader ends the process; raised so that context managers run."""


def interrupt(signum: int) -> NoReturn:
    """Note that the process is to die of `signum` and unwind.

    Raises:
        KeyboardInterrupt: for SIGINT, behind which libraries clean up too.
        Interrupted: for any other.
    """
    global _received, _received_at
    if _received is None:
        _received, _received_at = signum, time.monotonic()
    raise KeyboardInterrupt if signum == signal.SIGINT else Interrupted(signum)


def received() -> int | None:
    """The first signal that asked the process to end, also where something swallowed the exception."""
    return _received


def _handle(signum: int, _frame: FrameType | None) -> None:
    if _received is None:
        interrupt(signum)
    if signum == _received and time.monotonic() - _received_at >= ECHO[signal.Signals(signum)]:
        die(signum)


def _unraisable(lost: "sys.UnraisableHookArgs") -> None:
    """Where Python drops the handler's exception (inside a __del__), the signal comes again."""
    global _received
    if _received is None or not isinstance(lost.exc_value, KeyboardInterrupt | Interrupted):
        sys.__unraisablehook__(lost)
        return
    signum, _received = _received, None
    # Not from here: what is raised in this hook is dropped too.
    again = threading.Timer(0.02, signal.pthread_kill, (threading.get_ident(), signum))
    again.daemon = True
    again.start()


def install() -> None:
    """Handle the three signals, except those that the parent told us to ignore (nohup)."""
    sys.unraisablehook = _unraisable
    for signum in ECHO:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _handle)


def uninstall() -> None:
    """Let a signal end the process at once: nothing is left to clean up."""
    for signum in ECHO:
        if signal.getsignal(signum) is _handle:
            signal.signal(signum, signal.SIG_DFL)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block Ctrl-C only raises KeyboardInterrupt: the process goes on where that is caught."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is _handle:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def die(signum: int) -> NoReturn:
    """End the process by `signum`, so that the parent sees the true cause."""
    try:
        os.write(2, last_words)
    except OSError:
        pass
    signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signum})
    os.kill(os.getpid(), signum)
    os._exit(128 + signum)  # only where the signal was held back from outside
