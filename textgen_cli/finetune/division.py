"""What a launcher asks for that divides the weights among the processes: FSDP 2, told by accelerate's variables.

Everything else that divides weights is refused. Knows no torch.
"""

import os
from dataclasses import dataclass

from textgen_cli.errors import UsageError

FSDP = "ACCELERATE_USE_FSDP"
LAUNCHER = "accelerate launch"

# What accelerate tells the processes that it starts -> its option, and what speaks against it.
OTHER = "divides the weights in a way that is not supported"
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": (
        "--use_deepspeed",
        "its checkpoints are pickles that could run code when they are read",
    ),
    "ACCELERATE_USE_MEGATRON_LM": ("--use_megatron_lm", OTHER),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("--use_parallelism_config", OTHER),
}
ON, OFF = ("1", "true"), ("0", "false")
INSTEAD = "use --use_fsdp --fsdp_version 2"
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
    for name, (option, fact) in REFUSED.items():
        if _on(name):
            raise UsageError("E-CONFLICT", f"{LAUNCHER} {option}", fact, hint=INSTEAD)
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


def taken() -> Division | None:
    """As `asked`; and the libraries, which would divide by themselves, are told of none."""
    found = asked()
    os.environ.pop(FSDP, None)
    return found


def _on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ON
