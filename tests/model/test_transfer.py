"""The bytes of files: what is cut, killed, stalled, spliced or too long; rows F87 to F95 of what may go wrong."""

import gzip
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock
import pytest
from huggingface_hub import constants
from parts.hub import Hub, etag

from textgen_cli.errors import NetworkError, TextgenError
from textgen_cli.events import silent
from textgen_cli.model import hub, transfer

REPO, BIG = "org/name", "model.safetensors"
WEIGHTS = os.urandom(1 << 20) * 3
FILES = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b'{"tokens": []}', BIG: WEIGHTS}


def fetch() -> Path:
    return hub.fetch(REPO, None, offline=False, report=silent).folder / BIG


def part(cache: Path) -> Path:
    return cache / "models--org--name" / "blobs" / f"{etag(BIG, WEIGHTS)}{hub.PART}"


def leave(cache: Path, content: bytes, tag: str | None = None) -> None:
    """What an earlier run left of the weights."""
    part(cache).parent.mkdir(parents=True)
    part(cache).write_bytes(content)
    if tag is not None:
        part(cache).with_name(f"etag.{part(cache).name}").write_text(tag)


def ranges(server: Hub) -> list[str | None]:
    return [request.headers.get("range") for request in server.requests("GET", "safetensors")]


@pytest.mark.parametrize("tag", [None, "right", "other"])
def test_the_next_run_goes_on_where_the_last_one_stopped(server: Hub, cache: Path, tag: str | None) -> None:
    """F87, F92: with the ETag of another file the server sends all of it, and nothing is spliced."""
    server.add(REPO, FILES)
    leave(cache, WEIGHTS[:1000], {"right": f'"{etag(BIG, WEIGHTS)}"', "other": '"else"'}.get(tag or ""))
    assert fetch().read_bytes() == WEIGHTS
    assert ranges(server) == ["bytes=1000-"]
    assert not list(cache.rglob("*incomplete"))


def test_parts_of_files_that_the_branch_has_no_more_go(server: Hub, cache: Path) -> None:
    """F92: the branch has moved since; what another process is fetching stays."""
    server.add(REPO, FILES)
    blobs = cache / "models--org--name" / "blobs"
    old, held = (blobs / f"{digit * 64}{hub.PART}" for digit in "ab")
    blobs.mkdir(parents=True)
    for path in (old, old.with_name(f"etag.{old.name}"), held):
        path.write_bytes(b"1")
    lock = hub.lock_of(blobs / ("b" * 64))
    lock.parent.mkdir(parents=True)
    with filelock.FileLock(lock):
        fetch()
    assert list(blobs.glob("*incomplete")) == [held]


def test_a_part_that_is_not_of_the_file_costs_a_second_fetch_and_no_more(server: Hub, cache: Path) -> None:
    server.add(REPO, FILES)
    leave(cache, b"?" * 1000)
    assert fetch().read_bytes() == WEIGHTS
    assert ranges(server) == ["bytes=1000-", None]


@pytest.mark.parametrize("length", [len(WEIGHTS), len(WEIGHTS) + 1])
def test_a_part_as_long_as_the_file_or_longer(server: Hub, cache: Path, length: int) -> None:
    server.add(REPO, FILES)
    leave(cache, (WEIGHTS + b"x")[:length])
    assert fetch().read_bytes() == WEIGHTS
    assert ranges(server) == ([] if length == len(WEIGHTS) else [None])


def test_a_server_that_ignores_ranges_sends_it_all_again(server: Hub, cache: Path) -> None:
    """F90."""
    server.add(REPO, FILES)
    server.fault("safetensors", whole=True)
    leave(cache, WEIGHTS[:1000])
    assert fetch().read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "value",
    [
        "bytes 0-99/3145728",
        "bytes 999-3145727/3145728",
        "bytes 1000-3145727/5",
        "bytes 1000-",
        "junk",
        "",
        None,
    ],
)
def test_another_range_than_asked_for_is_never_spliced(
    server: Hub, cache: Path, clock: list[float], value: str | None
) -> None:
    """F91."""
    server.add(REPO, FILES)
    leave(cache, WEIGHTS[:1000])
    server.fault("safetensors", headers={"Content-Range": value}, times=1)
    assert fetch().read_bytes() == WEIGHTS
    assert ranges(server)[-1] is None


@pytest.mark.parametrize("status", [416, 500, 503])
def test_a_range_that_is_refused(server: Hub, cache: Path, clock: list[float], status: int) -> None:
    server.add(REPO, FILES)
    leave(cache, WEIGHTS[:1000])
    server.fault("safetensors", status=status, times=1)
    assert fetch().read_bytes() == WEIGHTS
    assert ranges(server) == ["bytes=1000-", None if status == 416 else "bytes=1000-"]


