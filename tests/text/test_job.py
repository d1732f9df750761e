"""Batches on the disk: killed, cut, filled up, raced and resumed, the file is that of a quiet run."""

import errno
import fcntl
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts.faults import command, inject, need, preloaded, result, small_disk, work, write_input

from textgen_cli.errors import (
    BusyError,
    InputError,
    InternalError,
    OutputError,
    ResumeError,
    TextgenError,
    UsageError,
)
from textgen_cli.events import Event
from textgen_cli.text import job as job_module
from textgen_cli.text.job import Job, open_job
from textgen_cli.text.records import Record, line

COUNT = 200


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_input(tmp_path_factory.mktemp("input") / "in.jsonl", COUNT)


@pytest.fixture(scope="module")
def reference(source: Path) -> bytes:
    """The output by the simplest loop: no job, no windows, no batches."""
    out = []
    index = 0
    for text in source.read_text(encoding="utf-8").split("\n"):
        if text.strip():
            try:
                record = Record(index, json.loads(text))
            except ValueError:
                message = "line 23: Expecting property name enclosed in double quotes (column 2)"
                record = Record(index, {}, {"code": "E-JSON", "message": message})
            out += [line(fields) for fields in result(record).outputs]
            index += 1
    return b"".join(out)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder where a sync costs nothing, if there is one: kills and injected errors need no slow disk."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as folder:
        yield Path(folder)


def files(out: Path) -> list[str]:
    """What stands beside and under the name of an output: "", ".partial", ".state"."""
    return sorted(
        path.name.removeprefix(out.name) for path in out.parent.iterdir() if path.name.startswith(out.name)
    )


def finish(source: Path, out: Path, reference: bytes) -> None:
    """A resumed run succeeds, without a word, and gives the reference."""
    done = work(source, out, "--resume")
    assert (done.returncode, done.stdout) == (0, "")
    assert "E-" not in done.stderr
    assert out.read_bytes() == reference
    assert files(out) == [""]


def wait_for_records(out: Path, process: "subprocess.Popen[Any]") -> None:
    partial = Path(f"{out}.partial")
    limit = time.monotonic() + 30
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.002)


def started(out: Path, *arguments: str | Path) -> "subprocess.Popen[str]":
    """A worker that has written some records and is at work."""
    process = subprocess.Popen(command(*arguments), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_records(out, process)
    return process


def kill(process: "subprocess.Popen[str]", signum: int = signal.SIGKILL) -> str:
    process.send_signal(signum)
    stderr = process.communicate(timeout=20)[1]
    assert process.returncode == -signum
    return stderr


# ---- in this process: small jobs, every state on the disk


def records(count: int) -> list[Record]:
    return [Record(at, {"prompt": f"p{at}"}) for at in range(count)]


def lines_of(record: Record) -> list[bytes]:
    return [line(fields) for fields in result(record).outputs]


def run(out: Path, count: int, *, upto: int | None = None, every: int = 1, **options: Any) -> Job:
    """Write the results of so many records; stop before record `upto`; a point after each `every` records."""
    with open_job(out, {"model": "m", "n": 1}, **options) as job:
        if job.complete:
            return job
        todo = list(job.verify(records(count)))[job.done :]
        for record in todo:
            if record.index == upto:
                return job
            job.append(record, lines_of(record), failed=result(record).failed)
            if record.index % every == 0:
                job.point(force=True)
        job.commit()
    return job


def whole(count: int) -> bytes:
    return b"".join(data for record in records(count) for data in lines_of(record))


def test_a_quiet_run(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with open_job(out, {"a": 1}) as job:
        assert files(out) == [".partial", ".state"]
        for record in job.verify(records(20)):
            job.append(record, lines_of(record), failed=result(record).failed)
        assert files(out) == [".partial", ".state"]
        job.commit()
        assert files(out) == [""]
        assert job.complete
    assert out.read_bytes() == whole(20)
    assert (job.done, job.failed) == (20, 1)
    assert files(out) == [""]


def test_an_empty_job_gives_an_empty_file(tmp_path: Path) -> None:
    """F52."""
    run(tmp_path / "out", 0)
    assert (tmp_path / "out").read_bytes() == b""
    assert files(tmp_path / "out") == [""]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.floats(0, 1)), max_size=5), st.integers(1, 9))
