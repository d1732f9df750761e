"""The generated files in the repository are what the program generates now."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GENERATE = ROOT / "docs" / "generate.py"


def generate(script: Path, *options: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(script), *options]
    return subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=120, check=False)


def test_generated_files_are_current() -> None:
    done = generate(GENERATE, "--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_a_stale_file_is_named(tmp_path: Path) -> None:
    for name in ("docs", "completions", "textgen_cli"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "CONTRIBUTING.md", tmp_path)
    script = tmp_path / "docs" / "generate.py"
    assert generate(script).returncode == 0
    with (tmp_path / "completions" / "textgen.fish").open("a") as stale:
        stale.write("# by hand\n")
    done = generate(script, "--check")
    assert done.returncode == 1
    assert done.stderr == "completions/textgen.fish is not current: run `make generate`\n"


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("_textgen", "#compdef textgen"),
        ("textgen.bash", "_textgen_completion() {"),
        ("textgen.fish", "complete --command textgen"),
        ("textgen.ps1", "Import-Module PSReadLine"),
    ],
)
def test_a_script_begins_as_its_shell_needs(name: str, first: str) -> None:
    assert (ROOT / "completions" / name).read_text().startswith(first)