@pytest.mark.parametrize("left", [0, 1000])
def test_a_body_that_comes_packed(server: Hub, cache: Path, left: int) -> None:
    """F94: it was asked for as it is; what comes otherwise is unpacked, and never appended to a part."""
    server.add(REPO, FILES)
    if left:
        leave(cache, WEIGHTS[:left])
    server.fault("safetensors", body=gzip.compress(WEIGHTS, 1), headers={"Content-Encoding": "gzip"})
    assert fetch().read_bytes() == WEIGHTS


@pytest.mark.parametrize("value", ["-1", "9223372036854775808", "junk"])
def test_a_length_that_is_none(
    server: Hub, cache: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    server.add(REPO, FILES)
    server.fault("safetensors", headers={"Content-Length": value})
    try:
        assert fetch().read_bytes() == WEIGHTS
    except NetworkError as error:
        assert error.exit_code == 7  # noqa: PT017 - either is right
    assert not part(cache).exists() or part(cache).stat().st_size <= len(WEIGHTS)


def test_a_server_that_trickles_is_one_that_stalls(
    server: Hub, cache: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """F95: each byte comes in time, all of them never; the bound is one of bytes a second."""
    monkeypatch.setattr(transfer, "WINDOW", 0.2)
    server.add(REPO, FILES)
    server.fault("safetensors", trickle=0.02)
    start = time.monotonic()
    with pytest.raises(TextgenError) as caught:
        fetch()
    assert caught.value.name == "E-STALL"
    assert time.monotonic() - start < 6 * (0.2 + 0.1) + 1
    server.faults.clear()
    assert fetch().read_bytes() == WEIGHTS


SCRIPT = """
import sys
from textgen_cli.model import hub
hub.fetch("org/name", None, offline=False, report=lambda event: print(event.done, flush=True))
"""


def process(server: Hub, home: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", SCRIPT], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, **server.settings(home)})  # fmt: skip


def parts_of(folder: Path) -> int:
    """Bytes of files that are under way; one may be whole, and elsewhere, before it is looked at."""
    sizes = []
    for path in folder.rglob(f"*{hub.PART}"):
        with suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return sum(sizes)


@pytest.mark.slow
def test_killed_again_and_again_it_fetches_hardly_more_than_the_file(server: Hub, tmp_path: Path) -> None:
    """F89: SIGKILL at every tenth of the file; the bytes of all runs together are those of the file and a little."""
    server.add(REPO, FILES)
    step = len(WEIGHTS) // 5
    for _ in range(5):
        server.fault(
            "safetensors", cut=step, then=None
        )  # then silence: the body ends, and the next try waits
        done = process(server, tmp_path)
        assert done.stdout is not None
        started = next(iter(done.stdout), "")
        assert started
        have = parts_of(tmp_path)
        while parts_of(tmp_path) < min(have + step, len(WEIGHTS)):
            time.sleep(0.005)
            if done.poll() is not None:
                break
        done.send_signal(signal.SIGKILL)
        done.communicate(timeout=30)
    server.faults.clear()
    _out, err = process(server, tmp_path).communicate(timeout=60)
    assert err == ""
    blob = tmp_path / "hub/models--org--name/blobs" / etag(BIG, WEIGHTS)
    assert blob.read_bytes() == WEIGHTS
    starts = [int((asked or "bytes=0-")[6:-1]) for asked in ranges(server)]
    assert starts == sorted(starts)
    assert starts[-1] >= 4 * step


@pytest.mark.slow
def test_a_waiting_process_goes_on_where_the_killed_one_stopped(server: Hub, tmp_path: Path) -> None:
    """F106: the kernel frees the lock of the dead; what it had brought is not fetched again."""
    server.add(REPO, FILES)
    gate = threading.Event()
    server.fault("safetensors", cut=1 << 20, times=1)
    first = process(server, tmp_path)
    while not any(path.stat().st_size >= 1 << 20 for path in tmp_path.rglob(f"*{hub.PART}")):
        time.sleep(0.01)
    server.fault("safetensors", stall=20, times=1, then=gate.set)
    while len(ranges(server)) < 2:
        time.sleep(0.01)
    second = process(server, tmp_path)
    time.sleep(1.5)
    assert second.poll() is None
    assert len(ranges(server)) == 2
    first.kill()
    first.communicate(timeout=30)
    _out, err = second.communicate(timeout=60)
    assert (second.returncode, err) == (0, "")
    assert ranges(server)[-1] == f"bytes={1 << 20}-"


def test_what_runs_at_once_tells_its_failure_and_calls_the_rest_off() -> None:
    from textgen_cli.model import together

    seen: list[Any] = []
    ended = threading.Event()

    def work(item: int, tell: Any, stopped: threading.Event) -> None:
        tell(item)
        if item == 1:
            raise NetworkError("E-X", "one", "fails")
        stopped.wait(10)
        ended.set()

    with pytest.raises(NetworkError, match="E-X"):
        seen.extend(together.each([0, 1], work, 2))
    assert set(seen) == {0, 1}
    assert ended.wait(5)
