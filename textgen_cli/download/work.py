"""`--for`: what a model takes to generate, score or learn here: memory by part, operations, time, and does it fit.

Memory and operations are arithmetic (`model/cost.py`); the time is that arithmetic by what a second or two on this
machine measure. No weight is read, so a model of the Hub need not be fetched.
"""

import importlib
from dataclasses import replace
from typing import Any

from textgen_cli.config import DownloadConfig
from textgen_cli.errors import ModelError
from textgen_cli.events import Progress, Report
from textgen_cli.model import anatomy, cost, device, room, speed
from textgen_cli.model.cost import Network, Work
from textgen_cli.model.inspect import Facts, inspect

LENGTH = 1024  # tokens of a row where nobody asks for a number


def estimate(config: DownloadConfig, report: Report) -> dict[str, Any]:
    """What the work that `config.knowing` names takes, as JSON has it.

    Raises what `inspect` raises; ModelError E-CONFIG where the config does not tell the sizes, UsageError E-DEVICE.
    """
    facts = inspect(config.model, report, config.getting.include)
    network = network_of(facts)
    placement = device.place(
        config.model, "finetune" if config.knowing.for_ == "finetune" else _purpose(config)
    )
    work = _work(config, facts, placement)
    libraries = _libraries(work) if placement.device.type == "cpu" else 0
    free = device.free_memory(placement.device)
    free = room.free() if free is None else free
    # What this process has taken already is no longer free, and is part of the peak all the same.
    left = None if free is None else free + libraries
    parts = cost.memory(network, work, libraries)
    report(Progress("measure", facts.model))
    sizes = network.sizes
    rate = speed.operations(placement, work.tokens, sizes.hidden, sizes.inner, learns=work.job == "finetune")
    done = cost.operations(network, work)
    seconds = done["flops"] / rate
    time = {"seconds": seconds, "tokens_a_second": work.tokens / seconds}
    measured = {"flops_a_second": rate}
    if work.job == "generate":
        measured["bytes_a_second"] = speed.reading(placement, sizes.hidden, sizes.inner)
        step = cost.token_bytes(network, work) / measured["bytes_a_second"]
        time["generated_a_second"] = work.batch / step
    return {
        "model": facts.model,
        "for": work.job,
        "method": work.method if work.job == "finetune" else None,
        "device": str(placement.device),
        "dtype": work.dtype,
        "quantize": work.quantize,
        "batch": work.batch,
        "length": work.length,
        "memory": parts,
        "free": left,
        "fits": None if left is None else parts["peak"] <= left,
        "compute": done | {"tokens": work.tokens, **time},
        "measured": measured,
        "ways": [] if left is None else cost.ways(network, work, libraries, left),
    }


def network_of(facts: Facts) -> Network:
    """What the arithmetic needs. ModelError E-CONFIG where it is not told."""
    if facts.sizes is None or facts.weights is None:
        raise ModelError("E-CONFIG", facts.model, "does not tell its sizes: nothing can be estimated")
    weights = facts.weights
    if any(name.lower().endswith(".gguf") for name, _ in facts.files):
        # What is loaded is the copy of it in the cache, which is in float32 whatever the file has.
        weights = replace(weights, stored={"F32": 4 * weights.total})
    return Network(facts.config, facts.family, facts.sizes, weights)


def _purpose(config: DownloadConfig) -> device.Purpose:
    return "score" if config.knowing.for_ == "score" else "generate"


def _work(config: DownloadConfig, facts: Facts, placement: device.Placement) -> Work:
    asked = config.knowing
    assert asked.for_ is not None
    context = anatomy.context_of(facts.config)
    length = asked.length or min(context or LENGTH, LENGTH)
    return Work(
        job=asked.for_,
        batch=asked.batch or cost.default_batch(asked.for_, length),
        length=length,
        dtype=str(placement.dtype).removeprefix("torch."),
        quantize=config.model.quantize,
        method=asked.method or "full",
        recompute=asked.recompute,
        mapped=placement.device.type == "cpu",
    )


# What the commands import besides torch: half a gigabyte is more than many a model.
_IMPORTED = ("transformers.modeling_utils", "transformers.generation.utils")
_TO_LEARN = ("transformers.trainer", "datasets")
_TO_ADAPT = ("peft",)


def _libraries(work: Work) -> int:
    """Bytes that this process holds once it has imported what such work imports."""
    learns = work.job == "finetune"
    for name in (*_IMPORTED, *(_TO_LEARN if learns else ()), *(_TO_ADAPT if work.method != "full" else ())):
        importlib.import_module(name)
    return room.taken() or 0
