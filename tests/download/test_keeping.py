"""`download --list`, `--verify`, `--remove` and `--clean`: the models that are here, ours and others'."""

import json
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import filelock
import huggingface_hub
import pytest
from parts import files
from parts.gguf_files import tiny_llama, write_llama
from parts.hub import Hub

from textgen_cli.config import DownloadConfig, ModelConfig
from textgen_cli.config.download import GettingConfig, KeepingConfig
from textgen_cli.download import upkeep
from textgen_cli.download.inventory import Kept, kept, named
from textgen_cli.download.run import run
from textgen_cli.errors import BusyError, ModelError
from textgen_cli.events import silent
from textgen_cli.model import hub as hub_module
from textgen_cli.model.source import locate


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add("org/small", files.folder(tmp_path / "origin"))
        hub.add("org/others", files.folder(tmp_path / "origin"))
        yield hub


@pytest.fixture(name="cache")
def _cache(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return server.use(monkeypatch, tmp_path / "hf")


@pytest.fixture
def model(cache: Path, tmp_path: Path) -> ModelConfig:
    """The settings of a machine on which we fetched one model and another program a second one."""
    config = ModelConfig("org/small", cache_dir=tmp_path / "ours")
    run(DownloadConfig(config), silent)
    endpoint = os.environ.get("HF_ENDPOINT") or huggingface_hub.constants.ENDPOINT
    for name in ("config.json", "model.safetensors"):
        huggingface_hub.hf_hub_download("org/others", name, endpoint=endpoint, cache_dir=cache, token=False)
    return config


def row(config: ModelConfig, name: str) -> Kept:
    (found,) = named(config, name)
    return found


def test_the_list_names_what_is_ours_and_what_is_not(server: Hub, model: ModelConfig) -> None:
    rows = {one.model: one for one in kept(model)}
    assert {name: one.ours for name, one in rows.items()} == {"org/small": True, "org/others": False}
    small = rows["org/small"]
    content = server.commits["org/small", small.revision]
    assert (small.source, small.bytes) == ("hub", sum(map(len, content.values())))
    assert small.fields()["last_used"] is not None


def test_two_revisions_are_two_rows_and_one_of_them_can_go(
    server: Hub, model: ModelConfig, tmp_path: Path
) -> None:
    server.add(
        "org/small", files.folder(tmp_path / "v2", files={"generation_config.json": b"{}"}), branch="v2"
    )
    run(DownloadConfig(replace(model, model="org/small@v2")), silent)
    assert len(named(model, "org/small")) == 2
    config = DownloadConfig(model, keeping=KeepingConfig(remove=True))
    told = upkeep.remove(replace(config, getting=GettingConfig(dry_run=True)), "org/small@v2")
    assert len(told) == 1 and len(named(model, "org/small")) == 2
    assert upkeep.remove(config, "org/small@v2") == told
    (left,) = named(model, "org/small")
    assert left.revision == server.branches["org/small"]["main"]
    assert locate(replace(model, offline=True), silent).revision == left.revision  # shared content stays
    upkeep.remove(config, "org/small")
    assert named(model, "org/small") == []
    assert [one.model for one in kept(model)] == ["org/others"]
    with pytest.raises(ModelError, match="E-NOT-HERE"):
        upkeep.remove(config, "org/small")


def test_what_is_being_fetched_is_not_removed(model: ModelConfig) -> None:
    one = row(model, "org/small")
    lock = hub_module.lock_of((one.folder / "model.safetensors").resolve())
    with filelock.FileLock(lock), pytest.raises(BusyError) as caught:
        upkeep.remove(DownloadConfig(model, keeping=KeepingConfig(remove=True)), "org/small")
    assert caught.value.exit_code == 9
    assert one.folder.is_dir()


def verified(model: ModelConfig, name: str | None) -> dict[str, str | None]:
    found = upkeep.verify(DownloadConfig(model, keeping=KeepingConfig(verify=True)), name, silent)
    return {one.model: one.problem.name if one.problem else None for one in found}


def test_verifying_finds_what_no_time_tells_and_the_next_run_fetches_it_anew(
    server: Hub, model: ModelConfig
) -> None:
    assert verified(model, None) == {"org/small": None, "org/others": None}
    blob = (row(model, "org/small").folder / "model.safetensors").resolve()
    stamp = blob.stat()
    good = blob.read_bytes()
    blob.write_bytes(b"?" + good[1:])
    os.utime(blob, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    locate(replace(model, offline=True), silent)  # that the bytes are others is not seen by using it
    assert verified(model, "org/small") == {"org/small": "E-HASH"}
    assert not blob.exists()
    assert run(DownloadConfig(model), silent).folder.joinpath("model.safetensors").read_bytes() == good
    assert verified(model, "org/small") == {"org/small": None}
    with pytest.raises(ModelError, match="E-NOT-HERE"):
        verified(model, "org/absent")


def test_a_converted_file_is_listed_verified_and_removed(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_llama(file, tiny_llama())
    config = ModelConfig(str(file), cache_dir=tmp_path / "ours")
    folder = locate(config, silent).folder
    (one,) = kept(config)
    assert (one.model, one.source, one.form, one.folder) == ("tiny.gguf", "gguf", "converted", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(b"?" + weights.read_bytes()[1:])
    assert verified(config, None) == {"tiny.gguf": "E-HASH"}
    assert kept(config) == []  # it is not whole any more, so nothing uses it
    assert locate(config, silent).folder == folder
    assert verified(config, None) == {"tiny.gguf": None}
    upkeep.remove(DownloadConfig(config, keeping=KeepingConfig(remove=True)), str(file))
    assert (kept(config), file.exists(), folder.exists()) == ([], True, False)


def test_cleaning_takes_what_nobody_will_use_and_nothing_else(
    model: ModelConfig, cache: Path, tmp_path: Path
) -> None:
    """F110: orphans of earlier kills are listed and go; what a process holds stays."""
    home, ours = cache / "models--org--small", tmp_path / "ours"
    digest = "a" * 64
    junk = [
        home / "blobs" / f"{digest}.1a2b3c4d.incomplete",
        home / "blobs" / f"{digest}{hub_module.PART}",
        home / "blobs" / f"etag.{digest}{hub_module.PART}",
        home / "blobs" / ("b" * 40),
        ours / "gguf" / f".{digest}-1.0123abcd.staging" / "model.safetensors",
        ours / "gguf" / f"{digest}-0" / "model.safetensors",
        ours / "gguf" / f"{'c' * 64}-1" / "config.json",
    ]
    held = home / "blobs" / f"{'d' * 64}{hub_module.PART}"
    for path in [*junk, held]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    lock = hub_module.lock_of(home / "blobs" / ("d" * 64))
    lock.parent.mkdir(parents=True, exist_ok=True)
    config = DownloadConfig(model, keeping=KeepingConfig(clean=True))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with filelock.FileLock(lock):
        dry = upkeep.clean(replace(config, getting=GettingConfig(dry_run=True)))
        assert {path for path in tmp_path.rglob("*") if path.is_file()} - before <= {lock}
        assert {one.path for one in dry} == {
            path if path.parent.name == "blobs" else path.parent for path in junk
        }
        assert upkeep.clean(config) == dry
    assert not any(path.exists() for path in junk) and held.exists()
    assert upkeep.clean(config) == [upkeep.Removed("part of a file", 5, held)]
    assert verified(model, None) == {"org/small": None, "org/others": None}


@pytest.mark.slow
def test_the_commands_as_a_script_sees_them(server: Hub, model: ModelConfig, tmp_path: Path) -> None:
    env = {**os.environ, **server.settings(tmp_path / "hf"), "TEXTGEN_CACHE_DIR": str(tmp_path / "ours")}
    program = Path(sysconfig.get_path("scripts")) / "textgen"

    def textgen(*args: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [program, "download", *args], env=env, capture_output=True, text=True, check=False
        )

    lines = [line.split("\t") for line in textgen("--list").stdout.splitlines()]
    assert [(line[2], line[5], line[6]) for line in lines] == [
        ("hub", "", "org/others"),
        ("hub", "ours", "org/small"),
    ]
    rows = [json.loads(line) for line in textgen("--list", "--json").stdout.splitlines()]
    assert [row["model"] for row in rows] == ["org/others", "org/small"]
    (Path(rows[1]["folder"]) / "config.json").resolve().write_bytes(b"{}")
    done = textgen("--verify")
    assert (done.returncode, done.stdout) == (5, "ok\t2\torg/others\ndamaged\t0\torg/small\n")
    assert done.stderr.startswith("textgen: error: [E-HASH] config.json: ")
    done = textgen("--remove", "org/small", "--dry-run", "--json")
    assert json.loads(done.stdout)["path"] == rows[1]["folder"]
    assert textgen("--remove", "org/small").returncode == 0
    assert textgen("--verify", "org/small").returncode == 5
