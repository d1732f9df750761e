"""The wish to end a training, as a signal gives it, obeyed where nothing is lost by it.

A process that trains alone may leave a step or an evaluation in its midst; several leave together, behind a step. So
does one with DeepSpeed, which changes the weights as soon as it has the gradients.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from textgen_cli.finetune.group import ALONE, Group

ECHO = 1.0  # seconds in which the same signal again is the same request


@dataclass
class Stop:
    """A wish to end, as a signal gives it; raised where nothing is lost by it."""

    group: Group = ALONE
    signum: int | None = None
    at: float = 0.0
    open: bool = False  # whether it may be raised from the signal's handler itself
    before: dict[int, Any] = field(default_factory=dict)

    def check(self) -> None:
        """End here, in a step's midst, where that is wished for and nothing is left behind."""
        if self.signum is not None and self.group.alone:
            raise Stopped

    def agree(self) -> None:
        """End here, where all processes come, when one of them is to."""
        signum = self.group.largest(self.signum or 0)
        if signum:
            self.signum = signum
            raise Stopped

    def handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self.at = signum, time.monotonic()
            if self.open:
                self.open = False
                raise Stopped
        elif time.monotonic() - self.at >= ECHO:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """A block that may be left anywhere: it changes nothing."""
        self.open = self.group.size == 1
        try:
            yield
        finally:
            self.open = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals that end a process for this block. Only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                self.before[signum] = signal.signal(signum, self.handle)
        try:
            yield
        except Exception:
            self._give_back()
            if not self.group.leads:  # who ends it heard of this from the first one
                self.pass_on()
            raise
        finally:
            self._give_back()

    def _give_back(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def pass_on(self) -> None:
        """Hand the signal to whom it was meant for before."""
        if self.signum is not None:
            signal.raise_signal(self.signum)


class Stopped(BaseException):
    """A signal asked for the end; what stands is the state after the last whole step."""
