"""Publishing in processes of their own, to be raced, killed and starved.

As a program: `publishers.py TARGET MEGABYTES [hold]` fills TARGET through the cache and prints what it saw, a
word a line; with `hold` it says "inside" and waits for a line on stdin before it goes on.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from textgen_cli.errors import TextgenError
from textgen_cli.events import Event, Progress
from textgen_cli.model import cache


def _say(word: str) -> None:
    print(word, flush=True)


def _report(event: Event) -> None:
    if isinstance(event, Progress) and event.stage == "wait":
        _say("wait")


def _main(target: Path, megabytes: int, hold: bool) -> None:
    try:
        with cache.publish(target, report=_report, origin={"name": "made"}) as staging:
            if staging is None:
                _say("whole")
                return
            (staging / "deep").mkdir()
            (staging / "deep" / "weights").write_bytes(os.urandom(1 << 20) * megabytes)
            if hold:
                _say("inside")
                sys.stdin.readline()
            (staging / "config.json").write_text("{}")
        _say("made")
    except TextgenError as error:
        _say(f"{error.exit_code} {error}")


def start(
    target: Path, *, megabytes: int = 1, hold: bool = False, user: int | None = None
) -> "subprocess.Popen[str]":
    """A process that publishes `target`, as another user if asked."""
    command = [sys.executable, __file__, str(target), str(megabytes), *(["hold"] if hold else [])]
    if user is not None:
        command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command]
    environment = {**os.environ, "PYTHONPATH": str(Path(cache.__file__).parents[2])}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def words(process: "subprocess.Popen[str]") -> list[str]:
    """What a process says until it ends, after a line on its stdin."""
    return process.communicate("\n", timeout=60)[0].splitlines()


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A real file system of its own of this size; skips the test where mounting is not permitted."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0755", "none", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["hold"])
