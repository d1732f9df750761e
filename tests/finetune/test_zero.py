"""DeepSpeed's division: what its configuration may say, and that its checkpoints are read without running code.

test_group.py trains two processes with it.
"""

import json
import os
import pickle
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from parts.training import Trainings, configured
from safetensors.torch import load_file

from textgen_cli.config.finetune import TrainingConfig
from textgen_cli.errors import UsageError
from textgen_cli.events import silent
from textgen_cli.finetune import plan, zero
from textgen_cli.finetune.division import Zero, asked, taken
from textgen_cli.finetune.group import Group, joined
from textgen_cli.finetune.stop import Stop, Stopped
from textgen_cli.finetune.voice import Voice

pytest.importorskip("deepspeed")
AUTO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
}


@pytest.fixture(autouse=True)
def _launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in os.environ:
        if name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)
    launched(monkeypatch)


def launched(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """Set what `accelerate launch` tells the processes that it starts with these options."""
    rest = (
        "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0 x"
    )
    arguments = launch_command_parser().parse_args(["--use_deepspeed", *options, *rest.split()])
    arguments.deepspeed_fields_from_accelerate_config = ""  # set where its own settings are merged in
    prepare: Any = prepare_deepspeed_cmd_env
    for name, value in prepare(arguments)[1].items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ("", {"zero_optimization": {"stage": 2}}),
        ("--gradient_accumulation_steps 1", {"zero_optimization": {"stage": 2}}),
        (
            "--zero_stage 3 --offload_optimizer_device cpu --gradient_accumulation_steps 4 --gradient_clipping 0.5",
            {
                "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
                "gradient_accumulation_steps": 4,
                "gradient_clipping": 0.5,
            },
        ),
    ],
)
def test_what_the_launchers_options_say(
    options: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch, *options.split())
    assert asked() == taken() == Zero(AUTO | settings)


def test_what_a_file_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "zero_optimization": {"stage": 1, "overlap_comm": True},
        "train_batch_size": 8,
        "bf16": {"enabled": False},
    }
    launched(monkeypatch, "--deepspeed_config_file", "zero.json")
    Path("zero.json").write_text(json.dumps(said))
    found = asked()
    assert found == Zero(AUTO | said)
    zero.begin(said)


def test_what_a_file_leaves_out_is_as_the_training_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, "--deepspeed_config_file", "zero.json")
    said = {
        "optimizer": {"type": "AdamW", "params": {"lr": 0.5}},
        "scheduler": {"type": "WarmupDecayLR"},
        "bf16": {},
        "zero_optimization": None,
        "gradient_accumulation_steps": 1,
    }
    Path("zero.json").write_text(json.dumps(said))
    filled = {
        "optimizer": {"type": "AdamW", "params": {"lr": 0.5, "weight_decay": "auto"}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": dict.fromkeys(
                ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"
            ),
        },
        "zero_optimization": {},
        "gradient_accumulation_steps": 1,
    }
    assert asked() == Zero(AUTO | filled)


