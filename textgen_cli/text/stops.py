"""Stop strings in text that arrives in pieces: what may be shown now, and where the text ends. Plain Python."""

from collections.abc import Sequence


class StopFinder:
    """Holds back the end of the text while it may be the beginning of a stop string.

    The string that is complete first ends the text, so the pieces it comes in make no difference.
    With `trim`, blanks before the text's first word are dropped and those after its last never given out.
    """

    def __init__(self, stops: Sequence[str], *, trim: bool = False) -> None:
        self._stops = [stop for stop in stops if stop]
        self._trim = trim
        self._begun = False
        self._blanks = ""  # certain, but perhaps the last of the text
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that is certain; after a stop string was found, nothing more."""
        return self._trimmed(self._certain(text)) if self._trim else self._certain(text)

    def _trimmed(self, text: str) -> str:
        text = self._blanks + text if self._begun else text.lstrip()
        kept = text.rstrip()
        self._blanks = text[len(kept) :]
        self._begun = self._begun or bool(kept)
        return kept

    def _certain(self, text: str) -> str:
        if self.found:
            return ""
        held = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.found = True
            self._held = ""
            return held[: min(found)[1]]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def end(self) -> str:
        """What was held back, once no more text comes."""
        rest, self._held = self._held, ""
        if self.found:
            return ""
        return self._trimmed(rest) if self._trim else rest


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
