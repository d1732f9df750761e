"""The files of completions/ in real interactive shells under a pseudo-terminal."""

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

COMPLETIONS = Path(__file__).parent.parent / "completions"
CONTROL = re.compile(
    r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b\][^\x07]*\x07|[\x00-\x08\x0b-\x1f]|\x1b[=>]"
)

pytestmark = pytest.mark.slow  # each starts a program

# shell -> its command line without the user's own start files, and the lines that load the completion
SHELLS = {
    "bash": (
        ["--norc", "--noprofile", "-i"],
        ["bind 'set enable-bracketed-paste off'", f"source '{COMPLETIONS}/textgen.bash'"],
    ),
    "zsh": (
        ["-f", "-i"],
        [f"fpath=('{COMPLETIONS}' $fpath)", "autoload -Uz compinit && compinit -u -D"],
    ),
    "fish": (
        ["--no-config", "-i"],
        [f"source '{COMPLETIONS}/textgen.fish'"],
    ),
}


class Session:
    """One interactive shell that has loaded our completion."""

    def __init__(self, shell: str, home: Path) -> None:
        args, setup = SHELLS[shell]
        keep = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("TEXTGEN", "XDG", "ZDOT"))
        }
        path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
        env = keep | {"HOME": str(home), "PATH": path, "TERM": "vt100", "PS1": "> ", "LC_ALL": "C.UTF-8"}
        self.child = pexpect.spawn(shell, args, env=env, encoding="utf-8", timeout=30, dimensions=(50, 160))
        for number, line in enumerate([*setup, "true"]):
            # The words are split, so that the echo of the line is not taken for its output.
            self.child.sendline(f"{line}; echo rea''dy{number}")
            self.child.expect(f"ready{number}")

    def completed(self, text: str, rest: str) -> str:
        """The command line as the shell would run it, once TAB after `text` has shown `rest`."""
        self.child.send(text + "\t")
        self.child.expect_exact(rest)
        self.child.send("\x01echo 'BEG''IN' \x05 END\r")
        self.child.expect(r"BEGIN (.*?) END")
        return str(self.child.match.group(1))

    def shows(self, text: str, *wanted: str) -> bool:
        """Whether pressing TAB behind `text` lists all of `wanted`.

        The first TAB writes what the words have in common, the next ones (which differs by shell) list them.
        """
        self.child.send(text)
        for _ in range(8):
            self.child.send("\t")
            self.child.expect(pexpect.TIMEOUT, timeout=1)
            seen = CONTROL.sub("", self.child.before or "")
            if all(word in seen for word in wanted):
                return True
        return False


@pytest.fixture(params=SHELLS, name="session")
def _session(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Session]:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    session = Session(request.param, tmp_path)
    yield session
    session.child.close(force=True)


def test_a_command_is_completed(session: Session) -> None:
    assert session.completed("textgen gen", "erate").split() == ["textgen", "generate"]


def test_options_are_listed(session: Session) -> None:
    assert session.shows("textgen generate --max", "--max-new-tokens", "--max-length")


@pytest.mark.skipif(shutil.which("pwsh") is None, reason="PowerShell is not installed")
@pytest.mark.parametrize(
    ("text", "wanted"),
    [("textgen gen", {"generate"}), ("textgen generate --max", {"--max-new-tokens", "--max-length"})],
)
def test_powershell(text: str, wanted: set[str]) -> None:
    matches = f"(TabExpansion2 '{text}' {len(text)}).CompletionMatches.CompletionText"
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["pwsh", "-NoLogo", "-NoProfile", "-Command", f". '{COMPLETIONS}/textgen.ps1'; {matches}"],
        env=os.environ | {"PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=True,
    )
    assert set(done.stdout.split()) == wanted
