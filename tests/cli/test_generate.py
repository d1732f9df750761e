"""`textgen generate` with a small real model, from the command line to the bytes."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from parts.shell import Shell

Run = Callable[..., subprocess.CompletedProcess[bytes]]
pytestmark = pytest.mark.slow


@pytest.fixture(name="program")
def _program(warm: Shell) -> list[str]:
    return [warm.program]


def test_texts_are_separated_by_a_blank_line(run: Run, small_model: Callable[..., Path]) -> None:
    args = ["generate", "word", "-m", str(small_model("llama")), "-n", "4", "--device", "cpu"]
    one = run(*args, "--greedy")
    assert (one.returncode, one.stderr) == (0, b"")
    assert one.stdout.endswith(b"\n")
    three = run(*args, "--num-return-sequences", "3", "--stop", "\n")
    assert (three.returncode, three.stderr) == (0, b"")
    assert len(three.stdout.decode().removesuffix("\n").split("\n\n")) == 3


def test_the_text_does_not_depend_on_where_the_prompt_comes_from(
    run: Run, small_model: Callable[..., Path]
) -> None:
    args = ["-m", str(small_model("llama")), "-n", "4", "--device", "cpu"]
    argument = run("generate", "word", *args)
    piped = run("generate", *args, stdin=b"word\n")
    assert (argument.returncode, piped.returncode, piped.stderr) == (0, 0, b"")
    assert argument.stdout == piped.stdout


def test_a_reader_that_is_gone_stops_the_run(shell: Run, small_model: Callable[..., Path]) -> None:
    line = f"$TEXTGEN generate word -m {small_model('llama')} -n 100 --device cpu | true"
    done = shell(line)
    assert (done.returncode, done.stderr) == (141, b"")
