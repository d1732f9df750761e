"""Shell scripts whose `textgen` is forked from a process that has the libraries imported: a command saves seconds.

Run as a program it is that process: each connection to its socket brings the three descriptors of a command and,
as a line of JSON, its arguments, folder and variables; the answer is the status of the child that ran the real face.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

# What stands on the PATH as `textgen`: it hands its command over, and ends as that ended.
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
door = socket.socket(socket.AF_UNIX)
door.connect({path!r})
socket.send_fds(door, [b"."], [0, 1, 2])
order = dict(args=sys.argv[1:], folder=os.getcwd(), variables=dict(os.environ))
door.sendall(json.dumps(order).encode() + b"\\n")
for at in range(3):
    os.close(at)
status = int(door.makefile().readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


class Shell:
    """Runs scripts of bash in a folder; `program` is its `textgen` for other callers. Close it in the end."""

    def __init__(self, aside: Path) -> None:
        """`aside`: an empty folder of its own, for the socket and the program's stand-in."""
        door = socket.socket(socket.AF_UNIX)
        door.bind(str(aside / "door"))
        door.listen()
        script = aside / "textgen"
        script.write_text(CLIENT.format(python=sys.executable, path=str(aside / "door")))
        script.chmod(0o755)
        self.program = str(script)
        self._aside = aside
        with door:
            os.set_inheritable(door.fileno(), True)
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(door.fileno())], pass_fds=[door.fileno()]
            )

    def __call__(self, script: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Run a script to its end, as strictly as bash can."""
        return bash(script, folder, str(self._aside))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


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


def _serve(door: socket.socket) -> NoReturn:
    import transformers
    from transformers import Trainer  # noqa: F401 - what runs import, imported once
    from transformers.models.llama import modeling_llama  # noqa: F401

    from textgen_cli.generate import local  # noqa: F401

    transformers.logging.set_verbosity_error()
    signal.signal(
        signal.SIGCHLD, signal.SIG_IGN
    )  # those that wait for the children are no concern of this one
    while True:
        command, _ = door.accept()
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _attend(command)
        command.close()


def _attend(command: socket.socket) -> NoReturn:
    _, streams, _, _ = socket.recv_fds(command, 1, 3)
    with command.makefile("rw") as line:
        order = json.loads(line.readline())
        child = os.fork()
        if not child:
            _become(order, streams)
        for stream in streams:
            os.close(stream)
        _, status = os.waitpid(child, 0)
        line.write(f"{os.waitstatus_to_exitcode(status)}\n")
    os._exit(0)


def _become(order: dict[str, Any], streams: list[int]) -> NoReturn:
    code = 1
    try:
        from textgen_cli.cli.app import run

        for at, stream in enumerate(streams):
            os.dup2(stream, at)
            os.close(stream)
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["variables"])
        code = run(order["args"])
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
