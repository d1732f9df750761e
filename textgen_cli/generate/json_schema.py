"""JSON schemas for constrained decoding: each keyword must be one that the text will really obey.

llguidance reports the standard keywords that it lacks, but passes over words it does not know, a misspelt
`requried` among them. This is the strict reading. It knows nothing of tokens or models.
"""

import json
from collections.abc import Iterator
from typing import Any

from textgen_cli.errors import UsageError

# Keywords that hold schemas: as their value, in a list, in an object.
ONE = frozenset({"items", "additionalItems", "additionalProperties"})
LIST = frozenset({"anyOf", "oneOf", "allOf", "prefixItems", "items"})
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})
# fmt: off
LEAVES = frozenset({
    "$ref", "const", "enum", "type", "format", "pattern", "minLength", "maxLength", "minItems", "maxItems",
    "required", "minProperties", "maxProperties", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "multipleOf",
})
NOTES = frozenset({
    "$schema", "$id", "id", "$anchor", "$comment", "$vocabulary", "title", "description", "default",
    "example", "examples", "deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding",
    "discriminator",
})
LACKING = frozenset({
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames",
    "dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties",
    "contentSchema", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor",
})
# fmt: on
OBEYED = ONE | LIST | NAMED | LEAVES | NOTES


def check_schema(text: str, subject: str) -> str:
    """The schema as compact JSON. Raises UsageError E-GRAMMAR that names the place of what is wrong."""
    try:
        schema = json.loads(text)
        for place, node in _schemas(schema, "#"):
            _check_keywords(node, place, subject)
        return json.dumps(schema)
    except json.JSONDecodeError as error:
        raise _error(subject, f"line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise _error(subject, "is nested too deeply") from error


def _error(subject: str, fact: str) -> UsageError:
    return UsageError("E-GRAMMAR", subject, fact)


def _schemas(node: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each schema within, itself first, with its JSON pointer. Malformed parts are left to llguidance."""
    if not isinstance(node, dict):
        return
    yield place, node
    for key, value in node.items():
        here = f"{place}/{_pointer(key)}"
        if key in NAMED and isinstance(value, dict):
            for name, child in value.items():
                yield from _schemas(child, f"{here}/{_pointer(name)}")
        elif key in LIST and isinstance(value, list):
            for index, child in enumerate(value):
                yield from _schemas(child, f"{here}/{index}")
        elif key in ONE:
            yield from _schemas(value, here)


def _pointer(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _check_keywords(node: dict[str, Any], place: str, subject: str) -> None:
    for key in node:
        if key in OBEYED or (key.startswith("x-") and key != "x-guidance"):
            continue
        why = "is not supported" if key in LACKING else "is not a keyword of JSON Schema"
        raise _error(subject, f"{place}: {key!r} {why}")
    _check_count(node, place, subject)


def _check_count(node: dict[str, Any], place: str, subject: str) -> None:
    """A grammar can't hold free keys apart, so `minProperties` could be met by one key given twice."""
    least, required = node.get("minProperties", 0), node.get("required", [])
    if isinstance(least, int) and isinstance(required, list) and least > len(required) + 1:
        raise _error(
            subject, f"{place}: 'minProperties' is not supported beyond the required properties and one more"
        )
