"""Records: bytes of a text, lines, JSONL or CSV input -> Record; fields -> one line of JSON.

Owns what a line may be: size, encoding, depth, numbers, keys. A line that breaks a rule becomes a Record
with an error and the rest goes on. The bytes checked are the bytes parsed: one pass, memory that does not
grow with the input. Knows nothing of models, prompts, templates or output files.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from textgen_cli.errors import InputError
from textgen_cli.events import Notice, Report

LINE_LIMIT = 16 << 20  # bytes of one record
DOCUMENT_LIMIT = 64 << 20  # bytes of a JSON document, which is read whole
SKIP_LIMIT = 1 << 30  # bytes of one line after which the input is no text at all
DEPTH_LIMIT = 128  # arrays and objects inside one another
DIGIT_LIMIT = 1000  # digits of an integer
ID_LIMIT = 4096  # bytes of an `id`
IDS_REMEMBERED = 1 << 18
PIECE = 1 << 16  # bytes read at once

BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# Possessive: a string of 16 MiB must not cost memory for going back.
BRACKETS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]', re.DOTALL)


@dataclass(frozen=True)
class Record:
    """One record of the input; one that could not be read has no fields but an error."""

    index: int  # 0-based number of the record
    fields: dict[str, Any]  # as they came, in order
    error: dict[str, str] | None = None  # code and message
    size: int = 0  # bytes it took in the input, its line ends included


class _Bad(Exception):
    """Why one record cannot be read: a code and a fact. Never leaves this module."""

    def at(self, place: str) -> InputError:
        return InputError(self.args[0], place, self.args[1])


Parsed = tuple[int, int, dict[str, Any] | _Bad]  # first line's number from 1, bytes, fields


def format_of(path: Path) -> str:
    """The format a file's name tells, a key of READERS: jsonl, csv, tsv, or text."""
    known = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv"}
    return known.get(path.suffix.lower(), "text")


def read(
    stream: BinaryIO, form: str, *, name: str = "stdin", strict: bool = False, field: str = "prompt"
) -> Iterator[Record]:
    """The records of a binary stream in one of the formats of READERS, as they arrive.

    `field`: what plain text fills. Raises InputError where the input as a whole is unusable; with `strict`, also
    for the first bad record.
    """
    for index, (number, size, got) in enumerate(READERS[form](stream, name, field)):
        if not isinstance(got, _Bad):
            yield Record(index, got, None, size)
        elif strict:
            raise got.at(f"{name}: line {number}")
        else:
            yield Record(index, {}, got.at(f"line {number}").record(), size)


def text_field(record: Record, field: str) -> str:
    """The text of a field; InputError E-FIELD when it is absent or no string."""
    if field not in record.fields:
        raise InputError("E-FIELD", field, "is missing")
    value = record.fields[field]
    if not isinstance(value, str):
        raise InputError("E-FIELD", field, "is not a string")
    return value


def shard(records: Iterable[Record], number: int, of: int) -> Iterator[Record]:
    """Share `number` (1 … of) of the records: every of-th one, so that pipes can be shared out too."""
    return (record for record in records if record.index % of == number - 1)


def check_unique_ids(records: Iterable[Record]) -> None:
    """InputError E-ID at the first `id` seen before. Keeps 8 bytes and a set's slot for each record."""
    seen: set[int] = set()
    for record in records:
        if "id" not in record.fields:
            continue
        mark = hash(_ENCODER.encode(record.fields["id"]))
        if mark in seen:
            shown = _ENCODER.encode(record.fields["id"])[:80]
            raise InputError("E-ID", f"record {record.index}", f"id {shown} appears twice")
        seen.add(mark)


def warned(records: Iterable[Record], report: Report) -> Iterator[Record]:
    """Pass records on; a warning for the first `id` seen before, among the first IDS_REMEMBERED that have one."""
    seen: set[int] | None = set()
    for record in records:
        if seen is not None and "id" in record.fields:
            shown = _ENCODER.encode(record.fields["id"])
            mark = hash(shown)
            twice = mark in seen
            if twice:
                report(Notice(f"record {record.index}: id {shown[:80]} appears twice", "W-ID"))
            seen.add(mark)
            if twice or len(seen) >= IDS_REMEMBERED:
                seen = None
        yield record


# --- bytes -> lines


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[bytes | None, int]]:
    """(line with its end, bytes it took), split at byte 0x0A only; None for a line over LINE_LIMIT."""
    first = True
    while piece := stream.readline(PIECE):
        line: bytes | None = piece
        size = len(piece)
        if first:
            _check_encoding(piece, name)
        if size == PIECE and not piece.endswith(b"\n"):
            line, size = _long_line(stream, piece, name)
        if first and line is not None:
            line = line.removeprefix(BOM)
        first = False
        yield line, size


