"""Bad inputs of `textgen score` (faults.md F49-F63) that are not the fault of one record alone.

Single bad records and odd texts stand in test_run.py; a disk that fails amid reading (F58) is the reader's matter, as
tests/text/test_inputs.py and tests/generate have it.
"""

import json
import os
import pty
import re
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parts.hurt import wait_until, written
from parts.program import Done, Program

pytestmark = pytest.mark.slow

TEXTGEN = str(Path(sysconfig.get_path("scripts")) / "textgen")
Run = Callable[..., Done]
MANY = b"".join(b'{"id": %d, "text": "a f%sx"}\n' % (at, b"o" * 4000) for at in range(300))  # many reads


@pytest.fixture(name="job", scope="module")
def _job(small_model: Callable[..., Path]) -> list[str]:
    return ["score", "-m", str(small_model("tiny")), "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(name="run")
def _run(forked: Program, job: list[str], tmp_path: Path) -> Run:
    def run(*args: str, **more: Any) -> Done:
        return forked(tmp_path, *job, *args, **more)

    return run


def lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


def test_resuming_counts_records_and_not_ids(run: Run, tmp_path: Path) -> None:
    """F49: ten records with one id are ten results, also over two runs, but where ids are to be unique."""
    (tmp_path / "in.jsonl").write_bytes(b"".join(b'{"id": 1, "text": "%d"}\n' % at for at in range(10)))
    files = ("-i", "in.jsonl", "-o", "out.jsonl", "--batch-size", "1")
    refused = run("-m", "./absent", *files, "--unique-ids")
    assert refused == Done(4, b"", b"textgen: error: [E-ID] record 1: id 1 appears twice\n")
    assert run(*files, "--max-time", "0.000001").returncode == 3
    twice = b"textgen: warning: [W-ID] record 1: id 1 appears twice\n"
    assert run(*files, "--resume") == Done(0, b"", twice)
    found = lines((tmp_path / "out.jsonl").read_bytes())
    assert [(line["id"], line["text"]) for line in found] == [(1, str(at)) for at in range(10)]


def test_nothing_to_read_from(tmp_path: Path) -> None:
    """F54 and F55: a closed standard input, and a terminal that would wait for records."""
    master, slave = pty.openpty()
    for close, code, said in (
        ("<&-", 4, b"[E-STDIN-CLOSED] stdin: is closed, and no input is given"),
        ("", 2, b"[E-USAGE] "),
    ):
        argv = ["bash", "-c", f'"$0" score -m ./absent --lines -o out.jsonl {close}', TEXTGEN]
        done = subprocess.run(
            argv, cwd=tmp_path, stdin=slave, capture_output=True, timeout=60, check=False
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (code, b"")
        assert done.stderr.startswith(b"textgen: error: " + said), done.stderr
    os.close(slave)
    os.close(master)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["grows", "shrinks"])
def test_an_input_that_changes_meanwhile(forked: Program, job: list[str], tmp_path: Path, how: str) -> None:
    """F57: what came later is left out, and said; one that lost bytes is an error, and no resume takes it."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(MANY)
    args = [*job, "-i", "in.jsonl", "-o", "out.jsonl", "--batch-size", "1"]

    def act(_: int) -> None:
        wait_until(written(out))
        if how == "grows":
            with source.open("ab") as file:
                file.write(b'{"id": "late", "text": "a"}\n')
        else:
            os.truncate(source, len(MANY) - 1000)

    done = forked.during(act, tmp_path, *args)
    if how == "grows":
        said = b"textgen: warning: [W-INPUT-GREW] in.jsonl: grew while it was read: what came later is left out\n"
        assert done == Done(0, b"", said)
        assert [line["id"] for line in lines(out.read_bytes())] == list(range(300))
        return
    assert done == Done(4, b"", b"textgen: error: [E-INPUT-CHANGED] in.jsonl: shrank while it was read\n")
    assert not out.exists()
    assert forked(tmp_path, *args, "--resume").returncode == 10


def test_locales_and_names_change_no_byte(run: Run, job: list[str], tmp_path: Path) -> None:
    """F59 and F60: a process of its own in a locale that has no é, and names that are not UTF-8."""
    given, out = os.fsdecode(b"in\xe9.jsonl"), os.fsdecode(b"out\xe9.jsonl")
    (tmp_path / given).write_bytes('{"text": "naïve 你好 🙂", "ä": "ß"}\n'.encode())
    assert run("-i", given, "-o", out) == Done(0, b"", b"")
    again = run("-i", given, "-o", out)
    assert again.returncode == 2
    assert re.match(rb"textgen: error: \[E-EXISTS\] out\\xE9\.jsonl: exists\n", again.stderr)
    known = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [TEXTGEN, *job, "-i", given, "--jsonl"], cwd=tmp_path, env=known | ascii_only,
        stdin=subprocess.DEVNULL, capture_output=True, timeout=90, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, (tmp_path / out).read_bytes(), b"")


RANGES = [
    *[("--window", value) for value in ("1", "-1", "1e9", "nan")],
    *[("--stride", value) for value in ("0", "-1", "x")],
    *[("--top", value) for value in ("0", "-1")],
    *[("--max-time", value) for value in ("nan", "-1")],
    ("--batch-size", "0"),
    ("--shard", "4/3"),
]


@pytest.mark.parametrize(("option", "value"), RANGES)
def test_a_value_out_of_range(forked: Program, tmp_path: Path, option: str, value: str) -> None:
    """F62: before the input is read or a model looked for."""
    job = ["score", "-m", "./absent", "--jsonl", "--tokens", "-o", "out", f"{option}={value}"]
    done = forked(tmp_path, *job, stdin=b'{"text": "a"}\n')
    assert (done.returncode, done.stdout) == (2, b"")
    assert re.match(rf"textgen: error: \[E-(RANGE|USAGE)\] {option}: ", done.stderr.decode()), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_as_long_as_the_context(run: Run) -> None:
    """F63: a text slides where it is longer; with a context both fit, or the record fails and says by how much."""
    texts = b"".join(b'{"text": "%s"}\n' % (b"@" * count) for count in (127, 128, 129, 300))
    found = lines(run("--jsonl", stdin=texts).stdout)
    assert [line["tokens"] for line in found] == [127, 128, 129, 300]
    pairs = b"".join(b'{"c": "%s", "text": "@@"}\n' % (b"@" * count) for count in (125, 126, 127))
    done = run("--jsonl", "--context", "c", "--bos", "always", stdin=pairs)
    assert done.returncode == 3
    fits, full, over = lines(done.stdout)
    assert (fits["tokens"], full["tokens"]) == (2, 2)
    assert over["error"]["code"] == "E-CONTEXT"
    assert over["error"]["message"].endswith("130 tokens with the context, the window takes 128")
