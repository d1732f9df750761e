"""How the tests of the face start the program: the installed console script, or it with test commands."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

BORDER = Path(__file__).parent / "border.py"
Run = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(name="env")
def _env(tmp_path: Path) -> dict[str, str]:
    """An environment without settings of the person who runs the tests."""
    keep = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return keep | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}


@pytest.fixture(name="program")
def _program() -> list[str]:
    return [str(Path(sysconfig.get_path("scripts")) / "textgen")]


@pytest.fixture(name="border")
def _border() -> list[str]:
    return [sys.executable, str(BORDER)]


@pytest.fixture(name="run")
def _run(program: list[str], env: dict[str, str]) -> Run:
    """Run the program without a terminal; `start` names another beginning of the command line."""

    def run(
        *args: str | bytes, start: list[str] | None = None, stdin: bytes = b"", **more: str
    ) -> subprocess.CompletedProcess[bytes]:
        argv = [*(start or program), *args]
        return subprocess.run(argv, env=env | more, input=stdin, capture_output=True, timeout=60, check=False)

    return run


@pytest.fixture(name="shell")
def _shell(program: list[str], border: list[str], env: dict[str, str]) -> Run:
    """Run a line of bash with pipefail; $TEXTGEN is the program, $BORDER the one with test commands."""

    def shell(line: str, **more: str) -> subprocess.CompletedProcess[bytes]:
        words = {"TEXTGEN": program[0], "BORDER": " ".join(border)}
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", line],
            env=env | words | more, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
        )  # fmt: skip

    return shell
