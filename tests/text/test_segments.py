"""Words of a text and the tokens that belong to them, against rules written out character by character."""

import time
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textgen_cli.text.segments import assign, segments, sentences

ALPHABET = st.one_of(
    st.sampled_from(" \t\n\u3000ab.,é你好の한👍🏽\u200d"), st.characters(exclude_categories=["Cs"])
)
TEXTS = st.text(ALPHABET, max_size=40)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \n\t ", []),
        ("one two", ["one", "two"]),
        ("  one,\u3000two.\n", ["one,", "two."]),
        ("我喜欢猫。", ["我", "喜", "欢", "猫", "。"]),
        ("iPhone手机 ok", ["iPhone", "手", "机", "ok"]),
        ("ひらがなカタカナ", list("ひらがなカタカナ")),
        ("スーパー", list("スーパー")),  # the long vowel is a character too
        ("か\u3099っ", ["か\u3099", "っ"]),  # a voicing mark is not
        ("ｶﾞﾑ", ["ｶﾞ", "ﾑ"]),
        ("葛\U000e0100城", ["葛\U000e0100", "城"]),  # nor the choice of a glyph
        ("𠮷野家", ["𠮷", "野", "家"]),
        ("人々", ["人", "々"]),
        ("나는 고양이를 좋아한다", ["나는", "고양이를", "좋아한다"]),
        ("👩‍👩‍👧 fine 🇫🇷", ["👩‍👩‍👧", "fine", "🇫🇷"]),
        ("שלום עולם", ["שלום", "עולם"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert [text[start:end] for start, end in segments(text)] == words


@given(TEXTS)
def test_every_character_is_in_one_word_or_blank(text: str) -> None:
    seen = [place for start, end in segments(text) for place in range(start, end)]
    assert seen == [place for place, character in enumerate(text) if not character.isspace()]


@given(st.text(st.characters(), max_size=3), st.characters(min_codepoint=0x2E80))
def test_scripts_without_blanks_are_told_by_their_names(before: str, character: str) -> None:
    """Unicode's own names say what is Han or kana."""
    name = unicodedata.name(character, "")
    if name.startswith(("CJK UNIFIED", "CJK COMPATIBILITY IDEO", "HIRAGANA LETTER", "KATAKANA LETTER")):
        assert (len(before), len(before) + 1) in segments(before + character)


@st.composite
def tokenised(draw: st.DrawFn) -> tuple[str, list[tuple[int, int]]]:
    """A text cut into tokens, some of them bytes of a character: the same span again, or an empty one behind it."""
    text = draw(TEXTS)
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=20)) | {0, len(text)})
    offsets: list[tuple[int, int]] = []
    for start, end in pairwise(cuts):
        offsets += [(start, end), *draw(st.lists(st.sampled_from([(start, end), (end, end)]), max_size=2))]
    return text, offsets


@given(tokenised())
def test_a_token_belongs_to_the_word_of_its_first_character(case: tuple[str, list[tuple[int, int]]]) -> None:
    text, offsets = case
    words = segments(text)
    owners = assign(offsets, words)
    assert len(owners) == len(offsets)
    if not words:
        assert set(owners) <= {None}
        return
    owner_of = {place: number for number, (start, end) in enumerate(words) for place in range(start, end)}
    for (start, end), owner in zip(offsets, owners, strict=True):
        inside = [owner_of[place] for place in range(start, end) if place in owner_of]
        behind = [owner_of[place] for place in range(end, len(text)) if place in owner_of]
        if start == end:
            inside = [owner_of[start - 1]] if start - 1 in owner_of else []
        assert owner == (inside or behind or [len(words) - 1])[0]


@given(tokenised())
def test_tokens_in_order_have_words_in_order(case: tuple[str, list[tuple[int, int]]]) -> None:
    """But for bytes that are told again behind a longer token."""
    text, offsets = case
    once = sorted({(start, end) for start, end in offsets if start < end})
    owners = assign(once, segments(text))
    assert owners == sorted(owners, key=lambda owner: -1 if owner is None else owner)


@pytest.mark.parametrize(
    ("text", "offsets", "owners"),
    [
        ("a b", [(0, 1), (1, 3)], [0, 1]),  # the blank before is its word's
        ("a  b ", [(0, 1), (1, 2), (2, 4), (4, 5)], [0, 1, 1, 1]),
        ("a  b", [(0, 1), (2, 2), (3, 4)], [0, 1, 1]),  # a blank whose span was trimmed away
        ("👍 b", [(0, 1), (0, 1), (0, 1), (1, 3)], [0, 0, 0, 1]),  # bytes of an emoji
        ("👍你", [(0, 1), (1, 1), (1, 1), (1, 2)], [0, 0, 0, 1]),  # told as nothing behind it
        ("你好", [(0, 2)], [0]),  # one token over two words
        ("a", [(0, 0), (0, 1)], [0, 0]),
        (" ", [(0, 1)], [None]),
        ("", [], []),
    ],
)
def test_assignment_by_hand(text: str, offsets: list[tuple[int, int]], owners: list[int | None]) -> None:
    assert assign(offsets, segments(text)) == owners


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('Hello. How are you? "Fine." he said… ok', ["Hello.", "How are you?", '"Fine."', "he said…", "ok"]),
        ("他说。你好！「是的。」好", ["他说。", "你好！", "「是的。」", "好"]),
        ("One\n\n Two is 2.5. \n", ["One", "Two is 2.5."]),
        (" \n", []),
    ],
)
def test_sentences(text: str, found: list[str]) -> None:
    assert [text[start:end] for start, end in sentences(text)] == found


def test_long_runs_of_marks_cost_no_more_than_their_length() -> None:
    since = time.thread_time()
    assert len(sentences("." * 200_000 + '."' * 50_000)) == 1
    assert time.thread_time() - since < 2
