"""Records: what a line may be, that a bad one never harms the next, and that memory stays flat."""

import csv
import io
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from textgen_cli.errors import InputError
from textgen_cli.text.forms import READERS
from textgen_cli.text.lines import LINE_LIMIT
from textgen_cli.text.records import (
    Record,
    check_unique_ids,
    format_of,
    line,
    read,
    shard,
    text_field,
)
from textgen_cli.text.strict_json import DEPTH_LIMIT

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=6,
)
FIELDS = st.dictionaries(TEXT, VALUES, max_size=5)


def jsonl(data: bytes, **options: Any) -> list[Record]:
    return list(read(io.BytesIO(data), "jsonl", **options))


def code(record: Record) -> str:
    assert record.error is not None
    assert record.fields == {}
    return record.error["code"]


# ---- round trips


@settings(max_examples=30)
@given(st.lists(FIELDS, max_size=5))
@example([{"prompt": "a\u2028b\x85c\x0bd\x0ce\rf\ng\0h\x1b"}])
def test_jsonl_comes_back_as_it_was_written(rows: list[dict[str, Any]]) -> None:
    data = b"".join(line(row) for row in rows)
    assert data.count(b"\n") == len(rows)
    got = jsonl(data)
    assert [record.fields for record in got] == rows
    assert [list(record.fields) for record in got] == [list(row) for row in rows]
    assert [record.index for record in got] == list(range(len(rows)))
    assert sum(record.size for record in got) == len(data)


