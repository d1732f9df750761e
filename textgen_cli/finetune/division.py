"""What a launcher asks for that divides the weights among the processes: FSDP 2, told by accelerate's variables.

Everything else that divides weights is refused. Knows no torch.
"""

import os
from dataclasses import dataclass

from textgen_cli.errors import UsageError

FSDP = "ACCELERATE_USE_FSDP"
LAUNCHER = "accelerate launch"

# What accelerate tells the processes that it starts -> its option.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
}
# Settings of FSDP that are switched on -> the option, and what to do instead.
WITHOUT = {
    "FSDP_OFFLOAD_PARAMS": ("--fsdp_offload_params", "leave it out"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("--fsdp_activation_checkpointing", "use finetune's own --recompute"),
}


@dataclass(frozen=True)
class Division:
    """How the weights are divided."""

    layers: tuple[str, ...] | None = None  # classes that are gathered one by one; None: the network's layers
    reshard: bool = True  # a layer's whole weights are given up behind its forward pass


def asked() -> Division | None:
    """What the launcher asks for; None: each process holds the whole network. UsageError E-CONFLICT."""
    for name, option in REFUSED.items():
        if _on(name):
            fact = "divides the weights in a way that is not supported"
            raise UsageError(
                "E-CONFLICT", f"{LAUNCHER} {option}", fact, hint="use --use_fsdp --fsdp_version 2"
            )
    if not _on(FSDP):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("E-CONFLICT", f"{LAUNCHER} --use_fsdp", "is version 1", hint="add --fsdp_version 2")
    for name, (option, hint) in WITHOUT.items():
        if _on(name):
            raise UsageError("E-CONFLICT", f"{LAUNCHER} {option}", "is not supported", hint=hint)
    return Division(_layers(), os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in ON)


def _layers() -> tuple[str, ...] | None:
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP").upper()
    if policy == "NO_WRAP":
        return ()
    if policy != "TRANSFORMER_BASED_WRAP":
        option = f"{LAUNCHER} --fsdp_auto_wrap_policy {policy}"
        raise UsageError("E-CONFLICT", option, "is not supported", hint="TRANSFORMER_BASED_WRAP or NO_WRAP")
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    return tuple(name.strip() for name in named.split(",")) if named else None


def taken() -> Division | None:
    """As `asked`; and the libraries, which would divide by themselves, are told of none."""
    found = asked()
    os.environ.pop(FSDP, None)
    return found


ON = ("1", "true")


def _on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ON
