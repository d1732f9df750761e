"""Lock files: a model to the byte, whatever the server, the cache or somebody else does meanwhile."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from parts import files
from parts.hub import Hub
from parts.program import Program

from textgen_cli.config import DownloadConfig, ModelConfig
from textgen_cli.config.download import GettingConfig
from textgen_cli.download.run import names, run
from textgen_cli.errors import ModelError, NetworkError, TextgenError, UsageError
from textgen_cli.events import silent
from textgen_cli.model import lock
from textgen_cli.model.source import locate

NAME = "org/small"


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def cache(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return server.use(monkeypatch, tmp_path / "hf")


@pytest.fixture
def locked(server: Hub, cache: Path, tmp_path: Path) -> Callable[..., ModelConfig]:
    """A model that was locked and of which the branch means another commit by now."""
    server.add(NAME, files.folder(tmp_path / "model"))
    path = tmp_path / "models.lock"
    run(DownloadConfig(ModelConfig(NAME), GettingConfig(lock=path)), silent)
    server.add(NAME, files.folder(tmp_path / "new", files={"generation_config.json": b"{}"}))
    return lambda **changes: replace(ModelConfig(NAME, locked=path), **changes)


def failure(config: ModelConfig) -> TextgenError:
    with pytest.raises(TextgenError) as caught:
        locate(config, silent)
    return caught.value


def test_the_file_names_commit_and_hashes(
    server: Hub, locked: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    entry = json.loads((tmp_path / "models.lock").read_text())["models"][NAME]
    old = locate(locked(), silent)
    assert (entry["source"], entry["name"], entry["revision"]) == ("hub", NAME, old.revision)
    assert entry["revision"] != server.branches[NAME]["main"]
    assert entry["files"].keys() == {path.name for path in old.folder.iterdir()}
    assert "sha256" in entry["files"]["model.safetensors"] and "git" in entry["files"]["config.json"]


def test_a_locked_model_costs_no_request_and_another_machine_fetches_exactly_it(
    server: Hub,
    cache: Path,
    locked: Callable[..., ModelConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.log.clear()
    first = locate(locked(offline=True), silent)
    assert server.log == []
    server.use(monkeypatch, tmp_path / "other")
    assert failure(locked(offline=True)).name == "E-OFFLINE"
    second = locate(locked(), silent)
    assert second.revision == first.revision and second.folder != first.folder
    assert {r.path.rpartition("/")[2] for r in server.log} == {path.name for path in first.folder.iterdir()}
    assert not server.requests(
        path="/revision/|/tree/"
    )  # the file says what there is; the server is not asked


def test_a_server_that_says_and_sends_something_else_is_not_believed(
    server: Hub, locked: Callable[..., ModelConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T21: another endpoint may offer other bytes under the same commit; the hashes of the file count."""
    server.use(monkeypatch, tmp_path / "other")
    content = server.commits[NAME, locate_commit(locked)]
    content["model.safetensors"] = content["model.safetensors"][:-1] + b"?"
    error = failure(locked())
    assert (type(error), error.name, error.subject) == (ModelError, "E-HASH", "model.safetensors")


def locate_commit(locked: Callable[..., ModelConfig]) -> str:
    path = locked().locked
    assert path is not None
    return lock.read(path)[NAME].revision


def test_a_damaged_file_of_the_cache_is_found(locked: Callable[..., ModelConfig]) -> None:
    folder = locate(locked(), silent).folder
    (folder / "config.json").resolve().write_bytes(b"{}")
    assert failure(locked()).name == "E-HASH"
    assert locate(locked(), silent).folder == folder


