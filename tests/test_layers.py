"""Who may know whom, where import-linter cannot see it: what a start loads, and which names stand where."""

import ast
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "textgen_cli"
SCRIPTS = sysconfig.get_path("scripts")
HEAVY = {
    "accelerate", "datasets", "gguf", "httpx2", "huggingface_hub", "llguidance", "peft", "sacrebleu", "safetensors",
    "tokenizers", "torch", "transformers", "trl",
}  # fmt: skip

# A dotted name -> the parts of the package that may write it.
PLACES = {
    "from_pretrained": ("model/",),
    "print": ("cli/",),
    "sys.argv": ("cli/", "__main__.py"),
    "sys.exit": ("cli/", "__main__.py"),
    "os._exit": ("cli/", "__main__.py"),
    "SystemExit": ("cli/", "__main__.py"),
    "sys.stdout": ("cli/", "__main__.py"),
    "sys.stderr": ("cli/", "__main__.py"),
    "torch.cuda": ("model/device.py",),
    "torch.mps": ("model/device.py",),
    "torch.backends.mps": ("model/device.py",),
    "torch.accelerator": ("model/device.py",),
}


def names(source: str) -> Iterator[tuple[int, str]]:
    """Every dotted name a module writes, with its line: also `from sys import argv` as `sys.argv`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name | ast.Attribute):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def misplaced(source: str, where: str) -> list[str]:
    """The names in `source` that may not stand in the file `where` (a path below the package)."""
    found = []
    for line, name in names(source):
        for banned, places in PLACES.items():
            same = name == banned or (banned == "from_pretrained" and name.endswith(".from_pretrained"))
            if same and not where.startswith(places):
                found.append(f"{where}:{line}: {name}")
    return found


def test_names_stand_in_their_places() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    found = [place for f in files for place in misplaced(f.read_text(), f.relative_to(PACKAGE).as_posix())]
    assert found == []


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("generate/local.py", "net = AutoModelForCausalLM.from_pretrained(path)"),
        ("cli/generate.py", "load = AutoTokenizer.from_pretrained"),
        ("model/load.py", "print('loading')"),
        ("text/records.py", "import sys\nname = sys.argv[1]"),
        ("text/records.py", "from sys import argv"),
        ("model/cache.py", "raise SystemExit(8)"),
        ("generate/local.py", "import sys\nsys.stdout.write('text')"),
        ("model/load.py", "import torch\nif torch.cuda.is_available(): pass"),
        ("generate/local.py", "fast = torch.backends.mps.is_available()"),
    ],
)
def test_the_check_finds_a_planted_name(where: str, source: str) -> None:
    assert len(misplaced(source, where)) == 1


def loaded(argv: list[str], **env: str) -> tuple[int, set[str]]:
    """Exit code of a process and the top-level packages it imported, read from Python's own import log."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TEXTGEN")}
    done = subprocess.run(
        argv,
        env=clean | env | {"PYTHONPROFILEIMPORTTIME": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert lines, "Python wrote no import log"
    return done.returncode, {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_importing_the_face_loads_no_engine() -> None:
    code, modules = loaded([sys.executable, "-c", "import textgen_cli.cli.app"])
    assert (code, modules & HEAVY) == (0, set())
    assert "typer" in modules


def test_the_import_log_shows_an_engine() -> None:
    _, modules = loaded([sys.executable, "-c", "import tokenizers"])
    assert "tokenizers" in modules & HEAVY


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("generate --help", 0),
        ("score --help", 0),
        ("finetune --help", 0),
        ("download --help", 0),
        ("generate --dump-config", 0),
        ("no-such-command", 2),
        ("generate --no-such-option", 2),
        ("generate text --temperature -1", 2),
        ("generate text --greedy --num-return-sequences 2", 2),
        ("generate text --device abacus", 2),
        ("score text --labels a", 2),
        ("score --summary text", 2),
        ("finetune x -o y --dora", 2),
        ("generate --no-stdin", 2),
        ("generate", 4),  # standard input is empty
    ],
)
def test_what_needs_no_model_loads_no_engine(line: str, code: int) -> None:
    returned, modules = loaded([f"{SCRIPTS}/textgen", *line.split()])
    assert (returned, modules & HEAVY) == (code, set())


def test_bad_examples_load_no_engine(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": 5}\n')
    line = ["finetune", str(tmp_path / "bad.jsonl"), "--task", "clm", "-o", str(tmp_path / "out")]
    code, modules = loaded([f"{SCRIPTS}/textgen", *line])
    assert (code, modules & HEAVY) == (4, set())


def test_completion_loads_no_engine() -> None:
    words = {"_TEXTGEN_COMPLETE": "complete_bash", "COMP_WORDS": "textgen generate --max", "COMP_CWORD": "2"}
    assert loaded([f"{SCRIPTS}/textgen"], **words)[1] & HEAVY == set()
