"""Batches through a server, by the real program: files, resuming, failures, order. No model, no torch."""

import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from parts.endpoint import Call, Step, Stub, backwards, refuse, reply, whole
from parts.hurt import wait_until, written
from parts.program import Done, Program

pytestmark = pytest.mark.slow

COUNT = 150
INPUT = b"".join(
    json.dumps({"id": at, "prompt": f"prompt number {at}"}).encode() + b"\n" for at in range(COUNT)
)


@pytest.fixture(name="run")
def _run(forked: Program, tmp_path: Path) -> Callable[..., Done]:
    (tmp_path / "in.jsonl").write_bytes(INPUT)

    def run(stub: Stub, *args: str, **more: Any) -> Done:
        return forked(tmp_path, "generate", "--endpoint", stub.url, "-m", "m", *args, **more)

    return run


Run = Callable[..., Done]
SOME = 1000  # bytes: more than one record, so that one is counted as written
JOB = ("-i", "in.jsonl", "-o", "out.jsonl")


def lines(data: bytes) -> list[dict[str, Any]]:
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


def expected(at: int) -> dict[str, Any]:
    prompt = f"prompt number {at}"
    counts = {"prompt_tokens": 5, "completion_tokens": 7}
    return {"id": at, "prompt": prompt, "text": prompt[::-1], "finish_reason": "stop", **counts}


REFERENCE = b"".join(json.dumps(expected(at)).encode() + b"\n" for at in range(COUNT))


def after(seconds: Callable[[Call], float], step: Step | None = None) -> Step:
    """An answer that takes its time."""

    def slow(handler: BaseHTTPRequestHandler, call: Call) -> None:
        time.sleep(seconds(call))
        (step or whole())(handler, call)

    return slow


def number(call: Call) -> int:
    return int(re.sub(r"\D", "", call.body.get("prompt", "")))


def choosy(wrong: Callable[[int], Step | None]) -> Step:
    """A server that treats some records in its own way."""

    def step(handler: BaseHTTPRequestHandler, call: Call) -> None:
        (wrong(number(call)) or whole())(handler, call)

    return step


