"""Files in which pairs are published that are not records yet: one JSON document, or two files line by line.

What stands in a record of pairs, pairs.py knows.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from textgen_cli.config import BatchConfig, ScoreConfig
from textgen_cli.errors import InputError, UsageError
from textgen_cli.text import flow
from textgen_cli.text.inputs import open_source
from textgen_cli.text.records import Record, read

# A line of WinoBias (Zhao et al. 2018): its number, and a text in which who is meant stands in brackets.
_NUMBERED = re.compile(r"(\d+) (.*\[[^\]]+\].*)")
_BRACKETED = re.compile(r"\[([^\]]+)\]")
_PRONOUNS = {"he": "masculine", "him": "masculine", "his": "masculine"} | dict.fromkeys(
    ("she", "her", "hers"), "feminine"
)


def form_of(config: ScoreConfig) -> str:
    """The form of the input: with --second lines, of a .json file of pairs a document, else as ever."""
    batch = config.batch
    if config.scoring.second is not None:
        if batch.csv:
            raise UsageError("E-CONFLICT", "--csv", "cannot be used with --second, which joins lines")
        return "lines"
    named = batch.input is not None and batch.input.suffix.lower() == ".json"
    return (
        "json" if config.scoring.pairs and named and not (batch.lines or batch.csv) else flow.format_of(batch)
    )


def check_lengths(batch: BatchConfig, second: Path) -> None:
    """UsageError unless the first texts come from a file; InputError E-PAIRS where the other has more or less."""
    if batch.input is None or not batch.input.is_file():
        raise UsageError("E-CONFLICT", "--second", "needs the first texts from a file", hint="give -i FILE")
    with open_source(batch.input) as one, open_source(second) as two:
        here, there = one.lines(), two.lines()
    if here != there:
        raise InputError("E-PAIRS", str(second), f"has {there} lines with text, {batch.input} has {here}")


def joined(found: Iterator[Record], field: str, second: Path) -> Iterator[Record]:
    """Records whose `field` is the first text, with the line of that number of `second` as the other text."""
    with open_source(second) as source:
        others = read(source.stream, "lines", name=source.name)
        for record in found:
            other = next(other for other in others if other.index == record.index)
            size = record.size + other.size
            error = record.error or other.error
            try:
                fields = {} if error else _fields(str(record.fields[field]), str(other.fields["prompt"]))
            except InputError as wrong:
                fields, error = {}, wrong.record()
            yield Record(record.index, fields, error, size)


def _fields(first: str, second: str) -> dict[str, Any]:
    """The fields of a pair; WinoBias's lines lose their numbers and brackets."""
    one, two = _NUMBERED.fullmatch(first), _NUMBERED.fullmatch(second)
    if one is None and two is None:
        return {"first": first, "second": second}
    if one is None or two is None or one[1] != two[1]:
        raise InputError(
            "E-PAIRS", "pair", "its lines have different numbers, or only one of them has brackets"
        )
    pronoun = _BRACKETED.findall(one[2])[-1].lower()
    kind = {"category": _PRONOUNS[pronoun]} if pronoun in _PRONOUNS else {}
    return {"first": _BRACKETED.sub(r"\1", one[2]), "second": _BRACKETED.sub(r"\1", two[2]), **kind}
