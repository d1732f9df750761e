"""Several processes train as one would: the same losses, one voice, whole checkpoints, an end that all agree on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parts.training import TEXTS
from safetensors.torch import load_file

from textgen_cli.finetune import checkpoint, zero
from textgen_cli.finetune.checkpoint import partial_of
from textgen_cli.finetune.group import Group
from textgen_cli.finetune.stop import Stop

pytestmark = pytest.mark.slow  # each run imports torch three times

GUIDE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
# The launchers as the guide has them, each as words.
TORCHRUN, ACCELERATE, FSDP, ZERO = (
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
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}, text=True,
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


def sharded(folder: Path) -> list[int]:
    """Weights in each process's part of a checkpoint of FSDP, whose moments are as many."""
    shares = [weighs(load_file(folder / f"weights_{number}.safetensors").values()) for number in (0, 1)]
    for number, share in enumerate(shares):
        moments = torch.load(folder / f"optimizer_{number}.pt")["state"].values()
        assert weighs(one["exp_avg"] for one in moments) == share
    return shares


def zeroed(folder: Path) -> list[int]:
    """Weights in each process's part of a checkpoint of DeepSpeed, filled up to a whole number for each."""
    kept = SimpleNamespace(_config=None)
    zero.careful(kept)
    parts = [
        kept.checkpoint_engine.load(str(folder / f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt"))
        for number in (0, 1)
    ]
    return [
        sum(found.numel() for name, found in named(part["optimizer_state_dict"]) if name == "exp_avg")
        for part in parts
    ]


def named(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested lists and dicts, each with the nearest name above it."""
    pairs = value.items() if isinstance(value, dict) else [("", one) for one in value]
    for name, one in pairs:
        if isinstance(one, torch.Tensor):
            yield str(name), one
        elif isinstance(one, dict | list | tuple):
            yield from named(one)


@pytest.mark.parametrize(("launcher", "parts"), [(FSDP, sharded), (ZERO, zeroed)], ids=["fsdp", "zero"])
def test_weights_in_parts_are_learnt_as_whole_ones_are_and_survive_a_signal(
    launcher: list[str], parts: Callable[[Path], list[int]], work: Path, request: pytest.FixtureRequest
) -> None:
    if launcher == ZERO:
        pytest.importorskip("deepspeed")
    parted, name = [*launcher, *FREE_PORT], request.node.callspec.id
    done = start(work, parted, *SETTINGS, "-o", name, "-v")
    out, told = done.communicate(timeout=170)
    assert (done.returncode, out) == (0, f"{work / name}\n"), told
    said = [line for line in told.splitlines() if line.startswith("textgen:")]
    assert len(said) == len(set(said)) > 5
    for figure in ("loss", "eval_perplexity", "grad_norm"):
        whole, found = ([line[figure] for line in log(work / out) if figure in line] for out in ("two", name))
        assert len(found) == len(whole) > 2 and found == pytest.approx(whole, rel=1e-4)
    weights = load_file(work / name / "model.safetensors")
    for tensor, value in load_file(work / "two" / "model.safetensors").items():
        torch.testing.assert_close(weights[tensor], value, atol=1e-5, rtol=0)
    assert names(work / name) == names(work / "two") and shown(work / name) == shown(work / "two") != []

    hurt = work / f"{name}-hurt"
    kept = resumed(parted, hurt)
    shares = parts(kept)
    assert sum(shares) == pytest.approx(weighs(weights.values()), rel=0.01)
    assert shares[0] == pytest.approx(sum(shares) / 2, rel=0.01)
    for tensor, value in load_file(hurt / "model.safetensors").items():
        assert torch.equal(value, weights[tensor])


def resumed(launcher: Sequence[str], out: Path) -> Path:
    """Train with a break behind the first checkpoint; returns a copy of the newest one of before."""
    stopped_at(start(out.parent, launcher, *SETTINGS, "-o", out.name), partial_of(out) / "checkpoint-10")
    kept = checkpoint.Store(out).checkpoints()
    assert kept and all(checkpoint.damage(folder) is None for folder in kept)
    copy = shutil.copytree(kept[-1], out.with_name(f"{out.name}-kept"))
    again = start(out.parent, launcher, *SETTINGS, "-o", out.name, "--resume")
    assert again.communicate(timeout=170)[0] == f"{out}\n" and again.returncode == 0
    return copy


def test_a_file_tells_deepspeed_how_to_divide(work: Path) -> None:
    pytest.importorskip("deepspeed")
    (work / "zero.json").write_text(
        json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"})
    )
    by_file = ["--deepspeed_config_file" if word == "--zero_stage" else word for word in ZERO]
    by_file[by_file.index("--deepspeed_config_file") + 1] = "zero.json"
    kept = resumed([*by_file, *FREE_PORT], work / "by-file")
    assert (kept / "mp_rank_00_model_states.pt").is_file()  # all weights in one: it is not stage 3
    weights = load_file(work / "by-file" / "model.safetensors")
    for name, value in load_file(work / "two" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0)


def test_one_that_is_ended_says_nothing_of_what_the_first_one_told() -> None:
    class Ended(BaseException):
        pass

    def end(*_: object) -> None:
        raise Ended

    def struck() -> None:
        signal.raise_signal(signal.SIGTERM)
        raise ValueError

    before = signal.signal(signal.SIGTERM, end)
    stop = Stop(Group(number=1, size=2))
    try:
        with pytest.raises(Ended), stop.listening():
            struck()
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def shown(out: Path) -> list[str]:
    """The texts in the tables of a report, samples of before and after among them."""
    return re.findall(r'<td dir="auto">([^<]*)</td>', (out / "report.html").read_text())


def weighs(tensors: Iterable[torch.Tensor]) -> int:
    return sum(value.numel() for value in tensors)


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
