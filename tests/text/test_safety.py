"""Lists against texts: whole and in pieces, with blocks, in scripts with and without blanks between words."""

import random
import time
import unicodedata
from pathlib import Path

import pytest

from textgen_cli.errors import SafetyError, UsageError
from textgen_cli.text import safety
from textgen_cli.text.safety import Judge, Rule, Rules, folded, hidden, judged, read_rules


def rules_of(folder: Path, *lines: str) -> Rules:
    (folder / "words.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_rules([folder / "words.txt"])


def met(rules: Rules, text: str) -> list[str]:
    return [text[match.start : match.end] for match in judged(rules, text)]


@pytest.mark.parametrize(
    ("line", "text", "found"),
    [
        ("bad", "A bad, BAD; badly not-bad bad_", ["bad", "BAD", "bad"]),
        ("bad word", "a bad  word, bad\nword, bad-word", ["bad  word", "bad\nword"]),
        ("café", "CAFÉ cafe\u0301 caf\u00e9s", ["CAFÉ", "cafe\u0301"]),
        ("straße", "Die STRASSE dort", ["STRASSE"]),
        ("file", "a \ufb01le and ｆｉｌｅ", ["\ufb01le", "ｆｉｌｅ"]),
        ("secret", "se\u200bcr\u00adet", ["se\u200bcr\u00adet"]),
        ("你好", "他说你好吗", ["你好"]),
        ("バカ", "あのﾊﾞｶです", ["ﾊﾞｶ"]),
        ("AI", "用AI写, said", ["AI"]),
        ("한글", "\u1112\u1161\u11ab\u1100\u1173\u11af 한글판", ["\u1112\u1161\u11ab\u1100\u1173\u11af"]),
        ("C++", "C++ and c++; C+", ["C++", "c++"]),
        (r"re:\d{3}-\d{4}", "call 555-1234 or ５５５-1234", ["555-1234", "５５５-1234"]),
        (r"re: \bkill\w*", "Killing and skill", ["Killing"]),
        (r"re:a*", "baab", ["aa"]),
        (r"re:x.y", "x\ny x-y", ["x-y"]),
    ],
)
def test_what_a_line_matches(tmp_path: Path, line: str, text: str, found: list[str]) -> None:
    assert met(rules_of(tmp_path, "# a comment", "", line), text) == found


def test_a_match_names_its_line(tmp_path: Path) -> None:
    (match,) = judged(rules_of(tmp_path, "# comment", "", "bad word"), "so bad word")
    assert match.rule == Rule("words.txt", 3, "bad word")
    assert (match.start, match.end) == (3, 11)


def test_folding_agrees_with_the_library() -> None:
    draw = random.Random(3)
    alphabet = "aÄe\u0301ßﬁ你ﾊﾞ가\u1112\u1161\u11ab İı½"
    for _ in range(300):
        text = "".join(draw.choices(alphabet, k=12))
        normal = unicodedata.normalize("NFKC", text)
        assert "".join(c for c, _, _ in folded(text, case=False)) == normal, text


def test_pieces_make_no_difference(tmp_path: Path) -> None:
    """Any text in any pieces: the matches of the whole, and the whole with blocks; nothing of a match is given out."""
    rules = rules_of(tmp_path, "ab", "abab a", "b b", "ae\u0301", "你a", "re:b+c", "re:^a ?a$", "aba")
    draw = random.Random(11)
    blocked = 0
    for _ in range(1500):
        text = "".join(
            draw.choices("ab c\n你e\u0301-", weights=[6, 5, 3, 1, 1, 1, 1, 1, 1], k=draw.randint(1, 24))
        )
        judge, given, at = Judge(rules, blocks=True), "", 0
        whole = judged(rules, text)
        while at < len(text):
            size = draw.randint(1, 4)
            given += judge.feed(text[at : at + size])
            assert hidden(text, whole).startswith(given), (text, given)
            at += size
        assert given + judge.end() == hidden(text, whole), text
        assert judge.matches == whole
        blocked += bool(whole)
    assert 200 < blocked < 1400


def test_phrases_are_found_as_an_expression_finds_them(tmp_path: Path) -> None:
    import re

    draw = random.Random(5)
    words = ["ab", "ba", "aab", "b a", "bb"]
    rules = rules_of(tmp_path, *words)
    for _ in range(500):
        text = "".join(draw.choices("ab ", k=20))
        text = re.sub(" +", " ", text)
        found = {(m.start, m.end) for m in judged(rules, text)}
        told = {m.span(1) for word in words for m in re.finditer(rf"(?=(?<!\w)({word})(?!\w))", text)}
        assert found == {(s, e) for s, e in told if e > s}, text


def test_text_is_held_back_as_long_as_needed_and_no_longer(tmp_path: Path) -> None:
    judge = Judge(rules_of(tmp_path, "bad word"), blocks=True)
    assert [judge.feed(piece) for piece in ("so ", "ba", "d wor", "k, ba", "d", " word", "s bad wo", "rd!")] == [
        "so", " ", "", "bad work, ", "", "", "bad words ", "████████",
    ]  # fmt: skip
    assert judge.end() == "!"


def test_patterns_hold_the_line(tmp_path: Path) -> None:
    judge = Judge(rules_of(tmp_path, "re:a+b"), blocks=True)
    assert [judge.feed(piece) for piece in ("xaa", "a", "b\na", "a")] == ["", "", "x████\n", ""]
    assert judge.end() == "aa"


def test_a_phrase_that_begins_in_the_prompt(tmp_path: Path) -> None:
    rules = rules_of(tmp_path, "bad word", "re:over the", "rid")
    judge = Judge(rules, "told over, a bad", blocks=True)
    assert judge.feed(" word and") + judge.end() == "█████ and"
    judge = Judge(rules, "a g", blocks=True)
    assert judge.feed("rid") + judge.end() == "rid"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("re:(", "pattern"),
        ("re:", "empty"),
        ("\u200b", "no visible"),
        ("re:a{9999999999999999999}", "too big"),
    ],
)
def test_entries_that_cannot_be_used(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        rules_of(tmp_path, "good", line)
    assert "words.txt:2" in str(caught.value)
    with pytest.raises(UsageError, match="E-FILE"):
        read_rules([tmp_path / "none.txt"])


def test_a_catastrophic_pattern_does_not_hang(tmp_path: Path) -> None:
    rules = rules_of(tmp_path, "re:(a+)+b")
    start = time.monotonic()
    with pytest.raises(SafetyError, match="E-SAFETY-TIME"):
        judged(rules, "a" * 50_000 + "c")
    assert time.monotonic() - start < 20


def test_all_patterns_together_have_a_budget_for_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pattern is quick enough on each line, all of them on all lines are not: a second for each would add up."""
    rules = rules_of(tmp_path, *["re:(a+)+b"] * 10)
    line = "a" * 80 + "c"  # some milliseconds a pattern
    assert judged(rules, line) == []
    monkeypatch.setattr(safety, "TEXT_SECONDS", 0.3)
    since = time.thread_time()
    with pytest.raises(
        SafetyError, match=r"words\.txt:\d+: with the patterns before it took longer than 0\.3 s"
    ):
        judged(rules, f"{line}\n" * 100)
    assert time.thread_time() - since < 1


def test_long_lists_are_quick(tmp_path: Path) -> None:
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghij", k=8)) for _ in range(5000)]
    rules = rules_of(tmp_path, *words)
    text = " ".join(draw.choices([*words[:10], "other", "words"], k=3000))
    start = time.monotonic()
    assert len(judged(rules, text)) > 1000
    assert time.monotonic() - start < 5
