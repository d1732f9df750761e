"""How a network is computed while it learns: what it would hold and need not, each thing proved before it is left out.

Of networks that speak the logits (headloss.py); beside an adapter the copies of what its layers take (beside.py) and
what is quickly made again (again.py). It knows no data but the row that the proofs are made with.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from textgen_cli.events import Notice, Report
from textgen_cli.finetune import again, beside
from textgen_cli.finetune.again import Kept
from textgen_cli.finetune.headloss import PROBE, UNFIT, Spared, proved, replaced
from textgen_cli.finetune.ways import Base
from textgen_cli.model import device

Steps = tuple[tuple[Any, Callable[..., Any]], ...]  # layers with what they do instead of their forward
SPREAD = 0.02  # of the weights of an adapter that is tried; it begins with zeros, which would hide much
# Of the length of all gradients may differ: those of our arithmetic in 32 bits and in 16, whose rounding adds up over
# the layers, and those of results that are made again, which are the same but for the order of some sums on a GPU.
NEAR, NEAR_HALF, SAME = 1e-3, 0.15, 1e-2


@dataclass(frozen=True)
class Thrift:
    """What is left out of a network's forward."""

    spared: Spared | None = None
    layers: Steps = ()
    kept: Kept | None = None

    @contextmanager
    def learning(self) -> Iterator[None]:
        """For a step forth and back."""
        with ExitStack() as stack:
            stack.enter_context(self.measuring())
            for module, forward in self.layers:
                stack.enter_context(replaced(module, "forward", forward))
            yield

    def holding(self) -> AbstractContextManager[None]:
        """For the way forth within it."""
        return nullcontext() if self.kept is None else self.kept.holding()

    def measuring(self) -> AbstractContextManager[None]:
        """For a batch that nothing is learnt from."""
        return nullcontext() if self.spared is None else self.spared.instead()


def found(
    base: Base, batch: Mapping[str, torch.Tensor], counts: bool, recompute: bool, report: Report
) -> Thrift:
    """What can be left out of this network.

    batch: a row as it learns it; counts: it takes the number of tokens; recompute: it holds the inputs of
    its layers alone as it is.
    """
    spared, why = proved(base.net, batch, counts) if base.family in ("causal", "masked") else (None, "")
    if why:
        report(Notice(f"{base.name}: all logits of a batch are held at once: {why}"))
    if not base.adapter:
        return Thrift(spared)
    layers, kept = _layers(base, batch, None if recompute else Kept())
    if not layers:
        report(Notice(f"{base.name}: the adapter's layers are the library's"))
    return Thrift(spared, layers, kept)


def _layers(base: Base, batch: Mapping[str, torch.Tensor], kept: Kept | None) -> tuple[Steps, Kept | None]:
    """As many of the ways to hold less beside an adapter as give its gradients."""
    plain = tuple(beside.steps(base.net, None))
    if not plain:
        return (), None
    with _tried(base) as gradients:
        right = gradients(Thrift(), batch)
        ours = gradients(Thrift(layers=plain), batch)
        if not _near(ours, right, NEAR_HALF if base.autocast else NEAR):
            return (), None
        if kept is None:
            return plain, None
        lean = Thrift(layers=(*beside.steps(base.net, kept), *again.steps(base.net, kept)), kept=kept)
        if not _near(gradients(lean, batch), ours, SAME):
            return plain, None
    return lean.layers, kept


Gradients = list[torch.Tensor] | None


@contextmanager
def _tried(base: Base) -> Iterator[Callable[[Thrift, Mapping[str, torch.Tensor]], Gradients]]:
    """A function that gives the gradients of the adapter's weights, which are others until the end of the block."""
    weights = [p for p in base.net.parameters() if p.requires_grad]
    before, state, learning = [p.detach().clone() for p in weights], device.random_state(), base.net.training
    try:
        with torch.no_grad():
            for weight in weights:
                weight.normal_(0, SPREAD)
        now = device.random_state()

        def gradients(thrift: Thrift, batch: Mapping[str, torch.Tensor]) -> Gradients:
            device.restore_random(now)
            return _gradients(base, weights, thrift, batch)

        yield gradients
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
        base.net.train(learning)
        device.restore_random(state)


def _gradients(
    base: Base, weights: list[Any], thrift: Thrift, batch: Mapping[str, torch.Tensor]
) -> Gradients:
    """None where the network cannot be computed so."""
    asked = dict(batch)
    if base.family == "causal":
        asked = {name: value[:, :PROBE] for name, value in batch.items()}
        asked["labels"] = asked["input_ids"]  # what is learnt may stand behind so few tokens
    try:
        base.net.train()
        with thrift.learning():
            with thrift.holding(), torch.autocast(base.device.type, torch.bfloat16, enabled=base.autocast):
                loss = base.net(**asked).loss
            return list(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True))
    except UNFIT as error:
        if device.out_of_memory(error):
            raise
        return None


def _near(found: Gradients, right: Gradients, share: float) -> bool:
    if found is None or right is None:
        return False
    apart = sum(float((one - two).double().square().sum()) for one, two in zip(found, right, strict=True))
    size = sum(float(one.double().square().sum()) for one in right)
    return apart <= share**2 * size
