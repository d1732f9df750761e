"""The bounded header reader against handcrafted files, and against gguf's own reader."""

import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf as theirs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts import gguf_files as made
from parts.gguf_files import (
    ARCHITECTURE,
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    build,
    items,
    pair,
    row,
)

from textgen_cli.errors import ModelError
from textgen_cli.model import gguf


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    made.write_llama(path, made.tiny_llama(), quantised=True)
    return path


def test_header_is_what_gguf_reads(llama: Path) -> None:
    header, reader = gguf.check(llama), theirs.GGUFReader(llama)
    assert (header.architecture, header.name, header.context_length) == ("llama", "tiny", 128)
    assert (header.tokenizer_model, header.chat_template) == ("gpt2", made.CHAT_TEMPLATE)
    assert header.vocab_size == len(made.tokens()[0])
    assert [(t.name, t.shape, t.type, t.offset, t.size) for t in header.tensors] == [
        (t.name, tuple(t.shape.tolist()), t.tensor_type.name, t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]
    plain = {key: field.contents() for key, field in reader.fields.items() if len(field.types) == 1}
    assert header.metadata == {key: value for key, value in plain.items() if not key.startswith("GGUF.")}


def test_layouts_are_those_of_gguf() -> None:
    known = {kind.value: (kind.name, *sizes) for kind, sizes in theirs.constants.GGML_QUANT_SIZES.items()}
    assert {kind: tuple(layout) for kind, layout in gguf.LAYOUTS.items()}.items() <= known.items()


TOKENS = pair("tokenizer.ggml.tokens", ARRAY, items(STRING, ["a", "b"]))


def nested(depth: int) -> bytes:
    payload = items(U8, [1])
    for _ in range(depth - 1):
        payload = items(ARRAY, [payload])
    return payload


def keys(*pairs: bytes) -> bytes:
    return build((ARCHITECTURE, *pairs))


HOSTILE = {
    "empty": (b"", "too few"),
    "short": (b"GGUF" + bytes(19), "too few"),
    "not a GGUF file": (build(magic=b"GGML"), "not a GGUF file"),
    "version 0": (build(version=0), "big-endian"),
    "version 1": (build(version=1), "version 1 "),
    "version 4": (build(version=4), "version 4 "),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(100), "big-endian"),
    "2^62 keys": (build(key_count=2**62), "claims"),
    "2^62 tensors": (build(tensor_count=2**62), "claims"),
    "no tensor": (build(rows=()), "claims"),
    "more keys than there are": (build(key_count=60_000), "E-GGUF"),
    "more tensors than there are": (build(tensor_count=60_000), "E-GGUF"),
    "string of 2^63": (build((text := struct.pack("<Q", 2**63),)), "longer than"),
    "string past the end": (keys(made.text("x") + struct.pack("<IQ", STRING, 2**20)), "end of the header"),
    "key not UTF-8": (keys(pair(b"\xff\xfe", U32, 1)), "not UTF-8"),
    "text not UTF-8": (keys(pair("general.name", STRING, b"\xff")), "not UTF-8"),
    "empty key": (keys(pair("", U32, 1)), "reserved"),
    "key of the reader": (keys(pair("GGUF.version", U32, 3)), "reserved"),
    "long key": (keys(pair("k" * 300, U32, 1)), "longer than"),
    "duplicate key": (keys(pair("x", U32, 1), pair("x", U32, 2)), "twice"),
    "duplicate array": (keys(pair("x", U32, 1), pair("x", ARRAY, items(U8, []))), "twice"),
    "unknown value type": (keys(made.text("x") + struct.pack("<IQ", 13, 0)), "unknown type"),
    "array of 2^62": (keys(pair("x", ARRAY, items(U8, [], claimed=2**62))), "claims"),
    "array of 2^62 strings": (keys(pair("x", ARRAY, items(STRING, [], claimed=2**62))), "claims"),
    "array past the end": (keys(pair("x", ARRAY, items(U64, [], claimed=100_000))), "end of the header"),
    "strings past the end": (keys(pair("x", ARRAY, items(STRING, ["a"], claimed=100))), "header|longer"),
    "array of unknown type": (keys(pair("x", ARRAY, items(77, [], claimed=0))), "unknown type"),
    "nested 3000 deep": (keys(pair("x", ARRAY, nested(3000))), "nests too deep"),
    "nested 5 deep": (keys(pair("x", ARRAY, nested(5))), "nests too deep"),
    "no architecture": (build(()), "no architecture"),
    "architecture is a number": (build((pair("general.architecture", U32, 1),)), "wrong type"),
    "architecture is empty": (build((pair("general.architecture", STRING, ""),)), "no architecture"),
    "architecture rings": (build((pair("general.architecture", STRING, "\x1b]52;c;x\x07"),)), "no arch"),
    "alignment 0": (keys(pair("general.alignment", U32, 0)), "alignment 0"),
    "alignment 33": (keys(pair("general.alignment", U32, 33)), "alignment 33"),
    "alignment 2^31": (keys(pair("general.alignment", U32, 2**31)), "alignment"),
    "alignment is short": (keys(pair("general.alignment", U16, 32)), "wrong type"),
    "alignment is an array": (keys(pair("general.alignment", ARRAY, items(U32, [32]))), "wrong type"),
    "scores are bytes": (keys(TOKENS, pair("tokenizer.ggml.scores", ARRAY, items(U8, [1, 2]))), "wrong type"),
    "tokens are numbers": (keys(pair("tokenizer.ggml.tokens", ARRAY, items(U32, [1]))), "wrong type"),
    "tokens is a string": (keys(pair("tokenizer.ggml.tokens", STRING, "a")), "wrong type"),
    "types are floats": (keys(TOKENS, pair("tokenizer.ggml.token_type", ARRAY, items(F32, [1, 2]))), "wrong"),
    "too few scores": (keys(TOKENS, pair("tokenizer.ggml.scores", ARRAY, items(F32, [1.0]))), "2 tokens"),
    "scores without tokens": (keys(pair("tokenizer.ggml.scores", ARRAY, items(F32, [1.0]))), "None tokens"),
    "eos outside": (keys(TOKENS, pair("tokenizer.ggml.eos_token_id", U32, 2)), "outside the vocabulary"),
    "eos negative": (keys(TOKENS, pair("tokenizer.ggml.eos_token_id", I32, -1)), "outside the vocabulary"),
    "eos is a string": (keys(pair("tokenizer.ggml.eos_token_id", STRING, "2")), "wrong type"),
    "context length is true": (keys(pair("llama.context_length", BOOL, True)), "wrong type"),
    "template is an array": (keys(pair("tokenizer.chat_template", ARRAY, items(STRING, ["a"]))), "wrong"),
    "no dimension": (build(rows=(row("a", ()),)), "0 dimensions"),
    "5 dimensions": (build(rows=(row("a", (1, 1, 1, 1, 8)),)), "5 dimensions"),
    "2^31 dimensions": (build(rows=(row("a", (8,), dims=2**31),)), "dimensions"),
    "dimensions overflow": (build(rows=(row("a", (2**32, 2**32, 2, 2)),)), "ends at byte"),
    "a dimension of 0": (build(rows=(row("a", (0,)),)), "cannot be of type"),
    "half a block": (build(rows=(row("a", (16, 2), 8),), data=34), "cannot be of type"),
    "unknown tensor type": (build(rows=(row("a", (8,), 99),)), "unknown type 99"),
    "removed tensor type": (build(rows=(row("a", (32,), 4),)), "unknown type 4"),
    "offset past the end": (build(rows=(row("a", (8,), 0, 32),)), "ends at byte"),
    "offset of 2^63": (build(rows=(row("a", (8,), 0, 2**63),)), "ends at byte"),
    "offset not aligned": (build(rows=(row("a", (8,), 0, 4),), data=64), "not aligned"),
    "truncated data": (build(data=31), "ends at byte"),
    "overlap": (build(rows=(row("a", (16,)), row("b", (8,), 0, 32)), data=64), "overlaps"),
    "duplicate tensor": (build(rows=(row("a", (8,)), row("a", (8,), 0, 32)), data=64), "same name"),
    "long tensor name": (build(rows=(row("a" * 200, (8,)),)), "longer than"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_lies_are_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[case][0])
    with pytest.raises(ModelError, match=HOSTILE[case][1]) as caught:
        gguf.check(path)
    assert caught.value.name == "E-GGUF"


@pytest.mark.parametrize(
    "content",
    [build(), build(version=2), keys(pair("x", ARRAY, nested(4))),
     keys(TOKENS, pair("tokenizer.ggml.eos_token_id", U32, 1)),
     build((ARCHITECTURE, pair("general.alignment", U32, 64)), alignment=64)],
    ids=["least", "version 2", "nested 4 deep", "tokens", "alignment 64"],
)  # fmt: skip
def test_honest_files_pass(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert gguf.check(path).architecture == "llama"
    theirs.GGUFReader(path)


def test_every_truncation_is_refused(llama: Path, tmp_path: Path) -> None:
    whole, path = llama.read_bytes(), tmp_path / "cut.gguf"
    for part in range(20):
        path.write_bytes(whole[: len(whole) * part // 20])
        with pytest.raises(ModelError, match="E-GGUF"):
            gguf.check(path)


def test_not_a_file(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for name, code in {"pipe": "E-GGUF", ".": "E-GGUF", "absent": "E-READ"}.items():
        with pytest.raises(ModelError) as caught:
            gguf.check(tmp_path / name)
        assert caught.value.name == code


BIG = {
    "keys": (b"".join(pair(f"{n:0250}", U8, 1) for n in range(65_000)), 65_000),
    "strings": (pair("x", ARRAY, struct.pack("<IQ", STRING, 2_000_000) + bytes(16_000_000)), 1),
    "arrays": (
        pair("x", ARRAY, struct.pack("<IQ", ARRAY, 260_000) + struct.pack("<IQ", U8, 0) * 260_000),
        1,
    ),
    "text": (pair("x", STRING, "x" * (15 << 20) + "\U0001f600"), 1),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", BIG)
def test_the_worst_files_cost_little(case: str, tmp_path: Path) -> None:
    """What the limits just admit, in a process of its own: time and memory stay bounded."""
    payload, count = BIG[case]
    path = tmp_path / "big.gguf"
    path.write_bytes(build((ARCHITECTURE, payload), key_count=count + 1))
    program = (
        "import sys, time, pathlib; from textgen_cli.model import gguf\n"
        "start = time.process_time(); gguf.check(pathlib.Path(sys.argv[1]))\n"
        "print(time.process_time() - start)\n"
        "print(pathlib.Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    seconds, memory = map(float, done.stdout.split())
    assert memory * 1024 < 200e6
    assert seconds < 2  # a second on a machine that has nothing else to do


@given(st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_passes_gguf_reads_too(llama: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(llama.read_bytes())
    header_end = min(tensor.offset for tensor in gguf.check(llama).tensors)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(4, header_end - 1))
        new = data.draw(
            st.sampled_from(
                [b"\x00", b"\xff", b"\x08", b"\x01\x00", b"\xff" * 8, bytes(8), b"\x09\x00\x00\x00"]
            )
        )
        content[place : place + len(new)] = new
    path = tmp_path / "mutant.gguf"
    path.write_bytes(content)
    try:
        header = gguf.check(path)
    except ModelError:
        return
    start = time.process_time()
    reader = theirs.GGUFReader(path)
    assert time.process_time() - start < 20
    assert [(t.name, t.offset, t.size) for t in header.tensors] == [
        (t.name, t.data_offset, t.n_bytes) for t in reader.tensors
    ]
