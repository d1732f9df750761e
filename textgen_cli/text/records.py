"""Records: an input in any of its forms -> Record; fields -> one line of JSON.

A line that breaks a rule becomes a Record with an error and the rest goes on. Knows nothing of models, prompts,
templates or output files.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from textgen_cli.errors import InputError
from textgen_cli.events import Notice, Report
from textgen_cli.text.forms import READERS
from textgen_cli.text.lines import Bad
from textgen_cli.text.strict_json import ENCODER

IDS_REMEMBERED = 1 << 18


@dataclass(frozen=True)
class Record:
    """One record of the input; one that could not be read has no fields but an error."""

    index: int  # 0-based number of the record
    fields: dict[str, Any]  # as they came, in order
    error: dict[str, str] | None = None  # code and message
    size: int = 0  # bytes it took in the input, its line ends included


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
        if not isinstance(got, Bad):
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
        mark = hash(ENCODER.encode(record.fields["id"]))
        if mark in seen:
            shown = ENCODER.encode(record.fields["id"])[:80]
            raise InputError("E-ID", f"record {record.index}", f"id {shown} appears twice")
        seen.add(mark)


def warned(records: Iterable[Record], report: Report) -> Iterator[Record]:
    """Pass records on; a warning for the first `id` seen before, among the first IDS_REMEMBERED that have one."""
    seen: set[int] | None = set()
    for record in records:
        if seen is not None and "id" in record.fields:
            shown = ENCODER.encode(record.fields["id"])
            mark = hash(shown)
            twice = mark in seen
            if twice:
                report(Notice(f"record {record.index}: id {shown[:80]} appears twice", "W-ID"))
            seen.add(mark)
            if twice or len(seen) >= IDS_REMEMBERED:
                seen = None
        yield record


def line(fields: dict[str, Any]) -> bytes:
    """One line of JSON in UTF-8, LF at its end and nowhere else. ValueError for NaN and infinities."""
    return (ENCODER.encode(fields) + "\n").encode()
