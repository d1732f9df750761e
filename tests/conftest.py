"""Fixtures every test may use: small models, the real default model, and a clean environment."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from parts.program import Program
from parts.shell import Shell

# A busy machine is no failure of what is tested.
settings.register_profile("textgen", deadline=None)
settings.load_profile("textgen")

# Results of small models must not depend on how busy the machine is, nor on the user's settings.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"


# Files that take a minute. They come first, so that no worker is left alone with one of them in the end.
LONGEST = (
    "tests/test_readme.py", "tests/finetune/test_checkpoint.py", "tests/score/test_run.py",
    "tests/generate/test_batch.py", "tests/generate/test_compiled.py", "tests/generate/test_faults.py",
    "tests/generate/test_fault_inputs.py", "tests/text/test_job.py", "tests/cli/test_chat.py",
    "tests/generate/test_endpoint_batch.py", "tests/finetune/test_group.py", "tests/download/test_work.py",
)  # fmt: skip


# Files that take four seconds and more together, where others tell at once that something is broken.
SLOW_FILES = frozenset(
    f"tests/{name}.py"
    for name in (
        "download/test_knowing", "download/test_run", "explain/test_methods", "generate/test_banned",
        "generate/test_fields", "generate/test_tasks", "model/test_adapter", "model/test_cache", "model/test_copies",
        "score/test_masked", "test_layers", "text/test_metrics",
    )
)  # fmt: skip

# What starts the program, or needs the real default model: tests that ask for it are of the slow tier.
SLOW_FIXTURES = frozenset({"forked", "shimmed", "default_model", "program", "border"})


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, each in its own order; and the tier of those that start the program."""
    for item in items:
        name = item.nodeid.partition("::")[0]
        if name in SLOW_FILES or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(LONGEST)))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TEXTGEN_") and name != "TEXTGEN_CACHE_DIR":
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nonexistent")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """small_model("llama", template=...) -> folder; each is built once a run."""
    from parts.models import build

    made: dict[tuple[str, str | None], Path] = {}

    def get(architecture: str, template: str | None = None) -> Path:
        key = (architecture, template)
        if key not in made:
            made[key] = build(architecture, tmp_path_factory.mktemp(architecture), template=template)
        return made[key]

    return get


@pytest.fixture(scope="session")
def forked() -> Iterator[Program]:
    """The program where it is no matter how it starts: forked from a process that has the libraries imported."""
    program = Program()
    yield program
    program.close()


@pytest.fixture(scope="session")
def warm(forked: Program) -> Shell:
    """Scripts of bash with that program."""
    return Shell(forked)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The folder of the real default model, fetched and converted by the program itself; cached between runs."""
    done = subprocess.run(
        [sys.executable, "-m", "textgen_cli", "download"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1])
