"""The weights of a model folder: which files hold them, and their headers, read with bounds.

Owns the rules of the safetensors format (length, JSON, types, offsets that fill the file without a hole) and
of its index. It may refuse more than the safetensors library does, never less. It reads no tensor data.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from textgen_cli.errors import ModelError, SafetyError

ADAPTER = "adapter_model.safetensors"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TRAINING_LEFTOVERS = ("training_args.bin", "optimizer", "scheduler", "rng_state")

SHARD_LIMIT = 4096
JSON_LIMIT = 1 << 26  # bytes of a JSON file that is read whole
HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own limit
SIZE_LIMIT = 1 << 53  # elements or bytes; no real tensor comes near, and products stay far below 2^64

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


class Tensor(NamedTuple):
    """What a header says of one tensor; the data lies at [begin, end) after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_json(path: Path, error_name: str) -> dict[str, Any]:
    """A JSON object of a model folder; ModelError with the given name where it is none."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise ModelError(error_name, path.name, f"is larger than {JSON_LIMIT:,} bytes")
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(error_name, path.name, (error.strerror or str(error)).lower()) from error
    return parse_json(path.name, raw, error_name)


def parse_json(name: str, raw: bytes, error_name: str) -> dict[str, Any]:
    """The JSON object that a file of this name holds; ModelError with the given name where it holds none."""
    try:
        found = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ModelError(error_name, name, "is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        raise ModelError(error_name, name, f"not JSON{f' (line {line})' if line else ''}") from error
    if not isinstance(found, dict):
        raise ModelError(error_name, name, "is not a JSON object")
    return found


def find_weights(folder: Path, names: set[str]) -> tuple[tuple[Path, ...], dict[str, Tensor]]:
    """The safetensors files of a model folder that holds these names, and the tensors in all of them.

    Raises what `gathered` raises.
    """
    files, tensors = gathered(
        folder.name,
        names,
        index=lambda: read_json(folder / INDEX, "E-SHARD"),
        header=lambda name: read_header(folder / name),
    )
    return tuple(folder / name for name in files), tensors


def gathered(
    subject: str,
    names: set[str],
    *,
    index: Callable[[], dict[str, Any]],
    header: Callable[[str], dict[str, Tensor]],
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """The safetensors files among these names, and the tensors in all of them; `index` and `header` read what is there.

    Raises what `read_header` and `no_weights` raise; ModelError E-SHARD and SafetyError E-PATH for the index.
    """
    if SINGLE in names:  # the library's own order of preference
        tensors = header(SINGLE)
        if not tensors:
            raise ModelError("E-WEIGHTS", SINGLE, "holds no tensor")
        return (SINGLE,), tensors
    if INDEX not in names:
        raise no_weights(subject, names)
    return _shards(names, index(), header)


def no_weights(subject: str, names: set[str]) -> ModelError | SafetyError:
    """The error for a model without safetensors weights, after what it has instead."""
    pickled = any(is_pickle(name) for name in names)
    if ADAPTER in names or ("adapter_config.json" in names and not pickled):
        fact = "is an adapter, not a whole model"
        return ModelError("E-ADAPTER", subject, fact, hint="name its base with -m and this with --adapter")
    if pickled:
        fact = "has its weights only as a pickle, which can run code"
        return SafetyError("E-PICKLE", subject, fact, hint="convert it to safetensors elsewhere")
    has_gguf = any(name.endswith(".gguf") for name in names)
    hint = "fetch its .gguf file and name that" if has_gguf else None
    return ModelError("E-WEIGHTS", subject, f"has no {SINGLE}", hint=hint)


def is_pickle(name: str) -> bool:
    """Whether a file's name says that it holds weights as a pickle."""
    return name.endswith(PICKLES) and not name.startswith(TRAINING_LEFTOVERS)


def shards_of(index: dict[str, Any]) -> list[str]:
    """The files that an index names, not looked at yet. ModelError E-SHARD, SafetyError E-PATH."""
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(place, str) for place in listed.values()):
        raise ModelError("E-SHARD", INDEX, "has no weight_map from tensors to files")
    shards = sorted(set(listed.values()))
    if not shards:
        raise ModelError("E-SHARD", INDEX, "names no file")
    if len(shards) > SHARD_LIMIT:
        raise ModelError("E-SHARD", INDEX, f"names {len(shards):,} files, the limit is {SHARD_LIMIT:,}")
    for shard in shards:
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
            raise SafetyError("E-PATH", INDEX, f"names {shard!r}, which is not a file of the model folder")
    return shards


