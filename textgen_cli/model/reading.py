"""Tensors of safetensors files brought into memory, piece by piece, in the dtype that they are wanted in.

They are read and not mapped: a file that is cut or written anew while a job runs would else kill it by SIGBUS, or
change what it computes.
"""

from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path

import torch

from textgen_cli.errors import ModelError
from textgen_cli.model.weights import Tensor, data_start, read_header

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip

_PIECE = 1 << 20  # numbers converted at a time: 4 MB of float32, which the processor's caches hold


def dtypes(paths: Sequence[Path]) -> set[torch.dtype]:
    """What dtypes the tensors of these files have. Raises what `read_header` raises."""
    return {DTYPES[tensor.dtype] for path in paths for tensor in read_header(path).values()}


def tensors(paths: Sequence[Path], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor by its name, those in float32 in this dtype, the others in their own.

    Raises what `read_header` raises, ModelError E-TRUNCATED where a file has become shorter, and OSError.
    """
    # Freed at once: from then on the C library takes weights from its heap, where what packing frees is used again.
    torch.empty(_PIECE, dtype=torch.float32)
    piece = torch.empty(_PIECE, dtype=torch.float32)
    for path in paths:
        found = read_header(path)
        with path.open("rb", buffering=0) as file:
            start = data_start(file)
            for name, tensor in found.items():
                file.seek(start + tensor.begin)
                if tensor.dtype == "F32" and dtype != torch.float32:
                    yield name, _converted(file, path, tensor, dtype, piece)
                else:
                    whole = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
                    _fill(file, path, whole.view(-1))
                    yield name, whole


def _converted(
    file: FileIO, path: Path, tensor: Tensor, dtype: torch.dtype, piece: torch.Tensor
) -> torch.Tensor:
    whole = torch.empty(tensor.shape, dtype=dtype)
    for part in whole.view(-1).split(len(piece)):
        source = piece[: len(part)]
        _fill(file, path, source)
        part.copy_(source)
    return whole


def _fill(file: FileIO, path: Path, flat: torch.Tensor) -> None:
    """Read the next bytes of a file into a flat tensor."""
    room = flat.view(torch.uint8).numpy().data
    while room:
        got = file.readinto(room)  # the system gives at most 2 GB at once
        if not got:
            raise ModelError("E-TRUNCATED", path.name, f"ends {len(room):,} bytes too early")
        room = room[got:]