def test_resumed_from_any_point_and_any_cut(
    tmp_path: Path, stops: list[tuple[int, float]], every: int
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    for stop, share in stops:
        run(out, 30, upto=stop, every=every, resume=True)
        if partial.exists():
            os.truncate(partial, int(partial.stat().st_size * share))
    run(out, 30, resume=True)
    assert out.read_bytes() == whole(30)
    assert files(out) == [""]
    out.unlink()


def test_torn_tail_at_every_byte(tmp_path: Path) -> None:
    """F04: the last record cut at every byte, and bytes that were never sealed."""
    out, partial, state = tmp_path / "out", tmp_path / "out.partial", tmp_path / "out.state"
    run(out, 12, upto=10)
    data, log = partial.read_bytes(), state.read_bytes()
    last = len(b"".join(lines_of(records(10)[-1])))
    for cut in range(len(data) - last, len(data) + 1):
        events: list[Event] = []
        partial.write_bytes(data[:cut])
        state.write_bytes(log)
        job = run(out, 12, resume=True, report=events.append)
        assert out.read_bytes() == whole(12)
        assert job.done == 12
        dropped = cut - (len(data) - last) if cut < len(data) else 0
        assert [str(event) for event in events if f"dropped {dropped} bytes" in str(event)] == [
            str(event) for event in events
        ]
        assert len(events) == bool(dropped)
        out.unlink()


def test_torn_state_at_every_byte(tmp_path: Path) -> None:
    """The log cut anywhere: nothing was begun, or it goes on from an earlier point. Never wrong bytes."""
    out, partial, state = tmp_path / "out", tmp_path / "out.partial", tmp_path / "out.state"
    run(out, 6, upto=4)
    data, log = partial.read_bytes(), state.read_bytes()
    header = log.index(b"\n") + 1
    for cut in range(len(log) + 1):
        partial.write_bytes(data)
        state.write_bytes(log[:cut])
        if cut < header:
            with pytest.raises(ResumeError, match="E-RESUME-STATE"):
                run(out, 6, resume=True)
            assert partial.read_bytes() == data
        else:
            run(out, 6, resume=True)
            assert out.read_bytes() == whole(6)
            out.unlink()


@pytest.mark.parametrize("record", range(9))
def test_an_altered_record_is_refused_and_named(tmp_path: Path, record: int) -> None:
    """F05."""
    out, partial, state = tmp_path / "out", tmp_path / "out.partial", tmp_path / "out.state"
    run(out, 12, upto=9)
    data = bytearray(partial.read_bytes())
    at = len(whole(record)) + 14
    data[at] ^= 1
    partial.write_bytes(data)
    with pytest.raises(ResumeError) as caught:
        run(out, 12, resume=True)
    assert caught.value.name == "E-RESUME-CORRUPT"
    assert caught.value.subject.endswith("out.partial")
    assert caught.value.fact.startswith(f"record {record} ")
    assert partial.read_bytes() == data
    assert state.exists()


def test_an_altered_record_is_found_among_those_sealed_together(tmp_path: Path) -> None:
    run(tmp_path / "out", 12, upto=9, every=4)
    partial = tmp_path / "out.partial"
    data = partial.read_bytes()
    partial.write_bytes(data.replace(b"p6", b"q6"))
    with pytest.raises(ResumeError, match="one of the records 5 to 8"):
        run(tmp_path / "out", 12, resume=True)


def test_points_behind_a_cut_are_void(tmp_path: Path) -> None:
    """Cut, resumed with results of other lengths (a GPU may do so), killed before the next point."""
    out, partial, state = tmp_path / "out", tmp_path / "out.partial", tmp_path / "out.state"
    run(out, 12, upto=9)
    os.truncate(partial, len(whole(4)))
    with open_job(out, {"model": "m", "n": 1}, resume=True) as job:
        for record in list(job.verify(records(12)))[4:9]:
            job.append(record, [b"another result\n" * 40])
        killed = {path: path.read_bytes() for path in (partial, state)}
    for path, data in killed.items():
        path.write_bytes(data)
    run(out, 12, resume=True)
    assert out.read_bytes() == whole(12)


def test_a_partial_that_was_replaced_is_not_committed(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    with open_job(tmp_path / "out", {}) as job:
        job.append(records(1)[0], [b"x\n"])
        partial.unlink()
        partial.write_text("somebody else's")
        with pytest.raises(OutputError, match="moved or replaced"):
            job.commit()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("call", "code"), [("fsync", "EIO"), ("fsync", "ENOSPC"), ("write", "EIO")])
def test_after_an_io_error_no_sync_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: str
) -> None:
    """F24: the kernel may forget what it could not write, and say yes the next time."""
    real, left = getattr(os, call), [1]

    def once(fd: int, *rest: Any) -> Any:
        if left and left.pop():
            raise OSError(getattr(errno, code), "injected")
        return real(fd, *rest)

    with open_job(tmp_path / "out", {}) as job:
        job.append(records(1)[0], [b"x\n"])
        job.point(force=True)
        job.append(records(2)[1], [b"y\n"])
        monkeypatch.setattr(os, call, once)
        with pytest.raises(OutputError, match=r"E-WRITE.*\(after 2 records\)"):
            job.point(force=True) if call == "fsync" else job.append(records(3)[2], [b"z\n"])
    with open_job(tmp_path / "out", {}, resume=True) as job:
        assert job.done == 1