def _long_line(stream: BinaryIO, head: bytes, name: str) -> tuple[bytes | None, int]:
    """The whole of a line that does not fit one piece; what is over the limit is read and dropped."""
    parts, size = [head], len(head)
    while piece := stream.readline(PIECE):
        size += len(piece)
        if size <= LINE_LIMIT:
            parts.append(piece)
        else:
            parts.clear()
        if size > SKIP_LIMIT:
            raise InputError("E-LINE-TOO-LONG", name, f"a line has more than {SKIP_LIMIT:,} bytes: no text")
        if piece.endswith(b"\n"):
            break
    return (b"".join(parts) if size <= LINE_LIMIT else None), size


def _check_encoding(head: bytes, name: str) -> None:
    """InputError for UTF-16 and UTF-32, told by their byte order mark or by where the NULs stand."""
    if any(head[:4]) and not json.detect_encoding(head[:4]).startswith("utf-8"):
        raise InputError(
            "E-ENCODING", name, "is UTF-16 or UTF-32, not UTF-8", hint="convert it: iconv -f UTF-16 -t UTF-8"
        )


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        at = error.start
        raise _Bad("E-UTF8", f"byte 0x{line[at]:02x} at offset {at} is not UTF-8") from None


def _too_long(size: int) -> _Bad:
    return _Bad("E-LINE-TOO-LONG", f"has {size:,} bytes, limit {LINE_LIMIT:,}")


def _without_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


# --- lines -> fields


def _read_text(stream: BinaryIO, name: str, field: str) -> Iterator[Parsed]:
    """The whole input is one prompt; one line end at its end is the shell's, not the prompt's."""
    data = stream.read(LINE_LIMIT + 1)
    if len(data) > LINE_LIMIT:
        raise InputError("E-LINE-TOO-LONG", name, f"one prompt has more than {LINE_LIMIT:,} bytes")
    _check_encoding(data, name)
    try:
        text = _decode(data.removeprefix(BOM))
    except _Bad as bad:
        raise bad.at(name) from None
    if not text.strip():
        raise InputError("E-EMPTY", name, "holds no text", hint="did the command before it fail?")
    yield 1, len(data), {field: _without_end(text)}


def _read_lines(stream: BinaryIO, name: str, field: str) -> Iterator[Parsed]:
    return _each_line(stream, name, lambda line: {field: _without_end(_decode(line))})


def _read_jsonl(stream: BinaryIO, name: str, field: str) -> Iterator[Parsed]:
    return _each_line(stream, name, _json_object)


def _each_line(stream: BinaryIO, name: str, parse: Callable[[bytes], dict[str, Any]]) -> Iterator[Parsed]:
    for number, (line, size) in enumerate(_lines(stream, name), 1):
        if line is None:
            yield number, size, _too_long(size)
        elif line.strip(BLANK):
            try:
                yield number, size, parse(line)
            except _Bad as bad:
                yield number, size, bad


def _json_object(line: bytes) -> dict[str, Any]:
    text = _decode(line)
    if line.count(b"{") + line.count(b"[") > DEPTH_LIMIT:
        _check_depth(line)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _Bad("E-JSON", f"{error.msg} (column {error.colno})") from None
    if not isinstance(value, dict):
        raise _Bad("E-FIELD", "is not a JSON object")
    if SURROGATE.search(line):
        _check_surrogates(value)
    if len(line) > ID_LIMIT and "id" in value and len(_ENCODER.encode(value["id"]).encode()) > ID_LIMIT:
        raise _Bad("E-FIELD", f"id has more than {ID_LIMIT:,} bytes")
    return value


def _check_depth(line: bytes) -> None:
    depth = 0
    for match in BRACKETS.finditer(line):
        mark = match[0]
        if mark in b"[{":
            depth += 1
            if depth > DEPTH_LIMIT:
                raise _Bad("E-JSON-DEPTH", f"is more than {DEPTH_LIMIT} levels deep")
        elif mark in b"]}":
            depth -= 1


def _check_surrogates(value: dict[str, Any]) -> None:
    try:
        _ENCODER.encode(value).encode()
    except UnicodeEncodeError:
        raise _Bad("E-UTF8", "an escape is half of a surrogate pair: no character") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Bad("E-JSON-DUPKEY", f"key {json.dumps(twice[:80])} appears twice")
    return fields


def _integer(text: str) -> int:
    if len(text) > DIGIT_LIMIT:
        raise _Bad("E-JSON", f"a number has {len(text):,} digits, limit {DIGIT_LIMIT:,}")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Bad("E-JSON", f"number {text[:40]} is too large")
    return value


