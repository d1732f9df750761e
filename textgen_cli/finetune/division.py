"""What a launcher asks for that divides the work among the processes: FSDP 2 or DeepSpeed, by accelerate's variables.

Everything else that divides weights is refused. Knows no torch.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textgen_cli.errors import UsageError

FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
LAUNCHER = "accelerate launch"
ZERO = f"{LAUNCHER} --use_deepspeed"

# What accelerate tells the processes that it starts -> its option.
REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
}
ON, OFF = ("1", "true"), ("0", "false")
INSTEAD = "use --use_fsdp --fsdp_version 2, or --use_deepspeed"
# Settings of FSDP that are switched on -> the option, and what to do instead.
WITHOUT = {
    "FSDP_OFFLOAD_PARAMS": ("--fsdp_offload_params", "leave it out"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("--fsdp_activation_checkpointing", "use finetune's own --recompute"),
}
AUTO = "auto"  # of a value in DeepSpeed's configuration: as the training is told
# What of DeepSpeed's configuration is passed on: how it divides, computes and logs.
PASSED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "sparse_gradients", "data_types", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state",
)  # fmt: skip
# What of it holds settings of its own.
PARTS = ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "data_types")
LEARNING = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
# Parameters of its optimizers and schedulers that the training is told as well.
_WARMUP = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps")
SCHEDULES = {
    "WarmupLR": _WARMUP,
    "WarmupDecayLR": (*_WARMUP, "total_num_steps"),
    "WarmupCosineLR": ("warmup_num_steps", "total_num_steps"),
}


@dataclass(frozen=True)
class Division:
    """How FSDP divides the weights."""

    layers: tuple[str, ...] | None = None  # classes that are gathered one by one; None: the network's layers
    reshard: bool = True  # a layer's whole weights are given up behind its forward pass


@dataclass(frozen=True)
class Zero:
    """That DeepSpeed divides (ZeRO, Rajbhandari et al. 2020), and its configuration."""

    settings: Mapping[str, Any]


def asked() -> Division | Zero | None:
    """What the launcher asks for; None: each process holds the whole network.

    Raises UsageError E-CONFLICT, E-EXTRA, and E-CONFIG for a configuration that cannot be read.
    """
    for name, option in REFUSED.items():
        if _on(name):
            fact = "divides the weights in a way that is not supported"
            raise UsageError("E-CONFLICT", f"{LAUNCHER} {option}", fact, hint=INSTEAD)
    if _on(DEEPSPEED):
        if importlib.util.find_spec("deepspeed") is None:
            hint = "pip install 'textgen-cli[deepspeed]'"
            raise UsageError("E-EXTRA", ZERO, "needs the package deepspeed", hint=hint)
        return Zero(_settings())
    if not _on(FSDP):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("E-CONFLICT", f"{LAUNCHER} --use_fsdp", "is version 1", hint="add --fsdp_version 2")
    for name, (option, hint) in WITHOUT.items():
        if _on(name):
            raise UsageError("E-CONFLICT", f"{LAUNCHER} {option}", "is not supported", hint=hint)
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if reshard not in ON + OFF:
        option = f"{LAUNCHER} --fsdp_reshard_after_forward {reshard}"
        raise UsageError("E-CONFLICT", option, "is of version 1", hint="true or false")
    return Division(_layers(), reshard in ON)


def _layers() -> tuple[str, ...] | None:
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP").upper()
    if policy == "NO_WRAP":
        return ()
    if policy != "TRANSFORMER_BASED_WRAP":
        option = f"{LAUNCHER} --fsdp_auto_wrap_policy {policy}"
        raise UsageError("E-CONFLICT", option, "is not supported", hint="TRANSFORMER_BASED_WRAP or NO_WRAP")
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    return tuple(name.strip() for name in named.split(",")) if named else None


def _settings() -> dict[str, Any]:
    """DeepSpeed's configuration: of its file, else of the launcher's options."""
    path = _told("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    settings = _of_options() if path is None else _of_file(path)
    settings = {name: value for name, value in settings.items() if value is not None}
    for name in sorted(settings.keys() - set(PASSED)):
        raise UsageError("E-CONFLICT", f"{ZERO}: {name}", "is not supported", hint="leave it out")
    for name in PARTS:
        _part(settings, name)
    # The library's own defaults would hold where nothing is said, whatever the training is told.
    settings = dict.fromkeys(LEARNING, AUTO) | {"zero_optimization": {}} | settings
    settings["bf16"] = {"enabled": AUTO} | _part(settings, "bf16")
    if "optimizer" in settings:
        _fill(settings, "optimizer", ("lr", "weight_decay"))
    if "scheduler" in settings:
        _fill(settings, "scheduler", SCHEDULES.get(str(_part(settings, "scheduler").get("type")), ()))
    for name in ("offload_optimizer", "offload_param"):
        if _part(_part(settings, "zero_optimization"), name).get("device") == "nvme":
            raise UsageError("E-CONFLICT", f"{ZERO}: {name}", "to nvme is not supported", hint="cpu or none")
    return settings


def _fill(settings: dict[str, Any], name: str, missing: tuple[str, ...]) -> None:
    part = _part(settings, name)
    settings[name] = part | {"params": dict.fromkeys(missing, AUTO) | _part(part, "params")}


def _part(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = settings.get(name)
    if not isinstance(found, dict | None):
        raise UsageError("E-CONFLICT", f"{ZERO}: {name}", f"holds settings, and is not {found!r}")
    return dict(found or {})


def _of_file(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_bytes())
        if not isinstance(found, dict):
            raise ValueError("is no configuration of DeepSpeed")
    except (OSError, ValueError) as error:
        fact = getattr(error, "strerror", None) or str(error)
        raise UsageError("E-CONFIG", path, fact, hint=f"--deepspeed_config_file of {LAUNCHER}") from error
    return found


def _of_options() -> dict[str, Any]:
    stage = _told("ACCELERATE_DEEPSPEED_ZERO_STAGE") or "2"
    zero: dict[str, Any] = {"stage": int(stage) if stage.isdigit() else stage}
    for name in ("offload_optimizer", "offload_param"):
        device = _told(f"ACCELERATE_DEEPSPEED_{name.upper()}_DEVICE")
        if device is not None:
            zero[name] = {"device": device}
    steps = _number("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", int)
    return {
        "zero_optimization": zero,
        "gradient_accumulation_steps": AUTO if steps == 1 else steps,  # it writes 1 where nobody has said it
        "gradient_clipping": _number("ACCELERATE_GRADIENT_CLIPPING", float),
    }


def _number(name: str, kind: Callable[[str], float]) -> float | str:
    value = _told(name) or AUTO
    try:
        return AUTO if value == AUTO else kind(value)
    except ValueError:
        raise UsageError("E-CONFLICT", name, f"{value!r} is not a number") from None


def _told(name: str) -> str | None:
    value = os.environ.get(name, "none")
    return None if value.lower() in ("", "none") else value


def taken() -> Division | Zero | None:
    """As `asked`; and the libraries, which would divide by themselves, are told of none but DeepSpeed."""
    found = asked()
    os.environ.pop(FSDP, None)
    return found


def _on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ON
