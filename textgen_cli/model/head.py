"""A network's head by itself: hidden states of chosen positions in, their logits out.

Every architecture makes logits in its own way (layers, scaling, a bias, capping). So the network's own forward does
it here too, with its trunk giving the hidden states it is handed. Knows nothing of texts and batches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

CHUNK = 2_000_000  # logits held at once: 8 MB in float32, some of them several times over

# How an architecture fails whose trunk takes or gives other things than most.
_UNFIT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class Head:
    """What `net` does behind `trunk`, the modules of it that are left out; `probe`: a small input it takes.

    `splits` is False where the head cannot be had apart; then the network must be run whole.
    """

    def __init__(self, net: Any, trunk: Sequence[Any], probe: Mapping[str, torch.Tensor]) -> None:
        self.net, self.trunk, self.probe = net, trunk, probe
        self.vocabulary = 0
        self.splits = False

    @property
    def positions(self) -> int:
        """How many positions make CHUNK logits, one at least."""
        return max(1, CHUNK // self.vocabulary)

    @torch.inference_mode()
    def prove(self, hidden: Callable[[], torch.Tensor]) -> None:
        """Find out whether the head makes the net's logits of `hidden` (1, T, D), the trunk's answer to the probe."""
        whole = self.net(**self.probe).logits  # (1, T, V)
        self.vocabulary = int(whole.shape[-1])
        if any(module is self.net for module in self.trunk):
            return
        try:
            apart = self.apart(hidden()[0])
        except _UNFIT:
            return
        same = apart.shape == whole[0].shape
        self.splits = same and torch.allclose(apart, whole[0], rtol=1e-3, atol=1e-4, equal_nan=True)

    def logits(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits in float32 of hidden states (P, D): (<= positions, V) at a time, in order."""
        for part in hidden.split(self.positions):
            yield self.apart(part).float()

    def apart(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits (P, V) of hidden states (P, D), all at once."""
        with ExitStack() as stack:
            for module in self.trunk:
                stack.enter_context(_giving(module, hidden[None]))
            found: torch.Tensor = self.net(**self.probe).logits
        return found[0]


@contextmanager
def _giving(module: Any, hidden: torch.Tensor) -> Iterator[None]:
    """Let a module answer with these hidden states (1, P, D), whatever it is asked."""
    output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)
    before = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
