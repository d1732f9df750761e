"""Plain values between the generate flow and its engines: what to generate, and what came of it.

Knows no engine, no model and no network; both engines speak it.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol

from textgen_cli.errors import InternalError, TextgenError


@dataclass(frozen=True)
class Request:
    """One sequence to be generated: exactly one of `prompt`, `messages` and `pair` is set."""

    index: int  # record number
    sequence: int  # 0..N-1 within the record
    prompt: str | None  # raw text to continue
    messages: tuple[dict[str, Any], ...] | None  # a conversation: role, content
    seed: int  # this sequence's own stream: derive_seed(seed, index, sequence)
    pair: tuple[str, str] | None = None  # question and context, for models that mark the answer in it
    stop: tuple[str, ...] = ()  # strings that end this text, besides those of the run
    trim: bool = False  # blanks around the text are no part of it
    source_code: str | None = None  # the language the input is in, as the tokenizer names it
    target_code: str | None = None  # the language token that begins the output

    def __post_init__(self) -> None:
        if [self.prompt, self.messages, self.pair].count(None) != 2:
            raise InternalError(
                "E-INTERNAL", f"record {self.index}", "needs one of prompt, messages and pair"
            )


@dataclass(frozen=True)
class Completion:
    """How a sequence ended; it comes with the last chunk."""

    finish_reason: str  # stop, length, filter, error
    prompt_tokens: int | None
    completion_tokens: int | None
    logprobs: list[dict[str, Any]] | None = None  # one a token: token, logprob (nats), top
    error: TextgenError | None = None  # this record failed, the run goes on
    extra: dict[str, Any] = field(default_factory=dict)  # what this kind of model says besides
    # What the model read and what it answered, an end token included, for who looks at it again.
    tokens: tuple[Sequence[int], Sequence[int]] | None = None


@dataclass(frozen=True)
class Chunk:
    """A piece of one sequence's text; the whole text is the join of its chunks."""

    index: int
    sequence: int
    text: str
    final: Completion | None = None


class Engine(Protocol):
    """Turns requests into text. Chunks of several requests may interleave; each names its own.

    `done`: records whose results stand already. They still shape the batches, but need no text.
    """

    def stream(self, requests: Sequence[Request], done: Collection[int] = ()) -> Iterator[Chunk]: ...


def derive_seed(seed: int, index: int, sequence: int) -> int:
    """The seed (0 to 2^63-1) of one sequence of one record; it depends on nothing else, for ever."""
    name = f"textgen:{seed}:{index}:{sequence}".encode("ascii")
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "big") >> 1
