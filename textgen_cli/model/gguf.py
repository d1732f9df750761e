"""Reads the header of a GGUF file within fixed limits, before any library opens the file.

Owns the layout of GGUF: what is refused here never reaches a parser that might hang, grow or misread.
Knows no torch and no gguf package, decodes no tensor, and judges no architecture.
"""

import mmap
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from textgen_cli.errors import ModelError

VERSIONS = (2, 3)  # version 1 counted in 32 bits; nothing reads it any more
LEAST = 24  # bytes: magic, version, two counts
FIRST = 1 << 20  # bytes of a header that are read at first where it comes over a network

# Limits, each several times what the largest published models need; they keep a check under a second.
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_HEADER = 64 << 20  # bytes of metadata and tensor table
MAX_TEXT = 16 << 20  # bytes of all strings outside arrays; they are kept in memory
MAX_ITEM = 1 << 20  # bytes of a string inside an array
MAX_ITEMS = 1 << 21  # elements of all arrays; readers make an object of each
ARRAY_COST = 8  # elements that an array inside an array counts for
MAX_DEPTH = 4  # arrays in arrays
MAX_DIMS = 4
MAX_NAME = 127  # bytes of a tensor's name
MAX_KEY = 256  # bytes
ALIGNMENTS = tuple(1 << n for n in range(3, 17))

