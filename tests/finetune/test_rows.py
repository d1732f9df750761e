"""Rows of training data: every format, where a row stands, and that nothing is dropped without a word."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from textgen_cli.config.finetune import DataConfig
from textgen_cli.errors import InputError
from textgen_cli.events import silent
from textgen_cli.finetune.rows import FORMS, PIECE, Row, read


def rows(path: Path, data: bytes | None = None, **settings: Any) -> list[Row]:
    if data is not None:
        path.write_bytes(data)
    return list(read(path, DataConfig(**settings), silent))


def of(form: str, data: bytes) -> list[Row]:
    return list(FORMS[form](io.BytesIO(data), "file"))


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "y"}\n', [("line 1", {"text": "x"}), ("line 3", {"text": "y"})]),
        ("a.csv", b'text,label\n"a\nb",1\nc,2\n', [("line 2", {"text": "a\nb", "label": "1"}),
                                                   ("line 4", {"text": "c", "label": "2"})]),
        ("a.tsv", b'text\tlabel\r\n"quoted" it\t1\r\n', [("line 2", {"text": '"quoted" it', "label": "1"})]),
        ("a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo", [("line 1", {"text": "one\n\ntwo\n"})]),
        ("a.conll", b"-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nHe PRP O\n",
         [("line 3", {"words": ["EU", "rejects"], "tags": ["B-ORG", "O"]}),
          ("line 7", {"words": ["He"], "tags": ["O"]})]),
        ("a.bio", b"New York\tB-LOC\n.\tO\n", [("line 1", {"words": ["New York", "."], "tags": ["B-LOC", "O"]})]),
        ("a.unknown", b'{"text": "x"}\n', [("line 1", {"text": "x"})]),
        ("a.json", b'{"text": "x"}\n', [("line 1", {"text": "x"})]),
    ],
)  # fmt: skip
def test_a_name_or_the_first_bytes_tell_the_format(
    tmp_path: Path, name: str, data: bytes, expected: list[tuple[str, dict[str, Any]]]
) -> None:
    found = rows(tmp_path / name, data)
    assert [(row.place, row.fields) for row in found] == expected
    assert all(row.fact is None for row in found)


def test_a_named_format_overrules_the_name(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    assert [row.fields["text"] for row in rows(path, b"one\ntwo\n", format="lines")] == ["one", "two"]
    assert rows(path, b"He O\n", task="token-classification")[0].fields == {"words": ["He"], "tags": ["O"]}


@pytest.mark.parametrize(
    ("form", "data", "place", "fact"),
    [
        ("jsonl", b'{"text": "x"}\n{"text": NaN}\n', "line 2", "NaN is not a JSON number"),
        ("jsonl", b'{"a": 1}\n{"text": "\\ud800"}\n', "line 2", "surrogate"),
        ("jsonl", b'{"a": 1}\n{"text": "x', "line 2", "Unterminated string"),
        ("jsonl", b'{"a": 1}\n{"text": "' + b"x" * (17 << 20) + b'"}\n', "line 2", "17,825,805 bytes"),
        ("csv", b"text,label\na,b,c\n", "line 2", "has 3 cells, the header 2"),
        ("tsv", b"text\tlabel\na\n", "line 2", "has 1 cells, the header 2"),
        ("tsv", b"text\tlabel\n\xff\tb\n", "line 2", "byte 0xff"),
        ("lines", b"one\n\xffx\n", "line 2", "byte 0xff at offset 0 is not UTF-8"),
        ("text", b"one\n\xffx\n", "line 2", "byte 0xff"),
        ("conll", b"EU O\n\nHe O\nalone\nis O\n\n", "line 4", "is not a word and a tag"),
        ("conll", b"EU O\n\nHe O\n\xff O\n", "line 4", "byte 0xff"),
        ("conll", b"EU O\n\n\tB-LOC\n", "line 3", "is not a word and a tag"),
        ("conll", b"EU O\n\nNew York B-LOC\n", "line 3", "has 3 columns, the lines before 2"),
    ],
)
def test_a_bad_row_is_told_by_its_line_and_harms_no_other(
    form: str, data: bytes, place: str, fact: str
) -> None:
    found = of(form, data)
    bad = [row for row in found if row.fact is not None]
    assert [(row.place, row.fields) for row in bad] == [(place, {})]
    assert fact in str(bad[0].fact)
    assert len(found) - len(bad) == (0 if form in ("csv", "tsv") else 1)


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "lines", "text", "conll"])
def test_utf_16_is_refused_as_a_whole(form: str) -> None:
    with pytest.raises(InputError, match="UTF-16") as caught:
        of(form, "text,label\nword O\n".encode("utf-16"))
    assert caught.value.name == "E-ENCODING"


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("a.json", b'[{"text": "x"}]', "E-FORMAT"),
        ("a.parquet", b"no parquet", "E-FORMAT"),
        ("a.tsv", b"a\ta\n1\t2\n", "E-CSV"),
        ("a.csv", b"a,a\n1,2\n", "E-CSV"),
        ("b.json", b'{"data": [', "E-JSON"),
        ("c.json", b'{"data": [\xff', "E-UTF8"),
    ],
)
def test_a_file_that_is_unusable_as_a_whole(tmp_path: Path, name: str, data: bytes, code: str) -> None:
    with pytest.raises(InputError) as caught:
        rows(tmp_path / name, data)
    assert caught.value.name == code
    assert name in caught.value.subject


def test_a_file_that_is_absent(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        rows(tmp_path / "none.jsonl")


LINES = st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"])) | st.just(""), max_size=30)


@given(LINES, st.integers(1, 400))
def test_pieces_of_a_text_are_the_text(lines: list[str], times: int) -> None:
    text = "\n".join(line * times for line in lines)
    found = of("text", text.encode())
    kept = [line if line.strip(" ") else "" for line in text.split("\n")]  # a line of blanks is an empty line
    assert "".join(row.fields["text"] for row in found).strip("\n") == "\n".join(kept).strip("\n")
    for row in found:
        start = int(row.place.removeprefix("line ")) - 1
        assert row.fields["text"].startswith(kept[start])
        assert kept[start]


def test_pieces_end_at_empty_lines_and_are_not_too_long() -> None:
    paragraph = "word " * 100 + "\n"
    found = of("text", "\n".join([paragraph] * 100).encode())
    sizes = [len(row.fields["text"]) for row in found]
    assert all(PIECE <= size < PIECE + 600 for size in sizes[:-1])
    assert all(row.fields["text"].endswith("\n\n") for row in found[:-1])
    without = [len(row.fields["text"]) for row in of("text", (paragraph * 100).encode())]
    assert all(2 * PIECE <= size < 2 * PIECE + 600 for size in without[:-1])


# ---- SQuAD


def squad(**question: Any) -> bytes:
    asked = {"id": "1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]} | question
    paragraphs = [{"context": "Ada wrote it.", "qas": [asked]}]
    return json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}).encode()


def test_squad_gives_a_row_for_each_question(tmp_path: Path) -> None:
    (row,) = rows(tmp_path / "dev.json", squad())
    answers = [{"text": "Ada", "answer_start": 0}]
    assert row == Row("question 1", {"question": "Who?", "context": "Ada wrote it.", "answers": answers})
    pretty = json.dumps(json.loads(squad()), indent=2).encode()
    assert rows(tmp_path / "pretty.json", pretty) == [row]


def test_an_impossible_question_has_no_answers(tmp_path: Path) -> None:
    plausible = [{"text": "wrote", "answer_start": 4}]
    (row,) = rows(tmp_path / "a.json", squad(is_impossible=True, answers=[], plausible_answers=plausible))
    assert row.fields["answers"] == []


@pytest.mark.parametrize(
    "data",
    [
        {"data": [{"paragraphs": [{"context": "c", "qas": [7]}]}]},
        {"data": [{"paragraphs": [{"context": "c"}]}]},
        {"data": [{"paragraphs": [7]}]},
        {"data": [{"title": "t"}]},
        {"data": [7]},
        {"data": 7},
    ],
)
def test_a_broken_part_of_squad_is_one_bad_row(data: Any) -> None:
    (row,) = of("squad", json.dumps(data).encode())
    assert row.fact is not None
    assert row.place == "question 1"


# ---- Parquet, pipes


def test_parquet_gives_plain_values(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b", None], "label": [["x"], [], ["y"]], "n": [1.5, None, 2.0]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    found = rows(tmp_path / "a.parquet")
    assert [row.fields for row in found] == table.to_pylist()
    assert [row.place for row in found] == ["row 1", "row 2", "row 3"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"text": "x"}\n', [{"text": "x"}]),
        (b"plain\n", [{"text": "plain\n"}]),
        (b'  {"data": [{"paragraphs": []}]}', []),
        (b"", []),
    ],
)
def test_standard_input_is_told_by_its_first_bytes(data: bytes, expected: list[dict[str, Any]]) -> None:
    receiver, sender = os.pipe()
    os.write(sender, data)
    os.close(sender)
    saved = os.dup(0)
    os.dup2(receiver, 0)
    try:
        assert [row.fields for row in read(Path("-"), DataConfig(), silent)] == expected
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(receiver)
