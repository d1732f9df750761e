"""A training that DeepSpeed divides: what it is told, its checkpoints read without running code, the whole again.

DeepSpeed is an extra. Its checkpoints are pickles: here they are read by torch's restricted unpickling, which builds
tensors, plain values and the few plain classes that DeepSpeed writes, and nothing else. Knows no trainer.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from textgen_cli.errors import UsageError
from textgen_cli.finetune.division import AUTO, ZERO

# What a configuration that cannot be obeyed is met with; the last two of an optimizer that there is not.
FAULTS = ValueError, AssertionError, KeyError, TypeError, AttributeError
OWN_WORDS = "auto in its configuration takes what finetune is told"


def begin(settings: Mapping[str, Any]) -> None:
    """Make DeepSpeed ready for this process. Raises UsageError E-CONFLICT for a configuration that it refuses."""
    import deepspeed  # noqa: PLC0415 - an extra

    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    # An exchange through shared memory that it compiles at its first use, for a minute; gloo is there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from deepspeed.runtime.config import DeepSpeedConfig  # noqa: PLC0415 - an extra

    plain = _without_auto(settings)
    plain.pop("train_batch_size", None)
    try:
        DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1} | plain)
    except FAULTS as error:
        raise refused(error) from error


def _without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_auto(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if value != AUTO
    }


def unbuilt(error: Exception) -> bool:
    """Whether an operation that DeepSpeed compiles could not be compiled."""
    return any(
        word in str(error) for word in ("building extension", "failed to build", "JIT load", "CUDA_HOME")
    )


def refused(error: Exception) -> UsageError:
    """What DeepSpeed or the library say of a configuration, as an error of ours."""
    return UsageError("E-CONFLICT", ZERO, _said(error), hint=OWN_WORDS)


def _said(error: Exception) -> str:
    listed = getattr(error, "errors", None)
    if listed is not None:  # of pydantic: its first line counts the faults, and names none
        first = listed(include_url=False)[0]
        return ": ".join([".".join(map(str, first["loc"])), first["msg"]] if first["loc"] else [first["msg"]])
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("ds ")), lines[0] if lines else "is refused")
    return said.removeprefix("ds ").replace(" vs hf ", ", but finetune is told ")


# --- a checkpoint


def careful(engine: Any) -> None:
    """Let the engine read checkpoints without running what is in them."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine  # noqa: PLC0415 - an extra
    from deepspeed.runtime.fp16.loss_scaler import LossScaler  # noqa: PLC0415 - likewise
    from deepspeed.runtime.zero.config import ZeroStageEnum  # noqa: PLC0415 - likewise
    from deepspeed.utils.tensor_fragment import fragment_address  # noqa: PLC0415 - likewise

    plain = [LossScaler, ZeroStageEnum, fragment_address]

    class Careful(TorchCheckpointEngine):  # type: ignore[misc] # the package has no types
        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals(plain):
                return torch.load(path, map_location=map_location, weights_only=True)

    engine.checkpoint_engine = Careful(engine._config)
    engine._copy_recovery_script = lambda _folder: (
        None
    )  # a program beside them, which would read without care


def save(engine: Any, folder: Path) -> None:
    """Write the training's state: each process its part. What does not learn is left out."""
    engine.save_checkpoint(
        str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=_frozen(engine)
    )


def load(engine: Any, folder: Path) -> None:
    """Take the training's state from a checkpoint."""
    path, _ = engine.load_checkpoint(
        str(folder.parent), tag=folder.name, load_module_strict=not _frozen(engine)
    )
    assert path is not None


def _frozen(engine: Any) -> bool:
    return not all(p.requires_grad for p in engine.module.parameters())


# --- the weights


def own(net: Any) -> dict[str, torch.Tensor]:
    """What this process holds of the weights that learn, by name."""
    return {
        name: getattr(p, "ds_tensor", p).detach() for name, p in net.named_parameters() if p.requires_grad
    }


def full(p: torch.nn.Parameter) -> torch.Tensor:
    """All of a weight, with the precision that it learns in. All processes have to come."""
    from deepspeed.runtime.zero import GatheredParameters  # noqa: PLC0415 - likewise
    from deepspeed.utils import safe_get_full_fp32_param  # noqa: PLC0415 - an extra

    learnt: torch.Tensor | None = safe_get_full_fp32_param(p) if p.requires_grad else None
    if learnt is not None:
        return learnt
    if not hasattr(p, "ds_id"):
        return p.detach()
    with GatheredParameters([p]):
        return p.detach().clone()


def end() -> None:
    """Networks that are loaded from now on are whole."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config  # noqa: PLC0415 - an extra

    unset_hf_deepspeed_config()