@pytest.mark.parametrize("concurrency", ["1", "8"])
def test_the_order_of_the_input_is_kept(run: Run, tmp_path: Path, concurrency: str) -> None:
    chance = random.Random(3)
    # The first ones take long enough to be there together on a machine that is busy.
    with Stub([after(lambda call: chance.uniform(0, 0.01) + 0.1 * (number(call) < 8))]) as stub:
        assert run(stub, *JOB, "--concurrency", concurrency) == Done(0, b"", b"")
        assert (stub.busiest, len(stub.calls)) == (int(concurrency), COUNT)
        assert (tmp_path / "out.jsonl").read_bytes() == REFERENCE
        piped = run(stub, "--jsonl", stdin=INPUT)
        assert piped == Done(0, REFERENCE, b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_result_is_written_before_the_last_answer_has_come(
    forked: Program, run: Run, tmp_path: Path
) -> None:
    """One record that takes long holds back those behind it, not those before it."""
    goes_on = threading.Event()

    def wait(handler: BaseHTTPRequestHandler, call: Call) -> None:
        if number(call) == 100:
            goes_on.wait(30)
        whole()(handler, call)

    def act(pid: int) -> None:
        wait_until(written(tmp_path / "out.jsonl", len(REFERENCE) // 2))
        goes_on.set()

    with Stub([wait]) as stub:
        args = ("generate", "--endpoint", stub.url, "-m", "m", *JOB)
        assert forked.during(act, tmp_path, *args) == Done(0, b"", b"")
    assert (tmp_path / "out.jsonl").read_bytes() == REFERENCE


@pytest.mark.parametrize("concurrency", ["1", "8"])
def test_killed_and_resumed(run: Run, tmp_path: Path, concurrency: str) -> None:
    chance = random.Random(int(concurrency))
    kills = 0
    with Stub([after(lambda call: chance.uniform(0, 0.006))]) as stub:
        while not (tmp_path / "out.jsonl").exists() or kills < 12:
            if (tmp_path / "out.jsonl").exists():
                assert (tmp_path / "out.jsonl").read_bytes() == REFERENCE
                for left in tmp_path.glob("out.jsonl*"):  # killed behind the renaming, it leaves its state
                    left.unlink()
            more = {"kill_after": chance.uniform(0.2, 0.9)} if kills < 12 else {}
            done = run(stub, *JOB, "--resume", "--concurrency", concurrency, **more)
            assert done.returncode in (0, -signal.SIGKILL)
            kills += done.returncode != 0
        assert (tmp_path / "out.jsonl").read_bytes() == REFERENCE


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed(forked: Program, run: Run, tmp_path: Path, signum: signal.Signals) -> None:
    def act(pid: int) -> None:
        wait_until(written(tmp_path / "out.jsonl", SOME))
        os.kill(pid, signum)

    with Stub([after(lambda call: 0.01)]) as stub:
        args = ("generate", "--endpoint", stub.url, "-m", "m", *JOB)
        done = forked.during(act, tmp_path, *args)
        count = (tmp_path / "out.jsonl.partial").read_bytes().count(b"\n")
        said = f"textgen: interrupted: {count} of {COUNT} records written; resume with --resume\n"
        assert done == Done(-signum, b"", said.encode())
        asked = len(stub.calls)
        assert run(stub, *JOB, "--resume") == Done(0, b"", b"")
        assert len(stub.calls) - asked == COUNT - count  # what is there is not asked for again
    assert (tmp_path / "out.jsonl").read_bytes() == REFERENCE


CODES = {
    "E-CONTEXT": refuse(400, "This model's maximum context length is 8 tokens"),
    "E-ENDPOINT-REFUSED": refuse(400, "I do not like this \x1b[2J text"),
    "E-ENDPOINT-ANSWER": whole("x", finish="because"),
}


@pytest.mark.parametrize("code", CODES)
def test_a_refused_record_is_an_error_record(run: Run, tmp_path: Path, code: str) -> None:
    bad = {3, 50, 149}
    with Stub([choosy(lambda at: CODES[code] if at in bad else None)]) as stub:
        done = run(stub, *JOB)
    assert done == Done(3, b"", b"textgen: error: [E-RECORDS] 3 of 150 records: failed\n")
    found = lines((tmp_path / "out.jsonl").read_bytes())
    assert [line for at, line in enumerate(found) if at not in bad] == [
        expected(at) for at in range(COUNT) if at not in bad
    ]
    for at in bad:
        assert list(found[at]) == ["id", "prompt", "error"]
        assert found[at]["error"]["code"] == code
        assert "\x1b" not in found[at]["error"]["message"]


@pytest.mark.parametrize(("limit", "failed"), [("0", 1), ("2", 3), ("5%", 6)])
def test_too_many_failures(run: Run, tmp_path: Path, limit: str, failed: int) -> None:
    """The same record is the last one, whatever order the answers come in; the file can be resumed."""
    chance = random.Random(1)
    refused = refuse(400, "no")

    def step(handler: BaseHTTPRequestHandler, call: Call) -> None:
        time.sleep(chance.uniform(0, 0.004))
        (refused if number(call) % 10 == 0 and number(call) else whole())(handler, call)

    with Stub([step]) as stub:
        done = run(stub, *JOB, "--max-failures", limit)
        assert done.returncode == 3
        count = 10 * failed + 1
        said = (
            f"textgen: error: [E-RECORDS] {failed} of {count} records: failed, stopped by --max-failures\n"
            "textgen: hint: --resume goes on\n"
        )
        assert done.stderr.decode() == said
        assert len(lines((tmp_path / "out.jsonl.partial").read_bytes())) == count
        assert len(stub.calls) < COUNT  # it stopped asking
        assert run(stub, *JOB, "--resume").returncode == 3
    assert len(lines((tmp_path / "out.jsonl").read_bytes())) == COUNT


FATAL: dict[str, tuple[Step, int, str]] = {
    "the key is wrong": (refuse(401, "no"), 7, "E-ENDPOINT-KEY"),
    "it asks to wait too long": (refuse(429, "no", Retry_After="99999"), 7, "E-ENDPOINT-BUSY"),
    "the model is gone": (refuse(404, "The model `m` does not exist", "model"), 5, "E-ENDPOINT-MODEL"),
    "a field is refused": (refuse(400, "unknown field", "seed"), 2, "E-ENDPOINT-OPTION"),
    "a page of a proxy": (reply(200, "<html>", kind="text/html"), 7, "E-ENDPOINT-ANSWER"),
}


@pytest.mark.parametrize("row", FATAL)
def test_a_server_that_fails_amid_a_job(run: Run, tmp_path: Path, row: str) -> None:
    """It ends with the error's own code; when the server is well again, the job goes on to the same bytes."""
    step, code, name = FATAL[row]
    with Stub([choosy(lambda at: step if at >= 60 else None)]) as stub:
        done = run(stub, *JOB, "--concurrency", "4")
        assert (done.returncode, done.stdout) == (code, b"")
        assert done.stderr.startswith(f"textgen: error: [{name}] ".encode())
        data = (tmp_path / "out.jsonl.partial").read_bytes()
        assert REFERENCE.startswith(data)
        assert 0 < data.count(b"\n") <= 60
        stub.steps = [whole()]
        assert run(stub, *JOB, "--resume") == Done(0, b"", b"")
    assert (tmp_path / "out.jsonl").read_bytes() == REFERENCE


CHANGES = [
    ("model", ["-m", "other"]),
    ("split_sequences", ["--split-sequences"]),
    ("decoding.temperature", ["--temperature", "0.5"]),
    ("endpoint", ["--endpoint", "http://127.0.0.1:1/v1"]),
]


@pytest.mark.parametrize(("field", "options"), CHANGES)
def test_another_job_is_refused(run: Run, tmp_path: Path, field: str, options: list[str]) -> None:
    with Stub([choosy(lambda at: refuse(401, "no") if at > 9 else None)]) as stub:
        assert run(stub, *JOB).returncode == 7
        before = (tmp_path / "out.jsonl.partial").read_bytes()
        done = run(stub, *JOB, *options, "--resume")
        assert (done.returncode, done.stdout) == (10, b"")
        assert f"[E-RESUME] out.jsonl: {field} was ".encode() in done.stderr
        assert (tmp_path / "out.jsonl.partial").read_bytes() == before
        # How many are asked at one time changes no byte.
        stub.steps = [whole()]
        assert run(stub, *JOB, "--concurrency", "3", "--resume") == Done(0, b"", b"")
    assert (tmp_path / "out.jsonl").read_bytes() == REFERENCE


def test_messages_and_sequences(run: Run, tmp_path: Path) -> None:
    said = [{"role": "user", "content": "hello"}]
    record = json.dumps({"id": "x", "messages": said}).encode() + b"\n"

    def two(handler: BaseHTTPRequestHandler, call: Call) -> None:
        whole(*[f"{backwards(call)} {at}" for at in range(call.body.get("n", 1))])(handler, call)

    with Stub([two]) as stub:
        done = run(stub, "--jsonl", "--num-return-sequences", "2", "--system", "S", stdin=record)
        assert (done.returncode, done.stderr) == (0, b"")
        assert [(line["sequence"], line["text"]) for line in lines(done.stdout)] == [
            (0, "olleh 0"),
            (1, "olleh 1"),
        ]
        [call] = stub.calls
    assert call.path == "/v1/chat/completions"
    assert call.body["messages"] == [{"role": "system", "content": "S"}, *said]


def test_the_key_is_in_no_file_and_no_message(run: Run, tmp_path: Path) -> None:
    key = "sk-0123456789-secret"
    with Stub([choosy(lambda at: refuse(400 if at < 5 else 401, f"bad key {key}") if at else None)]) as stub:
        done = run(stub, *JOB, "-v", TEXTGEN_API_KEY=key)
        assert done.returncode == 7
        assert stub.calls[0].headers["authorization"] == f"Bearer {key}"
    assert key.encode() not in done.stderr
    for path in tmp_path.iterdir():
        assert key.encode() not in path.read_bytes()
