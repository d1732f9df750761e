"""`--safety` on generate: prompts and texts are judged by lists; the unsafe is told, hidden, dropped or redrawn.

An engine around any engine. Owns what becomes of a verdict; what is unsafe stands in text/safety.py.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from textgen_cli.errors import SafetyError
from textgen_cli.events import Notice, Report
from textgen_cli.generate.request import Chunk, Completion, Request, derive_seed
from textgen_cli.text.safety import Judge, Match, Rules, hidden, judged

DRAWS_AGAIN = 3
_BEFORE = 2000  # characters of a prompt that are looked at together with its continuation


@dataclass
class _Sequence:
    """A request and the judging of its text."""

    request: Request
    judge: Judge
    found: list[dict[str, Any]]  # matches in the prompt
    draws: int = 1
    held: str = ""  # judged as far as can be, and not given out
    failed: SafetyError | None = None  # it could not be judged

    def verdict(self) -> dict[str, Any]:
        """The record's field `safety`."""
        matches = self.found + [_told(match, "text") for match in self.judge.matches]
        more = {"draws": self.draws} if self.draws > 1 else {}
        return {"safety": {"unsafe": bool(matches), "matches": matches, **more}}


def _told(match: Match, where: str, message: int | None = None) -> dict[str, Any]:
    """A match as plain values; the list by its name, since no record holds a path."""
    rule = match.rule
    place = {"where": where} if message is None else {"where": where, "message": message}
    return place | {
        "list": rule.list, "line": rule.line, "rule": rule.text, "start": match.start, "end": match.end,
    }  # fmt: skip


