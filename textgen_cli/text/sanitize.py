"""What may reach a terminal or a message: control and hidden characters shown, secrets covered, length cut.

The rule, one character at a time, so that a sequence split over two pieces of a stream changes nothing:

- LF, TAB and every visible character pass.
- Shown escaped: the other control characters (C0, DEL, C1), bidi controls, line and paragraph separators,
  surrogates, tag characters, and whatever is drawn as nothing (format characters, fillers, selectors).
- Three exceptions, each for one character only and only directly behind the character that needs it, so
  that nothing can be hidden in a run of them: a variation selector 15 or 16 behind a symbol or keycap
  base; a zero-width joiner behind a symbol (emoji families); a zero-width joiner or non-joiner behind
  a letter or mark of a script that writes with them (Arabic, Indic and their relatives), and a Mongolian
  variation selector behind a Mongolian letter.

It does not know where text comes from or goes to.
"""

import re
import unicodedata
from collections.abc import Iterable

CLIP = 200

ZWNJ, ZWJ = "\u200c", "\u200d"
_SUSPECT = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without TAB and LF, DEL, C1
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"  # soft hyphen, joiners, fillers
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f"  # zero width, separators, bidi
    "\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"  # fillers, selectors, byte order mark
    "\ud800-\udfff"  # surrogates
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"  # format controls of single scripts
    "\U000e0000-\U000e0fff"  # tags and further selectors
    "]"
)
# Scripts whose spelling needs the zero-width joiners, as (first, last) code points.
_JOINING = (
    (0x0600, 0x085F), (0x0870, 0x0DFF), (0x1000, 0x109F), (0x1780, 0x18AF), (0x1A20, 0x1AAF),
    (0x1B00, 0x1BFF), (0xA840, 0xA87F), (0xA8E0, 0xA8FF), (0xA980, 0xA9DF), (0xAA60, 0xAA7F),
    (0xABC0, 0xABFF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFC), (0x10A00, 0x10A5F), (0x11000, 0x11DFF),
    (0x1E900, 0x1E95F),
)  # fmt: skip
_KEYCAPS = frozenset("0123456789#*")
_SYMBOLS_IN_OTHER_CATEGORIES = frozenset("\u203c\u2049\u2139\u3030")  # !! !? i ~ that have an emoji form
_BREAKS = re.compile(r"[\x09\x0a]")


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a file name that is no UTF-8
        code -= 0xDC00
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{{{code:X}}}"


def _is_symbol(character: str) -> bool:
    """Whether the character is an emoji or another symbol (skin tones are among them)."""
    return ord(character) > 0x7F and (
        unicodedata.category(character) in ("So", "Sk", "Sm") or character in _SYMBOLS_IN_OTHER_CATEGORIES
    )


def _may_follow(character: str, before: str) -> bool:
    """Whether an invisible character is needed for spelling, directly behind the character `before`."""
    if not before:
        return False
    if character in "\ufe0e\ufe0f":
        return before in _KEYCAPS or _is_symbol(before)
    if character in (ZWJ, ZWNJ):
        if character == ZWJ and (before == "\ufe0f" or _is_symbol(before)):
            return True
        code = ord(before)
        joins = any(first <= code <= last for first, last in _JOINING)
        return joins and unicodedata.category(before)[0] in "LM" and not _SUSPECT.match(before)
    return character in "\u180b\u180c\u180d\u180f" and "\u1820" <= before <= "\u18aa"


class Sanitizer:
    """Sanitises a stream piece by piece; the joined results equal the result for the joined pieces."""

    def __init__(self) -> None:
        self._before = ""  # the last character that was let through; "" behind an escape

    def feed(self, text: str) -> str:
        """The text as it may be shown; characters that could hide or forge something are escaped."""
        if not text:
            return ""
        end = 0

        def show(match: re.Match[str]) -> str:
            nonlocal end
            before = text[match.start() - 1] if match.start() > end else self._before
            kept = _may_follow(match[0], before)
            self._before = match[0] if kept else ""
            end = match.end()
            return match[0] if kept else _escape(match[0])

        shown = _SUSPECT.sub(show, text)
        if end < len(text):
            self._before = text[-1]
        return shown


def visible(text: str) -> str:
    """The whole text as it may be shown on a terminal."""
    return Sanitizer().feed(text)


def clip(text: str, limit: int = CLIP) -> str:
    """The text on one line, escaped (LF and TAB too) and cut to `limit` characters."""
    # Cut first too: escaping only makes text longer, and a long text costs time.
    shown = _BREAKS.sub(lambda match: _escape(match[0]), visible(text[: limit + 1]))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


_SECRETS = (
    (re.compile(r"\bhf_[A-Za-z0-9_]{4,}"), "hf_***"),
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/?#\"']*@"), r"\1***@"),
    (
        re.compile(
            r"(?i)([?&;](?:[a-z0-9_.-]*(?:token|signature|secret|password|credential|api[_-]?key)|sig|policy"
            r"|key-pair-id|x-amz-[a-z0-9-]+|x-goog-[a-z0-9-]+)=)[^&;\s\"'#]+"
        ),
        r"\1***",
    ),
    (re.compile(r"(?i)\b(token|password|secret|api[_-]?key)=[^&;\s\"'#]+"), r"\1=***"),
    (re.compile(r"(?i)\b(authorization[\"']?\s*[:=]\s*)(?:[a-z]+\s+)?[^\s\"',]+"), r"\1***"),
    (re.compile(r"(?i)\b(bearer)\s+[A-Za-z0-9._~+/=-]{8,}"), r"\1 ***"),
)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without tokens, passwords in URLs, signed query parameters and the given secrets."""
    for secret in secrets:
        if len(secret) >= 4:
            text = text.replace(secret, "***")
    for pattern, cover in _SECRETS:
        text = pattern.sub(cover, text)
    return text
