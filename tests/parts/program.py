"""The program as a child of a process that has the libraries imported and a model loaded once: seconds saved a run.

Run as a program it is that process: each connection to its socket brings the three streams of a command and, as a
line of JSON, its arguments, folder and variables. It forks a child in which the real face runs, tells its process id,
and in the end its status and the most memory it held.
"""

import fcntl
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn


@dataclass(frozen=True)
class Done:
    """How a run ended; `returncode` is negative for a signal."""

    returncode: int
    stdout: bytes
    stderr: bytes
    # Bytes it held at most; of those it was born with, what it touched.
    peak: int = field(default=0, compare=False)


class Started:
    """A command that runs: its process id, and how it ends."""

    def __init__(self, door: socket.socket) -> None:
        self._door, self._lines = door, door.makefile()
        self.pid = int(self._lines.readline())
        self.peak = 0

    def wait(self, seconds: float | None = None) -> int | None:
        """Its status, negative for a signal; None when it still runs after so many seconds."""
        if seconds is not None and not select.select([self._door], [], [], seconds)[0]:
            return None
        status, self.peak = map(int, self._lines.readline().split())
        self._lines.close()
        self._door.close()
        return status


class Program:
    """Runs `textgen` in a folder. Close it in the end."""

    def __init__(self, **environment: str) -> None:
        """`environment`: variables of its first process and of all runs."""
        keep = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        keep |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HOME": "/nonexistent"}
        self._environment = keep | environment
        self._aside = ExitStack()
        self.place = Path(self._aside.enter_context(tempfile.TemporaryDirectory()))
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(str(self.place / "door"))
            door.listen()
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(door.fileno())], env=self._environment,
                pass_fds=[door.fileno()], stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def start(
        self,
        streams: Sequence[int],
        folder: Path,
        args: Sequence[str],
        variables: dict[str, str],
        *,
        terminal: bool = False,
        opened: dict[int, str] | None = None,
    ) -> Started:
        """Run it with these descriptors; `terminal`: the second is one, which it is to control. `opened`: files
        that it opens itself in place of some of them, since a pipe lets it wait for the other end.
        """
        door = socket.socket(socket.AF_UNIX)
        door.connect(str(self.place / "door"))
        socket.send_fds(door, [b"."], list(streams))
        order = {"args": args, "folder": str(folder), "variables": self._environment | variables}
        door.sendall(json.dumps(order | {"terminal": terminal, "opened": opened or {}}).encode() + b"\n")
        return Started(door)

    def __call__(
        self, folder: Path, *args: str, stdin: bytes = b"", kill_after: float | None = None, **variables: str
    ) -> Done:
        """Run it to its end, or for so many seconds (`kill_after`) and then kill it with SIGKILL."""

        def act(started: Started) -> int:
            status = started.wait(kill_after)
            if status is None:
                os.kill(started.pid, signal.SIGKILL)
                status = started.wait()
            assert status is not None
            return status

        with tempfile.TemporaryFile() as given:
            given.write(stdin)
            given.seek(0)
            return self._run(act, folder, args, given.fileno(), {}, variables)

    def during(
        self, act: Callable[[int], None], folder: Path, *args: str,
        stdin: Path | None = None, stdout: Path | None = None, **variables: str,
    ) -> Done:  # fmt: skip
        """Run it; `act` is called with its process id while it runs. A given stream's bytes are not collected."""

        def acting(started: Started) -> int:
            try:
                act(started.pid)
            except BaseException:
                with suppress(ProcessLookupError):
                    os.kill(started.pid, signal.SIGKILL)
                raise
            finally:
                status = started.wait()
            assert status is not None
            return status

        with Path(os.devnull).open("rb") as given:
            opened = {0: str(stdin or os.devnull), **({1: str(stdout)} if stdout else {})}
            return self._run(acting, folder, args, given.fileno(), opened, variables)

    def _run(
        self, act: Callable[[Started], int], folder: Path, args: Sequence[str],
        stdin: int, opened: dict[int, str], variables: dict[str, str],
    ) -> Done:  # fmt: skip
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            streams = [stdin, out.fileno(), err.fileno()]
            started = self.start(streams, folder, args, variables, opened=opened)
            status = act(started)
            for file in (out, err):
                file.seek(0)
            return Done(status, out.read(), err.read(), started.peak)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._aside.close()


def _serve(door: socket.socket) -> NoReturn:
    _preheat()
    # Those that wait for the children are no concern of this one.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        command, _ = door.accept()
        if not os.fork():
            door.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _attend(command)
        command.close()


def _preheat() -> None:
    """Import what runs import, and load and run a network once: what the library makes at first use is made."""
    import transformers
    from transformers import Trainer  # noqa: F401 - what a run imports, imported once

    sys.path.insert(0, str(Path(__file__).parents[1]))
    import textgen_cli
    from parts.models import build
    from textgen_cli.config import GenerateConfig, ModelConfig
    from textgen_cli.config.generate import DecodingConfig
    from textgen_cli.events import silent
    from textgen_cli.generate.run import run

    for module in pkgutil.walk_packages(textgen_cli.__path__, "textgen_cli."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model = ModelConfig(model=str(build("llama", Path(folder))), device="cpu", dtype="float32")
        assert list(run(GenerateConfig(model=model, decoding=DecodingConfig(max_new_tokens=2)), "A", silent))


def _attend(command: socket.socket) -> NoReturn:
    _, streams, _, _ = socket.recv_fds(command, 1, 3)
    with command.makefile("rw") as line:
        order = json.loads(line.readline())
        child = os.fork()
        if not child:
            command.close()
            _become(order, streams)
        for stream in streams:
            os.close(stream)
        line.write(f"{child}\n")
        line.flush()
        _, status, used = os.wait4(child, 0)
        with suppress(BrokenPipeError):
            line.write(f"{os.waitstatus_to_exitcode(status)} {used.ru_maxrss * 1024}\n")
            line.flush()
    os._exit(0)


def _become(order: dict[str, Any], streams: list[int]) -> NoReturn:
    code = 1
    try:
        from textgen_cli.cli.app import run

        for at, stream in enumerate(streams):
            os.dup2(stream, at)
        for stream in set(streams):
            os.close(stream)
        for at, name in order.get("opened", {}).items():
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if int(at) else os.O_RDONLY
            os.dup2(os.open(name, flags, 0o600), int(at))
        if order["terminal"]:
            os.setsid()
            fcntl.ioctl(1, termios.TIOCSCTTY, 0)
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["variables"])
        code = run(order["args"])
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