STRING, ARRAY = 8, 9
FLOAT32, INT32, UINT32 = 6, 5, 4
INTEGERS = {0, 1, 2, 3, 4, 5, 10, 11}
SCALARS = {
    kind: struct.Struct("<" + code) for kind, code in zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
U32, U64 = SCALARS[UINT32], SCALARS[10]


class Layout(NamedTuple):
    """How a ggml type stores values: `block` values in `size` bytes."""

    name: str
    block: int
    size: int


LAYOUTS = {
    0: Layout("F32", 1, 4), 1: Layout("F16", 1, 2), 28: Layout("F64", 1, 8), 30: Layout("BF16", 1, 2),
    24: Layout("I8", 1, 1), 25: Layout("I16", 1, 2), 26: Layout("I32", 1, 4), 27: Layout("I64", 1, 8),
    2: Layout("Q4_0", 32, 18), 3: Layout("Q4_1", 32, 20), 6: Layout("Q5_0", 32, 22),
    7: Layout("Q5_1", 32, 24), 8: Layout("Q8_0", 32, 34), 9: Layout("Q8_1", 32, 40),
    10: Layout("Q2_K", 256, 84), 11: Layout("Q3_K", 256, 110), 12: Layout("Q4_K", 256, 144),
    13: Layout("Q5_K", 256, 176), 14: Layout("Q6_K", 256, 210), 15: Layout("Q8_K", 256, 292),
    16: Layout("IQ2_XXS", 256, 66), 17: Layout("IQ2_XS", 256, 74),
    18: Layout("IQ3_XXS", 256, 98), 19: Layout("IQ1_S", 256, 50), 20: Layout("IQ4_NL", 32, 18),
    21: Layout("IQ3_S", 256, 110), 22: Layout("IQ2_S", 256, 82), 23: Layout("IQ4_XS", 256, 136),
    29: Layout("IQ1_M", 256, 56), 34: Layout("TQ1_0", 256, 54), 35: Layout("TQ2_0", 256, 66),
    39: Layout("MXFP4", 32, 17),
}  # fmt: skip

# The type a key must have where a reader relies on it: value types, or element types of an array.
TEXT_KEYS = {
    "general.architecture", "general.name", "general.type", "tokenizer.chat_template",
    "tokenizer.ggml.model", "tokenizer.ggml.pre",
}  # fmt: skip
ARRAY_KEYS = {
    "tokenizer.ggml.tokens": {STRING},
    "tokenizer.ggml.merges": {STRING},
    "tokenizer.ggml.scores": {FLOAT32},
    "tokenizer.ggml.token_type": {INT32},
    "tokenizer.ggml.precompiled_charsmap": {0, 1},
}
INTEGER_ENDINGS = ("_token_id", ".context_length", ".block_count", ".embedding_length", ".vocab_size")


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]  # fastest-moving dimension first, as in the file
    type: str  # ggml's name: F32, Q4_1
    offset: int  # bytes from the start of the file
    size: int  # bytes


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself."""

    version: int
    metadata: Mapping[str, Any]  # numbers, truth values and strings by key
    lengths: Mapping[str, int]  # elements of each array by key
    tensors: tuple[Tensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def name(self) -> str | None:
        return self.metadata.get("general.name")

    @property
    def file_type(self) -> int | None:
        """The number of the quantisation that most weights have."""
        return self.metadata.get("general.file_type")

    @property
    def context_length(self) -> int | None:
        """Tokens."""
        return self.metadata.get(f"{self.architecture}.context_length")

    @property
    def tokenizer_model(self) -> str | None:
        return self.metadata.get("tokenizer.ggml.model")

    @property
    def chat_template(self) -> str | None:
        return self.metadata.get("tokenizer.chat_template")

    @property
    def vocab_size(self) -> int | None:
        """Tokens of the tokenizer inside the file."""
        return self.lengths.get("tokenizer.ggml.tokens")


def check(path: Path) -> Header:
    """The header of a GGUF file whose layout holds: every part lies inside the file, in known types.

    Raises ModelError: E-GGUF for a file that is no GGUF or lies about its layout, E-READ for one that
    cannot be read.
    """
    with _opened(path) as (data, size):
        return _header(_Cursor(data, min(size, MAX_HEADER), path.name), size)


def read(name: str, size: int, take: Callable[[int], bytes]) -> Header:
    """The header of a GGUF file of `size` bytes, of which `take` gives the next so many from the beginning on.

    No more is taken than twice the header, in steps that grow, and no more than MAX_HEADER. Raises ModelError E-GGUF.
    """
    if size < LEAST:
        raise _too_few(name, size)
    bound, data = min(size, MAX_HEADER), bytearray()
    while True:
        data += take(min(bound - len(data), max(FIRST, len(data))))
        try:
            return _header(_Cursor(data, len(data), name), size)
        except _Beyond:
            if len(data) >= bound:
                raise


def _header(cursor: "_Cursor", size: int) -> Header:
    """What stands at the cursor, of a file of so many bytes."""
    version = _version(cursor)
    tensor_count, key_count = cursor.scalar(U64), cursor.scalar(U64)
    if key_count > MAX_KEYS or not 0 < tensor_count <= MAX_TENSORS:
        raise cursor.refusal(f"claims {key_count} metadata keys and {tensor_count} tensors")
    metadata, lengths = _metadata(cursor, key_count)
    _check_meaning(cursor, metadata, lengths)
    tensors = _tensors(cursor, tensor_count, metadata.get("general.alignment", 32), size)
    return Header(version, metadata, lengths, tensors)


class _Beyond(ModelError):
    """The header goes on behind what is here of it."""


def _too_few(name: str, size: int) -> ModelError:
    return ModelError("E-GGUF", name, f"{size} bytes are too few for a GGUF file")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[mmap.mmap, int]]:
    """The bytes of a regular file, and their number."""
    try:
        status = path.stat()
        # Looked at before opening: to open a named pipe would wait for its writer.
        if not stat.S_ISREG(status.st_mode):
            raise ModelError("E-GGUF", path.name, "is not a regular file")
        if status.st_size < LEAST:
            raise _too_few(path.name, status.st_size)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data, len(data)
    except OSError as error:
        raise ModelError("E-READ", path.name, error.strerror or str(error)) from error


class _Cursor:
    """A place in the header that never moves past `end`."""

    def __init__(self, data: mmap.mmap | bytearray, end: int, subject: str) -> None:
        self.data, self.end, self.subject = data, end, subject
        self.position = 0
        self.items = MAX_ITEMS
        self.text = MAX_TEXT

    def refusal(self, fact: str) -> ModelError:
        return ModelError("E-GGUF", self.subject, fact)

    def beyond(self, what: str) -> ModelError:
        return _Beyond("E-GGUF", self.subject, f"{what} reaches past the end of the header")

    def skip(self, count: int, what: str) -> int:
        """Step over `count` bytes and return where they begin."""
        start = self.position
        if count > self.end - start:
            raise self.beyond(what)
        self.position = start + count
        return start

    def scalar(self, form: struct.Struct) -> Any:
        """The next number or truth value, in the form of one of `SCALARS`."""
        return form.unpack_from(self.data, self.skip(form.size, "a number"))[0]

    def string(self, limit: int, what: str) -> str:
        length = self.scalar(U64)
        if length > limit:
            raise self.refusal(f"{what} of {length} bytes is longer than {limit}")
        start = self.skip(length, what)
        try:
            return str(self.data[start : self.position], "utf-8")
        except UnicodeDecodeError:
            raise self.refusal(f"{what} is not UTF-8") from None


def _version(cursor: _Cursor) -> int:
    if cursor.data[: cursor.skip(4, "the magic") + 4] != b"GGUF":
        raise cursor.refusal("is not a GGUF file")
    version: int = cursor.scalar(U32)
    if version & 0xFFFF == 0:
        raise cursor.refusal("is a big-endian GGUF file")
    if version not in VERSIONS:
        raise cursor.refusal(f"GGUF version {version} is not supported")
    return version


def _metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Values by key, and the number of elements of each array by key."""
    values: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    for _ in range(count):
        key = cursor.string(MAX_KEY, "a metadata key")
        if key in values or key in lengths:
            raise cursor.refusal(f"metadata key {key!r} stands twice")
        # Readers put the file's own counts beside the metadata under these names.
        if not key or key.startswith("GGUF."):
            raise cursor.refusal(f"metadata key {key!r} is reserved")
        kind = cursor.scalar(U32)
        if kind == ARRAY:
            lengths[key] = _array(cursor, key)
        else:
            values[key] = _value(cursor, key, kind)
    return values, lengths


