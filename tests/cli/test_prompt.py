"""How a prompt is put together from the argument and standard input."""

import json
import os
import subprocess
from collections.abc import Callable

import pytest

Run = Callable[..., subprocess.CompletedProcess[bytes]]

# Arguments, standard input -> the prompt.
PROMPTS = [
    (["one"], b"", "one"),
    (["one"], b"two\nthree\n", "one\n\ntwo\nthree"),
    ([], b"two\n", "two"),
    ([], b"two\r\n", "two"),
    ([], b"two\n\n", "two\n"),
    ([], b"two ", "two "),
    ([], b"\n\ntwo", "\n\ntwo"),
    (["-"], b"two", "two"),
    (["one", "--no-stdin"], b"two", "one"),
    ([""], b"two", "two"),
    ([""], b"", ""),
    (["one"], b"\xef\xbb\xbfbom", "one\n\nbom"),
    (["é\U0001f600"], "ü\0\u2028".encode(), "é\U0001f600\n\nü\0\u2028"),
]
FAILURES = [
    ([], b"", 4, "[E-EMPTY] stdin: is empty, and no prompt is given"),
    ([], b"\n", 4, "[E-EMPTY] stdin: is empty, and no prompt is given"),
    (["-"], b"", 4, "[E-EMPTY] stdin: is empty"),
    (["one"], b"ab\xffcd", 4, "[E-UTF8] stdin: is not UTF-8 at byte 2"),
    ([], "text".encode("utf-16"), 4, "[E-UTF8] stdin: is not UTF-8 at byte 0"),
    ([b"ab\xff"], b"", 4, "[E-UTF8] prompt: is not UTF-8 at byte 2"),
    ([], b"x" * (4 * 2**20 + 1), 4, "[E-TOO-LONG] stdin: "),
    (["--no-stdin"], b"two", 2, "[E-USAGE] textgen generate: no prompt"),
    (["-", "--no-stdin"], b"two", 2, "[E-CONFLICT] -: "),
]


@pytest.mark.parametrize(("args", "stdin", "prompt"), PROMPTS)
def test_a_prompt(args: list[str], stdin: bytes, prompt: str, run: Run, border: list[str]) -> None:
    done = run("prompt", *args, start=border, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout) == prompt


@pytest.mark.parametrize(("args", "stdin", "code", "message"), FAILURES, ids=repr)
def test_no_prompt(args: list[str | bytes], stdin: bytes, code: int, message: str, run: Run) -> None:
    done = run("generate", *args, stdin=stdin)
    assert (done.returncode, done.stdout) == (code, b"")
    assert done.stderr.decode().startswith(f"textgen: error: {message}")


@pytest.mark.parametrize(
    "more",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
    ],
    ids=str,
)
def test_the_locale_changes_no_prompt(more: dict[str, str], run: Run, border: list[str]) -> None:
    done = run("prompt", "naïve".encode(), start=border, stdin="ü".encode(), **more)
    assert json.loads(done.stdout) == "naïve\n\nü"


@pytest.mark.parametrize(
    ("line", "code", "prompt"),
    [
        ("$BORDER prompt one <&-", 0, b'"one"'),
        ("$BORDER prompt one </dev/null", 0, b'"one"'),
        ("$BORDER prompt <&-", 4, b""),
        ("printf 'a\\nb\\n' | while read -r x; do $BORDER prompt --no-stdin $x; done", 0, b'"a""b"'),
    ],
)
def test_a_prompt_in_a_script(line: str, code: int, prompt: bytes, shell: Run) -> None:
    done = shell(line)
    assert (done.returncode, done.stdout) == (code, prompt)


def test_a_pipe_that_never_closes_can_be_left_alone(border: list[str], env: dict[str, str]) -> None:
    reading, writing = os.pipe()
    argv = [*border, "prompt", "one", "--no-stdin"]
    done = subprocess.run(argv, env=env, stdin=reading, capture_output=True, timeout=20, check=False)
    assert done.stdout == b'"one"'
    os.close(reading)
    os.close(writing)


def test_a_non_blocking_stdin_is_waited_for(border: list[str], env: dict[str, str]) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with subprocess.Popen([*border, "prompt"], env=env, stdin=reading, stdout=subprocess.PIPE) as process:
        os.close(reading)
        os.write(writing, b"late")
        os.close(writing)
        assert process.stdout is not None
        assert json.loads(process.stdout.read()) == "late"
