"""What a text may be: a JSON schema, any JSON, a regex, choices or a grammar, as users ask for it.

It owns the reading and the checks, which need no model, so that a bad grammar fails before one loads.
It knows nothing of tokens, masks or sampling: see constrain.py.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from textgen_cli.errors import UsageError
from textgen_cli.generate.json_schema import check_schema

Kind = Literal["json-schema", "json", "regex", "choices", "grammar"]

MAX_GRAMMAR_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Constraint:
    """What the text must match: the option that asked for it, its text, and its name in messages."""

    kind: Kind
    text: str  # the schema as JSON, the regex, the choices as a JSON array, the grammar; "" for json
    subject: str  # the option or file that messages name


def from_json_schema(value: str) -> Constraint:
    """`--json-schema FILE|JSON`: what starts with a brace is JSON, all else a file. Raises UsageError."""
    inline = value.lstrip().startswith("{")
    text = value if inline else _read(value)
    return Constraint("json-schema", text, "--json-schema" if inline else value)


def from_json(_value: str = "") -> Constraint:
    """`--json`: any JSON object or array."""
    return Constraint("json", "", "--json")


def from_regex(value: str) -> Constraint:
    """`--regex`: the whole text must match (syntax of Rust's regex, without look-around)."""
    return Constraint("regex", value, "--regex")


def from_choices(value: str) -> Constraint:
    """`--choices a,b,c`: the text is exactly one of these; `"a, b",c` gives two. Raises UsageError."""
    try:
        values = next(csv.reader([value], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise UsageError("E-GRAMMAR", "--choices", f"is no comma-separated list: {error}") from error
    return Constraint("choices", json.dumps(values, ensure_ascii=False), "--choices")


def from_grammar(path: str) -> Constraint:
    """`--grammar FILE`: a grammar in llguidance's Lark dialect, or llama.cpp's GBNF. Raises UsageError."""
    return Constraint("grammar", _read(path), path)


def requested(
    *,
    json_schema: str | None = None,
    json: bool = False,
    regex: str | None = None,
    choices: str | None = None,
    grammar: str | None = None,
) -> Constraint | None:
    """The constraint that the options of these names ask for. Raises UsageError, also for two at once."""
    options: dict[str, tuple[str | bool | None, Callable[[str], Constraint]]] = {
        "--json-schema": (json_schema, from_json_schema),
        "--json": (json or None, from_json),
        "--regex": (regex, from_regex),
        "--choices": (choices, from_choices),
        "--grammar": (grammar, from_grammar),
    }
    given = [name for name, (value, _) in options.items() if value is not None]
    if len(given) > 1:
        raise UsageError("E-CONFLICT", given[1], f"cannot be used with {given[0]}")
    if not given:
        return None
    value, build = options[given[0]]
    return build(str(value))


def refuse(*, num_beams: int | None, prompt_lookup: int | None, draft_model: str | None) -> None:
    """Raise UsageError E-CONFLICT where a constraint meets beams or speculation."""
    others = {
        "--num-beams": (num_beams or 1) > 1,
        "--prompt-lookup": bool(prompt_lookup),
        "--draft-model": draft_model is not None,
    }
    for option, used in others.items():
        if used:
            raise UsageError("E-CONFLICT", option, "cannot be used with a constraint", hint=f"drop {option}")


def _read(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_GRAMMAR_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError("E-GRAMMAR", path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or a NUL in the name
        raise UsageError("E-GRAMMAR", path, "is not UTF-8 text") from error
    if len(data) > MAX_GRAMMAR_BYTES:
        raise UsageError("E-GRAMMAR", path, f"is larger than {MAX_GRAMMAR_BYTES // 2**20} MiB")
    return text


def check(constraint: Constraint) -> str:
    """The constraint as llguidance takes it. Needs no model; raises UsageError E-GRAMMAR with the place."""
    try:
        constraint.text.encode()
    except UnicodeEncodeError as error:  # argv can hold bytes that are no text
        raise UsageError("E-GRAMMAR", constraint.subject, "is not UTF-8 text") from error
    grammar = _BUILD[constraint.kind](constraint)
    message = LLMatcher.validate_grammar(grammar)
    if message:
        raise UsageError("E-GRAMMAR", constraint.subject, fact(message, constraint.kind))
    return grammar


def _schema_grammar(constraint: Constraint) -> str:
    schema = check_schema(constraint.text, constraint.subject)
    try:
        return _compact(schema)
    except (
        ValueError
    ) as error:  # half of a surrogate pair, NaN: Python's JSON knows them, llguidance's does not
        raise UsageError("E-GRAMMAR", constraint.subject, str(error)) from error


def _json_grammar(constraint: Constraint) -> str:
    return _compact('{"type": ["object", "array"]}')


def _compact(schema: str) -> str:
    # One line without blanks between tokens: small models otherwise ramble in whitespace up to the limit.
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


def _regex_grammar(constraint: Constraint) -> str:
    if not constraint.text:
        raise UsageError("E-GRAMMAR", constraint.subject, "is empty")
    raw = LLMatcher.grammar_from_regex(constraint.text)
    if LLMatcher.validate_grammar(raw):
        return raw  # so that the column of the error is the user's
    # \\d as the ASCII digits: what scripts expect, and what a JSON schema's pattern means.
    return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(constraint.text, 'd')}/")


def _choices_grammar(constraint: Constraint) -> str:
    values: list[str] = json.loads(constraint.text)
    if not values or "" in values:
        raise UsageError("E-GRAMMAR", constraint.subject, "has an empty choice" if values else "is empty")
    return LLMatcher.grammar_from_lark(
        "start: " + " | ".join(json.dumps(v, ensure_ascii=False) for v in values)
    )


def _file_grammar(constraint: Constraint) -> str:
    text = constraint.text
    if "::=" in text:
        try:
            text = any_to_lark(text)
        except GbnfToLarkError as error:
            raise UsageError("E-GRAMMAR", constraint.subject, _gbnf_fact(error)) from error
        except Exception as error:
            # The converter raises bare Exception for a missing or doubled rule; anything narrower is a bug.
            if type(error) is not Exception:
                raise
            raise UsageError("E-GRAMMAR", constraint.subject, str(error)) from error
    return LLMatcher.grammar_from_lark(text)


_BUILD: Mapping[Kind, Callable[[Constraint], str]] = {
    "json-schema": _schema_grammar,
    "json": _json_grammar,
    "regex": _regex_grammar,
    "choices": _choices_grammar,
    "grammar": _file_grammar,
}


def _gbnf_fact(error: GbnfToLarkError) -> str:
    before = error.pos.text[: error.pos.pos]
    column = len(before) - before.rfind("\n")
    return f"line {before.count(chr(10)) + 1}, column {column}: {str(error).rsplit(' at line ', 1)[0]}"


def fact(message: str, kind: Kind) -> str:
    """llguidance's message of many lines as one: `line 2, column 5: …`."""
    place = re.match(r"(?:at )?(\d+)\((\d+)\): ", message)
    lines = message[place.end() if place else 0 :].splitlines()
    inner = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    if inner is None:
        told = lines[0] if lines else message
    elif kind == "regex":
        caret = next((line.index("^") - 3 for line in lines if re.fullmatch(r" {4} *\^+", line)), None)
        return f"column {caret}: {inner}" if caret else inner
    else:
        told = f"invalid regex: {inner}"
    if kind == "regex" or not place:  # the place counts from the grammar that the regex was put into
        return told
    return f"line {place[1]}, column {place[2]}: {told}"
