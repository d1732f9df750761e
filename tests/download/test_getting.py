"""`download` as scripts and people use it: which files, where to, how it is told, and what stands in its way."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pexpect
import pytest
from parts import files
from parts.faults import need, small_disk
from parts.hub import Hub, etag

from textgen_cli.config import DownloadConfig, ModelConfig
from textgen_cli.config.download import GettingConfig, KeepingConfig
from textgen_cli.download.run import plan, run
from textgen_cli.errors import NetworkError, OutputError, SafetyError, TextgenError, UsageError
from textgen_cli.events import Event, Notice, silent
from textgen_cli.model import hub as hub_module

pytestmark = pytest.mark.slow  # each starts a program

NAME = "org/small"
TEXTGEN = str(Path(sysconfig.get_path("scripts")) / "textgen")
MORE = {
    "README.md": b"# read me",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "pytorch_model.bin": b"\x80\x04.",
    "modeling_x.py": b"boom",
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add(NAME, files.folder(tmp_path / "origin", files=MORE))
        yield hub


@pytest.fixture
def cache(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return server.use(monkeypatch, tmp_path / "hf")


@pytest.fixture
def program(server: Hub, tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """The installed program with this hub, a home and caches of its own."""

    def start(*args: str, under: Sequence[str] = (), **env: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*under, TEXTGEN, *args], env=environment(server, tmp_path) | env, cwd=tmp_path,
                              capture_output=True, text=True, check=False, timeout=60)  # fmt: skip

    return start


def environment(server: Hub, home: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    own = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "xdg"), "OMP_NUM_THREADS": "1"}
    return kept | own | server.settings(home / "hf")


def config(name: str = NAME, **getting: Any) -> DownloadConfig:
    return DownloadConfig(ModelConfig(name), GettingConfig(**getting))


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


NEEDED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}

# --- which files


def test_patterns_choose_among_all_files_and_the_loaders_choice_stays_apart(server: Hub, cache: Path) -> None:
    some = run(config(include=("README.md", "onnx/*")), silent)
    assert {file.name for file in some.files} == {"README.md", "onnx/model.onnx", "onnx/config.json"}
    assert names(some.folder) == {file.name for file in some.files}
    with pytest.raises(NetworkError, match="E-OFFLINE"):  # these files are no model
        run(DownloadConfig(ModelConfig(NAME, offline=True)), silent)
    whole = run(config(), silent)
    assert {file.name for file in whole.files} >= NEEDED
    assert names(whole.folder) == NEEDED | names(some.folder)


def test_all_files_are_all_that_run_no_code(server: Hub, cache: Path) -> None:
    events: list[Event] = []
    found = run(config(all_files=True), events.append)
    assert {file.name for file in found.files} == NEEDED | {
        "README.md",
        "onnx/model.onnx",
        "onnx/config.json",
    }
    (warning,) = [event for event in events if isinstance(event, Notice) and event.name == "W-LEFT-OUT"]
    assert "modeling_x.py, pytorch_model.bin" in warning.text
    with pytest.raises(SafetyError, match="E-PICKLE"):
        run(config(include=("*.bin",)), silent)
    asked = {request.path.rpartition("/")[2] for request in server.requests(path="/resolve/")}
    assert not asked & {"pytorch_model.bin", "modeling_x.py"}


def test_a_dry_run_fetches_nothing_and_knows_what_is_here(server: Hub, cache: Path) -> None:
    planned = plan(config(), silent)
    assert (planned.needed, {here for _, here in planned.files}) == (
        sum(f.size for f, _ in planned.files),
        {False},
    )
    assert not server.requests(path="/resolve/") and not cache.exists()
    run(config(), silent)
    again = plan(config(), silent)
    assert (again.needed, {here for _, here in again.files}) == (0, {True})
    (again_files, _), commit = zip(*again.files, strict=True), again.revision
    assert commit == server.branches[NAME]["main"] and {file.name for file in again_files} == NEEDED


# --- a folder of one's own


def test_a_folder_of_ones_own_holds_the_files_and_nothing_else(
    server: Hub, cache: Path, tmp_path: Path
) -> None:
    target = tmp_path / "deep" / "model"
    found = run(config(to=target), silent)
    assert (found.folder, names(target)) == (target, NEEDED)
    assert not any(path.is_symlink() for path in target.iterdir())
    for name in NEEDED:
        assert (target / name).read_bytes() == (tmp_path / "origin" / name).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    run(config(to=target), silent)  # done already is done
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    assert {path.name for path in target.parent.iterdir()} == {"model"}


def test_a_folder_that_holds_something_else_is_not_touched(server: Hub, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("mine")
    with pytest.raises(OutputError, match="E-EXISTS") as caught:
        run(config(to=tmp_path / "mine"), silent)
    assert caught.value.exit_code == 8
    assert names(tmp_path / "mine") == {"x"}
    (tmp_path / "empty").mkdir()
    run(config(to=tmp_path / "empty"), silent)
    assert names(tmp_path / "empty") == NEEDED


def test_a_copy_of_something_damaged_is_none(server: Hub, cache: Path, tmp_path: Path) -> None:
    found = run(config(), silent)
    blob = (found.folder / "model.safetensors").resolve()
    stamp = blob.stat()
    blob.write_bytes(b"?" + blob.read_bytes()[1:])
    os.utime(blob, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as a disk rots: no time changes
    with pytest.raises(TextgenError):
        run(config(to=tmp_path / "copy"), silent)
    assert not (tmp_path / "copy").exists()


# --- mirrors


def test_a_mirror_goes_before_the_environment(server: Hub, cache: Path, tmp_path: Path) -> None:
    with Hub() as mirror:
        commit = mirror.add("org/other", tmp_path / "origin")
        found = run(DownloadConfig(ModelConfig("org/other", mirror=mirror.endpoint + "/")), silent)
        assert found.revision == commit and mirror.log and not server.log
    for wrong in ("ftp://x", "huggingface.co", "https://", "http://?"):
        with pytest.raises(UsageError, match="E-ENDPOINT"):
            ModelConfig(mirror=wrong)


# --- the command line


def test_the_path_on_stdout_and_json_for_scripts(
    server: Hub, program: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    lock = tmp_path / "models.lock"
    plain = program("download", NAME, "--lock", str(lock))
    commit = server.branches[NAME]["main"]
    folder = tmp_path / "hf/hub/models--org--small/snapshots" / commit
    assert (plain.returncode, plain.stdout, plain.stderr) == (0, f"{folder}\n", "")
    told = program("download", "--locked", str(lock), "--json", "--offline")
    fields = json.loads(told.stdout)
    assert (told.returncode, told.stderr) == (0, "")
    assert (fields["model"], fields["source"], fields["revision"]) == (NAME, "hub", commit)
    assert {file["name"] for file in fields["files"]} == NEEDED
    assert fields["bytes"] == sum(file["size"] for file in fields["files"])
    table = program("download", NAME, "--dry-run")
    rows = [line.split("\t") for line in table.stdout.splitlines()]
    assert {(name, here) for _, here, name in rows} == {(name, "here") for name in NEEDED}


def test_a_bar_for_each_file_and_one_for_all_on_a_terminal_alone(server: Hub, tmp_path: Path) -> None:
    server.fault("safetensors", stall=0.6)
    child = pexpect.spawn(TEXTGEN, ["download", NAME], env=environment(server, tmp_path) | {"TERM": "xterm"},
                          dimensions=(30, 120), timeout=30)  # fmt: skip
    child.expect(pexpect.EOF)
    child.close()
    text = child.before.decode("utf-8", "replace")
    assert child.exitstatus == 0
    assert re.search(r"download org/small .*\n.*  model\.safetensors ", text)
    assert text.rstrip().endswith(server.branches[NAME]["main"])


@pytest.mark.parametrize(
    ("options", "subject"),
    [
        ({"list": True, "verify": True}, "--verify"),
        ({"list": True, "to": Path("x")}, "--to"),
        ({"clean": True, "lock": Path("x")}, "--lock"),
        ({"remove": True, "include": ("x",)}, "--include"),
        ({"verify": True, "dry_run": True}, "--dry-run"),
        ({"convert": True}, "--convert"),
        ({"convert": True, "to": Path("x"), "all_files": True}, "--all-files"),
        ({"convert": True, "to": Path("x"), "list": True}, "--to"),
    ],
    ids=str,
)
def test_modes_that_contradict_each_other(options: dict[str, Any], subject: str) -> None:
    keeping = {name: value for name, value in options.items() if hasattr(KeepingConfig(), name)}
    getting = {name: value for name, value in options.items() if name not in keeping}
    with pytest.raises(UsageError, match="E-CONFLICT") as caught:
        DownloadConfig(getting=GettingConfig(**getting), keeping=KeepingConfig(**keeping))
    assert caught.value.subject == subject


def test_the_same_on_the_command_line(program: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    for args in (("--remove",), ("--list", "x")):
        done = program("download", *args)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("textgen: error: [E-")
    # What a run does is not left to a variable that means something else elsewhere.
    done = program("download", NAME, "--dry-run", TEXTGEN_TO="French", TEXTGEN_REMOVE="1")
    assert (done.returncode, done.stderr) == (0, "")


# --- what stands in its way


# Both in one process, for most of what strace slows down is what they import.
GENERATE_AND_SCORE = """
import sys
from textgen_cli.cli.app import run
sys.exit(run(["generate", *sys.argv[1:], "-n", "2"]) or run(["score", *sys.argv[1:]]))
"""


def test_offline_opens_no_connection_at_all(
    server: Hub,
    program: Callable[..., "subprocess.CompletedProcess[str]"],
    small_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """F100, with the kernel as witness: no socket of any network is even made."""
    need("strace", "-o", os.devnull, "true")
    server.add(NAME, small_model("llama"))
    assert program("download", NAME).returncode == 0
    trace = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=socket,connect,sendto"]
    trace += ["-o", str(tmp_path / "trace")]
    for args, code in (
        (("download", NAME, "--offline"), 0),
        (("download", "org/absent", "--offline"), 7),
        (("download", "ms:owner/absent", "--offline"), 7),
        (("download", "--offline"), 7),
        (("download", "--list"), 0),
        (("download", "--verify"), 0),
    ):
        done = program(*args, under=trace)
        assert done.returncode == code, (args, done.stderr)
        assert not re.findall(r"AF_INET|connect\(", (tmp_path / "trace").read_text()), args
    under = [*trace, sys.executable, "-c", GENERATE_AND_SCORE, "the lazy dog", "-m", NAME, "--offline"]
    done = subprocess.run(
        under, env=environment(server, tmp_path), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.count("\n") > 1, done.stderr
    # The name of a user is asked of a daemon of this machine, by a file.
    assert not re.findall(r"AF_(?!UNIX)", (tmp_path / "trace").read_text())
    assert len(server.requests(path="absent")) == 0


def test_a_cache_that_cannot_be_written(
    server: Hub, program: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    """F105: whole it serves, else the program says that it cannot write; it writes nothing elsewhere."""
    with small_disk(tmp_path / "hf", "8m"):
        assert program("download", NAME).returncode == 0
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "hf")], check=True)
        done = program("download", NAME)
        assert (done.returncode, done.stderr) == (0, "")
        server.add(NAME, files.folder(tmp_path / "new", files={"generation_config.json": b"{}"}))
        done = program("download", NAME)
        assert (done.returncode, done.stdout) == (8, "")
        assert "[E-WRITE]" in done.stderr and "read-only" in done.stderr
        subprocess.run(["mount", "-o", "remount,rw", str(tmp_path / "hf")], check=True)
        assert program("download", NAME).returncode == 0


def test_a_full_disk(
    server: Hub, program: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    """F104: where sizes tell, before the first byte; where something else fills the disk meanwhile, the part stays."""
    content = server.commits[NAME, server.branches[NAME]["main"]]
    weights = content["model.safetensors"] + os.urandom(6 << 20)
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    at = header["model.norm.weight"]["data_offsets"][1]
    header["rest"] = {"dtype": "U8", "shape": [6 << 20], "data_offsets": [at, at + (6 << 20)]}
    body = weights[8 + int.from_bytes(weights[:8], "little") :]
    server.add(NAME, {**content, "model.safetensors": files.safetensors(header, body)})
    with small_disk(tmp_path / "hf", "5m"):
        done = program("download", NAME)
        assert (done.returncode, done.stdout) == (8, "")
        assert "[E-SPACE]" in done.stderr and not server.requests(path="/resolve/")
    shutil.rmtree(tmp_path / "hf")
    with small_disk(tmp_path / "hf", "9m"):
        ballast = tmp_path / "hf" / "ballast"
        server.fault("safetensors", then=lambda: ballast.write_bytes(bytes(5 << 20)), times=1)
        done = program("download", NAME)
        assert (done.returncode, done.stdout) == (8, ""), done.stderr
        assert "[E-WRITE]" in done.stderr and "no space left" in done.stderr
        left = [
            path
            for path in (tmp_path / "hf").rglob(f"*{hub_module.PART}")
            if not path.name.startswith("etag.")
        ]
        assert len(left) == 1 and left[0].stat().st_size > 1 << 20
        ballast.unlink()
        server.log.clear()
        assert program("download", NAME).returncode == 0
        assert server.requests("GET", "safetensors")[0].headers["range"].startswith("bytes=")
    with small_disk(tmp_path / "small", "1m"):
        done = program("download", NAME, "--to", str(tmp_path / "small" / "model"))
        assert (done.returncode, done.stdout) == (8, "")
        assert list((tmp_path / "small").iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_nothing_that_the_next_one_takes(
    server: Hub, program: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path, signum: int
) -> None:
    server.fault("safetensors", stall=20, times=1)
    child = subprocess.Popen([TEXTGEN, "download", NAME], env=environment(server, tmp_path), cwd=tmp_path,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    while not server.requests("GET", "safetensors"):
        time.sleep(0.01)
    start = time.monotonic()
    child.send_signal(signum)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (-signum, "", "")
    assert time.monotonic() - start < 2
    assert not list((tmp_path / "hf").rglob("refs/*"))
    done = program("download", NAME, "--offline")
    assert (done.returncode, done.stdout) == (7, "")
    done = program("download", NAME)
    assert (done.returncode, done.stderr) == (0, "")
    blob = tmp_path / "hf/hub/models--org--small/blobs"
    content = server.commits[NAME, server.branches[NAME]["main"]]["model.safetensors"]
    assert (blob / etag("model.safetensors", content)).read_bytes() == content


def test_a_copy_that_is_killed_leaves_no_folder(server: Hub, cache: Path, tmp_path: Path) -> None:
    run(config(), silent)
    script = f"""
import os, signal
from pathlib import Path
from textgen_cli.config import DownloadConfig, ModelConfig
from textgen_cli.config.download import GettingConfig
from textgen_cli.download import place
from textgen_cli.download.run import run
place.snapshot.digest = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
run(DownloadConfig(ModelConfig({NAME!r}), GettingConfig(to=Path({str(tmp_path / "copy")!r}))), lambda event: None)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | server.settings(tmp_path / "hf"), check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "copy").exists() and list(tmp_path.glob(".copy.*.staging"))
    run(config(to=tmp_path / "copy"), silent)
    assert names(tmp_path / "copy") == NEEDED
    assert not list(tmp_path.glob(".copy*"))
