"""Scripts of bash, and people at a terminal, whose `textgen` is the one of `program.py`."""

import os
import pty
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pexpect.fdpexpect

from parts.program import Program

# What stands on the PATH as `textgen`: it hands its command over, and ends as that ended.
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
door = socket.socket(socket.AF_UNIX)
door.connect({door!r})
socket.send_fds(door, [b"."], [0, 1, 2])
order = dict(args=sys.argv[1:], folder=os.getcwd(), variables=dict(os.environ), terminal=False)
door.sendall(json.dumps(order).encode() + b"\\n")
for at in range(3):
    os.close(at)
lines = door.makefile()
lines.readline()
status = int(lines.readline().split()[0])
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


class Shell:
    """Runs scripts of bash in a folder; `program` is its `textgen` for other callers, `programs` the folder of that."""

    def __init__(self, program: Program) -> None:
        programs = program.place / "bin"
        programs.mkdir()
        script = programs / "textgen"
        script.write_text(CLIENT.format(python=sys.executable, door=str(program.place / "door")))
        script.chmod(0o755)
        self.program, self.programs = str(script), str(programs)

    def __call__(self, script: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Run a script to its end, as strictly as bash can."""
        return bash(script, folder, self.programs)


def bash(script: str, folder: Path, programs: str) -> subprocess.CompletedProcess[str]:
    """Run a script with a folder of programs before all others."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=280,
        check=False,
    )


class Seat:
    """The program on a pseudo-terminal of its own; `screen` is what it shows and takes (pexpect)."""

    def __init__(
        self,
        program: Program,
        folder: Path,
        args: Sequence[str],
        variables: dict[str, str] | None = None,
        size: tuple[int, int] = (40, 100),
    ) -> None:
        """`size`: lines and columns."""
        master, slave = pty.openpty()
        termios.tcsetwinsize(slave, size)
        self.screen = pexpect.fdpexpect.fdspawn(master, timeout=60, encoding="utf-8")
        known = {"TERM": "xterm"} | (variables or {})
        self.started = program.start([slave] * 3, folder, args, known, terminal=True)
        os.close(slave)

    def ended(self) -> int:
        """Its status once it has closed the terminal, negative for a signal; all it showed is in `screen.before`."""
        self.screen.expect(pexpect.EOF)
        status = self.started.wait()
        assert status is not None
        return status

    def close(self) -> None:
        """Hang up."""
        if not self.screen.closed:
            self.screen.close()
