"""Inputs: what cannot be opened, and files that change while they are read."""

import errno
import hashlib
import io
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from parts.faults import command, inject, work

from textgen_cli.errors import InputError
from textgen_cli.events import Event, Notice
from textgen_cli.text.inputs import open_source
from textgen_cli.text.records import read


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"a\nb\n" * 1_000_000)
    with open_source(path) as source:
        assert source.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
        assert source.stream.read() == path.read_bytes()
        assert source.stat.st_ino == path.stat().st_ino


def test_a_pipe_has_no_hash() -> None:
    here, there = os.pipe()
    os.write(there, b"a\nb")
    os.close(there)
    with open_source(here) as source:
        assert source.sha256() is None
        assert source.stream.read() == b"a\nb"
    os.close(here)


def test_a_line_of_a_pipe_is_given_when_it_comes() -> None:
    here, there = os.pipe()
    with open_source(here) as source:
        records = read(source.stream, "jsonl")
        os.write(there, b'{"a": 1}\n{"a"')
        assert next(records).fields == {"a": 1}
        os.write(there, b": 2}")
        os.close(there)
        assert next(records).fields == {"a": 2}
    os.close(here)


def test_a_descriptor_in_the_middle_of_a_file(tmp_path: Path) -> None:
    """As `(read line; textgen --lines) < file` gives it."""
    path = tmp_path / "in"
    path.write_bytes(b"first\nsecond\n")
    fd = os.open(path, os.O_RDONLY)
    os.read(fd, 6)
    with open_source(fd) as source:
        assert source.sha256() == hashlib.sha256(b"second\n").hexdigest()
        assert source.stream.read() == b"second\n"
    os.close(fd)  # fails if the source closed what it does not own


def test_a_file_of_the_kernel() -> None:
    """Its size is said to be 0."""
    with open_source(Path("/proc/version")) as source:
        assert source.sha256() is None
        assert source.stream.read() == Path("/proc/version").read_bytes()


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    """F54, F56."""
    closed = os.open(tmp_path, os.O_RDONLY)
    os.close(closed)
    for where, name, fact in (
        (tmp_path, "E-INPUT", "is a directory"),
        (tmp_path / "absent", "E-INPUT", "no such file or directory"),
        (tmp_path / ("n" * 300), "E-INPUT", "file name too long"),
        (closed, "E-STDIN-CLOSED", "is closed"),
    ):
        with pytest.raises(InputError) as caught:
            open_source(where)
        assert (caught.value.name, caught.value.fact) == (name, fact)


@pytest.mark.parametrize("hashed", [False, True])
def test_growth_is_left_out_and_said(tmp_path: Path, hashed: bool) -> None:
    """F57."""
    path = tmp_path / "in"
    path.write_bytes(b"a\n" * 10)
    events: list[Event] = []
    with open_source(path, report=events.append) as source:
        if hashed:
            source.sha256()
        with path.open("ab") as stream:
            stream.write(b"later\n")
        assert source.stream.read() == b"a\n" * 10
        assert source.stream.read() == b""
    assert [event.name for event in events if isinstance(event, Notice)] == ["W-INPUT-GREW"]


@pytest.mark.parametrize(("now", "hashed"), [(b"a\n" * 5, False), (b"", True), (b"a\n" * 9 + b"b\n", True)])
def test_other_changes_are_refused(tmp_path: Path, now: bytes, hashed: bool) -> None:
    """F57: cut, emptied, or altered in place."""
    path = tmp_path / "in"
    path.write_bytes(b"a\n" * 10)
    with open_source(path) as source:
        if hashed:
            source.sha256()
        with path.open("r+b") as stream:
            stream.truncate(len(now))
            stream.write(now)
        with pytest.raises(InputError) as caught:
            source.stream.read()
    assert caught.value.name == "E-INPUT-CHANGED"


def test_a_disk_that_cannot_be_read_in_the_middle(tmp_path: Path) -> None:
    """F58: exit 8, and the job can be resumed."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps({"prompt": f"{at} " + "word " * 2000}) + "\n" for at in range(250)))
    # The hash takes preads; the second readv is in the middle of the records.
    done = work(source, out, "--every-group", under=inject("readv:error=EIO:when=2"))
    assert done.returncode == 8
    assert f"[E-READ] {source}: {os.strerror(errno.EIO).lower()}" in done.stderr
    assert Path(f"{out}.partial").stat().st_size
    assert work(source, out, "--resume").returncode == 0
    assert work(source, tmp_path / "quiet").returncode == 0
    assert out.read_bytes() == (tmp_path / "quiet").read_bytes()


def test_dev_zero_ends(tmp_path: Path) -> None:
    """F56."""
    with Path("/dev/zero").open("rb") as zeros:
        done = work("-", tmp_path / "out", stdin=zeros)
    assert done.returncode == 4
    assert "E-LINE-TOO-LONG" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_fifo_nobody_writes_waits_until_interrupted(tmp_path: Path) -> None:
    """F56: Ctrl-C works, nothing is left."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    process = subprocess.Popen(command(fifo, tmp_path / "out"), stderr=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(2)
    process.communicate(timeout=10)
    assert process.returncode == -2
    assert list(tmp_path.iterdir()) == [fifo]


def test_reading_is_not_slowed_by_the_checks(tmp_path: Path) -> None:
    """A stream of our own gives the same lines as Python's, however they fall into its buffer."""
    path = tmp_path / "in"
    path.write_bytes(b"".join(b"x" * (at * 37 % 5000) + b"\n" for at in range(3000)))
    with open_source(path) as source:
        source.sha256()
        assert list(source.stream) == path.read_bytes().splitlines(keepends=True)


def test_a_slow_writer_is_waited_for() -> None:
    here, there = os.pipe()

    def write() -> None:
        for byte in b'{"a": 1}\n':
            os.write(there, bytes([byte]))
            time.sleep(0.005)
        os.close(there)

    thread = threading.Thread(target=write)
    thread.start()
    with open_source(here) as source:
        got: Any = [record.fields for record in read(source.stream, "jsonl")]
    thread.join()
    os.close(here)
    assert got == [{"a": 1}]
    assert isinstance(source.stream, io.BufferedReader)
