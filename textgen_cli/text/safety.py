"""Lists of words, phrases and patterns, where they occur in texts, and texts with blocks in their places.

A list has one entry a line; text may come in pieces. Knows no model, but how a classifier's verdict is told; how hard
an entry is to get around is told in docs/guide.md.
"""

import time
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regex

from textgen_cli.errors import SafetyError, UsageError
from textgen_cli.text.segments import is_unspaced

BLOCK = "█"
PATTERN_SECONDS = 1.0  # a pattern that takes longer on one line is given up, and the text is not passed
TEXT_SECONDS = 5.0  # so are all patterns that take longer on one text, in seconds of this thread's computing
_SIGN = "re:"


@dataclass(frozen=True)
class Rule:
    """An entry of a list."""

    list: str  # the file's name
    line: int  # from 1
    text: str

    @property
    def place(self) -> str:
        return f"{self.list}:{self.line}"


@dataclass(frozen=True)
class Label:
    """What a classifier holds of a stretch of text."""

    model: str  # its name
    label: str
    probability: float

    @property
    def place(self) -> str:
        return f"{self.label} ({self.probability:.2f})"


@dataclass(frozen=True)
class Match:
    """Where a rule was met, or a label found: characters `start` to `end` of the text, in its own count."""

    rule: Rule | Label
    start: int
    end: int


@dataclass(frozen=True)
class Judged:
    """A classifier's verdict on a text: where it is unsafe, and how probable it holds each label it was asked for."""

    matches: list[Match] = field(default_factory=list)
    probabilities: dict[str, float] = field(default_factory=dict)


@dataclass
class Rules:
    """The entries of all lists: phrases as an automaton (Aho and Corasick 1975), patterns one by one.

    State 0 of the automaton is its root; `ends` has the lengths and rules of the phrases that end in a state.
    """

    patterns: list[tuple[Rule, Any]] = field(default_factory=list)
    steps: list[dict[str, int]] = field(default_factory=lambda: [{}])
    shorter: list[int] = field(default_factory=lambda: [0])  # the longest proper suffix that is a state
    depth: list[int] = field(default_factory=lambda: [0])
    ends: list[list[tuple[int, Rule]]] = field(default_factory=lambda: [[]])

    def add(self, phrase: str, rule: Rule) -> None:
        """Put a folded phrase in; `link` has to follow the last one."""
        state = 0
        for character in phrase:
            if character not in self.steps[state]:
                self.steps[state][character] = len(self.steps)
                self.steps.append({})
                self.shorter.append(0)
                self.depth.append(self.depth[state] + 1)
                self.ends.append([])
            state = self.steps[state][character]
        self.ends[state].append((len(phrase), rule))

    def link(self) -> None:
        """Lead every state to the longest of its suffixes that is one too."""
        waiting = deque(self.steps[0].values())
        while waiting:
            state = waiting.popleft()
            for character, longer in self.steps[state].items():
                self.shorter[longer] = self.next(self.shorter[state], character)
                self.ends[longer] = self.ends[longer] + self.ends[self.shorter[longer]]
                waiting.append(longer)

    def next(self, state: int, character: str) -> int:
        """The longest state that ends in this character."""
        while state and character not in self.steps[state]:
            state = self.shorter[state]
        return self.steps[state].get(character, 0)


