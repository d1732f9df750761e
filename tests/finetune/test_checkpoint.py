"""A training never loses what it did: kills, signals, full disks, damage, other settings, second processes."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parts.faults import need, small_disk
from parts.training import Trainings, configured
from safetensors.torch import load_file

from textgen_cli.config.finetune import FinetuneConfig
from textgen_cli.finetune import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trainings() -> Iterator[Trainings]:
    made = Trainings()
    yield made
    made.close()


def weights(out: Path) -> str:
    found = next(out.glob("*model.safetensors"))
    return hashlib.sha256(found.read_bytes()).hexdigest()


TASKS = {
    "clm": "gpt2",  # which has dropout
    "mlm": "bert",
    "text-classification": "bert",
}
Unbroken = Callable[[str], str]


@pytest.fixture(scope="module")
def unbroken(
    trainings: Trainings, small_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Unbroken:
    """The weights that a task gives when nothing disturbs it."""
    known: dict[str, str] = {}

    def get(task: str) -> str:
        if task not in known:
            folder = tmp_path_factory.mktemp("unbroken")
            config = config_of(small_model(TASKS[task]), folder / "out")
            status, stdout, stderr = trainings(folder, task, config)
            assert (status, stdout, stderr) == (0, "", "")
            known[task] = weights(folder / "out")
        return known[task]

    return get


def config_of(model: Path, out: Path, **rest: Any) -> FinetuneConfig:
    training = {"save_steps": 2, "eval_steps": 4, "learning_rate": 1e-3, "accumulate": 2} | rest.pop(
        "training", {}
    )
    return configured(model, out, training=training, **rest)


@pytest.mark.parametrize(
    ("task", "step"), [*(("clm", step) for step in (1, 2, 3, 5)), ("mlm", 3), ("text-classification", 5)]
)
def test_after_a_kill_the_same_weights_come(
    task: str,
    step: int,
    trainings: Trainings,
    unbroken: Unbroken,
    small_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    status, _, _ = trainings(
        tmp_path, task, config_of(small_model(TASKS[task]), out), signum=signal.SIGKILL, step=step
    )
    assert status == -signal.SIGKILL
    assert not out.exists()
    assert (tmp_path / "out.partial" / "checkpoint-2").exists() == (step > 2)
    again = config_of(small_model(TASKS[task]), out, resume=True)
    assert trainings(tmp_path, task, again) == (0, "", "")
    assert weights(out) == unbroken(task)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(("task", "form"), [("clm", None), ("text-classification", None), ("clm", "int4")])
def test_an_adapter_goes_on_as_well(
    task: str, form: str | None, trainings: Trainings, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    found = []
    for name, hurt in (("whole", {}), ("broken", {"signum": signal.SIGKILL, "step": 5})):
        folder = tmp_path / name
        folder.mkdir()
        way, base = {"lora": 2, "lora_dropout": 0.1}, {"quantize": form}
        trainings(
            folder, task, config_of(small_model(TASKS[task]), folder / "out", way=way, base=base), **hurt
        )
        again = config_of(small_model(TASKS[task]), folder / "out", way=way, base=base, resume=True)
        assert (folder / "out").exists() == (name == "whole")
        if form and hurt:
            other = config_of(small_model(TASKS[task]), folder / "out", way=way, resume=True)
            status, _, stderr = trainings(folder, task, other)
            assert status == 10 and "quantize was" in stderr
        assert trainings(folder, task, again) == (0, "", "")
        found.append(weights(folder / "out"))
    assert found[0] == found[1]


def test_rows_in_random_order_go_on_as_well(
    trainings: Trainings, unbroken: Unbroken, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    found = []
    for name in ("whole", "broken"):
        folder = tmp_path / name
        folder.mkdir()
        settings = {"training": {"order": "random"}}
        config = config_of(small_model("gpt2"), folder / "out", **settings)
        hurt = {"signum": signal.SIGKILL, "step": 5} if name == "broken" else {}
        trainings(folder, "clm", config, **hurt)
        if hurt:
            config = config_of(small_model("gpt2"), folder / "out", resume=True, **settings)
            assert trainings(folder, "clm", config) == (0, "", "")
        found.append(weights(folder / "out"))
    assert found[0] == found[1] != unbroken("clm")  # which is by length


@pytest.mark.slow
def test_after_many_kills_anywhere_the_same_weights_come(
    trainings: Trainings, unbroken: Unbroken, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    draw = random.Random(5)
    expected = unbroken("clm")
    for trial in range(6):
        folder = tmp_path / str(trial)
        folder.mkdir()
        out, status, kills = folder / "out", 1, 0
        while status:
            config = config_of(small_model("gpt2"), out, resume=True)
            hurt = {"signum": signal.SIGKILL, "call": draw.randrange(1, 160)} if kills < 4 else {}
            status, _, stderr = trainings(folder, "clm", config, **hurt)
            assert status in (0, -signal.SIGKILL), stderr
            kills += 1
        assert weights(out) == expected
        assert not (folder / "out.partial").exists()
        shutil.rmtree(folder)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(
    ("task", "step"), [("clm", 3), ("mlm", 5)]
)  # the end of an epoch, and the midst of one
def test_a_signal_saves_once_more_and_ends_by_it(
    signum: int,
    task: str,
    step: int,
    trainings: Trainings,
    unbroken: Unbroken,
    small_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    config = config_of(small_model(TASKS[task]), out)
    status, stdout, stderr = trainings(tmp_path, task, config, signum=signum, step=step)
    assert (status, stdout, stderr) == (-signum, "", "")
    assert (tmp_path / "out.partial" / f"checkpoint-{step}").is_dir()
    assert trainings(tmp_path, task, config_of(small_model(TASKS[task]), out, resume=True)) == (0, "", "")
    assert weights(out) == unbroken(task)


@pytest.mark.slow
def test_a_signal_at_any_time_loses_nothing(
    trainings: Trainings, unbroken: Unbroken, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Also in the midst of a step, an evaluation or a save."""
    draw, expected, out = random.Random(3), unbroken("clm"), tmp_path / "out"
    seen = []
    for _ in range(12):
        pid = trainings.start(tmp_path, "clm", config_of(small_model("gpt2"), out, resume=True))
        time.sleep(draw.uniform(0.3, 1.5))
        subprocess.run(["kill", "-TERM", str(pid)], check=False)
        status, _, stderr = trainings.wait(tmp_path)
        assert status in (0, -signal.SIGTERM), stderr
        seen.append(status)
        if status == 0:
            assert weights(out) == expected
            shutil.rmtree(out)
    trainings(tmp_path, "clm", config_of(small_model("gpt2"), out, resume=True))
    assert weights(out) == expected
    assert -signal.SIGTERM in seen