def _constant(text: str) -> float:
    raise _Bad("E-JSON", f"{text} is not a JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


class _Feed:
    """Lines for csv.reader, which asks for more while a quote is open, and what is known of the row."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.lines = _lines(stream, name)
        self.name = name
        self.number = 0  # lines read
        self.begin()

    def begin(self) -> None:
        self.size = 0
        self.start = self.number + 1
        self.blank = True
        self.bad: _Bad | None = None

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        line, size = next(self.lines)
        if self.size and self.size + size > LINE_LIMIT:
            raise InputError("E-CSV", f"{self.name}: line {self.start}", "a quote in it is never closed")
        self.number += 1
        self.size += size
        if line is None:
            self.bad = _too_long(size)
            return "\n"
        self.blank = self.blank and not line.strip(BLANK)
        try:
            return _decode(line)
        except _Bad as bad:
            self.bad = bad
            return line.decode(errors="replace")


def _read_csv(stream: BinaryIO, name: str, field: str) -> Iterator[Parsed]:
    """Rows under a header row, as csv.DictReader gives them; cells that are missing at the end are None."""
    csv.field_size_limit(LINE_LIMIT)
    feed = _Feed(stream, name)
    header: list[str] | None = None
    for row in _csv_rows(feed):
        if header is not None:
            yield feed.start, feed.size, _csv_fields(header, row)
        elif isinstance(row, _Bad):
            raise row.at(f"{name}: line {feed.start}")
        elif len(set(row)) != len(row):
            raise InputError("E-CSV", f"{name}: line {feed.start}", "a column name appears twice")
        else:
            header = row


def _csv_rows(feed: _Feed) -> Iterator[list[str] | _Bad]:
    rows = csv.reader(feed, strict=True)
    while True:
        feed.begin()
        row: list[str] | _Bad
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            row = _Bad("E-CSV", str(error))
        if feed.bad is not None:
            yield feed.bad
        elif not feed.blank:
            yield row


def _csv_fields(header: list[str], row: list[str] | _Bad) -> dict[str, Any] | _Bad:
    if isinstance(row, _Bad):
        return row
    if len(row) > len(header):
        return _Bad("E-CSV", f"has {len(row)} cells, the header {len(header)}")
    missing: list[str | None] = [None] * (len(header) - len(row))
    return dict(zip(header, [*row, *missing], strict=True))


def _read_tsv(stream: BinaryIO, name: str, field: str) -> Iterator[Parsed]:
    """Rows under a header row; cells are split at tabs alone, quotes are characters like others."""
    header: list[str] | None = None
    for number, size, got in _read_lines(stream, name, field):
        if header is not None:
            yield number, size, got if isinstance(got, _Bad) else _tsv_fields(header, got[field].split("\t"))
            continue
        if isinstance(got, _Bad):
            raise got.at(f"{name}: line {number}")
        header = got[field].split("\t")
        if len(set(header)) != len(header):
            raise InputError("E-CSV", f"{name}: line {number}", "a column name appears twice")


def _tsv_fields(header: list[str], cells: list[str]) -> dict[str, Any] | _Bad:
    if len(cells) != len(header):
        return _Bad("E-CSV", f"has {len(cells)} cells, the header {len(header)}")
    return dict(zip(header, cells, strict=True))


def _read_json(stream: BinaryIO, name: str, field: str) -> Iterator[Parsed]:
    """The objects of a JSON document: of its list, or of the lists in its `data`; objects a line are read too."""
    data = stream.read(DOCUMENT_LIMIT + 1)
    if len(data) > DOCUMENT_LIMIT:
        fact = f"has more than {DOCUMENT_LIMIT >> 20} MiB"
        raise InputError("E-JSON", name, fact, hint="write it as JSONL, an object a line")
    _check_encoding(data, name)
    data = data.removeprefix(BOM)
    try:
        _check_depth(data)
        found = _objects(_DECODER.decode(_decode(data)))
        if SURROGATE.search(data):
            _check_surrogates({"": found})
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _read_jsonl(io.BytesIO(data), name, field)
            return
        raise InputError("E-JSON", name, f"{error.msg} (line {error.lineno})") from None
    except _Bad as bad:
        raise bad.at(name) from None
    for number, one in enumerate(found, 1):
        yield number, len(data) // len(found), one


def _objects(value: Any) -> list[dict[str, Any]]:
    inner = value.get("data") if isinstance(value, dict) else value
    lists = list(inner.values()) if isinstance(inner, dict) else [inner]
    if isinstance(value, dict) and "data" not in value:
        lists = [[value]]
    found = [one for part in lists for one in (part if isinstance(part, list) else [None])]
    objects = [one for one in found if isinstance(one, dict)]
    if not objects or len(objects) < len(found):
        raise _Bad("E-JSON", "holds no list of objects, by itself or as `data`")
    return objects


READERS: dict[str, Callable[[BinaryIO, str, str], Iterator[Parsed]]] = {
    "text": _read_text,
    "lines": _read_lines,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "json": _read_json,
}


# --- fields -> bytes


def line(fields: dict[str, Any]) -> bytes:
    """One line of JSON in UTF-8, LF at its end and nowhere else. ValueError for NaN and infinities."""
    return (_ENCODER.encode(fields) + "\n").encode()