def read_rules(paths: Iterable[Path | str]) -> Rules:
    """The rules of all lists; UsageError E-FILE, or E-SAFETY where an entry cannot be used."""
    rules = Rules()
    for path in map(Path, paths):
        for number, line in _lines(path):
            rule = Rule(path.name, number, line)
            if line.startswith(_SIGN):
                rules.patterns.append((rule, _compiled(path, rule)))
                continue
            phrase = "".join(character for character, _, _ in folded(line))
            if not phrase.strip():
                raise UsageError("E-SAFETY", f"{path}:{number}", "has no visible character")
            rules.add(phrase, rule)
    rules.link()
    return rules


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError("E-FILE", str(path), (error.strerror or str(error)).lower()) from error
    except UnicodeDecodeError as error:
        raise UsageError("E-FILE", str(path), f"is not UTF-8 at byte {error.start}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.startswith("#"):
            yield number, line.strip()


def _compiled(path: Path, rule: Rule) -> Any:
    try:
        found = regex.compile(rule.text.removeprefix(_SIGN).strip(), regex.IGNORECASE)
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise UsageError("E-SAFETY", f"{path}:{rule.line}", f"pattern: {error}") from error
    if found.pattern == "":
        raise UsageError("E-SAFETY", f"{path}:{rule.line}", "pattern is empty")
    return found


# --- one form for all spellings of a character


def folded(text: str, *, case: bool = True) -> list[tuple[str, int, int]]:
    """(character, start, end): NFKC, and with `case` case-folded; each says of which characters it was made.

    Blanks in a row are one space, invisible characters (category Cf) none.
    """
    found: list[tuple[str, int, int]] = []
    for start, end in _groups(text):
        group = text[start:end]
        if group.isspace():
            if not case or not found or found[-1][0] != " ":
                found.append((" " if case else group, start, end))
            continue
        plain = unicodedata.normalize("NFKC", group)
        if case:
            plain = unicodedata.normalize("NFKC", plain.casefold())
        found += [(character, start, end) for character in plain if unicodedata.category(character) != "Cf"]
    return found


def _groups(text: str) -> Iterator[tuple[int, int]]:
    """Characters with the marks that belong to them, which are normalised together."""
    start = 0
    for at in range(1, len(text) + 1):
        if at == len(text) or not _joins(text[at]):
            yield start, at
            start = at


def _joins(character: str) -> bool:
    """Whether a character may become one with that before it: marks, vowels and finals of Hangul, voicing."""
    if character < "\u0300":
        return False
    jamo = "\u1160" <= character <= "\u11ff" or character in "\uff9e\uff9f"
    return jamo or unicodedata.category(character).startswith("M")


def _divided(before: str, behind: str) -> bool:
    """Whether a word may end between two characters; always beside scripts that put no blanks between words."""
    return not (_in_word(before) and _in_word(behind)) or is_unspaced(before) or is_unspaced(behind)


def _in_word(character: str) -> bool:
    return character == "_" or unicodedata.category(character or " ")[0] in "LMN"


# --- finding, piece by piece


class _Phrases:
    """Finds phrases in text that grows; keeps what may still become one."""

    def __init__(self, rules: Rules, start: int) -> None:
        self._rules = rules
        self._kept, self._left = "", " "
        self.sure = start  # where the kept text begins: all before it is judged

    def feed(self, text: str, *, final: bool = False) -> list[Match]:
        """The matches that begin before what is sure now."""
        self._kept += text
        whole = folded(self._kept)
        grows = len(self._kept) if final or not whole else whole[-1][1]  # where the last group begins
        state, cut, found = 0, grows, []
        for place, (character, _, end) in enumerate(whole):
            if end > grows:
                break
            state = self._rules.next(state, character)
            for length, rule in self._rules.ends[state]:
                first = place + 1 - length
                before = whole[first - 1][0] if first else self._left
                if not _divided(before, whole[first][0]):
                    continue
                if place + 1 == len(whole) and not final:
                    cut = min(cut, whole[first][1])  # the next character tells
                elif place + 1 == len(whole) or _divided(character, whole[place + 1][0]):
                    found.append(Match(rule, whole[first][1], end))
        while state and not self._rules.steps[state]:  # it is a phrase, and none goes on from it
            state = self._rules.shorter[state]
        if state and not final:
            seen = sum(end <= grows for _, _, end in whole)
            cut = min(cut, whole[seen - self._rules.depth[state]][1])
        return self._until(cut, whole, found, final=final)

    def _until(
        self, cut: int, whole: list[tuple[str, int, int]], found: list[Match], *, final: bool
    ) -> list[Match]:
        base = self.sure
        told = [Match(m.rule, base + m.start, base + m.end) for m in found if m.start < cut or final]
        self._left = next((c for c, _, end in reversed(whole) if end <= cut), self._left)
        self._kept = self._kept[cut:]
        self.sure += cut
        return told


class _Patterns:
    """Finds patterns in the lines of text that grows, each once it is whole."""

    def __init__(self, rules: Rules, start: int) -> None:
        self._rules = rules
        self._kept = ""
        self._seconds = TEXT_SECONDS  # left
        self.sure = start

    def feed(self, text: str, *, final: bool = False) -> list[Match]:
        """The matches in the lines that are whole now; SafetyError E-SAFETY-TIME where they take too long."""
        *whole, rest = (self._kept + text).split("\n")
        lines = [line + "\n" for line in whole]
        if final:
            lines, rest = [*lines, rest], ""
        self._kept = rest
        found: list[Match] = []
        for line in lines:
            found += self._in_line(line.removesuffix("\n"))
            self.sure += len(line)
        return found

    def _in_line(self, line: str) -> Iterator[Match]:
        whole = folded(line, case=False)
        text = "".join(character for character, _, _ in whole)
        for rule, pattern in self._rules.patterns:
            since, most = time.thread_time(), min(PATTERN_SECONDS, self._seconds)
            try:
                spans = [m.span() for m in pattern.finditer(text, timeout=most)]
            except TimeoutError:
                raise self._too_slow(rule, line) from None
            self._seconds -= time.thread_time() - since
            if self._seconds <= 0:
                raise self._too_slow(rule, line)
            for first, last in spans:
                if first < last:
                    yield Match(rule, self.sure + whole[first][1], self.sure + whole[last - 1][2])

    def _too_slow(self, rule: Rule, line: str) -> SafetyError:
        """One pattern that took too long on a line, or all of them together on a text, where this is the last."""
        if self._seconds < PATTERN_SECONDS:
            fact = f"with the patterns before it took longer than {TEXT_SECONDS:g} s on one text"
            return SafetyError("E-SAFETY-TIME", rule.place, fact, hint="simplify the patterns")
        fact = f"took longer than {PATTERN_SECONDS:g} s on a line of {len(line):,} characters"
        return SafetyError("E-SAFETY-TIME", rule.place, fact, hint="simplify the pattern")


class Judge:
    """Judges a text that comes in pieces; `before`: what stands in front of it, where it continues something.

    With `blocks`, what is given out has blocks for the characters of matches; so it is held back while the
    longest phrase could still be met, and with patterns to the end of its line.
    """

    def __init__(self, rules: Rules, before: str = "", *, blocks: bool = False) -> None:
        self.matches: list[Match] = []
        self._blocks = blocks
        self._held, self._out = "", 0
        finders: Sequence[_Phrases | _Patterns] = (
            [_Phrases(rules, -len(before))] if len(rules.steps) > 1 else []
        )
        self._finders = [*finders, *([_Patterns(rules, -len(before))] if rules.patterns else [])]
        if before:
            self._find(before)

    def feed(self, text: str) -> str:
        """What can be given out now; without `blocks` the text itself."""
        self._held += text
        self._find(text)
        sure = max(min((finder.sure for finder in self._finders), default=0), 0)
        return self._given(sure - self._out) if self._blocks and self._finders else self._given(None)

    def end(self) -> str:
        """What was held back, once no more text comes; `matches` are complete then, in the text's order."""
        self._find("", final=True)
        self.matches.sort(key=lambda match: (match.start, match.end))
        return self._given(None)

    def _find(self, text: str, *, final: bool = False) -> None:
        for finder in self._finders:
            found = finder.feed(text, final=final)
            self.matches += [Match(m.rule, max(m.start, 0), m.end) for m in found if m.end > 0]

    def _given(self, size: int | None) -> str:
        text, start = self._held[:size], self._out
        self._held = self._held[len(text) :]
        self._out += len(text)
        return hidden(text, self.matches, start) if self._blocks else text


def judged(rules: Rules, text: str) -> list[Match]:
    """All matches in a text; raises SafetyError as a pattern does that takes too long."""
    judge = Judge(rules)
    judge.feed(text)
    judge.end()
    return judge.matches


def hidden(text: str, matches: Iterable[Match], start: int = 0) -> str:
    """The text, whose first character is number `start`, with blocks in the place of matches; line ends stay."""
    shown = list(text)
    for match in matches:
        for at in range(max(match.start - start, 0), min(match.end - start, len(shown))):
            shown[at] = shown[at] if shown[at] == "\n" else BLOCK
    return "".join(shown)
