"""The border: exit codes, messages, closed and full streams, pipes and signals, of real processes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[bytes]]
MESSAGE = re.compile(
    rb"textgen: error: \[E-[A-Z0-9-]+\] [^\n\x00-\x1f\x7f]+\n(textgen: hint: [^\n\x00-\x1f\x7f]+\n)?"
)

FAILURES = {
    "model": (5, b"[E-GGUF] file.gguf: array is longer than the file\ntextgen: hint: fetch it again\n"),
    "safety": (6, b"[E-CODE] org/name: holds code\n"),
    "busy": (9, b"[E-LOCKED] out: is held\n"),
    "resume": (10, b"[E-JOB] out: differs\n"),
    "oom": (11, b"[E-MEMORY] batch: too large\n"),
    "hostile": (5, rb"[E-X] a\x1B]52;c;x\x07\x0Ab: \u{202E}long long"),
    "secret": (5, b"[E-X] https://***@host/x: hf_*** and ***\n"),
    "bug": (1, rb"[E-INTERNAL] ValueError: what\x1B[2J"),
    "memory": (11, b"[E-MEMORY] memory: is not enough\n"),
    "torch-memory": (11, b"[E-MEMORY] memory: is not enough\n"),
    "cpu-memory": (11, b"[E-MEMORY] memory: is not enough\n"),
    "system-exit": (1, b"[E-INTERNAL] SystemExit: a library leaves\n"),
    "foreign-pipe": (1, b"[E-INTERNAL] BrokenPipeError: [Errno 32] Broken pipe\n"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_has_its_code_and_message(name: str, run: Run, border: list[str]) -> None:
    done = run("raise", name, start=border, HF_TOKEN="own-secret-value")
    code, message = FAILURES[name]
    assert done.returncode == code
    assert done.stdout == b""
    assert MESSAGE.fullmatch(done.stderr), done.stderr
    assert done.stderr.startswith(b"textgen: error: " + message)


def test_untrusted_text_is_cut(run: Run, border: list[str]) -> None:
    line = run("raise", "hostile", start=border).stderr.decode().splitlines()[0]
    assert line.endswith("…")
    assert len(line.partition(": \\u{202E}")[2]) < 200


def test_a_traceback_is_shown_on_request_only(run: Run, border: list[str]) -> None:
    assert b"Traceback" not in run("raise", "bug", start=border).stderr
    asked = run("raise", "bug", start=border, TEXTGEN_DEBUG="1")
    assert b"Traceback" in asked.stderr
    assert b'raise ERRORS["bug"]' not in asked.stderr
    assert b"\x1b" not in asked.stderr
    secret = run("raise", "secret", start=border, TEXTGEN_DEBUG="1", HF_TOKEN="own-secret-value")
    assert b"Traceback" in secret.stderr
    assert not re.search(rb"pass-word|hf_abc|own-secret-value", secret.stderr)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--nope"], "textgen: no such option: --nope"),
        (["generat", "x"], "textgen: no such command 'generat'. Did you mean 'generate'?"),
        (["generate", "--nope"], "textgen generate: no such option: --nope"),
        (["generate", "a", "b"], "textgen generate: got unexpected extra argument(s) (b)"),
        (["generate", "--top-k"], "textgen generate: option '--top-k' requires an argument"),
        (["generate", "x", "--top-k", "many"], "--top-k: input should be a valid integer"),
        (["generate", "x", "--dtype", "int3"], "--dtype: 'int3' is not one of"),
        (["generate", "x", "\x1b[2J"], "textgen generate: got unexpected extra argument(s) (\\x1b[2J)"),
    ],
)
def test_a_usage_error(args: list[str], message: str, run: Run) -> None:
    done = run(*args)
    assert (done.returncode, done.stdout) == (2, b"")
    assert MESSAGE.fullmatch(done.stderr), done.stderr
    assert done.stderr.decode().startswith(f"textgen: error: [E-USAGE] {message}")
    assert done.stderr.endswith(b" --help`\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-n", "0"], "--max-new-tokens: must be >= 1"),
        (["-n", "1000000000"], "--max-new-tokens: must be >= 1 and <= 1e+07"),
        (["--temperature", "nan"], "--temperature: must be >= 0"),
        (["--top-p", "2"], "--top-p: must be > 0 and <= 1"),
        (["--seed", str(2**70)], "--seed: must be 'random' or a number"),
    ],
)
def test_a_value_out_of_range(args: list[str], message: str, run: Run) -> None:
    done = run("generate", "x", *args)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith(f"textgen: error: [E-RANGE] {message}")


def test_help_and_version(run: Run) -> None:
    from textgen_cli import __version__

    assert run("--version").stdout == f"textgen {__version__}\n".encode()
    for args in (["--help"], ["-h"], ["generate", "--help"], ["download", "-h"]):
        done = run(*args)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"Usage: textgen" in done.stdout
        assert b"\x1b" not in done.stdout


def test_no_arguments_show_the_help_and_fail(run: Run) -> None:
    done = run()
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"Usage: textgen" in done.stderr


def test_python_m_is_the_same_program(run: Run, tmp_path: Path) -> None:
    assert run("--version", start=[sys.executable, "-m", "textgen_cli"]).stdout == run("--version").stdout


def test_modules_in_the_current_folder_are_not_imported(
    run: Run, env: dict[str, str], program: list[str], tmp_path: Path
) -> None:
    for name in ("json", "torch", "typer", "rich", "tomllib", "platformdirs", "textgen_cli", "gc", "enum"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n")
    done = subprocess.run(
        [*program, "generate", "-h"], cwd=tmp_path, env=env, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert not (tmp_path / "sprung").exists()


CLOSED = b"textgen: error: [E-STDOUT-CLOSED] stdout: is closed, the result could not be written\n"
FULL = b"textgen: error: [E-WRITE] stdout: no space left on device\n"
NO_STDIN = b"textgen: error: [E-STDIN-CLOSED] stdin: is closed, and no prompt is given\n"

# A shell line -> exit code, stdout, stderr (None: any).
STREAMS = {
    "$BORDER lines 100000 | head -1": (141, b"line 0\n", b""),
    "$BORDER lines 100000 | true": (141, b"", b""),
    "$BORDER lines 3 | cat": (0, b"line 0\nline 1\nline 2\n", b""),
    "$TEXTGEN --help | true": (None, b"", b""),
    "$BORDER lines 3 >&-": (8, b"", CLOSED),
    "$TEXTGEN generate x >&-": (8, b"", CLOSED),
    "$TEXTGEN download >&-": (8, b"", CLOSED),
    "$BORDER lines 3 >/dev/full": (8, b"", FULL),
    "$TEXTGEN --help >/dev/full": (8, b"", FULL),
    "$TEXTGEN --version >/dev/full": (8, b"", FULL),
    "$BORDER lines 2 2>&-": (0, b"line 0\nline 1\n", b""),
    "$BORDER lines 2 2>/dev/full": (0, b"line 0\nline 1\n", b""),
    "$BORDER raise bug 2>/dev/full": (1, b"", b""),
    "$BORDER raise bug 2>&-": (1, b"", b""),
    "$TEXTGEN --nope 2>&-": (2, b"", b""),
    "$BORDER lines 2 <&- >&- 2>&-": (8, b"", b""),
    "$TEXTGEN generate x --greedy <&- >&- 2>&-": (8, b"", b""),
    "$TEXTGEN generate <&-": (4, b"", NO_STDIN),
    "$BORDER lines 1 <&-": (0, b"line 0\n", b""),
}  # fmt: skip


@pytest.mark.parametrize("line", STREAMS)
def test_streams(line: str, shell: Run) -> None:
    code, stdout, stderr = STREAMS[line]
    done = shell(line)
    assert (done.stdout, done.stderr) == (stdout, stderr)
    # A help that fits into the pipe may be written before its reader is gone.
    assert done.returncode == code or (code is None and done.returncode in (0, 141))


def test_a_closed_descriptor_does_not_become_a_file(tmp_path: Path, shell: Run) -> None:
    victim = tmp_path / "victim"
    done = shell(f"MARKER={victim} $BORDER lines 1 0<&- 2>&-; $BORDER hold --swallow {tmp_path}/none 2>&-")
    assert done.returncode == 1
    assert victim.read_text() == "0"


def test_writing_stops_when_the_reader_is_gone(tmp_path: Path, shell: Run) -> None:
    marker = tmp_path / "marker"
    shell("$BORDER lines 1000000 | head -1", MARKER=str(marker))
    assert int(marker.read_text()) < 200_000


@pytest.mark.slow
def test_a_stderr_that_nobody_reads_does_not_block(env: dict[str, str], border: list[str]) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writing, True)
    with subprocess.Popen([*border, "raise", "bug"], env=env, stderr=writing) as process:
        assert process.wait(20) == 1
    os.close(reading)
    os.close(writing)


@pytest.mark.slow
def test_a_non_blocking_stdout_is_waited_for(env: dict[str, str], border: list[str]) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with subprocess.Popen(
        [*border, "lines", "20000"], env=env, stdout=writing, stderr=subprocess.PIPE
    ) as process:
        os.close(writing)
        time.sleep(1.0)
        with os.fdopen(reading, "rb") as file:
            data = file.read()
        assert process.wait(20) == 0
    assert data == b"".join(b"line %d\n" % n for n in range(20000))


@pytest.mark.parametrize(
    "more",
    [
        {"LC_ALL": "C", "TERM": "", "COLUMNS": "0"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii", "NO_COLOR": "1", "COLUMNS": "1"},
        {"TERM": "dumb", "COLUMNS": "abc", "TERMINAL_WIDTH": "abc"},
        {"CLICOLOR_FORCE": "1", "FORCE_COLOR": "1", "GITHUB_ACTIONS": "true"},
        {"LANG": "xx", "PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "1"},
    ],
    ids=str,
)
def test_the_environment_changes_no_byte_of_data(more: dict[str, str], run: Run, border: list[str]) -> None:
    text = r"h\u00e9 \U0001f600 [b]\x1b[31m\udc80"
    done = run("show", text, start=border, **more)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == "hé \U0001f600 [b]\x1b[31m?".encode()
    shown = run("--help", **more)
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert "╭─".encode() in shown.stdout
    assert b"\x1b" not in shown.stdout


def test_an_empty_environment(program: list[str]) -> None:
    done = subprocess.run([*program, "--version"], env={}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_without_a_terminal_progress_is_silent(run: Run, border: list[str]) -> None:
    done = run("work", start=border)
    assert (done.stdout, done.stderr) == (b"", b"textgen: warning: [W-OLD] the file is old\n")


def test_verbose_without_a_terminal_is_plain_and_rare(run: Run, border: list[str]) -> None:
    done = run("work", "-v", start=border)
    assert done.stderr.decode().splitlines() == [
        "textgen: chose the CPU \\x1B[2J",
        "textgen: download model [b]x[/b]",
        "textgen: warning: [W-OLD] the file is old",
    ]


@pytest.mark.slow
def test_verbose_progress_goes_on(run: Run, border: list[str]) -> None:
    slow = run("work", "-v", "--seconds", "4", start=border)
    assert slow.stderr.decode().splitlines()[1:3] == [
        "textgen: download model [b]x[/b]",
        "textgen: download model [b]x[/b] 4.0/4.0 MB",
    ]


def test_completion_loads(run: Run) -> None:
    words = {"_TEXTGEN_COMPLETE": "complete_bash", "COMP_WORDS": "textgen generate --max", "COMP_CWORD": "2"}
    assert {b"--max-new-tokens", b"--max-length"} <= set(run(**words).stdout.split())
    words |= {"COMP_WORDS": "textgen generate -m smol", "COMP_CWORD": "3"}
    assert b"smollm2-135m-instruct" in run(**words).stdout.split()


# Signals


def _started(argv: list[str], folder: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """A process that holds, once it holds."""
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (folder / "ready").exists():
        assert process.poll() is None
        time.sleep(0.01)
    return process


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("more", [[], ["--swallow"]], ids=str)
def test_a_signal_cleans_up_and_kills(
    signum: int, more: list[str], border: list[str], env: dict[str, str], tmp_path: Path
) -> None:
    with _started([*border, "hold", str(tmp_path), *more], tmp_path, env) as process:
        process.send_signal(signum)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (-signum, b"", b"")
    assert not (tmp_path / "ready").exists()


def _cleaning(process: subprocess.Popen[bytes], folder: Path) -> None:
    while not (folder / "cleaning").exists():
        assert process.poll() is None
        time.sleep(0.01)


def test_a_second_ctrl_c_kills_at_once(border: list[str], env: dict[str, str], tmp_path: Path) -> None:
    with _started([*border, "hold", "--slow", str(tmp_path)], tmp_path, env) as process:
        process.send_signal(signal.SIGINT)
        _cleaning(process, tmp_path)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        process.communicate(timeout=10)
        assert time.monotonic() - start < 0.5
    assert process.returncode == -signal.SIGINT


@pytest.mark.slow
def test_the_echo_of_a_signal_does_not_stop_the_cleaning(
    border: list[str], env: dict[str, str], tmp_path: Path
) -> None:
    with _started([*border, "hold", "--slow", str(tmp_path)], tmp_path, env) as process:
        process.send_signal(signal.SIGTERM)
        _cleaning(process, tmp_path)
        process.send_signal(signal.SIGTERM)  # `timeout` sends it to the process and to its group
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
        time.sleep(0.7)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("signum", SIGNALS)
def test_an_ignored_signal_stays_ignored(
    signum: int, border: list[str], env: dict[str, str], tmp_path: Path
) -> None:
    ignoring = ["bash", "-c", f"trap '' {int(signum)}; exec \"$@\"", "bash"]
    with _started([*ignoring, *border, "hold", str(tmp_path)], tmp_path, env) as process:
        process.send_signal(signum)
        time.sleep(0.3)
        assert process.poll() is None
        other = signal.SIGTERM if signum != signal.SIGTERM else signal.SIGINT
        process.send_signal(other)
        process.communicate(timeout=10)
    assert process.returncode == -other


def test_a_conversation_survives_ctrl_c_only(border: list[str], env: dict[str, str]) -> None:
    argv = [*border, "talk"]
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(2):
            assert process.stdout.readline() == b"waiting\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == b"stopped\n"
        assert process.stdout.readline() == b"waiting\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=10) == (b"", b"")
    assert process.returncode == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_while_the_face_is_imported(signum: int, program: list[str], env: dict[str, str]) -> None:
    """At every tenth of the program's life; before its first line Python itself may answer Ctrl-C."""
    start = time.monotonic()
    subprocess.run([*program, "generate", "-h"], env=env, capture_output=True, check=True)
    life = time.monotonic() - start
    died = 0
    for tenth in range(2, 10):
        with subprocess.Popen(
            [*program, "generate", "-h"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            time.sleep(life * tenth / 10)
            process.send_signal(signum)
            _, err = process.communicate(timeout=10)
        assert process.returncode in (0, -signum)
        died += process.returncode != 0
        assert err == b"" or (b"Traceback" in err and b"textgen_cli/cli" not in err)
    assert died


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_python_drops_comes_again(signum: signal.Signals) -> None:
    """An exception raised inside a __del__ is dropped: the process must end all the same, and say nothing."""
    code = f"""
import os, sys, time
from textgen_cli.cli.app import app, run
class Late:
    def __del__(self):
        os.kill(os.getpid(), {int(signum)})
        time.sleep(0.1)
@app.command()
def go() -> None:
    Late()
    time.sleep(20)
sys.exit(run(["go"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=15, check=False)
    assert (done.returncode, done.stderr) == (-signum, b"")
