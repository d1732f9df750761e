"""Models from ModelScope: its real client against a server on the loopback interface."""

import builtins
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from parts import files
from parts.scope import Scope

from textgen_cli.config import ModelConfig
from textgen_cli.download.inventory import kept, named
from textgen_cli.errors import ModelError, NetworkError, SafetyError, TextgenError, UsageError
from textgen_cli.events import Event, Progress, silent
from textgen_cli.model import modelscope, transfer
from textgen_cli.model.source import Located, locate

pytest.importorskip("modelscope_hub", reason="the extra modelscope is not installed")

WEIGHTS = os.urandom(1 << 20) * 2
NAME = "ms:owner/name"
ONLY = {"README.md": b"x", "pytorch_model.bin": b"\x80\x04.", "modeling_x.py": b"boom"}


@pytest.fixture
def scope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Scope]:
    with Scope() as scope:
        folder = files.folder(tmp_path / "origin")
        scope.files = {path.name: path.read_bytes() for path in folder.iterdir()} | ONLY
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", scope.endpoint)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        yield scope


def find(tmp_path: Path, *, name: str = NAME, offline: bool = False, report: Any = silent) -> Located:
    return locate(ModelConfig(name, cache_dir=tmp_path / "cache", offline=offline), report)


def failure(tmp_path: Path, **options: Any) -> TextgenError:
    with pytest.raises(TextgenError) as caught:
        find(tmp_path, **options)
    return caught.value


def test_what_loading_needs_comes_is_compared_and_kept(scope: Scope, tmp_path: Path) -> None:
    events: list[Event] = []
    found = find(tmp_path, report=events.append)
    assert {
        path.name: path.read_bytes() for path in found.folder.iterdir() if path.name != "textgen.json"
    } == {name: content for name, content in scope.files.items() if name not in ONLY}
    bars = [event for event in events if isinstance(event, Progress) and event.stage == "download"]
    assert (
        bars[-1].done == bars[-1].total == sum(len(scope.files[name]) for name in scope.files.keys() - ONLY)
    )
    assert {bar.part for bar in bars} - {None, ""} == scope.files.keys() - ONLY  # one each, and all of them
    scope.log.clear()
    assert find(tmp_path) == found
    assert [path.partition("?")[0] for path, _, _ in scope.log] == ["/api/v1/models/owner/name/repo/files"]
    scope.log.clear()
    assert find(tmp_path, offline=True) == found
    assert scope.log == []


def test_another_content_is_another_revision_and_both_are_listed(scope: Scope, tmp_path: Path) -> None:
    old = find(tmp_path)
    scope.files["generation_config.json"] = b"{}"
    new = find(tmp_path)
    assert new.revision != old.revision
    rows = kept(ModelConfig(cache_dir=tmp_path / "cache"))
    assert {(row.model, row.source, row.revision) for row in rows} == {
        (NAME, "modelscope", old.revision), (NAME, "modelscope", new.revision),
    }  # fmt: skip
    assert len(named(ModelConfig(cache_dir=tmp_path / "cache"), f"{NAME}@master")) == 1


def test_wrong_bytes_are_refused_and_leave_nothing(scope: Scope, tmp_path: Path) -> None:
    scope.spoiled["config.json"] = b"?" + scope.files["config.json"][1:]
    assert isinstance(failure(tmp_path), ModelError)
    assert failure(tmp_path).name == "E-HASH"
    assert not list((tmp_path / "cache").rglob("textgen.json"))
    scope.spoiled.clear()
    assert find(tmp_path).folder.is_dir()


def test_a_body_that_is_cut_goes_on(scope: Scope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PAUSES", (0.0,))
    scope.files["tokenizer.model"] = WEIGHTS
    scope.cut["tokenizer.model"] = 1 << 20
    assert (find(tmp_path).folder / "tokenizer.model").read_bytes() == WEIGHTS
    assert ranges(scope, "tokenizer.model") == [None, f"bytes={1 << 20}-"]


def ranges(scope: Scope, name: str) -> list[str | None]:
    return [asked for path, asked, _ in scope.log if path.endswith(f"FilePath={name}")]


SCRIPT = f"""
import sys
from pathlib import Path
from textgen_cli.config import ModelConfig
from textgen_cli.model.source import locate
locate(ModelConfig("{NAME}", cache_dir=Path(sys.argv[1])), lambda event: None)
"""


def test_files_come_at_once_and_after_a_kill_the_next_run_goes_on(scope: Scope, tmp_path: Path) -> None:
    """The other files arrive while the server is silent in the middle of one; none of them comes again."""
    scope.files["tokenizer.model"] = WEIGHTS
    scope.held["tokenizer.model"] = 1 << 20
    wanted = {name: len(scope.files[name]) for name in scope.files.keys() - ONLY} | {
        "tokenizer.model": 1 << 20
    }
    killed = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "cache")])
    try:
        until = time.monotonic() + 30
        while {path.name: path.stat().st_size for path in tmp_path.glob("cache/**/.*.parts/*")} != wanted:
            assert killed.poll() is None and time.monotonic() < until
            time.sleep(0.01)
    finally:
        killed.kill()
        killed.wait()
    scope.held.clear()
    scope.log.clear()
    assert (find(tmp_path).folder / "tokenizer.model").read_bytes() == WEIGHTS
    assert [asked for path, asked, _ in scope.log if "FilePath" in path] == [f"bytes={1 << 20}-"]
    assert not list(tmp_path.glob("cache/**/.*.parts"))


@pytest.mark.parametrize(("status", "code"), [(403, "E-GATED"), (416, "E-NETWORK"), (500, "E-NETWORK")])
def test_a_file_that_is_refused(
    scope: Scope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    monkeypatch.setattr(transfer, "PAUSES", (0.0,))
    scope.status["config.json"] = status
    error = failure(tmp_path)
    assert (error.name, error.exit_code) == (code, 7)
    assert "\x1b" not in str(error)


def test_refusals(scope: Scope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = failure(tmp_path, name="ms:owner/other")
    assert (type(error), error.name, error.exit_code) == (NetworkError, "E-REPO", 7)
    assert "\x1b" not in str(error)
    assert failure(tmp_path, offline=True).name == "E-OFFLINE"
    scope.files = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    assert isinstance(failure(tmp_path), SafetyError)
    assert isinstance(failure(tmp_path, name="ms:bare"), UsageError)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("modelscope_hub"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    modelscope._library.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    error = failure(tmp_path)
    assert (error.name, error.hint) == ("E-EXTRA", "pip install 'textgen-cli[modelscope]'")


@pytest.mark.slow
def test_the_client_is_quiet_and_another_endpoint_gets_no_token(scope: Scope, tmp_path: Path) -> None:
    env = {**os.environ, "MODELSCOPE_API_TOKEN": "ms-canary", "TEXTGEN_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "textgen_cli", "download", NAME],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip(), "model.safetensors").is_file()
    assert not any("canary" in str(entry) for entry in scope.log)
