"""Rows of training data: files and standard input -> where a row stands and its fields, one at a time.

Owns the formats. JSONL, CSV and lines are read by text/forms.py, with all of its checks. Knows no task: whether
the fields of a row are good is not asked here.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
from pyarrow import parquet

from textgen_cli.config.finetune import DataConfig
from textgen_cli.errors import InputError
from textgen_cli.events import Report
from textgen_cli.text.forms import READERS
from textgen_cli.text.inputs import open_source
from textgen_cli.text.lines import BOM, SKIP_LIMIT

STDIN = Path("-")
PIECE = 4096  # characters of a plain text that make one row, about
PARQUET_ROWS = 256  # read at once

FORMATS = {
    ".txt": "text", ".text": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv",
    ".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet", ".conll": "conll", ".bio": "conll", ".iob": "conll",
    ".iob2": "conll",
}  # fmt: skip
_SQUAD_HEAD = re.compile(rb'\{\s*("version"\s*:\s*"[^"]*"\s*,\s*)?"data"\s*:\s*\[')


@dataclass(frozen=True)
class Row:
    """One row; one that cannot be read has no fields but a fact."""

    place: str  # "line 3": where it begins; rows of Parquet and questions of SQuAD are counted from 1 as well
    fields: dict[str, Any]
    fact: str | None = None  # what is wrong with it


def read(where: Path, data: DataConfig, report: Report) -> Iterator[Row]:
    """The rows of a file, or of standard input for "-", in order; memory does not grow with a file but SQuAD JSON.

    Raises InputError for a file that is absent, no text, or unusable as a whole; OutputError where a disk fails.
    """
    with open_source(0 if where == STDIN else where, report=report) as source:
        form = data.format or _format_of(where, source.stream, data)
        if form == "parquet":
            yield from _parquet(where, source.name)
        else:
            yield from FORMS[form](source.stream, source.name)


def _format_of(where: Path, stream: BinaryIO, data: DataConfig) -> str:
    """What the name tells, or for standard input, .json and unknown names the first bytes."""
    form = FORMATS.get(where.suffix.lower())
    if form == "text" and data.task == "token-classification":
        return "conll"  # as the files of the shared tasks are called
    if form is not None:
        return form
    head = cast(Any, stream).peek(1).removeprefix(BOM).lstrip()
    if _SQUAD_HEAD.match(head):
        return "squad"
    if head.startswith(b"{"):
        return "jsonl"
    if where.suffix.lower() == ".json":
        fact, hint = "is neither SQuAD JSON nor one JSON object a line", "jq -c '.[]' makes lines of an array"
        raise InputError("E-FORMAT", str(where), fact, hint=hint)
    if head.startswith(b"PAR1"):
        raise InputError("E-FORMAT", str(where), "Parquet needs a file named .parquet, no pipe")
    return "conll" if data.task == "token-classification" else "text"


def _from_records(form: str) -> Callable[[BinaryIO, str], Iterator[Row]]:
    """A format of text/forms.py; plain text fills the field `text`."""

    def rows(stream: BinaryIO, name: str) -> Iterator[Row]:
        for number, _, got in READERS[form](stream, name, "text"):
            place = f"line {number}"
            yield Row(place, got) if isinstance(got, dict) else Row(place, {}, got.at(place).fact)

    return rows


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str | None, str]]:
    """(number, text, fact) of each line that holds more than blanks; no text where it cannot be read."""
    for number, _, got in READERS["lines"](stream, name, "text"):
        if isinstance(got, dict):
            yield number, got["text"], ""
        else:
            yield number, None, got.at(name).fact


def _text(stream: BinaryIO, name: str) -> Iterator[Row]:
    """A plain text as pieces of whole lines: at least PIECE characters up to an empty line, twice as many at most
    where no line is longer. Put together they are the text, with LF as line ends."""
    held: list[str] = []
    start, last, size = 1, 0, 0
    for number, line, fact in _lines(stream, name):
        empty = number - last - 1
        if held and ((empty and size >= PIECE) or size >= 2 * PIECE):
            yield Row(f"line {start}", {"text": "".join(held) + "\n" * empty})
            held, size, empty = [], 0, 0
        last = number
        if line is None:
            yield Row(f"line {number}", {}, fact)
            continue
        if not held:
            start, empty = number, 0
        held.append("\n" * empty + line + "\n")
        size += empty + len(line) + 1
    if held:
        yield Row(f"line {start}", {"text": "".join(held)})


def _conll(stream: BinaryIO, name: str) -> Iterator[Row]:
    """A sentence a row: the first column is a word, the last its tag; an empty line ends a sentence.

    Columns are split at tabs where a line has one, else at blanks. One bad line makes its sentence bad.
    """
    words: list[str] = []
    tags: list[str] = []
    start, last, bad, width = 0, 0, None, 0

    def sentence() -> Iterator[Row]:
        if bad is not None:
            yield bad
        elif words:
            yield Row(f"line {start}", {"words": words, "tags": tags})

    for number, line, fact in _lines(stream, name):
        begins = number > last + 1 or not (words or bad)
        last = number
        if begins:
            yield from sentence()
            words, tags, bad, start = [], [], None, number
        if line is not None and line.startswith("-DOCSTART-"):
            continue
        columns = _columns(line or "")
        width = width or (len(columns) if len(columns) > 1 else 0)
        told = fact if line is None else _fault(columns, width)
        if bad is None and told:
            bad = Row(f"line {number}", {}, told)
        words.append(columns[0])
        tags.append(columns[-1])
    yield from sentence()


def _fault(columns: list[str], width: int) -> str:
    if len(columns) < 2 or not columns[0]:
        return "is not a word and a tag in columns"
    # A remark, or a word with a blank in it, of which half would be learnt.
    return "" if len(columns) == width else f"has {len(columns)} columns, the lines before {width}"


def _columns(line: str) -> list[str]:
    if "\t" in line:
        return [column.strip(" ") for column in line.split("\t")]
    return [column for column in line.split(" ") if column] or [""]


def _squad(stream: BinaryIO, name: str) -> Iterator[Row]:
    """The questions of SQuAD 1.1 or 2.0; read whole."""
    raw = stream.read(SKIP_LIMIT + 1)
    if len(raw) > SKIP_LIMIT:
        raise InputError("E-FORMAT", name, f"SQuAD JSON of more than {SKIP_LIMIT:,} bytes; use JSONL")
    try:
        whole = json.loads(raw.removeprefix(BOM).decode())
    except UnicodeDecodeError as error:
        raise InputError("E-UTF8", name, f"is not UTF-8 (byte {error.start:,})") from error
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        raise InputError("E-JSON", name, f"is not JSON{f' (line {line})' if line else ''}") from error
    number = 0
    for paragraph in _inside(_inside([whole], "data"), "paragraphs"):
        for question in _inside([paragraph], "qas"):
            number += 1
            place = f"question {number}"
            if isinstance(question, dict):
                context = paragraph.get("context")
                answers = [] if question.get("is_impossible") is True else question.get("answers")
                fields = {"question": question.get("question"), "context": context, "answers": answers}
                yield Row(place, fields)
            else:
                yield Row(place, {}, "is not an object with a list of what SQuAD keeps there")


_BROKEN = object()  # stands for a part that is not shaped as SQuAD has it, so that it is told and not dropped


def _inside(parts: Any, key: str) -> Iterator[Any]:
    """What the lists under `key` of all parts hold, one after another."""
    for part in parts:
        found = part.get(key) if isinstance(part, dict) else None
        if isinstance(found, list):
            yield from found
        else:
            yield _BROKEN


def _parquet(where: Path, name: str) -> Iterator[Row]:
    if where == STDIN:
        raise InputError("E-FORMAT", name, "Parquet needs a file, no pipe")
    number = 0
    try:
        with parquet.ParquetFile(where) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", fields)
    except (pa.ArrowException, OSError) as error:
        fact = str(error).strip().partition("\n")[0]
        raise InputError("E-FORMAT", name, f"is not readable Parquet: {fact}") from error


FORMS: dict[str, Callable[[BinaryIO, str], Iterator[Row]]] = {
    "text": _text,
    "lines": _from_records("lines"),
    "jsonl": _from_records("jsonl"),
    "csv": _from_records("csv"),
    "tsv": _from_records("tsv"),
    "conll": _conll,
    "squad": _squad,
}
