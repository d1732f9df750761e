"""The forms of an input: lines -> fields, one reader a form.

A line that breaks a rule becomes a Bad and the rest goes on. The bytes checked are the bytes parsed: one pass, memory
that does not grow with the input, a JSON document apart.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from textgen_cli.errors import InputError
from textgen_cli.text.lines import (
    BLANK,
    BOM,
    LINE_LIMIT,
    Bad,
    check_encoding,
    decode,
    lines,
    too_long,
    without_end,
)
from textgen_cli.text.strict_json import DECODER, SURROGATE, check_depth, check_surrogates, fault, json_object

DOCUMENT_LIMIT = 64 << 20  # bytes of a JSON document, which is read whole

Parsed = tuple[int, int, dict[str, Any] | Bad]  # first line's number from 1, bytes, fields


def _read_text(stream: BinaryIO, name: str, field: str) -> Iterator[Parsed]:
    """The whole input is one prompt; one line end at its end is the shell's, not the prompt's."""
    data = stream.read(LINE_LIMIT + 1)
    if len(data) > LINE_LIMIT:
        raise InputError("E-LINE-TOO-LONG", name, f"one prompt has more than {LINE_LIMIT:,} bytes")
    check_encoding(data, name)
    try:
        text = decode(data.removeprefix(BOM))
    except Bad as bad:
        raise bad.at(name) from None
    if not text.strip():
        raise InputError("E-EMPTY", name, "holds no text", hint="did the command before it fail?")
    yield 1, len(data), {field: without_end(text)}


def _read_lines(stream: BinaryIO, name: str, field: str) -> Iterator[Parsed]:
    return _each_line(stream, name, lambda line: {field: without_end(decode(line))})


def _read_jsonl(stream: BinaryIO, name: str, field: str) -> Iterator[Parsed]:
    return _each_line(stream, name, json_object)


def _each_line(stream: BinaryIO, name: str, parse: Callable[[bytes], dict[str, Any]]) -> Iterator[Parsed]:
    for number, (line, size) in enumerate(lines(stream, name), 1):
        if line is None:
            yield number, size, too_long(size)
        elif line.strip(BLANK):
            try:
                yield number, size, parse(line)
            except Bad as bad:
                yield number, size, bad


class _Feed:
    """Lines for csv.reader, which asks for more while a quote is open, and what is known of the row."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.lines = lines(stream, name)
        self.name = name
        self.number = 0  # lines read
        self.begin()

    def begin(self) -> None:
        self.size = 0
        self.start = self.number + 1
        self.blank = True
        self.bad: Bad | None = None

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        line, size = next(self.lines)
        if self.size and self.size + size > LINE_LIMIT:
            raise InputError("E-CSV", f"{self.name}: line {self.start}", "a quote in it is never closed")
        self.number += 1
        self.size += size
        if line is None:
            self.bad = too_long(size)
            return "\n"
        self.blank = self.blank and not line.strip(BLANK)
        try:
            return decode(line)
        except Bad as bad:
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
        elif isinstance(row, Bad):
            raise row.at(f"{name}: line {feed.start}")
        elif len(set(row)) != len(row):
            raise InputError("E-CSV", f"{name}: line {feed.start}", "a column name appears twice")
        else:
            header = row


def _csv_rows(feed: _Feed) -> Iterator[list[str] | Bad]:
    rows = csv.reader(feed, strict=True)
    while True:
        feed.begin()
        row: list[str] | Bad
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            row = Bad("E-CSV", str(error))
        if feed.bad is not None:
            yield feed.bad
        elif not feed.blank:
            yield row


def _csv_fields(header: list[str], row: list[str] | Bad) -> dict[str, Any] | Bad:
    if isinstance(row, Bad):
        return row
    if len(row) > len(header):
        return Bad("E-CSV", f"has {len(row)} cells, the header {len(header)}")
    missing: list[str | None] = [None] * (len(header) - len(row))
    return dict(zip(header, [*row, *missing], strict=True))


def _read_tsv(stream: BinaryIO, name: str, field: str) -> Iterator[Parsed]:
    """Rows under a header row; cells are split at tabs alone, quotes are characters like others."""
    header: list[str] | None = None
    for number, size, got in _read_lines(stream, name, field):
        if header is not None:
            yield number, size, got if isinstance(got, Bad) else _tsv_fields(header, got[field].split("\t"))
            continue
        if isinstance(got, Bad):
            raise got.at(f"{name}: line {number}")
        header = got[field].split("\t")
        if len(set(header)) != len(header):
            raise InputError("E-CSV", f"{name}: line {number}", "a column name appears twice")


def _tsv_fields(header: list[str], cells: list[str]) -> dict[str, Any] | Bad:
    if len(cells) != len(header):
        return Bad("E-CSV", f"has {len(cells)} cells, the header {len(header)}")
    return dict(zip(header, cells, strict=True))


def _read_json(stream: BinaryIO, name: str, field: str) -> Iterator[Parsed]:
    """The objects of a JSON document: of its list, or of the lists in its `data`; objects a line are read too."""
    data = stream.read(DOCUMENT_LIMIT + 1)
    if len(data) > DOCUMENT_LIMIT:
        fact = f"has more than {DOCUMENT_LIMIT >> 20} MiB"
        raise InputError("E-JSON", name, fact, hint="write it as JSONL, an object a line")
    check_encoding(data, name)
    data = data.removeprefix(BOM)
    try:
        check_depth(data)
        found = _objects(DECODER.decode(decode(data)))
        if SURROGATE.search(data):
            check_surrogates({"": found})
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _read_jsonl(io.BytesIO(data), name, field)
            return
        raise InputError("E-JSON", name, f"{fault(error)} (line {error.lineno})") from None
    except Bad as bad:
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
        raise Bad("E-JSON", "holds no list of objects, by itself or as `data`")
    return objects


READERS: dict[str, Callable[[BinaryIO, str, str], Iterator[Parsed]]] = {
    "text": _read_text,
    "lines": _read_lines,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "json": _read_json,
}
