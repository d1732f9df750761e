"""Trainings as children of a process that has torch imported already: they can be killed, hurt and gone on with.

Run as a program it is that process: for each line of JSON on its standard input it forks a child that trains, and
answers with its pid and its status.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from textgen_cli.config import ModelConfig
from textgen_cli.config.finetune import DataConfig, FinetuneConfig, TrainingConfig, WayConfig
from textgen_cli.finetune.prepared import Prepared

TEXTS = [
    "Once upon a time there was a small model that read a few lines and wrote some more.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Numbers such as 1, 2, 3 and 42 stand beside words; so do café, naïve, 你好 and 🙂.",
    "A language model assigns probability to text, one token after another, until the end.",
]
MOODS = ("glad", "neither", "sad")


def _text(number: int) -> str:
    """Texts of many lengths."""
    return " ".join(TEXTS[(number + i) % 4][: 20 + 7 * ((i * number) % 9)] for i in range(1 + number % 3))


def _messages(number: int) -> list[dict[str, str]]:
    said = [
        {"role": "user", "content": _text(number)[:40]},
        {"role": "assistant", "content": f"Yes, {number}."},
    ]
    return said * (1 + number % 2)


def _question(number: int) -> dict[str, Any]:
    text = f"{_text(number)} The answer is {number}. {_text(number + 1)}"
    found = [] if number % 4 == 3 else [{"text": str(number), "start": text.index(f"is {number}.") + 3}]
    return {"question": "What is the answer?", "context": text, "answers": found}


EXAMPLES: dict[str, Callable[[int], dict[str, Any]]] = {
    "clm": lambda n: {"text": _text(n)},
    "mlm": lambda n: {"text": _text(n)},
    "chat": lambda n: {"messages": _messages(n)},
    "seq2seq": lambda n: {"source": _text(n)[:50], "target": _text(n)[:30].upper()},
    "text-classification": lambda n: {"text": _text(n), "pair": "", "label": MOODS[n % 3]},
    "token-classification": lambda n: {
        "words": _text(n).split(),
        "tags": ["LONG" if len(word) > 4 else "SHORT" for word in _text(n).split()],
    },
    "question-answering": _question,
}
LABELS = {"text-classification": MOODS, "token-classification": ("LONG", "SHORT")}


def prepared(task: str, count: int = 24, valid: int = 4, **changes: Any) -> Prepared:
    """Made-up examples of a task."""
    import datasets

    rows = [EXAMPLES[task](number) for number in range(count + valid)]
    problem = "single_label_classification" if task == "text-classification" else None
    values: dict[str, Any] = {
        "task": task,
        "train": datasets.Dataset.from_list(rows[valid:]),
        "valid": datasets.Dataset.from_list(rows[:valid]) if valid else None,
        "labels": LABELS.get(task, ()),
        "problem": problem,
        "sha256": f"{task}-{count}-{valid}",
        "facts": {},
    }
    return Prepared(**(values | changes))


def configured(
    model: Path,
    out: Path,
    *,
    training: dict[str, Any] | None = None,
    way: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    base: dict[str, Any] | None = None,
    **rest: Any,
) -> FinetuneConfig:
    """Settings of a short training."""
    timing: dict[str, Any] = {"epochs": 2, "batch_size": "4"} | (training or {})
    return FinetuneConfig(
        model=ModelConfig(model=str(model), **(base or {})),
        data=DataConfig(**(data or {})),
        way=WayConfig(**(way or {})),
        training=TrainingConfig(**timing),
        output=out,
        **rest,
    )


class Trainings:
    """Runs trainings in children. Close it in the end."""

    def __init__(self, **more: str) -> None:
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "HOME") if name in os.environ}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Tensors go back to the system, and nothing is held in reserve: see _no_more_memory.
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_ARENA_MAX": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        environment |= more
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, folder: Path, task: str, config: FinetuneConfig, **hurt: Any) -> tuple[int, str, str]:
        """Train; (exit status, stdout, stderr), the status negative for a signal.

        hurt: signum and step (after it), or signum and call (the N-th call that concerns a file of the output, or of
        what is named behind its path);
        strace: rules by which system calls fail, and below: the file of the output that they concern; memory: after
        that step the process gets no more of it; prepared: changes to the data.
        """
        self.start(folder, task, config, **hurt)
        return self.wait(folder)

    def start(self, folder: Path, task: str, config: FinetuneConfig, **hurt: Any) -> int:
        order = {"folder": str(folder), "task": task, "config": asdict(config), "hurt": hurt}
        pipes: Any = self._process
        pipes.stdin.write(json.dumps(order, default=str) + "\n")
        pipes.stdin.flush()
        return int(pipes.stdout.readline())

    def wait(self, folder: Path) -> tuple[int, str, str]:
        pipes: Any = self._process
        status = int(pipes.stdout.readline())
        return status, (folder / ".stdout").read_text(), (folder / ".stderr").read_text()

    def close(self) -> None:
        self._process.communicate()


def _serve() -> None:
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401 - imported once for all

    from textgen_cli.finetune import run  # noqa: F401

    transformers.logging.set_verbosity_error()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(json.loads(line))
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _become(order: dict[str, Any]) -> None:
    from textgen_cli.cli import signals
    from textgen_cli.errors import TextgenError

    folder = Path(order["folder"])
    for at, name in ((1, ".stdout"), (2, ".stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), at)
    code = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with it ignored
    signals.install()
    try:
        _train(order)
        code = 0
    except TextgenError as error:
        os.write(2, f"{error}\n".encode())
        code = error.exit_code
    except (signals.Interrupted, KeyboardInterrupt):
        signals.die(signals.received() or signal.SIGKILL)
    except Exception:  # noqa: BLE001 - a bug is told to the test
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _train(order: dict[str, Any]) -> None:
    from textgen_cli.events import Event, Progress
    from textgen_cli.finetune.run import fit

    parts = order["config"]
    kinds = {"model": ModelConfig, "data": DataConfig, "way": WayConfig, "training": TrainingConfig}
    built = {name: kind(**_tupled(parts.pop(name))) for name, kind in kinds.items()}
    output = Path(parts.pop("output"))
    hurt = order["hurt"]
    if "call" in hurt:
        _hurt_at_call(hurt["signum"], hurt["call"], str(output) + hurt.get("named", ""))
    if "strace" in hurt:
        _injected(hurt["strace"], output.with_name(output.name + ".partial") / hurt["below"])

    def report(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "train":
            if event.done == hurt.get("step"):
                os.kill(os.getpid(), hurt["signum"])
            if event.done == hurt.get("memory"):
                _no_more_memory()

    config = FinetuneConfig(**built, **parts, output=output)
    fit(config, [], prepared(order["task"], **hurt.get("prepared", {})), report)


def _tupled(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _hurt_at_call(signum: int, number: int, output: str) -> None:
    """Send a signal at the N-th call that opens, makes, renames or removes something of the output."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and output in str(
            arguments[0]
        ):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signum)

    sys.addaudithook(hook)


def _injected(rule: str, path: Path) -> None:
    """strace on this process, which makes system calls that concern a file fail."""
    import ctypes
    import time

    any_process, pr_set_ptracer = -1, 0x59616D61
    ctypes.CDLL(None).prctl(pr_set_ptracer, any_process, 0, 0, 0)  # where only a parent may trace
    traced = rule.partition(":")[0]
    subprocess.Popen(
        ["strace", "-q", "-o", os.devnull, "-p", str(os.getpid()), "-P", str(path),
         "-e", f"trace={traced}", "-e", f"inject={rule}"],
    )  # fmt: skip
    until = time.monotonic() + 10
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text() and time.monotonic() < until:
        time.sleep(0.01)


def _no_more_memory() -> None:
    """The process may not grow from here on, and what it holds in reserve goes back."""
    import ctypes
    import resource

    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))


if __name__ == "__main__":
    _serve()