@pytest.mark.parametrize("name", ["GRADIENT_CLIPPING", "GRADIENT_ACCUMULATION_STEPS"])
def test_a_variable_that_is_no_number_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", "two")
    with pytest.raises(UsageError, match=rf"E-CONFLICT\] ACCELERATE_{name}: 'two' is not a number"):
        asked()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, r"E-CONFIG\] zero.json: No such file"),
        ("{", r"E-CONFIG\] zero.json: Expecting"),
        ("[]", r"E-CONFIG\] zero.json: is no configuration"),
        ('{"zero_optimization": 3}', r"zero_optimization: holds settings, and is not 3"),
        ('{"bf16": true}', r"E-CONFLICT.* bf16: holds settings, and is not True"),
        (
            '{"zero_optimization": {"offload_param": "cpu"}}',
            r"offload_param: holds settings, and is not 'cpu'",
        ),
        ('{"flops_profiler": {"enabled": true}}', r"flops_profiler: is not supported"),  # it writes to stdout
        (
            '{"autotuning": {}}',
            r"E-CONFLICT\] accelerate launch --use_deepspeed: autotuning: is not supported",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
            r"E-CONFLICT.* offload_param: to nvme is not supported",
        ),
    ],
)
def test_a_file_that_cannot_be_obeyed_is_refused(
    text: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch, "--deepspeed_config_file", "zero.json")
    if text is not None:
        Path("zero.json").write_text(text)
    with pytest.raises(UsageError, match=told):
        asked()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"stage": 7}, "stage: Input should be "),
        ({"stage": 3, "no_such_key": True}, "no_such_key: "),
        ({"stage": "x"}, "stage: "),
        ({"stage": 3, "offload_param": {"device": "moon"}}, r"offload_param.device: "),
    ],
)
def test_what_deepspeed_does_not_know_is_refused_by_its_name_before_a_model_is_read(
    settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=rf"E-CONFLICT\] accelerate launch --use_deepspeed: {named}"):
        zero.begin({"zero_optimization": settings})


def test_one_process_is_left_behind_a_step_not_in_its_midst() -> None:
    """DeepSpeed has changed the weights before the library calls a step done."""
    stop = Stop(Group(division=Zero({})))
    voice: Any = Voice(TrainingConfig(), cast(Any, None), cast(Any, None), stop, silent)
    voice.on_step_begin(None, None, None)
    stop.handle(signal.SIGTERM, None)
    voice.on_pre_optimizer_step(None, None, None)
    with pytest.raises(Stopped):
        stop.agree()


@pytest.mark.slow
def test_a_training_that_was_over_is_finished_as_it_would_have_been(
    small_model: Callable[..., Path], tmp_path: Path
) -> None:
    alone = Trainings(
        ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="3", DS_ACCELERATOR="cpu",
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
    )  # fmt: skip
    wild = {"learning_rate": 1.0, "schedule": "constant", "eval_steps": 1, "patience": 1}
    config = configured(small_model("gpt2"), tmp_path / "out", training=wild, resume=True)
    final = tmp_path / "out.partial" / "final"
    try:
        hurt = {"signum": signal.SIGKILL, "call": 1, "named": ".partial/final/textgen.json"}
        assert alone(tmp_path, "clm", config, **hurt)[0] == -signal.SIGKILL
        weights = load_file(final / "model.safetensors")
        status, _, told = alone(tmp_path, "clm", config)
        assert status == 0, told
    finally:
        alone.close()
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(value, weights[name])


def test_a_process_that_no_launcher_has_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="ACCELERATE_USE_DEEPSPEED: is set, and no launcher"), joined(True):
        pass


class Trap:
    """What does something where it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("sprung"),)


def test_checkpoints_are_read_without_running_what_is_in_them() -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    engine = SimpleNamespace(_config=None)
    zero.careful(engine)
    torch.save({"scale": LossScaler(2.0), "stage": ZeroStageEnum(3), "value": torch.ones(2)}, "fair.pt")
    found = engine.checkpoint_engine.load("fair.pt")
    assert (found["scale"].loss_scale, found["stage"], found["value"].tolist()) == (2.0, 3, [1, 1])
    torch.save({"value": Trap()}, "trap.pt")
    with pytest.raises(pickle.UnpicklingError):
        engine.checkpoint_engine.load("trap.pt")
    assert not Path("sprung").exists()
    torch.load("trap.pt", weights_only=False)  # else nothing was shown
    assert Path("sprung").exists()


def test_rounded_weights_do_not_come_out_without_a_word() -> None:
    half: Any = SimpleNamespace(autocast=True)
    for stage, refused in (({}, True), ({"stage": 0}, True), ({"stage": 1}, False)):
        with pytest.raises(UsageError, match="stage 0: would round") if refused else nullcontext():
            plan._check_stage(Zero({"zero_optimization": stage}), half)
    plan._check_stage(Zero({"zero_optimization": {}}), cast(Any, SimpleNamespace(autocast=False)))
