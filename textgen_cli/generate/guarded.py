"""`--safety` on generate: prompts and texts are judged by lists, and by a classifier if one is given; the unsafe is
told, hidden, dropped or redrawn.

An engine around any engine. Owns what becomes of a verdict; what is unsafe stands in text/safety.py and classified.py.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from textgen_cli.errors import ModelError, OutOfMemory, SafetyError, TextgenError
from textgen_cli.events import Notice, Report
from textgen_cli.generate.request import Chunk, Completion, Request, derive_seed
from textgen_cli.text.safety import Judge, Judged, Label, Match, Rules, hidden, judged

DRAWS_AGAIN = 3
_BEFORE = 2000  # characters of a prompt that are looked at together with its continuation


_UNJUDGED = (SafetyError, ModelError, OutOfMemory)  # why a text cannot be judged, and so does not pass


class Classifies(Protocol):
    """Judges whole texts, `before` being what a text continues; with `blocks` it tells which stretches are unsafe."""

    def judge(self, text: str, before: str = "", *, blocks: bool = False) -> Judged: ...


@dataclass(frozen=True)
class _Prompt:
    """The verdict on a prompt: the matches in each of its texts, by the number of its message."""

    parts: dict[int | None, list[Match]]
    probabilities: dict[str, float]  # the highest of the texts

    @property
    def matches(self) -> list[Match]:
        return [match for part in self.parts.values() for match in part]


@dataclass
class _Sequence:
    """A request and the judging of its text."""

    request: Request
    judge: Judge
    prompt: _Prompt
    draws: int = 1
    text: str = ""  # as it was written
    held: str = ""  # judged as far as can be, and not given out
    classified: Judged = field(default_factory=Judged)
    failed: TextgenError | None = None  # it could not be judged

    @property
    def matches(self) -> list[Match]:
        """Those in the text."""
        return self.judge.matches + self.classified.matches

    def verdict(self) -> dict[str, Any]:
        """The record's field `safety`."""
        found = [_told(match, "prompt", place) for place, part in self.prompt.parts.items() for match in part]
        matches = found + [_told(match, "text") for match in self.matches]
        both = {"prompt": self.prompt.probabilities, "text": self.classified.probabilities}
        known = {where: told for where, told in both.items() if told}
        more: dict[str, Any] = {"probabilities": known} if known else {}
        more |= {"draws": self.draws} if self.draws > 1 else {}
        return {"safety": {"unsafe": bool(matches), "matches": matches, **more}}