def test_what_the_file_does_not_hold_is_refused_adapters_too(
    locked: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    error = failure(locked(model="org/other"))
    assert (error.name, error.exit_code, error.hint) == ("E-LOCKED", 5, f"it holds {NAME}")
    assert failure(locked(model="./x")).name == "E-LOCKED"
    # Without a name the one model of the file is meant.
    assert locate(locked(model=ModelConfig.model), silent).label == NAME


def test_a_folder_is_locked_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files.folder(tmp_path / "model")
    path = tmp_path / "l"
    run(DownloadConfig(ModelConfig("./model"), GettingConfig(lock=path)), silent)
    config = ModelConfig("./model", locked=path)
    assert locate(config, silent).folder == tmp_path / "model"
    for name, content, fact in (
        ("config.json", b"{}", "config.json is another one"),
        ("generation_config.json", b"{}", "generation_config.json is not locked"),
    ):
        before = (tmp_path / "model" / name).read_bytes() if (tmp_path / "model" / name).exists() else None
        (tmp_path / "model" / name).write_bytes(content)
        assert failure(config).fact == fact
        if before is not None:
            (tmp_path / "model" / name).write_bytes(before)
        else:
            (tmp_path / "model" / name).unlink()
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert failure(config).fact == "tokenizer.json is missing"


def test_several_models_in_one_file(locked: Callable[..., ModelConfig], tmp_path: Path) -> None:
    files.folder(tmp_path / "second")
    path = tmp_path / "models.lock"
    run(DownloadConfig(ModelConfig(str(tmp_path / "second")), GettingConfig(lock=path)), silent)
    assert set(lock.read(path)) == {NAME, str(tmp_path / "second")}
    assert set(names(DownloadConfig(ModelConfig(locked=path)), None)) == {NAME, str(tmp_path / "second")}
    assert failure(ModelConfig(locked=path)).name == "E-LOCKED"  # two models, and none is named


WORK = {
    "generate": ["the lazy dog", "-n", "4"],
    "score": ["the lazy dog"],
    "finetune": ["data.txt", "--format", "lines", "--max-steps", "1", "--valid-share", "0", "-o", "out"],
}


@pytest.mark.parametrize("command", WORK)
def test_every_command_takes_what_is_locked_and_nothing_else(
    small_model: Callable[..., Path],
    forked: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_model("llama"), "model")
    Path("data.txt").write_text("the lazy dog\n" * 4)
    run(DownloadConfig(ModelConfig("./model"), GettingConfig(lock=Path("l"))), silent)
    args = [command, *WORK[command], "--locked", "l", "--device", "cpu", "--offline"]
    done = forked(tmp_path, *args)
    assert done.returncode == 0 and done.stdout, done.stderr
    shutil.rmtree("out", ignore_errors=True)
    with Path("model/model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    done = forked(tmp_path, *args)
    assert (done.returncode, done.stdout) == (5, b"")
    assert done.stderr == b"textgen: error: [E-LOCKED] ./model: model.safetensors is another one\n"
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"format": 2, "models": {}}', '{"format": 1, "models": {"a": 1}}', '{"format": 1}',
        '{"format": 1, "models": {"a": {"source": "hub", "name": "a", "revision": 1}}}',
        '{"format": 1, "models": {"a": {"source": "hub", "name": "a", "revision": "../../x"}}}',
        '{"format": 1, "models": {"a": {"source": "folder", "name": "a", "revision": "", "files": {"../x": {"size": 1, '
        '"git": "' + "0" * 40 + '"}}}}}',
        '{"format": 1, "models": {"a": {"source": "folder", "name": "a", "revision": "", "files": {"x": {"git": 1}}}}}',
    ],
)  # fmt: skip
def test_a_file_that_is_no_lock_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "l").write_text(text)
    with pytest.raises(UsageError, match="E-LOCK"):
        lock.read(tmp_path / "l")
    with pytest.raises(UsageError, match="E-LOCK"):
        lock.read(tmp_path / "absent")


def test_no_network_for_what_is_missing(
    server: Hub, locked: Callable[..., ModelConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.use(monkeypatch, tmp_path / "other")
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert isinstance(failure(locked(mirror="http://127.0.0.1:1")), NetworkError)
    assert set(pauses) <= {1.0, 2.0}  # of each file, while several come at once