def test_a_lock_on_a_removed_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder ends, and removes OUT.state, between this process's open and its lock."""
    state, real = tmp_path / "out.state", fcntl.flock
    calls: list[int] = []

    def flock(fd: int, how: int) -> None:
        if not calls:
            state.unlink()
        calls.append(fd)
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with open_job(tmp_path / "out", {}) as job:
        assert len(calls) == 2
        with pytest.raises(BusyError, match=f"held by pid {os.getpid()}"):
            open_job(tmp_path / "out", {})
        job.append(records(1)[0], [b"x\n"])
        job.commit()


@pytest.mark.parametrize("gone", [".partial", ".state"])
def test_half_of_the_files_is_gone(tmp_path: Path, gone: str) -> None:
    """F06: refused whatever is left, and nothing is touched but by --restart."""
    out = tmp_path / "out"
    run(out, 9, upto=5)
    (tmp_path / f"out{gone}").unlink()
    left = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ResumeError, match="E-RESUME-STATE"):
        run(out, 9, resume=True)
    with pytest.raises(UsageError, match="E-EXISTS"):
        run(out, 9)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == left
    run(out, 9, restart=True)
    assert out.read_bytes() == whole(9)
    assert files(out) == [""]


def test_a_damaged_state(tmp_path: Path) -> None:
    out, state = tmp_path / "out", tmp_path / "out.state"
    run(out, 9, upto=5)
    log = state.read_bytes().split(b"\n")
    state.write_bytes(b"\n".join([*log[:3], b'{"n": "x"', *log[3:]]))
    before = state.read_bytes()
    with pytest.raises(ResumeError, match="E-RESUME-STATE"):
        run(out, 9, resume=True)
    assert state.read_bytes() == before
    run(out, 9, restart=True)
    assert out.read_bytes() == whole(9)


def test_files_that_are_not_ours_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "out.state").write_text("my notes\n")
    for options in ({}, {"resume": True}, {"restart": True}):
        with pytest.raises(UsageError, match="E-EXISTS"):
            run(out, 3, **options)
    assert (tmp_path / "out.state").read_text() == "my notes\n"
    assert files(out) == [".state"]


OTHER: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"a": 1, "b": 2}, {"a": 1, "b": 3}, "b was 2, is now 3"),
    ({"d": {"x": 1, "y": 1}}, {"d": {"x": 1, "y": 2}, "e": 5}, "d.y was 1, is now 2"),
    ({"a": 1}, {"a": 1, "z": None}, "z was absent, is now null"),
    ({"a": 1, "z": 5}, {"a": 1}, "z was 5, is now absent"),
    ({"a": "x" * 90}, {"a": "y"}, 'a was "' + "x" * 38 + '…, is now "y"'),
    ({"a": 1}, {"a": True}, "a was 1, is now true"),
    ({"a": 1}, {"a": 1.0}, "a was 1, is now 1.0"),
]


