"""What a person sees: the program under a real pseudo-terminal."""

import os
import pty
import re
import subprocess
from collections.abc import Callable

import pexpect
import pytest

Run = Callable[..., subprocess.CompletedProcess[bytes]]


def on_terminal(argv: list[str], env: dict[str, str], *descriptors: int) -> tuple[int, bytes, bytes, bytes]:
    """Run with these descriptors on one terminal: exit code, what it showed, and piped stdout and stderr."""
    master, slave = pty.openpty()
    streams = [slave if number in descriptors else subprocess.PIPE for number in range(3)]
    process = subprocess.Popen(
        argv, env={"TERM": "xterm"} | env, stdin=streams[0], stdout=streams[1], stderr=streams[2]
    )
    os.close(slave)
    if process.stdin is not None:
        process.stdin.close()
    shown = b""
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:  # EIO: the last one has closed the terminal
        pass
    out = process.stdout.read() if process.stdout else b""
    err = process.stderr.read() if process.stderr else b""
    code = process.wait(20)
    os.close(master)
    return code, shown.replace(b"\r\n", b"\n"), out, err


SPLIT = r"a\x1b|]52;c;eA==\x07|[/b]\n\tb\r|\u202e|\U0001f468\u200d|\U0001f469 [link=file:///x]y[/link]"
SANITISED = "a\\x1B]52;c;eA==\\x07[/b]\n\tb\\x0D\\u{202E}\U0001f468\u200d\U0001f469 [link=file:///x]y[/link]"
EXACT = (
    b"a\x1b]52;c;eA==\x07[/b]\n\tb\r\xe2\x80\xae"
    + "\U0001f468\u200d\U0001f469 [link=file:///x]y[/link]".encode()
)


def test_text_is_sanitised_on_a_terminal_only(border: list[str], env: dict[str, str]) -> None:
    code, shown, _, err = on_terminal([*border, "show", SPLIT], env, 1)
    assert (code, shown.decode(), err) == (0, SANITISED, b"")
    code, shown, out, _ = on_terminal([*border, "show", SPLIT], env | {"TERM": "dumb"}, 2)
    assert (code, shown, out) == (0, b"", EXACT)


def test_the_bar_is_gone_before_text_and_does_not_return(border: list[str], env: dict[str, str]) -> None:
    code, shown, _, _ = on_terminal([*border, "show", "one|two"], env, 1, 2)
    assert code == 0
    bar, _, text = shown.rpartition(b"\x1b[?25h")
    assert b"generate x" in bar
    assert re.fullmatch(rb"(\x1b\[[0-9]*[AK]|\r|\x1b\[2K)*onetwo", text), text


def test_progress_is_drawn_on_the_terminal_of_stderr(border: list[str], env: dict[str, str]) -> None:
    code, shown, out, _ = on_terminal([*border, "work", "--seconds", "0.5"], env, 2)
    assert (code, out) == (0, b"")
    assert b"download model [b]x[/b]" in shown
    assert b"MB" in shown
    assert b"textgen: warning: [W-OLD] the file is old" in shown
    assert b"chose the CPU" not in shown
    assert b"\x1b[?25l" in shown
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")


def test_a_bar_for_stderr_stays_out_of_stdout(border: list[str], env: dict[str, str]) -> None:
    code, shown, _, err = on_terminal([*border, "work", "--seconds", "0.5"], env, 1)
    assert (code, shown, err) == (0, b"", b"textgen: warning: [W-OLD] the file is old\n")


@pytest.mark.parametrize("term", ["dumb", "", "unknown"])
def test_nothing_is_drawn_on_a_plain_terminal(term: str, border: list[str], env: dict[str, str]) -> None:
    _, shown, _, _ = on_terminal([*border, "work", "-v"], env | {"TERM": term}, 0, 1, 2)
    assert b"\x1b" not in shown
    assert b"textgen: chose the CPU \\x1B[2J\n" in shown


def test_no_color(border: list[str], program: list[str], env: dict[str, str]) -> None:
    colour = re.compile(rb"\x1b\[[0-9;]*3[0-9]")
    _, shown, _, _ = on_terminal([*border, "work", "--seconds", "0.5"], env | {"NO_COLOR": "1"}, 2)
    assert not colour.search(shown)
    assert colour.search(on_terminal([*border, "work", "--seconds", "0.5"], env, 2)[1])
    assert colour.search(on_terminal([*program, "--help"], env, 1)[1])
    assert not colour.search(on_terminal([*program, "--help"], env | {"NO_COLOR": "1"}, 1)[1])
    assert not colour.search(on_terminal([*program, "--help"], env | {"FORCE_COLOR": "1"}, 2)[2])


def test_a_prompt_is_asked_for_and_not_waited_for(program: list[str], env: dict[str, str]) -> None:
    code, shown, out, _ = on_terminal([*program, "generate"], env, 0, 2)
    assert (code, out) == (2, b"")
    assert shown.startswith(b"textgen: error: [E-USAGE] textgen generate: no prompt\ntextgen: hint: ")
    assert on_terminal([*program, "generate", "-"], env, 0, 2)[0] == 2


def test_ctrl_c_at_the_keyboard(border: list[str], env: dict[str, str]) -> None:
    child = pexpect.spawn(border[0], [*border[1:], "work", "--seconds", "20"], env={"TERM": "xterm"} | env)
    child.expect("download")
    child.sendintr()
    child.expect(pexpect.EOF, timeout=10)
    child.close()
    assert child.signalstatus == 2
    assert b"Traceback" not in child.before
    assert b"\x1b[?25h" in child.before