@settings(max_examples=30)
@given(FIELDS)
def test_a_line_is_the_json_another_reader_understands(row: dict[str, Any]) -> None:
    assert json.loads(line(row)) == row
    assert line(row).endswith(b"\n")
    assert b"\n" not in line(row)[:-1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_line_never_holds_what_is_not_json(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        line({"x": value})


@given(st.lists(st.lists(TEXT, min_size=2, max_size=2), max_size=5))
def test_csv_comes_back_as_python_reads_it(rows: list[list[str]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([["a", "b"], *rows])
    expected = list(csv.DictReader(io.StringIO(text.getvalue(), newline="")))
    got = list(read(io.BytesIO(text.getvalue().encode()), "csv"))
    assert [record.fields for record in got] == expected


# ---- lines, rows F37 to F51


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"a": "x\x1b"}', "Invalid control character (column 9)"),
        (b'{"a": "x', "Unterminated string (column 7)"),
        (b'{"a" 1}', "Expecting ':' delimiter (column 6)"),
    ],
)
def test_what_is_said_of_a_broken_line(line: bytes, said: str) -> None:
    (record,) = read(io.BytesIO(line), "jsonl")
    assert record.error is not None and record.error["message"].endswith(said)


GOOD = b'{"prompt": "fine"}\n'
DEEP = DEPTH_LIMIT + 1
BAD_LINES: list[tuple[str, bytes, str]] = [
    ("F37 bad byte", b'{"prompt": "\xff"}', "E-UTF8"),
    ("F37 encoded surrogate", b'{"prompt": "\xed\xa0\x80"}', "E-UTF8"),
    ("F37 cut character", b'{"prompt": "\xc3', "E-UTF8"),
    ("F42 raw NUL", b'{"prompt": "a\0b"}', "E-JSON"),
    ("F42 raw ESC", b'{"prompt": "a\x1bb"}', "E-JSON"),
    ("F42 raw VT", b'{"prompt": "a\x0bb"}', "E-JSON"),
    ("F42 NUL behind the object", b'{"prompt": "a"}\0', "E-JSON"),
    ("F43 array", b'["prompt"]', "E-FIELD"),
    ("F43 string", b'"prompt"', "E-FIELD"),
    ("F43 null", b"null", "E-FIELD"),
    ("no JSON", b"prompt", "E-JSON"),
    ("cut", b'{"prompt": "a', "E-JSON"),
    ("two objects", b'{"a": 1} {"b": 2}', "E-JSON"),
    ("BOM in the middle", b'\xef\xbb\xbf{"a": 1}', "E-JSON"),
    ("F45 100,000 arrays", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "E-JSON-DEPTH"),
    ("F45 100,000 open", b"[" * 100_000, "E-JSON-DEPTH"),
    ("F45 one too deep", b'{"a":' * DEEP + b"1" + b"}" * DEEP, "E-JSON-DEPTH"),
    ("F46 long integer", b'{"a": ' + b"7" * 5000 + b"}", "E-JSON"),
    ("F46 large float", b'{"a": 1e999}', "E-JSON"),
    ("F46 large negative", b'{"a": [-1e999]}', "E-JSON"),
    ("F46 NaN", b'{"a": NaN}', "E-JSON"),
    ("F46 Infinity", b'{"a": -Infinity}', "E-JSON"),
    ("F47 lone surrogate", b'{"prompt": "\\ud800"}', "E-UTF8"),
    ("F47 in a key", b'{"\\uDFFF": 1}', "E-UTF8"),
    ("F47 wrong order", b'{"prompt": "\\udc00\\ud800"}', "E-UTF8"),
    ("F48 twice", b'{"a": 1, "a": 2}', "E-JSON-DUPKEY"),
    ("F48 twice inside", b'{"b": [{"a": 1, "\\u0061": 1}]}', "E-JSON-DUPKEY"),
    ("F50 long id", b'{"id": "' + b"i" * 5000 + b'"}', "E-FIELD"),
    ("F44 long line", b'{"a": "' + b"a" * LINE_LIMIT + b'"}', "E-LINE-TOO-LONG"),
]
ACCEPTED: list[tuple[str, bytes, dict[str, Any]]] = [
    ("F40 CRLF", b'{"a": 1}\r\n', {"a": 1}),
    ("F40 no end", b'{"a": 1}', {"a": 1}),
    ("F41 separators", '{"a": "b\u2028c\u2029d\x85e"}\n'.encode(), {"a": "b\u2028c\u2029d\x85e"}),
    ("F42 escaped NUL", b'{"a": "\\u0000\\u001b"}\n', {"a": "\0\x1b"}),
    ("F45 as deep as allowed", b'{"a":' * DEPTH_LIMIT + b"1" + b"}" * DEPTH_LIMIT, {}),
    ("F45 brackets in a string", b'{"a": "' + b'[\\"' * 500 + b'"}', {"a": '["' * 500}),
    ("F45 wide", b'{"a": [' + b"[]," * 500 + b"[]]}", {"a": [[]] * 501}),
    ("F46 1,000 digits", b'{"a": -' + b"7" * 999 + b"}", {"a": -int("7" * 999)}),
    ("F46 tiny", b'{"a": 1e-999}', {"a": 0.0}),
    ("F47 pair", b'{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
    ("F47 escaped backslash", b'{"a": "\\\\ud800"}', {"a": "\\ud800"}),
    ("F48 same key elsewhere", b'{"a": {"a": 1}, "b": {"a": 2}}', {"a": {"a": 1}, "b": {"a": 2}}),
    ("F50 ids", b'{"id": {"x": [null]}}', {"id": {"x": [None]}}),
    ("order", b'{"z": 1, "a": 2}', {"z": 1, "a": 2}),
]


@pytest.mark.parametrize(("bad", "name"), [pytest.param(b, c, id=i) for i, b, c in BAD_LINES])
def test_a_bad_line_is_an_error_record_and_the_rest_goes_on(bad: bytes, name: str) -> None:
    got = jsonl(GOOD + bad + b"\n" + GOOD)
    assert [record.index for record in got] == [0, 1, 2]
    assert got[0].fields == got[2].fields == {"prompt": "fine"}
    assert code(got[1]) == name
    assert got[1].error is not None
    assert got[1].error["message"].startswith("line 2: ")
    assert got[1].size == len(bad) + 1


@pytest.mark.parametrize(("bad", "name"), [pytest.param(b, c, id=i) for i, b, c in BAD_LINES])
def test_strict_ends_at_the_first_bad_line(bad: bytes, name: str) -> None:
    records = read(io.BytesIO(GOOD + bad + b"\n"), "jsonl", name="in.jsonl", strict=True)
    assert next(records).fields == {"prompt": "fine"}
    with pytest.raises(InputError) as caught:
        next(records)
    assert (caught.value.name, caught.value.subject) == (name, "in.jsonl: line 2")


@pytest.mark.parametrize(("data", "fields"), [pytest.param(b, c, id=i) for i, b, c in ACCEPTED])
def test_accepted_lines(data: bytes, fields: dict[str, Any]) -> None:
    (record,) = jsonl(data)
    assert record.error is None
    assert record.fields == fields or not fields
    assert list(record.fields) == list(json.loads(data))


def test_the_byte_offset_of_bad_utf8_is_named() -> None:
    (record,) = jsonl('{"é": "'.encode() + b'\xff"}')
    assert record.error == {"code": "E-UTF8", "message": "line 1: byte 0xff at offset 8 is not UTF-8"}


@given(st.binary(max_size=60))
@example(b"\0{")
@example(b'{"a":1}\r')
def test_any_bytes_are_records_or_an_unusable_input(data: bytes) -> None:
    for form in READERS:
        name, got = "", []
        try:
            got = list(read(io.BytesIO(data), form))
        except InputError as error:
            name = error.name
        assert name in {"", "E-ENCODING", "E-UTF8", "E-EMPTY", "E-CSV"} | (
            {"E-JSON"} if form == "json" else set()
        )
        assert all((record.error is None) or not record.fields for record in got)
        for record in got:
            line({**record.fields, "error": record.error})


@given(st.binary(max_size=40).filter(lambda data: b"\n" not in data))
def test_no_line_is_taken_that_the_standard_library_refuses(data: bytes) -> None:
    got = jsonl(GOOD + data)[1:]
    if got and got[0].error is None:
        assert got[0].fields == json.loads(data)


def test_blank_lines_are_no_records() -> None:
    got = jsonl(b"\n  \t\r\n" + GOOD + b"\r\n\n" + b"junk\n")
    assert [(record.index, record.error is None) for record in got] == [(0, True), (1, False)]
    assert got[1].error is not None
    assert got[1].error["message"].startswith("line 6: ")


@pytest.mark.parametrize("form", ["jsonl", "lines", "csv", "tsv"])
@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_empty_input_has_no_records(form: str, data: bytes) -> None:
    assert list(read(io.BytesIO(data), form)) == []


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("form", READERS)
def test_utf16_ends_the_run_at_once(codec: str, form: str) -> None:
    with pytest.raises(InputError) as caught:
        list(read(io.BytesIO(('{"prompt": "a"}\n' * 200).encode(codec)), form))
    assert caught.value.name == "E-ENCODING"


@pytest.mark.parametrize("form", ["lines", "jsonl"])
def test_only_lf_ends_a_line(form: str) -> None:
    inside = "a\u2028b\x85c\u2029d" + ("\x0be\x0cf\x1cg" if form == "lines" else "")
    data = f'{{"prompt": "{inside}"}}\n{{"prompt": "z"}}\n'.encode()
    got = list(read(io.BytesIO(data), form))
    assert len(got) == 2
    assert inside in got[0].fields["prompt"]


def test_lines_are_prompts() -> None:
    got = list(read(io.BytesIO(b"\xef\xbb\xbf one \r\n\ntwo\xff\nthr\0ee"), "lines"))
    assert [record.fields for record in got] == [{"prompt": " one "}, {}, {"prompt": "thr\0ee"}]
    assert code(got[1]) == "E-UTF8"


@pytest.mark.parametrize(
    ("data", "prompt"),
    [(b"a\nb\n", "a\nb"), (b"a\r\n", "a"), (b"\n a\n\n", "\n a\n"), (b"\xef\xbb\xbfa", "a"), (b"a", "a")],
)
def test_the_whole_text_is_one_prompt(data: bytes, prompt: str) -> None:
    (record,) = read(io.BytesIO(data), "text")
    assert record.fields == {"prompt": prompt}


@pytest.mark.parametrize(
    ("data", "name"),
    [(b"", "E-EMPTY"), (b"\n", "E-EMPTY"), (b"\xef\xbb\xbf \n", "E-EMPTY"), (b"a\xff", "E-UTF8")],
)
def test_unusable_text(data: bytes, name: str) -> None:
    with pytest.raises(InputError) as caught:
        list(read(io.BytesIO(data), "text"))
    assert caught.value.name == name


def test_text_over_the_limit() -> None:
    with pytest.raises(InputError, match="E-LINE-TOO-LONG"):
        list(read(io.BytesIO(b"a" * (LINE_LIMIT + 1)), "text"))


# ---- CSV


def rows(data: bytes) -> list[Record]:
    return list(read(io.BytesIO(data), "csv"))


def test_csv_rows() -> None:
    data = '\xef\xbb\xbfid,prompt\r\n1,"a ""b"",\r\nc\nd"\r\n\r\n  \n2\n3,é\n'.encode("latin-1").replace(
        b"\xe9", b"\xc3\xa9"
    )
    got = rows(data)
    assert [record.fields for record in got] == [
        {"id": "1", "prompt": 'a "b",\r\nc\nd'},
        {"id": "2", "prompt": None},
        {"id": "3", "prompt": "é"},
    ]


def test_bad_csv_rows_do_not_harm_the_next() -> None:
    data = b'a,b\n1,2,3\n4,\xff\n5,"x"y\n6,' + b"x" * (LINE_LIMIT + 1) + b'\n7,8\n9,"open\n'
    got = rows(data)
    assert [code(record) if record.error else record.fields for record in got] == [
        "E-CSV", "E-UTF8", "E-CSV", "E-LINE-TOO-LONG", {"a": "7", "b": "8"}, "E-CSV",
    ]  # fmt: skip
    messages = [record.error["message"] for record in got if record.error]
    assert [message.split(":")[0] for message in messages] == [
        "line 2",
        "line 3",
        "line 4",
        "line 5",
        "line 7",
    ]


@pytest.mark.parametrize("data", [b"a,a\n1,2\n", b'a,"b\n1,2\n', b"a,\xff\n"])
def test_a_csv_header_that_cannot_be_used(data: bytes) -> None:
    with pytest.raises(InputError) as caught:
        rows(data)
    assert caught.value.name in {"E-CSV", "E-UTF8"}


def test_a_quote_that_never_closes_does_not_eat_the_memory() -> None:
    line_ = b"word " * 2000 + b"\n"
    data = b'a,b\n1,"' + line_ * (LINE_LIMIT // len(line_) + 2)
    with pytest.raises(InputError) as caught:
        rows(data)
    assert (caught.value.name, caught.value.subject) == ("E-CSV", "stdin: line 2")


# ---- memory


class Endless(io.RawIOBase):
    """A stream of so many equal bytes, then a tail."""

    def __init__(self, fill: bytes, count: int, tail: bytes) -> None:
        self.fill, self.left, self.tail = fill, count, tail

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self.left)
        if size:
            self.left -= size
            buffer[:size] = self.fill * size
            return size
        piece, self.tail = self.tail[: len(buffer)], self.tail[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)


def test_a_long_line_costs_no_memory() -> None:
    stream = io.BufferedReader(Endless(b"x", 100_000_000, b"\n" + GOOD))
    tracemalloc.start()
    try:
        got = list(read(stream, "jsonl"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert code(got[0]) == "E-LINE-TOO-LONG"
    assert (got[1].index, got[1].fields) == (1, {"prompt": "fine"})
    assert peak < 32 << 20


def test_a_line_without_end_ends_the_run() -> None:
    """As /dev/zero: it must not be read for ever."""
    stream = io.BufferedReader(Endless(b"\0", 1 << 40, b""), 1 << 20)
    with pytest.raises(InputError, match="E-LINE-TOO-LONG"):
        list(read(stream, "jsonl"))


def test_memory_does_not_grow_with_the_input() -> None:
    def peak(count: int) -> int:
        data = io.BytesIO(GOOD * count)
        tracemalloc.start()
        try:
            assert sum(1 for _ in read(data, "jsonl")) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(20_000) < peak(200) + 100_000


# ---- TSV and JSON documents


def test_tsv_rows_are_split_at_tabs_alone() -> None:
    data = b'a\tb c\r\n"x\t y"\n\none\n1\t\n'
    first, bad, last = read(io.BytesIO(data), "tsv")
    assert (first.fields, last.fields) == ({"a": '"x', "b c": ' y"'}, {"a": "1", "b c": ""})
    assert bad.error == {"code": "E-CSV", "message": "line 4: has 1 cells, the header 2"}
    with pytest.raises(InputError, match="line 1: a column name appears twice"):
        list(read(io.BytesIO(b"a\ta\n"), "tsv"))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'\xef\xbb\xbf[{"a": 1},\n {"a": 2}]\n', [{"a": 1}, {"a": 2}]),
        (b'{"version": 1, "data": {"x": [{"a": 1}], "y": [{"a": 2}]}}', [{"a": 1}, {"a": 2}]),
        (b'{"data": [{"a": 1}]}', [{"a": 1}]),
        (b'{"a": 1}', [{"a": 1}]),
        (b'{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
    ],
)
def test_a_json_document_holds_records(data: bytes, found: list[dict[str, int]]) -> None:
    assert [record.fields for record in read(io.BytesIO(data), "json")] == found


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (b'[{"a": 1}, 2]', "E-JSON.*holds no list of objects"),
        (b"[]", "E-JSON.*holds no list of objects"),
        (b'{"data": {"x": 1}}', "E-JSON.*holds no list of objects"),
        (b'[{"a": 1},\n}', "E-JSON.*line 2"),
        (b'[{"a": 1, "a": 2}]', "E-JSON-DUPKEY"),
        (b"[" * 200 + b"]" * 200, "E-JSON-DEPTH"),
    ],
)
def test_a_json_document_that_is_unusable(data: bytes, fact: str) -> None:
    with pytest.raises(InputError, match=fact):
        list(read(io.BytesIO(data), "json"))


# ---- small helpers


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.jsonl", "jsonl"),
        ("a.NDJSON", "jsonl"),
        ("b.csv", "csv"),
        ("b.tsv", "tsv"),
        ("c.txt", "text"),
        ("jsonl", "text"),
    ],
)
def test_format_of(name: str, form: str) -> None:
    assert format_of(Path(name)) == form


def test_shards_share_all_records() -> None:
    records = [Record(at, {}) for at in range(10)]
    shares = [[record.index for record in shard(records, number, 3)] for number in (1, 2, 3)]
    assert shares == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


def test_unique_ids() -> None:
    records = [
        Record(0, {"id": 1}),
        Record(1, {"id": "1"}),
        Record(2, {}),
        Record(3, {}),
        Record(4, {"id": None}),
    ]
    check_unique_ids(records)
    with pytest.raises(InputError) as caught:
        check_unique_ids([*records, Record(5, {"id": "1"})])
    assert (caught.value.name, caught.value.subject) == ("E-ID", "record 5")


def test_text_field() -> None:
    record = Record(0, {"prompt": "a", "n": 1})
    assert text_field(record, "prompt") == "a"
    for field in ("n", "absent"):
        with pytest.raises(InputError, match="E-FIELD"):
            text_field(record, field)