def _shards(
    names: set[str], index: dict[str, Any], header: Callable[[str], dict[str, Tensor]]
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    shards, listed = shards_of(index), index["weight_map"]
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if shard not in names:
            raise ModelError("E-SHARD", shard, "is named by the index and is not there")
        found = header(shard)
        if double := found.keys() & tensors.keys():
            raise ModelError("E-SHARD", shard, f"holds {min(double)!r}, which another file holds too")
        if absent := {tensor for tensor, place in listed.items() if place == shard} - found.keys():
            raise ModelError("E-SHARD", shard, f"lacks {min(absent)!r}, which the index promises")
        tensors |= found
    return tuple(shards), tensors


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, its layout checked against the file's size.

    Raises ModelError E-TRUNCATED, E-SAFETENSORS; SafetyError E-PICKLE where the content is a pickle.
    """
    with path.open("rb") as file:
        return parse_header(path.name, os.fstat(file.fileno()).st_size, file.read)


def data_start(file: BinaryIO) -> int:
    """Where in a safetensors file, read from its beginning, the data of the tensors begins."""
    return 8 + int.from_bytes(file.read(8), "little")


def parse_header(name: str, size: int, read: Callable[[int], bytes]) -> dict[str, Tensor]:
    """The same of a file of so many bytes, of which `read` gives the next ones from its beginning on."""
    start = read(8)
    length = int.from_bytes(start, "little")
    if len(start) == 8 and length <= min(HEADER_LIMIT, size - 8):
        return _tensors(Path(name), read(length), size - 8 - length)
    raise _no_header(Path(name), start + read(24), length, size)


def _no_header(path: Path, head: bytes, length: int, size: int) -> ModelError | SafetyError:
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")):
        return SafetyError("E-PICKLE", path.name, "is a pickle that calls itself safetensors")
    if head.startswith(b"version https://git-lfs"):
        return _bad(path, "is a Git LFS pointer, not the weights")
    if len(head) >= 8 and length > HEADER_LIMIT:
        return _bad(path, f"header claims {length:,} bytes, the limit is {HEADER_LIMIT:,}")
    least = 8 + length if len(head) >= 8 else 8
    return ModelError("E-TRUNCATED", path.name, f"{size:,} of at least {least:,} bytes")


def _tensors(path: Path, raw: bytes, data_size: int) -> dict[str, Tensor]:
    header = _parse(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "metadata is not a map of strings")
    tensors = {name: _tensor(path, name, entry) for name, entry in header.items()}
    _check_layout(path, tensors, data_size)
    return tensors


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    # The library takes neither a leading blank nor a repeated name or a sign; Python's JSON does.
    if not raw.startswith(b"{"):
        raise _bad(path, "header is not a JSON object")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=_natural)
        if b"\\u" in raw:  # an escaped half of a surrogate pair is text to Python only
            json.dumps(header, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise _bad(path, "header is not JSON of the safetensors form") from error
    return dict(header)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _natural(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError("not a natural number")
    return int(digits)


def _tensor(path: Path, name: str, entry: Any) -> Tensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"tensor {name!r} lacks dtype, shape or data_offsets, or has more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _bad(path, f"tensor {name!r} has an unknown dtype")
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise _bad(path, f"tensor {name!r} has a shape or offsets that are no list of natural numbers")
    size = ITEM_BYTES[dtype]
    for side in shape:
        size *= side
        if max(size, side) > SIZE_LIMIT:
            raise _bad(path, f"tensor {name!r} is larger than any file")
    begin, end = offsets
    if end - begin != size:
        raise _bad(path, f"tensor {name!r} needs {size:,} bytes and is given {end - begin:,}")
    return Tensor(dtype, tuple(shape), begin, end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _check_layout(path: Path, tensors: dict[str, Tensor], data_size: int) -> None:
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != at:
            raise _bad(
                path,
                f"tensor {name!r} {'overlaps another' if tensor.begin < at else 'leaves a hole before it'}",
            )
        at = tensor.end
    if at > data_size:
        raise ModelError("E-TRUNCATED", path.name, f"{data_size:,} of {at:,} bytes of tensor data")
    if at < data_size:
        raise _bad(path, f"has {data_size - at:,} bytes after the last tensor")


def _bad(path: Path, fact: str) -> ModelError:
    return ModelError("E-SAFETENSORS", path.name, fact)