def _value(cursor: _Cursor, key: str, kind: int) -> Any:
    must_be_text, must_be_whole = key in TEXT_KEYS, key.endswith(INTEGER_ENDINGS)
    wrong = (
        key in ARRAY_KEYS
        or (must_be_text and kind != STRING)
        or (must_be_whole and kind not in INTEGERS)
        or (key == "general.alignment" and kind != UINT32)
    )
    if wrong:
        raise cursor.refusal(f"{key!r} has the wrong type {kind}")
    if kind == STRING:
        before = cursor.position
        text = cursor.string(cursor.text, f"the text of {key!r}")
        cursor.text -= cursor.position - before - U64.size
        return text
    if kind not in SCALARS:
        raise cursor.refusal(f"{key!r} has the unknown type {kind}")
    return cursor.scalar(SCALARS[kind])


def _array(cursor: _Cursor, key: str, depth: int = 1) -> int:
    """Step over an array and return the number of its elements."""
    kind: int = cursor.scalar(U32)
    count: int = cursor.scalar(U64)
    cost = count * ARRAY_COST if kind == ARRAY else count
    if cost > cursor.items:
        raise cursor.refusal(f"array {key!r} claims {count} elements")
    cursor.items -= cost
    wrong = key in TEXT_KEYS or key.endswith("_token_id") or key == "general.alignment"
    if wrong or kind not in ARRAY_KEYS.get(key, {kind}):
        raise cursor.refusal(f"array {key!r} has elements of the wrong type {kind}")
    if kind in SCALARS:
        cursor.skip(count * SCALARS[kind].size, f"array {key!r}")
    elif kind == STRING:
        _strings(cursor, count, key)
    elif kind == ARRAY and depth < MAX_DEPTH:
        for _ in range(count):
            _array(cursor, key, depth + 1)
    else:
        raise cursor.refusal(f"array {key!r} has elements of the unknown type {kind} or nests too deep")
    return count


