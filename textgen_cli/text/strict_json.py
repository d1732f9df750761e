"""One JSON object of an input, read more strictly than Python reads it, and values written as JSON.

Owns what may stand in a record: depth, numbers, keys, surrogates, the length of an `id`.
"""

import json
import math
import re
from typing import Any

from textgen_cli.text.lines import Bad, decode

DEPTH_LIMIT = 128  # arrays and objects inside one another
DIGIT_LIMIT = 1000  # digits of an integer
ID_LIMIT = 4096  # bytes of an `id`

SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# Possessive: a string of 16 MiB must not cost memory for going back.
BRACKETS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]', re.DOTALL)


def json_object(line: bytes) -> dict[str, Any]:
    """The object that a line holds; Bad where it holds none or breaks a rule."""
    text = decode(line)
    if line.count(b"{") + line.count(b"[") > DEPTH_LIMIT:
        check_depth(line)
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise Bad("E-JSON", f"{fault(error)} (column {error.colno})") from None
    if not isinstance(value, dict):
        raise Bad("E-FIELD", "is not a JSON object")
    if SURROGATE.search(line):
        check_surrogates(value)
    if len(line) > ID_LIMIT and "id" in value and len(ENCODER.encode(value["id"]).encode()) > ID_LIMIT:
        raise Bad("E-FIELD", f"id has more than {ID_LIMIT:,} bytes")
    return value


def fault(error: json.JSONDecodeError) -> str:
    """What a parser says is wrong, without the word that leads to its own account of the place."""
    return error.msg.removesuffix(" at").removesuffix(" starting")


def check_depth(line: bytes) -> None:
    """Bad where arrays and objects lie too deep in one another, before a parser follows them."""
    depth = 0
    for match in BRACKETS.finditer(line):
        mark = match[0]
        if mark in b"[{":
            depth += 1
            if depth > DEPTH_LIMIT:
                raise Bad("E-JSON-DEPTH", f"is more than {DEPTH_LIMIT} levels deep")
        elif mark in b"]}":
            depth -= 1


def check_surrogates(value: dict[str, Any]) -> None:
    """Bad where a value holds half a surrogate pair, which no UTF-8 can say."""
    try:
        ENCODER.encode(value).encode()
    except UnicodeEncodeError:
        raise Bad("E-UTF8", "an escape is half of a surrogate pair: no character") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Bad("E-JSON-DUPKEY", f"key {json.dumps(twice[:80])} appears twice")
    return fields


def _integer(text: str) -> int:
    if len(text) > DIGIT_LIMIT:
        raise Bad("E-JSON", f"a number has {len(text):,} digits, limit {DIGIT_LIMIT:,}")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise Bad("E-JSON", f"number {text[:40]} is too large")
    return value


def _constant(text: str) -> float:
    raise Bad("E-JSON", f"{text} is not a JSON number")


DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
)
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