def test_a_second_process_is_refused(
    trainings: Trainings, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = config_of(small_model("gpt2"), out)
    with checkpoint.open_store(out, {}, resume=False, restart=False):
        status, _, stderr = trainings(tmp_path, "clm", config)
    assert status == 9 and "[E-LOCKED]" in stderr


def test_a_finished_folder_is_left_as_it_is(
    trainings: Trainings, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    model = small_model("gpt2")
    assert trainings(tmp_path, "clm", config_of(model, out))[0] == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert trainings(tmp_path, "clm", config_of(model, out, resume=True)) == (0, "", "")
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    status, _, stderr = trainings(tmp_path, "clm", config_of(model, out))
    assert status == 2 and "[E-EXISTS]" in stderr
    other = config_of(model, out, resume=True, training={"seed": 1})
    status, _, stderr = trainings(tmp_path, "clm", other)
    assert status == 10 and "[E-RESUME]" in stderr
    old = weights(out)
    assert trainings(tmp_path, "clm", config_of(model, out, restart=True, training={"seed": 1})) == (
        0,
        "",
        "",
    )
    assert weights(out) != old


@pytest.mark.parametrize("where", ["out", "out.partial"])
@pytest.mark.parametrize("how", [{}, {"resume": True}, {"restart": True}])
def test_foreign_files_are_refused_and_kept(
    where: str, how: dict[str, bool], trainings: Trainings, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / where).mkdir()
    (tmp_path / where / "thesis.tex").write_text("years of work")
    status, _, stderr = trainings(tmp_path, "clm", config_of(small_model("gpt2"), tmp_path / "out", **how))
    assert status == 2 and "[E-EXISTS]" in stderr
    assert [path.name for path in (tmp_path / where).iterdir()] == ["thesis.tex"]


@pytest.fixture(scope="module")
def broken_off(
    trainings: Trainings, small_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A training that was killed after step 5, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("broken")
    config = config_of(small_model("gpt2"), folder / "out")
    assert trainings(folder, "clm", config, signum=signal.SIGKILL, step=5)[0] == -signal.SIGKILL
    return folder


CHANGES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "data": ("data was", {}, {"prepared": {"sha256": "other"}}),
    "seed": ("seed was", {"training": {"seed": 3}}, {}),
    # These decide what is held out, so the data are others too.
    "split seed": ("seed was", {"training": {"seed": 3}}, {"prepared": {"sha256": "other"}}),
    "share": ("encoding.valid_share was", {"data": {"valid_share": 0.2}}, {"prepared": {"sha256": "other"}}),
    "rate": ("training.learning_rate was", {"training": {"learning_rate": 1e-4}}, {}),
    "epochs": ("training.epochs was", {"training": {"epochs": 5}}, {}),
    "batch": ("training.batch_size was", {"training": {"batch_size": "8"}}, {}),
    "accumulate": ("training.accumulate was", {"training": {"accumulate": 1}}, {}),
    "rank": ("way.lora was", {"way": {"lora": 2}}, {}),
    "length": ("encoding.max_length was", {"data": {"max_length": 64}}, {}),
    "base": ("model was", {"other": "llama"}, {}),
    "threads": ("threads was", {"base": {"threads": 2}}, {}),
    "dtype": ("dtype was", {"base": {"dtype": "float32"}}, {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_named(
    change: str, broken_off: Path, trainings: Trainings, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    said, settings, hurt = CHANGES[change]
    shutil.copytree(broken_off, tmp_path, dirs_exist_ok=True)
    settings = dict(settings)
    model = small_model(settings.pop("other", "gpt2"))
    config = config_of(model, tmp_path / "out", resume=True, **settings)
    status, _, stderr = trainings(tmp_path, "clm", config, **hurt)
    assert status == 10 and said in stderr
    assert (tmp_path / "out.partial" / "checkpoint-4").is_dir()


def test_another_number_of_processes_is_named(
    broken_off: Path, trainings: Trainings, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(broken_off, tmp_path, dirs_exist_ok=True)
    settings = tmp_path / "out.partial" / "run.json"
    settings.write_text(settings.read_text().replace('"processes": 1', '"processes": 2'))
    config = config_of(small_model("gpt2"), tmp_path / "out", resume=True)
    status, _, stderr = trainings(tmp_path, "clm", config)
    assert status == 10 and "processes was 2" in stderr


def test_an_unfinished_training_is_not_begun_anew_unasked(
    broken_off: Path,
    trainings: Trainings,
    unbroken: Unbroken,
    small_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    shutil.copytree(broken_off, tmp_path, dirs_exist_ok=True)
    status, _, stderr = trainings(tmp_path, "clm", config_of(small_model("gpt2"), tmp_path / "out"))
    assert status == 2 and "unfinished" in stderr
    config = config_of(small_model("gpt2"), tmp_path / "out", restart=True)
    assert trainings(tmp_path, "clm", config) == (0, "", "")
    assert weights(tmp_path / "out") == unbroken("clm")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "cut": ("model.safetensors", _cut),
    "flipped": ("optimizer.pt", _flip),
    "missing": ("rng_state.pth", Path.unlink),
    "added": ("evil.pt", lambda path: path.write_bytes(b"")),
    "manifest": ("manifest.json", _flip),
    "no manifest": ("manifest.json", Path.unlink),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_never_used(
    damage: str,
    broken_off: Path,
    trainings: Trainings,
    unbroken: Unbroken,
    small_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    name, hurt = DAMAGE[damage]
    shutil.copytree(broken_off, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "out.partial" / "checkpoint-4"
    hurt(newest / name)
    model = small_model("gpt2")
    status, _, stderr = trainings(tmp_path, "clm", config_of(model, tmp_path / "out", resume=True))
    assert status == 10 and "[E-CHECKPOINT]" in stderr
    assert name in stderr or damage == "manifest"
    config = config_of(model, tmp_path / "out", resume_previous=True)
    assert trainings(tmp_path, "clm", config) == (0, "", "")
    assert weights(tmp_path / "out") == unbroken("clm")


class Trap:
    """What does something where it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> Any:
        return Path.touch, (self.sprung,)


def test_a_forged_checkpoint_runs_nothing(
    broken_off: Path, trainings: Trainings, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(broken_off, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "out.partial" / "checkpoint-4"
    torch.save({"state": Trap(tmp_path / "sprung"), "param_groups": []}, newest / "optimizer.pt")
    (newest / "manifest.json").unlink()
    checkpoint.seal(newest, 4)
    config = config_of(small_model("gpt2"), tmp_path / "out", resume=True)
    status, _, stderr = trainings(tmp_path, "clm", config)
    assert status == 10 and "[E-CHECKPOINT]" in stderr
    assert not (tmp_path / "sprung").exists()


def test_a_loss_that_is_no_number_ends_it_and_keeps_what_was_good(
    trainings: Trainings, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    wild = {
        "learning_rate": 100.0,
        "weight_decay": 100.0,
        "schedule": "constant",
        "epochs": 60,
        "save_steps": 1,
    }
    config = configured(small_model("gpt2"), tmp_path / "out", training=wild)
    status, _, stderr = trainings(tmp_path, "clm", config)
    assert status == 5 and "[E-DIVERGED]" in stderr and "step " in stderr
    kept = checkpoint.Store(tmp_path / "out").checkpoints()
    assert kept and all(checkpoint.damage(folder) is None for folder in kept)
    for folder in kept:
        tensors = load_file(folder / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_full_disk_leaves_the_former_checkpoint(
    trainings: Trainings, unbroken: Unbroken, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "1200k") as disk:
        config = config_of(small_model("gpt2"), disk / "out")
        status, _, stderr = trainings(tmp_path, "clm", config)
        assert status == 8 and "[E-WRITE]" in stderr
        kept = checkpoint.Store(disk / "out").checkpoints()
        assert kept and all(checkpoint.damage(folder) is None for folder in kept)
        assert not list((disk / "out.partial").glob(".saving*"))
        shutil.copytree(disk / "out.partial", tmp_path / "out.partial")
    config = config_of(small_model("gpt2"), tmp_path / "out", resume=True)
    assert trainings(tmp_path, "clm", config) == (0, "", "")
    assert weights(tmp_path / "out") == unbroken("clm")


FAILURES = {  # a system call, and the file of the second checkpoint that it concerns
    "open the weights": ("openat:error=EIO:when=1", ".saving-4/model.safetensors"),
    "write the optimizer": ("write:error=EIO:when=1", ".saving-4/optimizer.pt"),
    "write the manifest": ("write:error=EIO:when=1", ".saving-4/manifest.json"),
    "sync the weights": ("fsync:error=EIO:when=1", ".saving-4/model.safetensors"),
    "sync the folder": ("fsync:error=EIO:when=1", ".saving-4"),
    "rename": ("rename:error=EIO:when=1", ".saving-4"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_an_error_of_the_disk_leaves_the_former_checkpoint(
    failure: str, trainings: Trainings, unbroken: Unbroken, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    """F116."""
    need("strace", "-o", os.devnull, "true")
    rule, below = FAILURES[failure]
    config = config_of(small_model("gpt2"), tmp_path / "out")
    status, stdout, stderr = trainings(tmp_path, "clm", config, strace=rule, below=below)
    assert (status, stdout) == (8, "") and "[E-WRITE]" in stderr, stderr
    (kept,) = checkpoint.Store(tmp_path / "out").checkpoints()
    assert kept.name == "checkpoint-2" and checkpoint.damage(kept) is None
    assert not list((tmp_path / "out.partial").glob(".saving*")) and not (tmp_path / "out").exists()
    config = config_of(small_model("gpt2"), tmp_path / "out", resume=True)
    assert trainings(tmp_path, "clm", config) == (0, "", "")
    assert weights(tmp_path / "out") == unbroken("clm")


def test_memory_that_ends_leaves_the_last_checkpoint(
    trainings: Trainings, unbroken: Unbroken, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    """F127."""
    config = config_of(small_model("gpt2"), tmp_path / "out")
    status, stdout, stderr = trainings(tmp_path, "clm", config, memory=3)
    assert (status, stdout) == (11, "") and "[E-MEMORY]" in stderr, stderr
    (kept,) = checkpoint.Store(tmp_path / "out").checkpoints()
    assert kept.name == "checkpoint-2" and checkpoint.damage(kept) is None
    config = config_of(small_model("gpt2"), tmp_path / "out", resume=True)
    assert trainings(tmp_path, "clm", config) == (0, "", "")
    assert weights(tmp_path / "out") == unbroken("clm")


def test_the_newest_is_told_by_its_step_whatever_the_clock_says(tmp_path: Path) -> None:
    with checkpoint.open_store(tmp_path / "out", {}, resume=False, restart=False) as store:
        for step in (2, 4, 10):
            with store.saving(step) as folder:
                (folder / "model.safetensors").write_bytes(b"weights")
            os.utime(store.folder / f"checkpoint-{step}", (10_000 - step, 10_000 - step))
        store.rotate(1, best=2)
        assert [path.name for path in store.checkpoints()] == ["checkpoint-2", "checkpoint-10"]
        found = store.newest()
        assert found is not None and found.step == 10


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with checkpoint.open_store(tmp_path / "out", {}, resume=False, restart=False) as store:
        with pytest.raises(FileNotFoundError), store.saving(3) as folder:
            shutil.copy(tmp_path / "nothing", folder)
        assert store.checkpoints() == [] and store.newest() is None
        assert sorted(path.name for path in store.folder.iterdir()) == ["lock", "run.json"]


def test_a_manifest_lists_every_file_by_its_hash(broken_off: Path) -> None:
    folder = broken_off / "out.partial" / "checkpoint-4"
    listed = json.loads((folder / "manifest.json").read_bytes())
    assert listed["step"] == 4
    assert listed["files"].keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}
    for name, entry in listed["files"].items():
        assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert "training_args.bin" not in listed["files"]