def _told(match: Match, where: str, message: int | None = None) -> dict[str, Any]:
    """A match as plain values; the list by its name, since no record holds a path."""
    rule = match.rule
    told: dict[str, Any] = {"where": where} if message is None else {"where": where, "message": message}
    if isinstance(rule, Label):
        told |= {"model": rule.model, "label": rule.label, "probability": rule.probability}
    else:
        told |= {"list": rule.list, "line": rule.line, "rule": rule.text}
    return told | {"start": match.start, "end": match.end}


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
    classifier: Classifies | None = None  # judges as well, each text when it is whole
    continues: bool = True
    alone: bool = False
    talks: bool = False  # a conversation, whose older messages were told already

    def measure(self, messages: Sequence[dict[str, Any]]) -> tuple[int | None, int | None]:
        """What the engine says of a conversation's size."""
        size: tuple[int | None, int | None] = self.engine.measure(messages)
        return size

    def stream(self, requests: Sequence[Request], done: Collection[int] = ()) -> Iterator[Chunk]:
        """The engine's chunks as far as they are judged; what is drawn again comes behind all others.

        Texts flow with flag, flow as far as they are certain with redact, and come whole with drop and retry; whole
        with redact too where a classifier judges.
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
            sequence = _Sequence(request, self._judge(request), sequence.prompt, draw + 1)
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
            prompt = self._judged(request)
            if self.action == "redact":
                request = _hidden(request, prompt.parts)
            judge = self._judge(request)
        except _UNJUDGED as error:
            return Chunk(request.index, request.sequence, "", Completion("error", None, None, error=error))
        sequence = _Sequence(request, judge, prompt)
        if prompt.matches and self._drops:
            return self._dropped(sequence, Completion("filter", None, None), "prompt", prompt.matches)
        if prompt.matches:
            self._tell(request, "prompt", prompt.matches)
        return sequence

    def _judged(self, request: Request) -> _Prompt:
        parts: dict[int | None, list[Match]] = {}
        highest: dict[str, float] = {}
        for place, text in self._parts(request):
            found = (
                self.classifier.judge(text, blocks=self.action == "redact") if self.classifier else Judged()
            )
            parts[place] = judged(self.rules, text) + found.matches
            highest |= {label: max(p, highest.get(label, 0.0)) for label, p in found.probabilities.items()}
        return _Prompt(parts, highest)

    def _parts(self, request: Request) -> Iterator[tuple[int | None, str]]:
        """The texts of a request, each with the number of its message."""
        if request.prompt is not None:
            yield None, request.prompt
        messages = list(enumerate(request.messages or ()))
        for number, message in messages[-1:] if self.talks and self.action == "flag" else messages:
            yield number, str(message["content"])
        yield from enumerate(request.pair or ())

    def _judge(self, request: Request) -> Judge:
        return Judge(self.rules, self._before(request), blocks=self.action == "redact")

    def _before(self, request: Request) -> str:
        """What the text of a request continues."""
        return (request.prompt or "")[-_BEFORE:] if self.continues else ""

    # --- texts

    def _passed(self, sequence: _Sequence, chunk: Chunk, *, last: bool) -> list[Chunk] | None:
        """What of a chunk can be given out; None where its text has ended, is unsafe and is to be drawn again."""
        final, judge = chunk.final, sequence.judge
        if sequence.failed is None:
            try:
                sequence.held += judge.feed(chunk.text) + (judge.end() if final else "")
                if self.classifier is not None:
                    sequence.text += chunk.text
                    if final is not None and final.error is None:
                        self._classify(sequence, self.classifier)
            except _UNJUDGED as error:
                sequence.failed, sequence.held = error, ""
        if final is not None:
            return self._ended(sequence, final, last=last)
        if self._whole or not sequence.held:
            return []
        text, sequence.held = sequence.held, ""
        return [replace(chunk, text=text)]

    def _classify(self, sequence: _Sequence, classifier: Classifies) -> None:
        """The classifier's verdict on a text that has ended; behind an unsafe prompt it stands for itself."""
        before = "" if sequence.prompt.matches else self._before(sequence.request)
        found = classifier.judge(sequence.text, before, blocks=self.action == "redact")
        sequence.classified = found
        if self.action == "redact":
            sequence.held = hidden(sequence.held, found.matches)

    def _ended(self, sequence: _Sequence, final: Completion, *, last: bool) -> list[Chunk] | None:
        request, unsafe = sequence.request, bool(sequence.matches)
        error = final.error or sequence.failed
        if error is not None:
            text = "" if self._whole else sequence.held
            final = replace(_without_tokens(final), finish_reason="error", error=error)
            return [Chunk(request.index, request.sequence, text, final)]
        if unsafe and self._drops:
            return [self._dropped(sequence, final, "text", sequence.matches)] if last else None
        if unsafe:
            self._tell(request, "text", sequence.matches)
        if self.action == "redact" and (unsafe or sequence.prompt.matches):
            final = _without_tokens(final)
        final = replace(final, extra=final.extra | sequence.verdict())
        return [Chunk(request.index, request.sequence, sequence.held, final)]

    @property
    def _drops(self) -> bool:
        """Whether an unsafe text is not given."""
        return self.action in ("drop", "retry")

    @property
    def _whole(self) -> bool:
        """Whether a text is given when it has ended, or not at all."""
        return self._drops or (self.action == "redact" and self.classifier is not None)

    def _dropped(self, sequence: _Sequence, final: Completion, where: str, matches: Sequence[Match]) -> Chunk:
        """The end of a sequence without its text."""
        request = sequence.request
        error = None
        if self.alone:
            error = SafetyError("E-UNSAFE", where, f"matches {_places(matches)}")
        else:
            self._tell(request, where, matches)
        final = replace(_without_tokens(final), finish_reason="filter", error=error)
        return Chunk(
            request.index, request.sequence, "", replace(final, extra=final.extra | sequence.verdict())
        )

    def _tell(self, request: Request, where: str, matches: Sequence[Match]) -> None:
        """A verdict as a warning, by the lines of the lists and by labels alone; blocks tell themselves."""
        if self.action == "redact" or (where == "prompt" and request.sequence):  # told with the first
            return
        record = "" if self.alone else f"record {request.index}: "
        self.report(Notice(f"{record}{where} matches {_places(matches)}", name="W-UNSAFE"))


def _places(matches: Sequence[Match]) -> str:
    return ", ".join(dict.fromkeys(match.rule.place for match in matches))


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
