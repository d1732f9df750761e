"""What becomes of a loaded network: adapters merged into its weights, these quantised, other adapters beside them.

Owns the order of these and which adapter goes where. It does not know how a model is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from textgen_cli.config import ModelConfig
from textgen_cli.errors import ModelError, OutOfMemory
from textgen_cli.events import Report
from textgen_cli.model import device, quantize
from textgen_cli.model.source import Located

if TYPE_CHECKING:
    from textgen_cli.model.adapter import Adapter

# The names that heads of labels and spans have in transformers' networks.
LABELLING = ("score", "classifier", "classification_head", "qa_outputs")


@dataclass(frozen=True)
class Plan:
    """What is to be done, in this order."""

    merged: Sequence["Adapter"] = ()
    form: quantize.Format | None = None  # that the network is then quantised to
    beside: Sequence["Adapter"] = ()  # that learnt beside such weights
    trains: bool = False  # gradients are to pass through it, and heads of labels learn
    rounds: bool = False  # products with codes may be rounded to bfloat16


def plan(
    config: ModelConfig,
    form: quantize.Format | None,
    base: Located,
    report: Report,
    *,
    trains: bool = False,
) -> Plan:
    """Find the adapters and say which go where. `form`: of the weights in the folder.

    Raises what `adapter.find` raises, ModelError E-QUANTIZE for an adapter that cannot be added to codes.
    """
    if not config.adapter:
        return Plan(form=config.quantize, trains=trains)
    from textgen_cli.model import adapter  # peft costs seconds

    here = None if trains else form or config.quantize
    found = adapter.find(base, config, report)
    merged = [one for one in found if not one.beside or one.beside != here]
    if form and merged:
        fact = "has quantised weights, to which only an adapter that learnt beside the same can be added"
        raise ModelError("E-QUANTIZE", base.label, fact)
    return Plan(merged, config.quantize, [one for one in found if one not in merged], trains)


def made(net: Any, planned: Plan, name: str, where: torch.device, report: Report) -> Any:
    """The network as planned, on its device. Raises OutOfMemory and what `adapter` and `quantize` raise."""
    try:
        if planned.merged:
            from textgen_cli.model import adapter

            net = adapter.merge(net, planned.merged, report)
        if planned.form:
            quantize.apply(net, planned.form, name, report, LABELLING if planned.trains else ())
        net = net.to(where)
        quantize.arrange(net, kernels=not planned.trains, rounds=planned.rounds)
        if planned.beside:
            from textgen_cli.model import adapter

            net = adapter.attach(net, planned.beside, report)
    except (RuntimeError, MemoryError) as error:
        if not device.out_of_memory(error):
            raise
        raise OutOfMemory("E-MEMORY", name, "does not fit into memory while it is changed") from error
    return net
