"""DeepSpeed's division: what its configuration may say, and that its checkpoints are read without running code.

test_group.py trains two processes with it.
"""

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from textgen_cli.errors import UsageError
from textgen_cli.finetune import zero
from textgen_cli.finetune.division import Zero, asked, taken

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


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, r"E-CONFIG\] zero.json: No such file"),
        ("{", r"E-CONFIG\] zero.json: Expecting"),
        ("[]", r"E-CONFIG\] zero.json: is no configuration"),
        ('{"zero_optimization": 3}', r"E-CONFIG\] zero.json: is no configuration"),
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


@pytest.mark.parametrize("settings", [{"stage": 7}, {"stage": 3, "no_such_key": True}, {"stage": "x"}])
def test_what_deepspeed_does_not_know_is_refused_before_a_model_is_read(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"E-CONFLICT\] accelerate launch --use_deepspeed: \S+"):
        zero.begin({"zero_optimization": settings})


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
