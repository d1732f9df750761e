"""Real faults for jobs: a worker process that runs a batch through the real protocol, and ways to hurt it.

Run as a program it is that worker: no model, the text of a record is a hash of its prompt.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from textgen_cli.errors import TextgenError
from textgen_cli.events import Event, Notice
from textgen_cli.text import job as job_module
from textgen_cli.text.batch import Result, Stream, failure, run_job
from textgen_cli.text.inputs import Source, open_source
from textgen_cli.text.job import Job, open_job
from textgen_cli.text.records import Record, format_of, read
from textgen_cli.text.windows import batches, in_order, windows

# ---- the worker


def result(record: Record) -> Result:
    """One line; two for every fifth record; an error for every thirteenth and for unreadable ones."""
    if record.error:
        return failure(record, record.error)
    if record.index % 13 == 12:
        return failure(record, {"code": "E-TEST", "message": "the thirteenth"})
    text = hashlib.sha256(json.dumps(record.fields).encode()).hexdigest() * (1 + record.index % 7)
    count = 2 if record.index % 5 == 4 else 1
    return Result(record, [{**record.fields, "text": text, "sequence": at} for at in range(count)])


def results(source: Source, form: str, sink: Job | Stream, delay: float) -> Iterator[list[Result]]:
    """What a wing does: windows, batches by size, results in input order, missing ones only."""
    pending = sink.verify(read(source.stream, form, name=source.name))
    for start, window in windows(pending, 16, sink.done):
        parts: list[list[tuple[int, Result]]] = []
        for part in batches([record.size for record in window], 600, 6):
            time.sleep(delay)
            parts.append([(start + at, result(window[at])) for at in part])
        yield from in_order(parts, max(start, sink.done))


def run_worker(arguments: argparse.Namespace) -> None:
    """The whole of a job, as a command would run it."""
    if arguments.every_group:
        job_module.LONGEST = 0.0
        job_module.SHARE = 1e9  # what a point costs never delays the next

    def report(event: Event) -> None:
        if isinstance(event, Notice):
            print(event.name, event.text, file=sys.stderr)

    with open_source(0 if arguments.input == "-" else Path(arguments.input), report=report) as source:
        if arguments.out == "-":
            sink = Stream(sys.stdout.buffer)
            run_job(results(source, "jsonl", sink, arguments.delay), sink)
            return
        fingerprint = {"input": source.sha256(), "decoding": {"temperature": arguments.temperature}}
        flags: dict[str, Any] = {"resume": arguments.resume, "restart": arguments.restart}
        with open_job(Path(arguments.out), fingerprint, source=source.stat, report=report, **flags) as job:
            if not job.complete:
                form = "jsonl" if arguments.input == "-" else format_of(Path(arguments.input))
                run_job(results(source, form, job, arguments.delay), job, max_time=arguments.max_time)


def _die(signum: int) -> NoReturn:
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    raise AssertionError


def main() -> int:
    """Exit code of the error, or death by the signal, as the real face does it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("input")
    parser.add_argument("out")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--every-group", action="store_true", help="a point after each group of results")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds for each batch")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--max-time", type=float)
    try:
        run_worker(parser.parse_args())
    except TextgenError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        _die(signal.SIGPIPE)
    except KeyboardInterrupt:
        _die(signal.SIGINT)
    return 0


# ---- what tests use


def command(*arguments: str | Path) -> list[str]:
    """The worker's command line."""
    return [sys.executable, "-I", "-B", __file__, *map(str, arguments)]


def work(
    *arguments: str | Path, under: Sequence[str] = (), **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """Run the worker to its end, below another command such as prlimit or strace."""
    kwargs = {"capture_output": True, "text": True, "timeout": 60, **kwargs}
    return subprocess.run([*under, *command(*arguments)], check=False, **kwargs)


def write_input(path: Path, count: int) -> Path:
    """A JSONL input of so many records of many sizes, with an unreadable one and a blank line."""
    with path.open("w", encoding="utf-8") as stream:
        for at in range(count):
            prompt = f"record {at} " + "é" * (at * 7 % 40)
            stream.write(json.dumps({"id": at, "prompt": prompt}, ensure_ascii=False) + "\n")
            if at == 20:
                stream.write("\n{not JSON}\n")
    return path


def _skip(reason: str) -> NoReturn:
    import pytest  # here, since the worker starts hundreds of times

    pytest.skip(reason)


@cache
def _tool_works(*probe: str) -> bool:
    if shutil.which(probe[0]) is None:
        return False
    return subprocess.run(probe, check=False, capture_output=True).returncode == 0


def need(*probe: str) -> None:
    """Skip the test unless this command runs here and succeeds."""
    if not _tool_works(*probe):
        _skip(f"`{' '.join(probe)}` does not work here")


def inject(*rules: str, log: Path = Path(os.devnull)) -> list[str]:
    """strace in front of a command, with rules such as `fsync:error=EIO:when=2`."""
    need("strace", "-o", os.devnull, "true")
    names = sorted({rule.split(":")[0] for rule in rules})
    found = [part for rule in rules for part in ("-e", f"inject={rule}")]
    return ["strace", "-f", "-y", "-o", str(log), "-e", f"trace={','.join(names)}", *found]


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A real tmpfs of that size; skips where mounting is not permitted."""
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=False, capture_output=True
    )
    if done.returncode:
        _skip("mounting a file system is not permitted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@contextmanager
def preloaded(folder: Path, source: str) -> Iterator[dict[str, str]]:
    """An environment in which a C library stands before libc; skips where there is no compiler."""
    need("gcc", "--version")
    (folder / "shim.c").write_text(source)
    shim = folder / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(shim), str(folder / "shim.c"), "-ldl"], check=True)
    yield {**os.environ, "LD_PRELOAD": str(shim)}


if __name__ == "__main__":
    sys.exit(main())
