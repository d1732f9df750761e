"""What a training takes of memory at its peak, from a config and the headers of weights; none is read.

The arithmetic is that of `model/cost.py`; here stands which weights learn, by the way of training.
"""

import math
import re
from collections.abc import Mapping
from typing import Literal

from textgen_cli.config.finetune import WayConfig
from textgen_cli.model import anatomy, cost, room
from textgen_cli.model.check import Checked
from textgen_cli.model.cost import Network, Work
from textgen_cli.model.family import Family
from textgen_cli.model.weights import Tensor, read_header

_EMBEDDINGS = re.compile(r"embed|\bwte\b|\bwpe\b|lm_head|\bshared\b")
_LAYER = re.compile(r"\.(?:layers?|h|block)\.(\d+)\.")


def estimate(
    checked: Checked,
    way: WayConfig,
    family: Family,
    rows: int,
    length: int,
    *,
    half: bool,
    recompute: bool,
    form: Literal["int8", "int4"] | None = None,
) -> tuple[dict[str, int], int]:
    """The peak in bytes with its parts, and the operations of one batch of so many rows of padded tokens.

    half: computes in bfloat16; form: of the weights beside an adapter. ({}, 0) where the config does not tell the
    sizes.
    """
    tensors: dict[str, Tensor] = {}
    for path in checked.weights:
        tensors |= read_header(path)
    sizes = anatomy.sizes(checked.config)
    if sizes is None:
        return {}, 0
    network = Network(checked.config, family, sizes, anatomy.count(tensors, checked.config, family))
    work = Work(
        job="finetune",
        batch=rows,
        length=length,
        dtype="bfloat16" if half else "float32",
        quantize=form,
        method="full" if way.lora is None else "qlora" if form else "lora",
        recompute=recompute,
        copied="quantization_config" in checked.config,
    )
    memory = cost.learning(network, work, _learning(dict(anatomy.shapes_of(tensors)), way), room.taken() or 0)
    return memory, int(cost.operations(network, work)["flops"])


def _learning(shapes: Mapping[str, tuple[int, ...]], way: WayConfig) -> int:
    """How many parameters learn."""
    if way.lora is not None:
        return sum(way.lora * sum(shape) for name, shape in shapes.items() if _adapted(name, shape, way))
    found = 0
    for name, shape in shapes.items():
        layer = _LAYER.search(name)
        frozen = way.freeze and (
            int(layer[1]) < way.freeze if layer else _EMBEDDINGS.search(name) is not None
        )
        found += 0 if frozen else math.prod(shape)
    return found


def _adapted(name: str, shape: tuple[int, ...], way: WayConfig) -> bool:
    """Whether a weight gets a LoRA adapter: those named, else all linear ones."""
    if len(shape) != 2:
        return False
    if way.lora_targets is not None:
        return name.split(".")[-2:-1] != [] and name.split(".")[-2] in way.lora_targets.split(",")
    return not _EMBEDDINGS.search(name)