def _strings(cursor: _Cursor, count: int, key: str) -> None:
    """What `cursor.skip` and `cursor.string` do, at the pace that a vocabulary asks for."""
    data, end, position = cursor.data, cursor.end, cursor.position
    for _ in range(count):
        start = position + U64.size
        length = U64.unpack_from(data, position)[0] if start <= end else 0
        if length > MAX_ITEM:
            raise cursor.refusal(f"an element of {key!r} of {length} bytes is longer than {MAX_ITEM}")
        if start + length > end:
            raise cursor.beyond(f"an element of {key!r}")
        position = start + length
        try:
            str(data[start:position], "utf-8")
        except UnicodeDecodeError:
            raise cursor.refusal(f"an element of {key!r} is not UTF-8") from None
    cursor.position = position


def _check_meaning(cursor: _Cursor, values: Mapping[str, Any], lengths: Mapping[str, int]) -> None:
    """Refuse metadata that contradicts itself."""
    architecture = values.get("general.architecture", "")
    if not 0 < len(architecture) <= 64 or not architecture.isprintable():
        raise cursor.refusal("names no architecture")
    if values.get("general.alignment", 32) not in ALIGNMENTS:
        raise cursor.refusal(f"alignment {values['general.alignment']} is not a power of two from 8 to 65536")
    vocabulary = lengths.get("tokenizer.ggml.tokens")
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        if lengths.get(key, vocabulary) != vocabulary:
            raise cursor.refusal(f"{key!r} has {lengths[key]} elements for {vocabulary} tokens")
    for key, value in values.items():
        is_token = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        if is_token and vocabulary is not None and not 0 <= value < vocabulary:
            raise cursor.refusal(f"{key!r} is {value}, outside the vocabulary of {vocabulary}")


def _tensors(cursor: _Cursor, count: int, alignment: int, file_size: int) -> tuple[Tensor, ...]:
    """The tensor table; `offset` counts from the start of the file."""
    tensors = [_tensor(cursor) for _ in range(count)]
    if len({tensor.name for tensor in tensors}) != count:
        raise cursor.refusal("two tensors have the same name")
    start = -(-cursor.position // alignment) * alignment
    end = start
    placed = []
    for tensor in tensors:
        if tensor.offset % alignment:
            raise cursor.refusal(f"tensor {tensor.name!r} is not aligned to {alignment} bytes")
        placed.append(Tensor(tensor.name, tensor.shape, tensor.type, start + tensor.offset, tensor.size))
    for tensor in sorted(placed, key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise cursor.refusal(f"tensor {tensor.name!r} overlaps another")
        end = tensor.offset + tensor.size
        if end > file_size:
            raise cursor.refusal(f"tensor {tensor.name!r} ends at byte {end} of {file_size}: truncated?")
    return tuple(placed)


def _tensor(cursor: _Cursor) -> Tensor:
    """One row of the tensor table; its offset counts from the start of the tensor data."""
    name = cursor.string(MAX_NAME, "a tensor's name")
    dims = cursor.scalar(U32)
    if not 1 <= dims <= MAX_DIMS:
        raise cursor.refusal(f"tensor {name!r} has {dims} dimensions")
    shape = tuple(cursor.scalar(U64) for _ in range(dims))
    kind = cursor.scalar(U32)
    offset: int = cursor.scalar(U64)
    if kind not in LAYOUTS:
        raise cursor.refusal(f"tensor {name!r} has the unknown type {kind}")
    layout = LAYOUTS[kind]
    if 0 in shape or shape[0] % layout.block:
        raise cursor.refusal(f"tensor {name!r} of shape {shape} cannot be of type {layout.name}")
    return Tensor(name, shape, layout.name, offset, prod(shape) // layout.block * layout.size)
