"""Prompt templates: `Translate to {to=French}: {text}`, named fields and nothing else.

`{name}` is a field, `{name=default}` one with a default, `{{` and `}}` are braces. Values are put in as they
are: no attributes, indexes, formats or second expansion. It knows nothing of records, tasks or models.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textgen_cli.errors import InputError, UsageError

_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_FIELD = re.compile(r"\s*([^\W\d][\w-]*)\s*(?:=(.*))?", re.DOTALL)


TEMPLATE_BYTES = 4 * 2**20


@dataclass(frozen=True)
class _Field:
    name: str
    default: str | None


def fill(template: str, fields: Mapping[str, Any]) -> str:
    """The template with its fields put in. Raises InputError E-FIELD and UsageError E-TEMPLATE."""
    return "".join(part if isinstance(part, str) else _value(part, fields) for part in _parts(template))


def template_fields(template: str) -> list[str]:
    """The names of a template's fields, each once, in order. Raises UsageError E-TEMPLATE."""
    return list(dict.fromkeys(part.name for part in _parts(template) if isinstance(part, _Field)))


def read_template(path: Path) -> str:
    """The template that a file holds. UsageError E-TEMPLATE where it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(TEMPLATE_BYTES + 1)
        if len(data) > TEMPLATE_BYTES:
            raise UsageError("E-TEMPLATE", str(path), f"has more than {TEMPLATE_BYTES:,} bytes")
        return data.decode("utf-8-sig").removesuffix("\n")
    except OSError as error:
        raise UsageError("E-TEMPLATE", str(path), (error.strerror or str(error)).lower()) from error
    except UnicodeDecodeError as error:
        raise UsageError("E-TEMPLATE", str(path), f"is not UTF-8 at byte {error.start}") from error


def _parts(template: str) -> Iterator[str | _Field]:
    end = 0
    for match in _PART.finditer(template):
        yield template[end : match.start()]
        end = match.end()
        yield match[0][0] if match[0] in ("{{", "}}") else _field(match, template)
    yield template[end:]


def _field(match: re.Match[str], template: str) -> _Field:
    if match[1] is None:
        raise _broken(
            template, match.start(), f"single {match[0]!r}; write {match[0] * 2!r} for the character"
        )
    found = _FIELD.fullmatch(match[1])
    if not found:
        raise _broken(template, match.start(), f"{match[0]!r} is no field name")
    return _Field(found[1], found[2])


def _broken(template: str, at: int, fact: str) -> UsageError:
    before = template[:at]
    column = at - before.rfind("\n")
    return UsageError("E-TEMPLATE", "template", f"line {before.count(chr(10)) + 1}, column {column}: {fact}")


def _value(field: _Field, fields: Mapping[str, Any]) -> str:
    if field.name not in fields and field.default is not None:
        return field.default
    return text_of(fields, field.name)


def text_of(fields: Mapping[str, Any], name: str) -> str:
    """A field that is a string or a number, as text. Raises InputError E-FIELD for any other and none."""
    if name not in fields:
        raise InputError("E-FIELD", name, "is missing")
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        kind = {bool: "true or false", type(None): "null", list: "an array", dict: "an object"}.get(
            type(value)
        )
        raise InputError("E-FIELD", name, f"must be text or a number, not {kind or type(value).__name__}")
    return str(value)