@dataclass(frozen=True)
class GuardedEngine:
    """Another engine whose texts are judged.

    `action`: flag, redact, drop or retry. `continues`: a raw prompt and its text are one text, in which a phrase may
    lie over the seam. `alone`: nobody reads records, so a dropped text is an error. `report` is told what has no
    place in a record.
    """

    engine: Any  # an Engine, or a Talker where `measure` is asked
    rules: Rules
    action: str
    report: Report
    continues: bool = True
    alone: bool = False
    talks: bool = False  # a conversation, whose older messages were told already

    def measure(self, messages: Sequence[dict[str, Any]]) -> tuple[int | None, int | None]:
        """What the engine says of a conversation's size."""
        size: tuple[int | None, int | None] = self.engine.measure(messages)
        return size

    def stream(self, requests: Sequence[Request], done: Collection[int] = ()) -> Iterator[Chunk]:
        """The engine's chunks as far as they are judged; what is drawn again comes behind all others.

        Texts flow with flag, flow as far as they are certain with redact, and come whole with drop and retry.
        """
        open_: dict[tuple[int, int], _Sequence] = {}
        for request in requests:
            found = self._opened(request)
            if isinstance(found, Chunk):
                yield found
            else:
                open_[request.index, request.sequence] = found
        again: list[_Sequence] = []
        for chunk in self._asked([sequence.request for sequence in open_.values()], done):
            sequence = open_[chunk.index, chunk.sequence]
            passed = self._passed(sequence, chunk, last=self.action != "retry" or chunk.index in done)
            if passed is None:
                again.append(sequence)
            else:
                yield from passed
        for sequence in again:
            yield from self._again(sequence)

    def _asked(self, requests: Sequence[Request], done: Collection[int]) -> Iterator[Chunk]:
        if requests:
            yield from self.engine.stream(requests, done)

    def _again(self, sequence: _Sequence) -> Iterator[Chunk]:
        """Draw a sequence from its next streams, alone, so that no other record has a part in its text."""
        request = sequence.request
        for draw in range(1, DRAWS_AGAIN + 1):
            seed = derive_seed(request.seed, 0, draw)
            sequence = replace(sequence, judge=self._judge(request), draws=draw + 1, held="", failed=None)
            for chunk in self._asked([replace(request, seed=seed)], ()):
                passed = self._passed(sequence, chunk, last=draw == DRAWS_AGAIN)
                if passed is None:
                    break
                yield from passed
                if chunk.final:
                    return

    # --- prompts

    def _opened(self, request: Request) -> _Sequence | Chunk:
        """The request with what its prompt's verdict makes of it, or its end."""
        try:
            parts = {place: judged(self.rules, text) for place, text in self._parts(request)}
            if self.action == "redact":
                request = _hidden(request, parts)
            judge = self._judge(request)
        except SafetyError as error:
            return Chunk(request.index, request.sequence, "", Completion("error", None, None, error=error))
        found = [_told(match, "prompt", place) for place, matches in parts.items() for match in matches]
        sequence = _Sequence(request, judge, found)
        if found and self.action in ("drop", "retry"):
            return self._dropped(sequence, Completion("filter", None, None), "prompt")
        if found:
            self._tell(request, "prompt", [match.rule.place for part in parts.values() for match in part])
        return sequence

    def _parts(self, request: Request) -> Iterator[tuple[int | None, str]]:
        """The texts of a request, each with the number of its message."""
        if request.prompt is not None:
            yield None, request.prompt
        messages = list(enumerate(request.messages or ()))
        for number, message in messages[-1:] if self.talks and self.action == "flag" else messages:
            yield number, str(message["content"])
        yield from enumerate(request.pair or ())

    def _judge(self, request: Request) -> Judge:
        before = (request.prompt or "")[-_BEFORE:] if self.continues else ""
        return Judge(self.rules, before, blocks=self.action == "redact")

    # --- texts

    def _passed(self, sequence: _Sequence, chunk: Chunk, *, last: bool) -> list[Chunk] | None:
        """What of a chunk can be given out; None where its text has ended, is unsafe and is to be drawn again."""
        final, judge = chunk.final, sequence.judge
        if sequence.failed is None:
            try:
                sequence.held += judge.feed(chunk.text) + (judge.end() if final else "")
            except SafetyError as error:
                sequence.failed, sequence.held = error, ""
        if final is not None:
            return self._ended(sequence, final, last=last)
        if self._whole or not sequence.held:
            return []
        text, sequence.held = sequence.held, ""
        return [replace(chunk, text=text)]

    def _ended(self, sequence: _Sequence, final: Completion, *, last: bool) -> list[Chunk] | None:
        request, unsafe = sequence.request, bool(sequence.judge.matches)
        error = final.error or sequence.failed
        if error is not None:
            text = "" if self._whole else sequence.held
            final = replace(_without_tokens(final), finish_reason="error", error=error)
            return [Chunk(request.index, request.sequence, text, final)]
        if unsafe and self._whole:
            return [self._dropped(sequence, final, "text")] if last else None
        if unsafe:
            self._tell(request, "text", [match.rule.place for match in sequence.judge.matches])
        if self.action == "redact" and (unsafe or sequence.found):
            final = _without_tokens(final)
        final = replace(final, extra=final.extra | sequence.verdict())
        return [Chunk(request.index, request.sequence, sequence.held, final)]

    @property
    def _whole(self) -> bool:
        """Whether a text is given when it has ended, or not at all."""
        return self.action in ("drop", "retry")

    def _dropped(self, sequence: _Sequence, final: Completion, where: str) -> Chunk:
        """The end of a sequence without its text."""
        request = sequence.request
        verdict = sequence.verdict()
        places = [f"{match['list']}:{match['line']}" for match in verdict["safety"]["matches"]]
        error = None
        if self.alone:
            error = SafetyError("E-UNSAFE", where, f"matches {', '.join(dict.fromkeys(places))}")
        else:
            self._tell(request, where, places)
        final = replace(_without_tokens(final), finish_reason="filter", error=error)
        return Chunk(request.index, request.sequence, "", replace(final, extra=final.extra | verdict))

    def _tell(self, request: Request, where: str, places: Sequence[str]) -> None:
        """A verdict as a warning, by the lines of the lists alone; blocks tell themselves."""
        if self.action == "redact" or (where == "prompt" and request.sequence):  # told with the first
            return
        record = "" if self.alone else f"record {request.index}: "
        fact = f"{record}{where} matches {', '.join(dict.fromkeys(places))}"
        self.report(Notice(fact, name="W-UNSAFE"))


def _hidden(request: Request, parts: dict[int | None, list[Match]]) -> Request:
    """The request with blocks in its texts."""
    if request.prompt is not None:
        return replace(request, prompt=hidden(request.prompt, parts[None]))
    if request.pair is not None:
        question, context = (hidden(text, parts[place]) for place, text in enumerate(request.pair))
        return replace(request, pair=(question, context))
    messages = tuple(
        message | {"content": hidden(str(message["content"]), parts[place])}
        for place, message in enumerate(request.messages or ())
    )
    return replace(request, messages=messages)


def _without_tokens(final: Completion) -> Completion:
    """A completion without all that repeats its text: log-probabilities, explanations, alternatives."""
    kept = {name: value for name, value in final.extra.items() if name == "truncated"}
    return replace(final, logprobs=None, tokens=None, extra=kept)
