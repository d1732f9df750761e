"""A conversation: history that fits into the context, answers one after another. Knows no terminal.

What an answer is depends on the messages, the settings and the seed alone, so a record with the same messages
gives the same text in a batch: in float32 up to ties of rounding, since what is computed together differs.
"""

import json
import re
import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, get_args

from textgen_cli.config import DecodingConfig
from textgen_cli.errors import InputError, OutputError, TextgenError, UsageError
from textgen_cli.generate.messages import check_messages
from textgen_cli.generate.request import Chunk, Engine, Request, derive_seed

ANSWER_SHARE = 4  # at least a quarter of the context stays free for the answer
_SURROGATE = re.compile("[\ud800-\udfff]")
NOT_IN_A_TALK = ("num_return_sequences", "logprobs")  # settings that mean nothing for one answer on a screen
KINDS = {f.name: f.type for f in fields(DecodingConfig) if f.name not in NOT_IN_A_TALK}


class Talker(Engine, Protocol):
    """An engine that can say how many tokens a conversation has and how many it takes, None where unknown."""

    def measure(self, messages: Sequence[dict[str, Any]]) -> tuple[int | None, int | None]: ...


@dataclass
class Conversation:
    """Messages so far and the engine that answers; `reopen` makes an engine for other settings."""

    decoding: DecodingConfig
    reopen: Callable[[DecodingConfig], Talker]
    seed: int
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)  # user, assistant, user, …
    dropped: int = 0  # messages that the last answer could no longer see
    _engine: Talker | None = None

    def open(self) -> None:
        """Load the model and try its chat template; UsageError and what loading raises."""
        if self.decoding.num_return_sequences > 1:
            raise UsageError("E-CONFLICT", "--num-return-sequences", "means nothing in a conversation")
        self.engine.measure([*self._head(), {"role": "user", "content": "?"}])

    @property
    def engine(self) -> Talker:
        if self._engine is None:
            self._engine = self.reopen(self.decoding)
        return self._engine

    def ask(self, text: str) -> Generator[Chunk]:
        """Answer a message; what has come when the answer is broken off stays in the history."""
        return self._answer([*self.messages, {"role": "user", "content": text}])

    def retry(self) -> Generator[Chunk]:
        """Answer the last message anew, as the next higher seed does."""
        asked = list(self.messages)
        while asked and asked[-1]["role"] == "assistant":
            asked.pop()
        if not asked:
            raise UsageError("E-CHAT", "/retry", "nothing has been asked yet")
        self.seed += 1
        return self._answer(asked)

    def _answer(self, asked: list[dict[str, Any]]) -> Generator[Chunk]:
        """The history becomes `asked` and the answer, unless it fails before there is any of it."""
        answer, whole = "", False
        try:
            for chunk in self._chunks(asked):
                answer += chunk.text
                whole = chunk.final is not None
                yield chunk
        finally:
            if answer or whole:
                self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _chunks(self, asked: list[dict[str, Any]]) -> Iterator[Chunk]:
        """The answer to as many of the newest turns as the engine takes."""
        starts = self._starts(asked)
        for start in starts:
            seen, begun = self._seen(asked, start), False
            try:
                for chunk in self.engine.stream([Request(0, 0, None, seen, derive_seed(self.seed, 0, 0))]):
                    if chunk.final and chunk.final.error:
                        raise chunk.final.error
                    self.dropped, begun = start, True
                    yield chunk
            except TextgenError as error:
                if error.name != "E-CONTEXT" or begun or start == starts[-1]:
                    raise
            else:
                return

    def _seen(self, asked: list[dict[str, Any]], start: int) -> tuple[dict[str, Any], ...]:
        return (*self._head(), *asked[start:])

    def _head(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _starts(self, asked: list[dict[str, Any]]) -> list[int]:
        """Where the part of `asked` may begin that is shown to the engine, at a user's message, best first.

        The first leaves room for an answer, where the engine can tell; else it is that of the last answer.
        """
        turns = [0, *(place for place, message in enumerate(asked) if place and message["role"] == "user")]
        for number, start in enumerate(turns):
            size, limit = self.engine.measure(self._seen(asked, start))
            if size is None:
                return [turn for turn in turns if turn >= self.dropped] or turns[-1:]
            if limit is None or size <= limit - limit // ANSWER_SHARE:
                return turns[number:]
        return turns[-1:]

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.messages, self.dropped = [], 0

    def set(self, name: str, value: str) -> None:
        """Change a decoding setting for the answers to come; UsageError where it cannot be, and nothing changes."""
        name = name.replace("-", "_")
        if name not in KINDS:
            known = ", ".join(sorted(KINDS))
            raise UsageError("E-CHAT", f"/set {name}", "is no decoding setting", hint=f"known are {known}")
        changed = replace(self.decoding, **{name: _parsed(name, value, getattr(self.decoding, name))})
        self._engine = self.reopen(changed)
        self.decoding, self.dropped = changed, 0
        if name == "seed":
            self.seed = secrets.randbits(63) if changed.seed == "random" else int(changed.seed)

    def save(self, path: Path) -> None:
        """Write the conversation as one JSONL record, as `generate --jsonl` reads it."""
        line = json.dumps({"messages": [*self._head(), *self.messages]}, ensure_ascii=False) + "\n"
        try:
            path.write_bytes(line.encode())
        except OSError as error:
            raise OutputError("E-WRITE", str(path), (error.strerror or str(error)).lower()) from error

    def load(self, path: Path) -> None:
        """Go on with a saved conversation; InputError where the file holds none, and nothing changes."""
        try:
            found = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=_whole)
        except OSError as error:
            raise InputError("E-READ", str(path), (error.strerror or str(error)).lower()) from error
        except (ValueError, RecursionError) as error:
            raise InputError("E-INPUT", str(path), f"is no JSON record: {error}") from error
        messages = check_messages(found.get("messages") if isinstance(found, dict) else None)
        leads = messages[0]["role"] == "system"
        self.system = messages[0]["content"] if leads else None
        self.messages, self.dropped = messages[1:] if leads else messages, 0


def _whole(found: dict[str, Any]) -> dict[str, Any]:
    """A JSON object whose texts hold no half characters, which no tokenizer takes."""
    return {
        k: _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", v) if isinstance(v, str) else v
        for k, v in found.items()
    }


def _parsed(name: str, value: str, now: Any) -> Any:
    """A value of the setting's own type; `none` takes the setting back, texts of a list are added to it."""
    kind = KINDS[name]
    kinds = {kind, *get_args(kind)}
    if value.lower() == "none":
        return getattr(DecodingConfig, name)
    if isinstance(now, tuple):
        return (*now, value)
    if bool in kinds:
        if value.lower() not in ("true", "false"):
            raise UsageError("E-CHAT", f"/set {name}", f"is true or false, not {value!r}")
        return value.lower() == "true"
    for make, what in ((int, "a whole number"), (float, "a number"), (Path, "a file")):
        if make in kinds:
            try:
                return make(value)
            except ValueError:
                raise UsageError("E-CHAT", f"/set {name}", f"is {what}, not {value!r}") from None
    return value
