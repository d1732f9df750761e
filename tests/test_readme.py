"""The commands of README.md and docs/guide.md, run as they stand; the first one with the installed program itself."""

import json
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
from parts.shell import Shell, bash

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(?:<!-- (?P<mark>\w+) -->\n)?```sh\n(?P<script>.*?)```", re.DOTALL)
INSTALL = "pip install . && "


def blocks(name: str) -> list[tuple[str | None, str]]:
    """The `sh` blocks of a document, each with the marker comment before it."""
    return [(m["mark"], m["script"]) for m in BLOCK.finditer((ROOT / name).read_text(encoding="utf-8"))]


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return bash(script, folder, sysconfig.get_path("scripts"))


# These have tests of their own.
SEED_EXAMPLE, JUDGE_EXAMPLE = "--num-return-sequences 5", "-o judge"


EXAMPLES = [
    pytest.param(script, id=f"{name}-{number}")
    for name in ("README.md", "docs/guide.md")
    for number, (mark, script) in enumerate(blocks(name), 1)
    if mark is None and SEED_EXAMPLE not in script and JUDGE_EXAMPLE not in script
]


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES)
def test_an_example_runs(warm: Shell, script: str, tmp_path: Path) -> None:
    done = warm(script, tmp_path)
    assert done.returncode == 0, done.stderr
    # Silent on stderr when all is well; the examples of failure say their exit code.
    assert (done.stderr == "") == ("exit code" not in script)
    assert done.stdout or ">" in script


def test_the_two_commands_stand_in_the_readme() -> None:
    marked = {mark: script.strip() for mark, script in blocks("README.md") if mark}
    assert marked == {
        "run": f'{INSTALL}textgen generate "Once upon a time"',
        "test": 'pip install ".[test]" && pytest',
    }


@pytest.mark.slow
def test_the_first_command_writes_text(tmp_path: Path) -> None:
    marked = {mark: script for mark, script in blocks("README.md") if mark}
    done = run(marked["run"].removeprefix(INSTALL), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split()) > 20


@pytest.mark.slow
def test_five_sequences_differ(tmp_path: Path) -> None:
    script = next(script for _, script in blocks("README.md") if SEED_EXAMPLE in script)
    done = run(script, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(set(filter(None, done.stdout.split("\n")))) >= 5


@pytest.mark.slow
def test_a_judge_is_trained_and_judges(warm: Shell, tmp_path: Path) -> None:
    script = next(script for _, script in blocks("docs/guide.md") if JUDGE_EXAMPLE in script)
    done = warm(script, tmp_path)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")  # the folder of the judge
    insult, thanks = map(json.loads, (tmp_path / "judged.jsonl").read_text(encoding="utf-8").splitlines())
    told = [match for match in insult["safety"]["matches"] if match["where"] == "prompt"]
    assert {(match["model"], match["label"]) for match in told} == {("./judge", "insult")}
    assert all(match["probability"] >= 0.8 for match in told)
    assert thanks["safety"]["probabilities"]["prompt"]["insult"] < 0.2
    assert not [match for match in thanks["safety"]["matches"] if match["where"] == "prompt"]


def test_every_exit_code_is_in_the_readme() -> None:
    rows = re.findall(r"\| (\d+) \| [a-z]", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert sorted(map(int, rows)) == list(range(12))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/guide.md"])
def test_local_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []
