"""Several processes train as one would: the same losses, one voice, whole checkpoints, an end that all agree on."""

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from parts.training import TEXTS
from safetensors.torch import load_file

from textgen_cli.finetune import checkpoint

pytestmark = pytest.mark.slow  # each run imports torch three times

GUIDE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
# The launchers as the guide has them, each as words.
TORCHRUN, ACCELERATE, DIVIDED = (
    found.split() for found in re.findall(r"^((?:torchrun|accelerate) .*)-m textgen_cli", GUIDE, re.MULTILINE)
)
FREE_PORT = ("--main_process_port", "0")
SETTINGS = ("lines.txt", "--format", "lines", "--from-scratch", "tiny", "--vocab-size", "400",
            "--max-length", "64", "--batch-size", "2", "--threads", "1",
            "--max-steps", "60", "--save-steps", "10", "--eval-steps", "30")  # fmt: skip


@pytest.fixture(name="work", scope="module")
def _work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with examples of many lengths, and `two`: what two processes make of them."""
    folder = tmp_path_factory.mktemp("group")
    rows = [f"{number}: {TEXTS[number % 4][: 12 + 7 * number % 60]}" for number in range(63)]  # 60 are learnt
    (folder / "lines.txt").write_text("\n".join(rows) + "\n")
    done = start(folder, TORCHRUN, *SETTINGS, "-o", "two", "-v")
    out, told = done.communicate(timeout=170)
    assert (done.returncode, out) == (0, f"{folder / 'two'}\n"), told
    (folder / "told").write_text(told)
    return folder


def start(folder: Path, launcher: Sequence[str], *args: str) -> subprocess.Popen[str]:
    """`textgen finetune` in two processes; without a launcher in one."""
    scripts = Path(sysconfig.get_path("scripts"))
    started = [scripts / launcher[0], *launcher[1:]] if launcher else [sys.executable]
    return subprocess.Popen(
        [*started, "-m", "textgen_cli", "finetune", *args],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def stopped_at(started: subprocess.Popen[str], folder: Path) -> None:
    """Ask the launcher to end all when a checkpoint is there."""
    until = time.monotonic() + 120
    while not folder.exists() and time.monotonic() < until:
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    out, told = started.communicate(timeout=60)
    assert started.returncode and out == "", told


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in log(out) if "loss" in line]


def test_two_learn_as_one_does_from_the_same_batches(work: Path) -> None:
    done = start(work, (), *SETTINGS, "--accumulate", "2", "-o", "one")
    assert done.communicate(timeout=170)[1] == "" and done.returncode == 0
    assert len(losses(work / "two")) == len(losses(work / "one")) == 60
    assert losses(work / "two") == pytest.approx(losses(work / "one"), abs=1e-3)
    one, two = (
        [line["eval_perplexity"] for line in log(work / name) if "eval_perplexity" in line]
        for name in ("one", "two")
    )
    assert two[0] == pytest.approx(one[0], rel=1e-6) and len(one) == len(two) == 3
    assert two == pytest.approx(one, rel=1e-3)


def test_one_speaks(work: Path) -> None:
    launcher = "torch/distributed/run.py"  # which has a word of its own on threads
    lines = [line for line in (work / "told").read_text().splitlines() if launcher not in line]
    assert all(line.startswith("textgen: ") for line in lines)
    assert len(lines) == len(set(lines)) > 5
    assert [line for line in lines if line.startswith("textgen: step 0:")]


def test_a_signal_to_all_saves_once_and_the_same_weights_come(work: Path) -> None:
    partial = work / "broken.partial"
    stopped_at(start(work, TORCHRUN, *SETTINGS, "-o", "broken"), partial / "checkpoint-10")
    kept = checkpoint.Store(work / "broken").checkpoints()
    assert kept and all(checkpoint.damage(folder) is None for folder in kept)
    assert {path.name for path in kept[-1].glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    again = start(work, TORCHRUN, *SETTINGS, "-o", "broken", "--resume")
    assert again.communicate(timeout=170)[0] == f"{work / 'broken'}\n" and again.returncode == 0
    for name, value in load_file(work / "two" / "model.safetensors").items():
        assert torch.equal(value, load_file(work / "broken" / "model.safetensors")[name])
    assert not partial.exists()


def test_weights_in_parts_are_learnt_as_whole_ones_are_and_survive_a_signal(work: Path) -> None:
    parted = [*DIVIDED, *FREE_PORT]
    done = start(work, parted, *SETTINGS, "-o", "parts", "-v")
    out, told = done.communicate(timeout=170)
    assert (done.returncode, out) == (0, f"{work / 'parts'}\n"), told
    said = [line for line in told.splitlines() if line.startswith("textgen:")]
    assert len(said) == len(set(said)) > 5
    for name in ("loss", "eval_perplexity", "grad_norm"):
        whole, parts = ([line[name] for line in log(work / out) if name in line] for out in ("two", "parts"))
        assert len(parts) == len(whole) > 2 and parts == pytest.approx(whole, rel=1e-4)
    weights = load_file(work / "parts" / "model.safetensors")
    for name, value in load_file(work / "two" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0)
    assert names(work / "parts") == names(work / "two") and shown(work / "parts") == shown(work / "two") != []

    done = start(work, parted, *SETTINGS, "-o", "hurt")
    stopped_at(done, work / "hurt.partial" / "checkpoint-10")
    kept = checkpoint.Store(work / "hurt").checkpoints()
    assert kept and all(checkpoint.damage(folder) is None for folder in kept)
    shares = [weighs(load_file(kept[-1] / f"weights_{number}.safetensors")) for number in (0, 1)]
    assert sum(shares) == weighs(weights) and shares[0] == pytest.approx(sum(shares) / 2, rel=0.01)
    moments = [torch.load(kept[-1] / f"optimizer_{number}.pt")["state"].values() for number in (0, 1)]
    assert [sum(one["exp_avg"].numel() for one in state) for state in moments] == shares
    again = start(work, parted, *SETTINGS, "-o", "hurt", "--resume")
    assert again.communicate(timeout=170)[0] == f"{work / 'hurt'}\n" and again.returncode == 0
    for name, value in load_file(work / "hurt" / "model.safetensors").items():
        assert torch.equal(value, weights[name])


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def shown(out: Path) -> list[str]:
    """The texts in the tables of a report, samples of before and after among them."""
    return re.findall(r'<td dir="auto">([^<]*)</td>', (out / "report.html").read_text())


def weighs(tensors: dict[str, torch.Tensor]) -> int:
    return sum(value.numel() for value in tensors.values())


def test_accelerate_starts_it_too_and_bad_data_are_told_once(work: Path) -> None:
    (work / "bad.jsonl").write_text('{"text": "a"}\nnot JSON\n')
    done = start(work, [*ACCELERATE, *FREE_PORT], "bad.jsonl", "-o", "bad", "--from-scratch", "tiny")
    out, told = done.communicate(timeout=120)
    assert done.returncode and out == ""
    assert told.count("textgen: error: [E-DATA]") == 1
    assert not (work / "bad.partial").exists()
    few = ("--max-steps", "2", "--save-steps", "1", "-o", "small")
    done = start(work, [*ACCELERATE, *FREE_PORT], *SETTINGS[:-6], *few)
    out, told = done.communicate(timeout=170)
    assert (done.returncode, out) == (0, f"{work / 'small'}\n"), told