@pytest.mark.parametrize(("old", "new", "fact"), OTHER)
def test_another_job_is_refused(tmp_path: Path, old: dict[str, Any], new: dict[str, Any], fact: str) -> None:
    out = tmp_path / "out"
    with open_job(out, old) as job:
        job.append(records(1)[0], [b"x\n"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ResumeError) as caught:
        open_job(out, new, resume=True)
    assert (caught.value.name, caught.value.fact) == ("E-RESUME", fact)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with open_job(out, new, restart=True) as job:
        assert job.done == 0


def test_tuples_and_lists_are_the_same_fingerprint(tmp_path: Path) -> None:
    with open_job(tmp_path / "out", {"stop": ("a", "b")}) as job:
        job.append(records(1)[0], [b"x\n"])
    with open_job(tmp_path / "out", {"stop": ("a", "b")}, resume=True) as job:
        assert job.done == 1


@pytest.mark.parametrize(
    ("now", "fact"),
    [
        (
            [Record(0, {"prompt": "p0"}), Record(1, {"prompt": "other"}), *records(9)[2:]],
            "differs within the 5",
        ),
        (records(9)[:4], "has 4 records now, 5"),
        ([Record(0, {}, {"code": "E", "message": "m"}), *records(9)[1:]], "differs within the 5"),
        ([Record(r.index + 1, r.fields) for r in records(9)], "differs within the 5"),
    ],
)
def test_a_pipe_must_bring_the_same_records_again(tmp_path: Path, now: list[Record], fact: str) -> None:
    """No hash of the whole input is known: what was read is known."""
    out = tmp_path / "out"
    run(out, 9, upto=5)
    with open_job(out, {"model": "m", "n": 1}, resume=True) as job, pytest.raises(ResumeError) as caught:
        list(job.verify(now))
    assert (caught.value.name, caught.value.subject) == ("E-RESUME", "input")
    assert fact in caught.value.fact
    run(out, 9, resume=True)
    assert out.read_bytes() == whole(9)


def test_nothing_is_appended_before_the_input_is_verified(tmp_path: Path) -> None:
    run(tmp_path / "out", 9, upto=5)
    with open_job(tmp_path / "out", {"model": "m", "n": 1}, resume=True) as job, pytest.raises(InternalError):
        job.append(records(6)[5], [b"x\n"])


def test_an_output_that_exists(tmp_path: Path) -> None:
    """F28, F29: refused; with resume taken as it is; with restart made anew."""
    out = tmp_path / "out"
    out.write_text("precious")
    before = out.stat()
    with pytest.raises(UsageError, match="E-EXISTS"):
        run(out, 3)
    assert run(out, 3, resume=True).complete
    assert (out.read_text(), files(out)) == ("precious", [""])
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    run(out, 3, restart=True)
    assert out.read_bytes() == whole(3)


def test_unfinished_work_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, 9, upto=5)
    before = (tmp_path / "out.partial").read_bytes()
    with pytest.raises(UsageError) as caught:
        run(out, 9)
    assert caught.value.name == "E-EXISTS"
    assert (tmp_path / "out.partial").read_bytes() == before
    run(out, 9, resume=True)
    assert out.read_bytes() == whole(9)


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_job(out, {}) as job:
        job.append(records(1)[0], [b"x\n"])
        out.write_text("precious")
        with pytest.raises(UsageError, match="E-EXISTS"):
            job.commit()
    assert out.read_text() == "precious"
    with pytest.raises(UsageError, match="beside unfinished work"):
        open_job(out, {}, resume=True)
    out.unlink()
    with open_job(out, {}, resume=True) as job:
        assert job.done == 1


@pytest.mark.parametrize("name", ["out", "out.partial", "out.state"])
@pytest.mark.parametrize("link", [False, True])
def test_the_input_is_never_the_output(tmp_path: Path, name: str, link: bool) -> None:
    """F30."""
    path = tmp_path / name
    path.write_text("input")
    if link:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    for resume, restart in ((False, False), (True, False), (False, True)):
        with pytest.raises(UsageError, match="E-SAME-FILE"):
            open_job(tmp_path / "out", {}, source=path.stat(), resume=resume, restart=restart)
    assert path.read_text() == "input"


@pytest.mark.parametrize("name", ["out.partial", "out.state"])
def test_links_in_our_names_are_not_followed(tmp_path: Path, name: str) -> None:
    """T39."""
    target = tmp_path / "target"
    (tmp_path / name).symlink_to(target)
    for options in ({}, {"resume": True}):
        with pytest.raises(TextgenError) as caught:
            run(tmp_path / "out", 3, **options)
        assert caught.value.exit_code in (2, 8, 10)
    target.write_text("precious")
    with pytest.raises(TextgenError):
        run(tmp_path / "out", 3, resume=True)
    assert target.read_text() == "precious"


def test_the_partial_of_a_job_turned_into_a_link(tmp_path: Path) -> None:
    run(tmp_path / "out", 9, upto=5)
    partial = tmp_path / "out.partial"
    partial.rename(tmp_path / "elsewhere")
    partial.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="E-WRITE"):
        run(tmp_path / "out", 9, resume=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["out.partial", "out.state"])
