"""Running a batch: order, limits, time, streams."""

import io
import itertools
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parts.faults import command, work, write_input

from textgen_cli.errors import InputError, OutputError, UsageError
from textgen_cli.events import Event, Progress
from textgen_cli.text.batch import Limit, Result, Stream, Summary, failure, parse_limit, run_job
from textgen_cli.text.job import open_job
from textgen_cli.text.records import Record


def results(failed: str, start: int = 0, group: int = 3) -> Iterator[list[Result]]:
    """A result for each letter, failed ones for x, in groups."""
    all_ = []
    for at, letter in enumerate(failed):
        record = Record(at, {"n": at})
        bad = letter == "x"
        all_.append(failure(record, {"code": "E", "message": "m"}) if bad else Result(record, [{"n": at}]))
    for first in range(start, len(all_), group):
        yield all_[first : first + group]


def test_a_failure_keeps_the_fields() -> None:
    record = Record(3, {"id": 7, "prompt": "p"})
    got = failure(record, InputError("E-FIELD", "text", "is missing"))
    assert got == Result(
        record, [{"id": 7, "prompt": "p", "error": {"code": "E-FIELD", "message": "text: is missing"}}], True
    )


def test_a_stream_is_flushed_for_each_record() -> None:
    class Seen(io.BytesIO):
        flushed: list[bytes] = []  # noqa: RUF012 - one stream, one test

        def flush(self) -> None:
            self.flushed.append(self.getvalue())

    stream = Seen()
    summary = run_job(results("..x"), Stream(stream))
    assert summary == Summary(3, 1, "")
    last = b'{"n": 2, "error": {"code": "E", "message": "m"}}\n'
    assert stream.flushed == [b'{"n": 0}\n', b'{"n": 0}\n{"n": 1}\n', b'{"n": 0}\n{"n": 1}\n' + last]


def test_progress_is_told_after_each_group() -> None:
    events: list[Event] = []
    run_job(results("......."), Stream(io.BytesIO()), total=7, stage="score", report=events.append)
    assert events == [Progress("score", "records", n, 7.0, "records") for n in (3.0, 6.0, 7.0)]


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("0", Limit(0)),
        ("12", Limit(12)),
        ("3%", Limit(percent=3.0)),
        ("0.5%", Limit(percent=0.5)),
        ("100%", Limit(percent=100)),
    ],
)
def test_limits(text: str, limit: Limit) -> None:
    assert parse_limit(text) == limit


@pytest.mark.parametrize("text", ["", "-1", "x", "1.5", "101%", "%", "1e3", "٣", "5%%"])
def test_no_limits(text: str) -> None:
    with pytest.raises(UsageError, match="--max-failures"):
        parse_limit(text)


@pytest.mark.parametrize(
    ("limit", "failed", "written"),
    [
        ("0", "..x...", 3),
        ("1", ".xx...x", 3),
        ("2", ".xx...", 6),
        ("0%", ".x", 2),
        ("1%", "x" + "." * 20 + "x.", 22),
        ("1%", "x" + "." * 199 + "x.", 202),
        ("100%", "x" * 30, 30),
    ],
)
@pytest.mark.parametrize("group", [1, 3, 50])
def test_too_many_failures_end_the_run_at_the_same_record(
    limit: str, failed: str, written: int, group: int
) -> None:
    stream = io.BytesIO()
    summary = run_job(results(failed, group=group), Stream(stream), max_failures=parse_limit(limit))
    assert stream.getvalue().count(b"\n") == summary.records == written
    assert summary.stopped == ("max-failures" if written < len(failed) or limit == "0%" else "")
    assert summary.failed == failed[:written].count("x")


@given(st.text("x.", max_size=150), st.sampled_from(["0", "1", "5", "2%", "10%"]), st.integers(1, 9))
def test_where_it_ends_does_not_depend_on_groups(failed: str, limit: str, group: int) -> None:
    outs = []
    for size in (1, group):
        stream = io.BytesIO()
        run_job(results(failed, group=size), Stream(stream), max_failures=parse_limit(limit))
        outs.append(stream.getvalue())
    assert outs[0] == outs[1]


def test_failures_of_earlier_runs_count(tmp_path: Path) -> None:
    failed, out = "x.x.x...", tmp_path / "out"
    with open_job(out, {}) as job:
        assert run_job(results(failed), job, max_failures=Limit(1)) == Summary(3, 2, "max-failures")
    with open_job(out, {}, resume=True) as job:
        list(job.verify(Record(at, {"n": at}) for at in range(8)))
        assert run_job(results(failed, job.done), job, max_failures=Limit(1)) == Summary(3, 2, "max-failures")
    with open_job(out, {}, resume=True) as job:
        list(job.verify(Record(at, {"n": at}) for at in range(8)))
        assert run_job(results(failed, job.done), job, max_failures=Limit(3)) == Summary(8, 3, "")
    assert [json.loads(text)["n"] for text in out.read_text().splitlines()] == list(range(8))


def test_time_is_looked_at_between_groups() -> None:
    ticks = itertools.count()
    stream = io.BytesIO()
    summary = run_job(results("." * 30), Stream(stream), max_time=4, clock=lambda: next(ticks))
    assert summary == Summary(12, 0, "max-time")


def test_a_job_in_time_is_committed(tmp_path: Path) -> None:
    with open_job(tmp_path / "out", {}) as job:
        assert run_job(results("." * 30), job, max_time=1000) == Summary(30, 0, "")
    assert (tmp_path / "out").exists()


def test_dev_full() -> None:
    """F20."""
    with Path("/dev/full").open("wb", buffering=0) as stream, pytest.raises(OutputError) as caught:
        run_job(results("..."), Stream(stream))
    assert str(caught.value) == "[E-WRITE] stdout: no space left on device"


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    """F17, F18: no word, and death by SIGPIPE after what was read is whole."""
    source = write_input(tmp_path / "in.jsonl", 200)
    expected = work(source, "-").stdout.splitlines()
    process = subprocess.Popen(
        command(source, "-", "--delay", "0.01"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().rstrip("\n") == expected[0]
    process.stdout.close()
    assert process.wait(10) == -signal.SIGPIPE
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()


def test_a_stream_and_a_file_hold_the_same(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", 60)
    assert work(source, tmp_path / "out").returncode == 0
    assert work(source, "-").stdout == (tmp_path / "out").read_text(encoding="utf-8")
