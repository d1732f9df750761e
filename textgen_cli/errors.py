"""The error tree: every failure a user can meet, with its exit code.

TextgenError
├── InternalError      1  a bug
├── UsageError         2  the command line cannot be obeyed
├── RecordsFailed      3  the run finished, some records hold an error
├── InputError         4  the input is unusable
├── ModelError         5  the model, tokenizer or adapter is unusable
├── SafetyError        6  refused for safety
├── NetworkError       7  network or remote failure after retries
├── OutputError        8  output, cache or state cannot be written
├── BusyError          9  another process holds it
├── ResumeError       10  the saved state belongs to another job
└── OutOfMemory       11  memory is not enough

Only these are turned into messages; any other exception is a bug.
"""

from collections.abc import Iterable
from typing import ClassVar


class TextgenError(Exception):
    """A failure with a name (`E-…`), the object it concerns, one fact and at most one hint."""

    exit_code: ClassVar[int] = 1

    def __init__(self, name: str, subject: str, fact: str, *, hint: str | None = None) -> None:
        super().__init__(name, subject, fact)
        self.name = name
        self.subject = subject
        self.fact = fact
        self.hint = hint

    def __str__(self) -> str:
        return f"[{self.name}] {self.subject}: {self.fact}"

    def record(self) -> dict[str, str]:
        """The `error` field of a failed record."""
        return {"code": self.name, "message": f"{self.subject}: {self.fact}"}


class InternalError(TextgenError):
    exit_code = 1


class UsageError(TextgenError):
    exit_code = 2


class RecordsFailed(TextgenError):
    exit_code = 3


class InputError(TextgenError):
    exit_code = 4


class ModelError(TextgenError):
    exit_code = 5


class SafetyError(TextgenError):
    exit_code = 6


class NetworkError(TextgenError):
    exit_code = 7


class OutputError(TextgenError):
    exit_code = 8


class BusyError(TextgenError):
    exit_code = 9


class ResumeError(TextgenError):
    exit_code = 10


class OutOfMemory(TextgenError):
    exit_code = 11


# When several failures meet, the first of these that occurred is the exit code.
PRECEDENCE = (2, 6, 10, 9, 8, 5, 4, 7, 11, 3, 1)


def worst(codes: Iterable[int]) -> int:
    """The exit code that wins among several; 0 when there is none."""
    seen = set(codes) - {0}
    return next((code for code in PRECEDENCE if code in seen), 0)