def test_files_of_another_user_are_not_resumed(tmp_path: Path, name: str) -> None:
    run(tmp_path / "out", 9, upto=5)
    os.chown(tmp_path / name, 12345, 12345)
    with pytest.raises(OutputError, match="belongs to another user"):
        run(tmp_path / "out", 9, resume=True)


def test_a_fifo_for_a_state(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out.state")
    with pytest.raises(OutputError, match="not a regular file"):
        run(tmp_path / "out", 3)


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002, 0o000])
def test_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    """F137."""
    out = tmp_path / "out"
    before = os.umask(mask)
    try:
        with open_job(out, {}) as job:
            job.append(records(1)[0], [b"x\n"])
            assert stat.S_IMODE((tmp_path / "out.state").stat().st_mode) == 0o644 & ~mask
            job.commit()
        assert stat.S_IMODE(out.stat().st_mode) == 0o666 & ~mask
    finally:
        os.umask(before)


def test_a_umask_that_leaves_nothing(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        with pytest.raises(OutputError, match="umask"):
            open_job(tmp_path / "out", {})
    finally:
        os.umask(before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("length", "name"), [(247, ""), (248, "E-NAME-TOO-LONG"), (256, "E-NAME-TOO-LONG")])
def test_long_names(tmp_path: Path, length: int, name: str) -> None:
    """F138."""
    out = tmp_path / ("n" * length)
    if not name:
        run(out, 3)
        return
    with pytest.raises(OutputError) as caught:
        open_job(out, {})
    assert caught.value.name == name
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    """F60."""
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/out\xe9"))
    run(out, 9, upto=5)
    run(out, 9, resume=True)
    assert out.read_bytes() == whole(9)


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    """F25, and a current folder that is gone."""
    for out in (tmp_path / "absent" / "out", Path("/proc/out"), tmp_path / "file" / "out"):
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="E-WRITE"):
            open_job(out, {})


def test_nothing_done_leaves_nothing(tmp_path: Path) -> None:
    """F13: a signal, or any error, before the first record."""
    for error in (KeyboardInterrupt, InputError("E-INPUT", "x", "y")):
        with pytest.raises((KeyboardInterrupt, InputError)), open_job(tmp_path / "out", {}, resume=True):
            raise error
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [7, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_at_any_line_of_the_code_leaves_a_sound_job(tmp_path: Path, step: int) -> None:
    """F07: a KeyboardInterrupt between any two lines of append, point and commit; then resume."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    at = 1
    while interrupted_run(out, at):
        if partial.exists():
            data = partial.read_bytes()
            assert whole(6).startswith(data)
            assert not data or data.endswith(b"\n")
        run(out, 6, resume=True)
        assert out.read_bytes() == whole(6)
        assert files(out) == [""]
        out.unlink()
        at += step
    assert at > 100


def interrupted_run(out: Path, at: int) -> bool:
    """Whether a run in a child was interrupted: at the `at`-th line that job.py executes."""
    left = at

    def on_call(frame: Any, _event: str, _arg: object) -> Any:
        inside = frame.f_code.co_filename == job_module.__file__
        # A second signal may end the tidying up; that is what a kill does, and tested as one.
        return on_line if inside and frame.f_code.co_name not in {"_leave", "_abandon", "__exit__"} else None

    def on_line(_frame: Any, event: str, _arg: object) -> Any:
        nonlocal left
        left -= event == "line"
        if event == "line" and left == 0:
            raise KeyboardInterrupt
        return on_line

    child = os.fork()
    if not child:
        status = 1
        try:
            sys.settrace(on_call)
            run(out, 6, every=2)
            status = 0
        except KeyboardInterrupt:
            status = 2
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 2)
    return status == 2


def test_points_keep_to_their_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A point when 5% of the time has gone by since the last, at most a second; less often on a slow disk."""
    now = [100.0]
    cost = [0.0]
    real = os.fsync

    def fsync(fd: int) -> None:
        now[0] += cost[0]
        real(fd)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "fsync", fsync)
    with open_job(tmp_path / "out", {}) as job:
        times: list[float] = []
        for record in records(600):
            now[0] += 0.1
            job.append(record, [b"x\n"])
            sealed = job._sealed.n
            job.point()
            if job._sealed.n > sealed:
                times.append(now[0] - 100)
            cost[0] = 0.5 if record.index > 300 else 0.0
        gaps = [later - earlier for earlier, later in pairwise(times)]
    assert times[0] < 0.2
    assert max(gap for gap, at in zip(gaps, times, strict=False) if at < 28) < 1.2
    assert gaps[-1] > 9
    assert len(times) < 100


# ---- another process: locks, kills, full disks


