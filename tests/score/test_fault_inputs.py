"""What an input of `textgen score` can do as a whole: ids that come twice, names, locales, files that change."""

import json
import os
import pty
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parts.program import Done, Program

TEXTGEN = str(Path(sysconfig.get_path("scripts")) / "textgen")
Run = Callable[..., Done]


@pytest.fixture(name="known", scope="module")
def _known(small_model: Callable[..., Path]) -> list[str]:
    return ["score", "-m", str(small_model("llama")), "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(name="run")
def _run(forked: Program, known: list[str], tmp_path: Path) -> Run:
    def run(*args: str, **more: Any) -> Done:
        return forked(tmp_path, *known, *args, **more)

    return run


def found(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_ids_that_come_twice(run: Run, tmp_path: Path) -> None:
    """F49: told once, and as many results as records; with --unique-ids refused before a model is looked for."""
    (tmp_path / "in.jsonl").write_bytes(b"".join(b'{"id": 1, "text": "a %d"}\n' % at for at in range(3)))
    files = ("-i", "in.jsonl", "-o", "out.jsonl")
    twice = b"record 1: id 1 appears twice\n"
    done = run("-m", "./absent", *files, "--unique-ids")
    assert done == Done(4, b"", b"textgen: error: [E-ID] " + twice)
    assert run(*files) == Done(0, b"", b"textgen: warning: [W-ID] " + twice)
    assert [(line["id"], line["text"]) for line in found(tmp_path / "out.jsonl")] == [
        (1, f"a {at}") for at in range(3)
    ]


def test_names_that_are_not_utf8(run: Run, tmp_path: Path) -> None:
    """F60."""
    given, out = os.fsdecode(b"in\xe9.jsonl"), os.fsdecode(b"out\xe9.jsonl")
    (tmp_path / given).write_bytes(b'{"text": "a b"}\n')
    assert run("-i", given, "-o", out) == Done(0, b"", b"")
    assert [line["text"] for line in found(tmp_path / out)] == ["a b"]
    again = run("-i", given, "-o", out)
    assert again.returncode == 2
    assert again.stderr.startswith(rb"textgen: error: [E-EXISTS] out\xE9.jsonl: exists")


@pytest.mark.parametrize("length", [128, 129, 200])
def test_a_context_as_long_as_the_models(run: Run, length: int) -> None:
    """F63: what does not fit beside a token to score is an error or is cut and says so; one byte is one token."""
    given = json.dumps({"text": "@", "context": "@" * length}).encode() + b"\n"
    done = run("--jsonl", "--context", "context", "--bos", "never", stdin=given)
    line = json.loads(done.stdout)
    if length == 128:  # the last token is read by nobody
        assert (done.returncode, line["tokens"], "truncated" in line) == (0, 1, False)
        return
    assert (done.returncode, line["error"]["code"]) == (3, "E-CONTEXT")
    cut = run("--jsonl", "--context", "context", "--bos", "never", "--truncate", "left", stdin=given)
    assert (cut.returncode, json.loads(cut.stdout)["truncated"]) == (0, True)


@pytest.mark.parametrize("how", ["grows", "shrinks"])
def test_an_input_that_changes(forked: Program, known: list[str], run: Run, tmp_path: Path, how: str) -> None:
    """F57: what came later is left out, and said; a file that lost bytes is an error, and no resume takes it."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b'{"text": "the dog", "more": "%s"}\n' % (b"o" * 4000) * 1500
    )  # more than is read at once
    job = ("-i", "in.jsonl", "-o", "out.jsonl", "--batch-size", "1")

    def act(pid: int) -> None:
        partial, until = tmp_path / "out.jsonl.partial", time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < until:
            time.sleep(0.01)
        if how == "grows":
            with source.open("ab") as file:
                file.write(b'{"text": "late"}\n')
        else:
            os.truncate(source, source.stat().st_size - 1000)

    done = forked.during(act, tmp_path, *known, *job)
    if how == "grows":
        assert (done.returncode, len(found(out))) == (0, 1500)
        assert done.stderr.startswith(b"textgen: warning: [W-INPUT-GREW] in.jsonl: grew while it was read")
        return
    assert (done.returncode, out.exists()) == (4, False)
    assert done.stderr.startswith(b"textgen: error: [E-INPUT")
    assert run(*job, "--resume").returncode == 10


@pytest.mark.parametrize("variables", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}])
def test_any_locale(run: Run, known: list[str], tmp_path: Path, variables: dict[str, str]) -> None:
    """F59: a process of its own in a locale that has no é, and a file whose name has one."""
    (tmp_path / "é.jsonl").write_bytes('{"text": "naïve 你好 🙂", "ä": "ß"}\n'.encode())
    assert run("-i", "é.jsonl", "-o", "ref.jsonl") == Done(0, b"", b"")
    keep = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [TEXTGEN, *known, "-i", "é.jsonl", "-o", "ü.jsonl"], cwd=tmp_path, env=keep | variables,
        stdin=subprocess.DEVNULL, capture_output=True, timeout=90, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (tmp_path / "ü.jsonl").read_bytes() == (tmp_path / "ref.jsonl").read_bytes()


def test_no_input_is_waited_for(tmp_path: Path) -> None:
    """F54 and F55: standard input that is closed, and one that is a terminal."""
    closed = subprocess.run(
        ["bash", "-c", f"{TEXTGEN} score -m ./absent --jsonl -o out.jsonl <&-"],
        cwd=tmp_path, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    said = b"textgen: error: [E-STDIN-CLOSED] stdin: is closed, and no input is given\n"
    assert (closed.returncode, closed.stdout, closed.stderr) == (4, b"", said)
    master, slave = pty.openpty()
    for args in ([], ["--jsonl"]):
        done = subprocess.run(
            [TEXTGEN, "score", "-m", "./absent", *args], cwd=tmp_path, stdin=slave, capture_output=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.startswith(b"textgen: error: [E-USAGE] ")
    os.close(slave)
    os.close(master)
    assert list(tmp_path.iterdir()) == []
