"""What may reach a terminal: every control character is shown, readable text stays as it is."""

import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textgen_cli.text.sanitize import Sanitizer, clip, redact, visible

# Terminal attacks and forgeries -> what is shown.
HOSTILE = {
    "\x1b]52;c;ZXZpbA==\x07": "\\x1B]52;c;ZXZpbA==\\x07",
    "\x1b]8;;file:///etc/passwd\x1b\\link\x1b]8;;\x1b\\": "\\x1B]8;;file:///etc/passwd\\x1B\\link\\x1B]8;;\\x1B\\",
    "\x1b[2J\x1b[H": "\\x1B[2J\\x1B[H",
    "\x9b31mred": "\\x9B31mred",
    "safe\rforged": "safe\\x0Dforged",
    "a\x08b\x7f\x00": "a\\x08b\\x7F\\x00",
    "user\u202etxt.exe": "user\\u{202E}txt.exe",
    "\u2066isolate\u2069": "\\u{2066}isolate\\u{2069}",
    "pay\u200bpal": "pay\\u{200B}pal",
    "pay\u200dpal": "pay\\u{200D}pal",  # a joiner is for scripts that join
    "a\ufe0f": "a\\u{FE0F}",
    "\ufeffa": "\\u{FEFF}a",
    "x\u00ady": "x\\xADy",
    "a\u2028b": "a\\u{2028}b",
    "\u3164": "\\u{3164}",
    "hi" + "".join(chr(0xE0000 + ord(c)) for c in "no"): "hi\\u{E006E}\\u{E006F}",
    "\ud800": "\\u{D800}",
    "\U0001f600\ufe0f\ufe0f\ufe0e": "\U0001f600\ufe0f\\u{FE0F}\\u{FE0E}",  # one selector, no hidden run
    "\U0001f600\u200d\u200d": "\U0001f600\u200d\\u{200D}",
    "a\ufe0f\u200d": "a\\u{FE0F}\\u{200D}",  # an escape is nothing to join
    "\u0661\u200d": "\u0661\\u{200D}",  # an Arabic digit does not join
}
READABLE = [
    "plain ASCII with [b]markup[/b] and \\x1B written out\n\tindented",
    "Čeština, ελληνικά, עברית, العربية, 日本語, 한국어, ไทย",
    "e\u0301 combining",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
    "\u2764\ufe0f\u200d\U0001f525",
    "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f469\U0001f3fd\u200d\U0001f680",
    "\U0001f441\ufe0f\u200d\U0001f5e8\ufe0f",
    "1\ufe0f\u20e3 #\ufe0f\u20e3",
    "\u203c\ufe0f \u00a9\ufe0f \u2194\ufe0f \u2122\ufe0e",
    "\U0001f1e9\U0001f1ea",
    "می\u200cخواهم",  # Persian
    "क्\u200dष क्\u200cष",  # Devanagari
    "ශ්\u200dරී",  # Sinhala
    "ᠪᠦᠷᠢ\u180b",  # Mongolian
    "private use \ue0b0",
]


@pytest.mark.parametrize(("text", "shown"), HOSTILE.items(), ids=ascii)
def test_hostile_text_is_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize("text", READABLE, ids=ascii)
def test_readable_text_stays(text: str) -> None:
    assert visible(text) == text


awkward = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from("\x1b\x9b\r\u200d\u200c\ufe0f\ufe0e\u202e\u180b\U0001f600\u2764क्م1a\ud800\U000e0061"),
    )
)


@given(st.lists(awkward))
def test_cutting_a_stream_anywhere_changes_nothing(pieces: list[str]) -> None:
    sanitizer = Sanitizer()
    assert "".join(sanitizer.feed(piece) for piece in pieces) == visible("".join(pieces))


@given(awkward)
def test_nothing_hidden_passes(text: str) -> None:
    shown = visible(text)
    assert not {c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")} - {"\n", "\t"}
    assert not set(shown) & set("\u200b\u200e\u200f\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
    invisible = "\u200c\u200d\ufe0e\ufe0f"
    assert not any(a in invisible and b in "\u200c\ufe0e\ufe0f" for a, b in pairwise(shown))
    shown.encode()


@given(
    st.text(
        st.characters(
            categories=("L", "N", "P", "S", "Zs", "Mc"), exclude_characters="\u115f\u1160\u3164\uffa0"
        )
    )
)
def test_safe_text_is_untouched(text: str) -> None:
    assert visible(text) == text


@given(awkward)
def test_sanitised_text_is_safe(text: str) -> None:
    assert visible(visible(text)) == visible(text)


@given(st.text(), st.integers(2, 300))
def test_a_clip_is_one_short_line(text: str, limit: int) -> None:
    shown = clip(text, limit)
    assert len(shown) <= limit
    assert not set(shown) & set("\n\t\x1b\r")
    assert shown.endswith("…") or visible(text).replace("\n", "\\x0A").replace("\t", "\\x09") == shown


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("Bearer hf_AbCdEfGh123456 refused", "hf_AbCdEfGh123456"),
        ("Authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
        ("{'authorization': 'Bearer abc.def-ghi'}", "abc.def-ghi"),
        ("proxy http://me:pa55@host:3128 said no", "pa55"),
        ("https://oauth2:tok3n@git.host/x", "tok3n"),
        ("https://s3/x?X-Amz-Signature=beef01&X-Amz-Credential=AKIA7", "beef01"),
        ("https://s3/x?X-Amz-Signature=beef01&X-Amz-Credential=AKIA7", "AKIA7"),
        ("https://cdn/x?Policy=eyJ9&Signature=Zm9v&Key-Pair-Id=K2", "Zm9v"),
        ("https://blob/x?sv=1&sig=a%2Fb", "a%2Fb"),
        ("https://api/x?access_token=t0k", "t0k"),
        ("failed with token=t0k", "t0k"),
    ],
)
def test_secrets_are_covered(text: str, hidden: str) -> None:
    assert hidden in text
    assert hidden not in redact(text)
    assert "***" in redact(text)


def test_given_secrets_are_covered() -> None:
    assert redact("the key is swordfish!", ["swordfish", "", "is"]) == "the key is ***!"


@pytest.mark.parametrize(
    "text",
    [
        "https://host/path?revision=main&name=a@b",
        "org/name@0123abc: file.gguf has 3 tokens, limit=2",
        "the basic information about hf models",
        "--max-new-tokens: must be >= 1, not 0",
    ],
)
def test_other_text_is_not_covered(text: str) -> None:
    assert redact(text) == text