def test_two_processes_on_one_output(tmp_path: Path, source: Path, reference: bytes) -> None:
    """F31, F32: the second leaves at once, names the first, and harms nothing."""
    out = tmp_path / "out.jsonl"
    data = source.read_bytes()
    first = subprocess.Popen(command("-", out), stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert first.stdin is not None
    first.stdin.write(data[:5000])
    first.stdin.flush()
    wait_for_records(out, first)
    for flags in ([], ["--resume"], ["--restart"]):
        second = work(source, out, *flags)
        assert second.returncode == 9
        assert "E-LOCKED" in second.stderr
        assert f"held by pid {first.pid}" in second.stderr
    assert first.communicate(data[5000:], timeout=30)[1] == b""
    assert first.returncode == 0
    assert out.read_bytes() == reference
    assert files(out) == [""]


def test_a_killed_holder_leaves_no_lock(tmp_path: Path, source: Path, reference: bytes) -> None:
    out = tmp_path / "out.jsonl"
    kill(started(out, source, out, "--delay", "0.03"))
    assert files(out) == [".partial", ".state"]
    finish(source, out, reference)


def test_an_interrupted_run_leaves_no_torn_line(tmp_path: Path, source: Path, reference: bytes) -> None:
    """F07: all records written before the signal are kept."""
    out = tmp_path / "out.jsonl"
    kill(started(out, source, out, "--delay", "0.02"), signal.SIGINT)
    data = Path(f"{out}.partial").read_bytes()
    assert data.endswith(b"\n")
    assert reference.startswith(data)
    with open_log(out) as entries:
        assert entries[-1]["bytes"] == len(data)
    finish(source, out, reference)


class open_log:  # noqa: N801 - a small context for reading one file
    """The entries of OUT.state."""

    def __init__(self, out: Path) -> None:
        self.path = Path(f"{out}.state")

    def __enter__(self) -> list[dict[str, Any]]:
        return [json.loads(entry) for entry in self.path.read_text().splitlines()]

    def __exit__(self, *rest: object) -> None:
        pass


@pytest.mark.slow
def test_max_time_stops_clean_and_resumes(tmp_path: Path, source: Path, reference: bytes) -> None:
    out = tmp_path / "out.jsonl"
    runs = 0
    while not out.exists():
        done = work(source, out, "--resume", "--max-time", "0.3", "--delay", "0.03")
        assert (done.returncode, done.stderr) == (0, "")
        runs += 1
    assert runs > 2
    assert out.read_bytes() == reference


def test_changed_options_and_input_are_refused(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out.jsonl"
    kill(started(out, source, out, "--delay", "0.03", "--every-group"))
    other = work(source, out, "--resume", "--temperature", "0.7")
    assert other.returncode == 10
    assert "decoding.temperature was 0.5, is now 0.7" in other.stderr
    longer = write_input(tmp_path / "in.jsonl", COUNT + 1)
    grown = work(longer, out, "--resume")
    assert grown.returncode == 10
    assert "E-RESUME]" in grown.stderr
    assert "input was" in grown.stderr


def test_a_pipe_is_resumed_when_it_brings_the_same(tmp_path: Path, source: Path, reference: bytes) -> None:
    out = tmp_path / "out.jsonl"
    data = source.read_text(encoding="utf-8")
    assert work("-", out, "--max-time", "0", "--every-group", input=data).returncode == 0
    assert files(out) == [".partial", ".state"]
    changed = work("-", out, "--resume", input=data.replace("record 0 ", "record x "))
    assert changed.returncode == 10
    assert "[E-RESUME] input" in changed.stderr
    again = work("-", out, "--resume", input=data)
    assert (again.returncode, again.stderr) == (0, "")
    assert out.read_bytes() == reference


def test_a_disk_that_fills_up(tmp_path: Path, source: Path, reference: bytes) -> None:
    """F21: a real small file system, then a larger one."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        out = disk / "out.jsonl"
        done = work(source, out)
        assert done.returncode == 8
        assert re.search(r"\[E-WRITE\] .*: no space left on device \(after \d+ records\)", done.stderr)
        assert files(out) == [".partial", ".state"]
        data = Path(f"{out}.partial").read_bytes()
        assert reference.startswith(data)
        assert data.endswith(b"\n")
        full = work(source, out, "--resume")
        assert full.returncode == 8
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        finish(source, out, reference)


def test_a_read_only_disk(tmp_path: Path, source: Path, reference: bytes) -> None:
    """F25."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        out = disk / "out.jsonl"
        run(out, 9, upto=5)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for flags in ([], ["--resume"], ["--restart"]):
            done = work(source, out, *flags)
            assert done.returncode == 8
            assert "read-only file system" in done.stderr
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        run(out, 9, resume=True)
        assert out.read_bytes() == whole(9)


def test_a_limit_on_file_sizes(tmp_path: Path, source: Path, reference: bytes) -> None:
    """F26: an error of its own, no death by SIGXFSZ; the write that meets the limit is a short one."""
    need("prlimit", "--fsize=100", "true")
    out = tmp_path / "out.jsonl"
    done = work(source, out, under=["prlimit", "--fsize=50000"])
    assert done.returncode == 8
    assert "file too large (after " in done.stderr
    assert Path(f"{out}.partial").read_bytes().endswith(b"\n")
    finish(source, out, reference)


SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <string.h>
#include <unistd.h>
#include <stdio.h>
ssize_t write(int fd, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    static unsigned calls;
    if (!real) real = dlsym(RTLD_NEXT, "write");
    if (fd > 2 && ++calls % 3 == 0) { errno = EINTR; return -1; }
    return real(fd, data, fd > 2 && size > 1 ? (size + 1) / 2 : size);
}
"""


def test_short_writes_and_eintr(tmp_path: Path, source: Path, reference: bytes) -> None:
    """F27."""
    with preloaded(tmp_path, SHIM) as environment:
        out = tmp_path / "out.jsonl"
        done = work(source, out, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert out.read_bytes() == reference


ERRORS = [
    ("fsync:error=ENOSPC:when=3", "no space left on device"),
    ("fsync:error=EIO:when=3", "input/output error"),
    ("fsync:error=EIO:when=1", "input/output error"),
    ("fsync:error=ENOSPC:when=2", "no space left on device"),
    ("rename:error=ENOSPC:when=1", "no space left on device"),
    ("write:error=EIO:when=30", "input/output error"),
    ("write:error=ENOSPC:when=4", "no space left on device"),
    ("write:error=EDQUOT:when=50", "disk quota exceeded"),
    ("unlink:error=EIO:when=2", "input/output error"),
    ("ftruncate:error=EIO:when=1", "input/output error"),
]


@pytest.mark.parametrize(("rule", "words"), ERRORS)
def test_a_disk_that_fails_once(
    tmp_path: Path, source: Path, reference: bytes, rule: str, words: str
) -> None:
    """F22-F24: reported, exit 8, resumable to the same bytes."""
    out = tmp_path / "out.jsonl"
    done = work(source, out, "--every-group", under=inject(rule))
    assert done.returncode == 8, done.stderr
    assert "[E-WRITE]" in done.stderr
    assert words in done.stderr.lower()
    finish(source, out, reference)


def test_a_close_that_fails(tmp_path: Path, source: Path, reference: bytes) -> None:
    """F22: as network file systems do when the space was only promised."""
    need("strace", "-o", os.devnull, "true")
    out = tmp_path / "out.jsonl"
    log = tmp_path / "log"
    assert work(source, out, under=inject("close:when=60000:error=EIO", log=log)).returncode == 0
    calls = [call for call in log.read_text().splitlines() if " close(" in call]
    number = next(at for at, call in enumerate(calls, 1) if "out.jsonl.partial" in call)
    out.unlink()
    done = work(source, out, under=inject(f"close:error=ENOSPC:when={number}"))
    assert done.returncode == 8
    assert "no space left on device (after 201 records)" in done.stderr
    assert files(out) == [".partial", ".state"]
    finish(source, out, reference)


def test_no_locks(tmp_path: Path, source: Path) -> None:
    """F36."""
    for code in ("ENOLCK", "EOPNOTSUPP"):
        done = work(source, tmp_path / "out", under=inject(f"flock:error={code}"))
        assert done.returncode == 9
        assert "E-NO-LOCKS" in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_without_a_lock_on_request(tmp_path: Path) -> None:
    run(tmp_path / "out", 9, upto=5, lock=False)
    run(tmp_path / "out", 9, resume=True, lock=False)
    assert (tmp_path / "out").read_bytes() == whole(9)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["moved", "removed"])
def test_the_folder_goes_away(tmp_path: Path, source: Path, reference: bytes, how: str) -> None:
    """F35."""
    folder = tmp_path / "folder"
    folder.mkdir()
    out = folder / "out.jsonl"
    process = started(out, source, out, "--delay", "0.05")
    if how == "moved":
        folder.rename(tmp_path / "moved")
    else:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 8
    assert "E-WRITE" in stderr
    if how == "moved":
        finish(source, tmp_path / "moved" / "out.jsonl", reference)


# ---- sweeps


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path, source: Path, reference: bytes) -> None:
    """F01: 60 kills, each resumed to the reference."""
    chance = random.Random(5)
    phases = set()
    for trial in range(60):
        out = tmp_path / f"out{trial}"
        process = subprocess.Popen(command(source, out, "--delay", "0.003"), stderr=subprocess.PIPE)
        time.sleep(chance.uniform(0.02, 0.3))
        process.kill()
        process.communicate()
        phases.add(tuple(files(out)))
        finish(source, out, reference)
    assert (".partial", ".state") in phases


@pytest.mark.slow
def test_killed_and_resumed_twenty_times(tmp_path: Path, source: Path, reference: bytes) -> None:
    """F03."""
    out = tmp_path / "out.jsonl"
    sizes = [0]
    for _ in range(20):
        process = subprocess.Popen(command(source, out, "--resume", "--delay", "0.02", "--every-group"))
        partial = Path(f"{out}.partial")
        limit = time.monotonic() + 20
        while not partial.exists() or partial.stat().st_size <= sizes[-1]:
            assert time.monotonic() < limit
            if out.exists() or process.poll() is not None:
                break
            time.sleep(0.001)
        process.kill()
        process.wait()
        if out.exists():
            break
        sizes.append(partial.stat().st_size)
    finish(source, out, reference)
    assert len(sizes) > 10


def calls_of(log: Path, name: str) -> Iterator[tuple[str, int]]:
    """(system call, its number among those of its name) of every call that concerns the output's files."""
    seen: dict[str, int] = {}
    for entry in log.read_text().splitlines():
        match = re.match(r"\d+ +(\w+)\(", entry)
        if match:
            call = match[1]
            seen[call] = seen.get(call, 0) + 1
            if name in entry or (call == "fsync" and str(log.parent) in entry):
                yield call, seen[call]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--resume"], ["--restart"]], ids=["fresh", "resumed", "restarted"])
def test_killed_at_every_system_call(tmp_path: Path, flags: list[str]) -> None:
    """F02: at every write, fsync, truncation, creation, removal and rename of a run."""
    small = write_input(tmp_path / "in.jsonl", 24)
    expected = tmp_path / "expected"
    assert work(small, expected).returncode == 0
    traced = ["write", "fsync", "rename", "ftruncate", "openat", "unlink", "flock"]

    before = tmp_path / "before"
    assert work(small, before, "--max-time", "0", "--every-group").returncode == 0
    assert files(before) == [".partial", ".state"]

    def prepare(out: Path) -> None:
        for end in files(before) if flags else []:
            shutil.copy(f"{before}{end}", f"{out}{end}")

    log = tmp_path / "log"
    out = tmp_path / "first.out"
    prepare(out)
    quiet = [f"{call}:when=60000:error=EIO" for call in traced]
    assert work(small, out, *flags, "--every-group", under=inject(*quiet, log=log)).returncode == 0
    calls = list(calls_of(log, out.name))
    assert {call for call, _ in calls} >= {"write", "fsync", "rename", "openat", "unlink"}
    reached = 0
    for call, number in calls:
        out = tmp_path / f"{number:05}.out"
        prepare(out)
        done = work(small, out, *flags, "--every-group", under=inject(f"{call}:signal=KILL:when={number}"))
        # Python itself opens a file more or less from run to run: the last of them may be missed.
        assert done.returncode == -signal.SIGKILL or (done.returncode, call) == (0, "openat"), (call, number)
        reached += done.returncode != 0
        finish(small, out, expected.read_bytes())
        out.unlink()
    assert len(calls) > 20 and reached >= len(calls) - 2


def test_errno_of_every_failure_is_words() -> None:
    """The names above are those of this system."""
    assert os.strerror(errno.ENOSPC) == "No space left on device"


def test_restart_keeps_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out, record = tmp_path / "out.jsonl", Record(0, {})
    out.write_bytes(b"old\n")
    with open_job(out, {"a": 1}, restart=True) as job:
        job.append(record, [b"new\n"])
    assert out.read_bytes() == b"old\n"
    with open_job(out, {"a": 1}, resume=True) as job:
        assert list(job.verify([record])) == [record] and job.done == 1
        job.commit()
    assert out.read_bytes() == b"new\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
