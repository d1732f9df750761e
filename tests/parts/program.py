"""The program as a child of a process that has torch imported already, which saves seconds a run.

Run as a program it is that process: for each line of JSON on its standard input it forks a child, in which
real face runs with the descriptors, folder and variables named there, and answers with its status.
"""

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Done:
    """How a run ended; `returncode` is negative for a signal."""

    returncode: int
    stdout: bytes
    stderr: bytes
    peak: int = field(
        default=0, compare=False
    )  # bytes it held at most; of those it was born with, what it touched


class Program:
    """Runs `textgen` in a folder. Close it in the end."""

    def __init__(self) -> None:
        environment = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HOME": "/nonexistent"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(
        self, folder: Path, *args: str, stdin: bytes = b"", kill_after: float | None = None, **variables: str
    ) -> Done:
        """Run it to its end, or for so many seconds (`kill_after`) and then kill it with SIGKILL."""
        names = [str(folder / f".{name}") for name in ("stdin", "stdout", "stderr")]
        for name, data in zip(names, (stdin, b"", b""), strict=True):  # it may be killed before it opens one
            Path(name).write_bytes(data)
        order = {"args": args, "folder": str(folder), "streams": names, "variables": variables}
        pipes: Any = self._process
        pipes.stdin.write(json.dumps(order) + "\n")
        pipes.stdin.flush()
        child = int(pipes.stdout.readline())
        if kill_after is not None and not select.select([pipes.stdout], [], [], kill_after)[0]:
            os.kill(child, signal.SIGKILL)
        status, peak = map(int, pipes.stdout.readline().split())
        out, err = (Path(name).read_bytes() for name in names[1:])
        for name in names:
            Path(name).unlink()
        return Done(status, out, err, peak)

    def close(self) -> None:
        self._process.communicate()


def _serve() -> None:
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401 - what a run imports, imported once

    from textgen_cli.generate import local  # noqa: F401

    transformers.logging.set_verbosity_error()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(json.loads(line))
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        _, status, used = os.wait4(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)} {used.ru_maxrss * 1024}\n")
        sys.stdout.flush()


def _become(order: dict[str, Any]) -> None:
    from textgen_cli.cli.app import run

    flags = (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT | os.O_TRUNC] * 2)
    for at, (name, flag) in enumerate(zip(order["streams"], flags, strict=True)):
        os.dup2(os.open(name, flag, 0o600), at)
    os.chdir(order["folder"])
    os.environ.update(order["variables"])
    code = 1
    try:
        code = run(order["args"])
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
