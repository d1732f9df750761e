"""The loss of words without all of their logits: a head and its cross-entropy, a few positions at a time.

A network of ours holds B·T·V logits several times over, most of what a small one takes of memory. Here its own forward
still runs, but its head hands on the hidden states, and its loss makes logits of them in pieces: what it does between
the two (scaling) then happens to the hidden states, and what it does besides (the loss of experts) is done as ever.
That this gives the same loss is true of most networks and is proved of each before it learns. It knows no task.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from textgen_cli.finetune.collate import IGNORED
from textgen_cli.model import device

CHUNK = 8_000_000  # logits at one time: 32 MB in float32, of which two or three are there at once
# Whether a place tells the next token, not its own.
SHIFTED: dict[Any, bool] = {
    ForCausalLMLoss: True,
    ForMaskedLMLoss: False,
}
LARGE = 100.0  # a logit that no network of those that bound them lets through
NEAR = 1e-4  # of the loss, and ten times as much of the length of a gradient, may differ in the proof
PROBE = 16  # tokens of a row that it is proved with

# How a network fails whose forward makes another thing of its head's answer than most.
UNFIT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class _Surprisal(torch.autograd.Function):
    """`surprisal` with its gradients, which are found on the way forth, while the logits of a piece are there.

    Hsu et al., "Liger Kernel", arXiv:2410.10989, section 3.2, in plain torch.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, items: Any) -> Any:
        wanted = ctx.needs_input_grad[:3]
        dtype = _dtype(hidden, weight)
        states, matrix = hidden.to(dtype), weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        exact = torch.promote_types(dtype, torch.float32)
        nats = torch.empty(len(targets), dtype=exact, device=hidden.device)
        slopes = [
            torch.zeros(like.shape, dtype=exact, device=like.device) if asked else None
            for like, asked in zip((hidden, weight, bias), wanted, strict=True)
        ]
        share, rows = 1 / items.to(exact), max(1, CHUNK // len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for at in range(0, len(targets), rows):
                part = slice(at, at + rows)
                chances = _log_chances(states[part], matrix, offset)  # (P, V)
                known = targets[part, None] != IGNORED  # (P, 1)
                right = targets[part, None].where(known, 0)
                nats[part] = -(chances.gather(1, right) * known)[:, 0]
                if any(wanted):
                    slope = torch.zeros_like(chances).scatter_(1, right, -share * known)
                    slope = torch.ops.aten._log_softmax_backward_data(slope, chances, 1, exact)
                    _add(slopes, part, states[part], matrix, slope)
        ctx.slopes = slopes
        ctx.dtypes = [getattr(one, "dtype", None) for one in (hidden, weight, bias)]
        ctx.mark_non_differentiable(nats)
        return nats.sum() / items, nats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Any, _: Any) -> Any:
        slopes, ctx.slopes = ctx.slopes, None  # they are changed in place: a second time they would be wrong
        if slopes is None:
            raise RuntimeError("the way back was gone already")
        parts = zip(slopes, ctx.dtypes, strict=True)
        return *(None if one is None else one.mul_(gradient).to(dtype) for one, dtype in parts), None, None


def _dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """What a linear layer computes in here."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _log_chances(states: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """(P, V) in float32 at least, of states (P, D)."""
    logits = functional.linear(states, matrix, offset)
    return functional.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


def _add(slopes: list[Any], part: slice, states: Any, matrix: Any, slope: Any) -> None:
    """Add the gradients that a piece's logits (P, V) have; their own is `slope`."""
    of_hidden, of_weight, of_bias = slopes
    if of_bias is not None:
        of_bias += slope.sum(0)
    slope = slope.to(matrix.dtype)
    if of_hidden is not None:
        of_hidden[part] = slope @ matrix
    if of_weight is not None and of_weight.dtype == slope.dtype:
        of_weight.addmm_(slope.T, states)
    elif of_weight is not None:
        of_weight += slope.T @ states


def surprisal(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, items: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nats of targets (N) by hidden states (N, D) and a head (V, D), a bias (V) or none, in float32 at least.

    Their sum over `items`, a number or a tensor, which has a gradient once; each of them (N), 0 where it is ignored.
    """
    given: Any = (hidden, weight, bias)
    if not torch.is_grad_enabled():  # which cannot be told inside: no gradient is found then
        given = (None if one is None else one.detach() for one in given)
    found: Any = _Surprisal.apply(*given, targets, torch.as_tensor(items, device=hidden.device))  # type: ignore[no-untyped-call]  # torch's
    return found[0], found[1]


@dataclass
class Spared:
    """A network whose logits are spared while it learns and is measured.

    `told`: nats and number of the tokens of each row (B, 2), of the last batch that was measured.
    """

    net: Any  # that has the head: without an adapter's wrapping
    head: torch.nn.Linear
    shifted: bool
    told: torch.Tensor | None = field(default=None)

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Until the end of the block the network's logits are its hidden states, and its loss is right all the same."""
        with replaced(self.head, "forward", _as_it_is), replaced(self.net, "loss_function", self.loss):
            yield

    def loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """What the library's loss function gives; `logits` are hidden states (B, T, D), labels (B, T)."""
        if shift_labels is None:
            shift_labels = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:] if self.shifted else labels
        if logits.shape[:-1] != shift_labels.shape or shift_labels.dim() != 2:
            raise ValueError("rows and places are no longer told apart")
        targets = shift_labels.to(logits.device)
        known = targets != IGNORED  # (B, T)
        items = known.sum() if num_items_in_batch is None else num_items_in_batch
        # Where few are left out, a copy of the others is no saving.
        chosen = known if known.sum() * 8 < known.numel() * 7 else torch.ones_like(known)
        loss, nats = surprisal(logits[chosen], self.head.weight, self.head.bias, targets[chosen], items)
        if not torch.is_grad_enabled():
            self.told = _by_row(nats, chosen, known)
        return loss


def _by_row(nats: torch.Tensor, chosen: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    exact = torch.float32 if nats.device.type == "mps" else torch.float64
    places = torch.zeros(known.shape, dtype=exact, device=nats.device)
    places[chosen] = nats.to(exact)
    return torch.stack([places.sum(1), known.sum(1).to(exact)], dim=1)


def _as_it_is(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


@contextmanager
def replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a network for the time of a block; a method is given back to its class."""
    kept = dict(vars(thing))
    setattr(thing, name, value)
    try:
        yield
    finally:
        for changed in (name, f"_{name}"):  # transformers keeps a loss function under the second
            if changed in kept:
                vars(thing)[changed] = kept[changed]
            else:
                vars(thing).pop(changed, None)


# --- the proof


def proved(whole: Any, batch: Mapping[str, torch.Tensor], counts: bool) -> tuple[Spared | None, str]:
    """`whole`, a network with or without an adapter around it, as one whose logits are spared, or why it cannot be.

    batch: a few rows as it learns them; counts: it takes the number of tokens. It is asked both ways for the loss of
    the same hidden states and for the gradients to them and to the head, in float32; once more with states so large
    that logits are bound, if they ever are. The random state stays as it was.
    """
    net = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    head, shifted = net.get_output_embeddings(), SHIFTED.get(getattr(net, "loss_function", None))
    if type(head) is not torch.nn.Linear or "forward" in vars(head):
        return None, "its head is no plain layer"
    if shifted is None:
        return None, "its loss is one of its own"
    found = Spared(net, head, shifted)
    asked = {name: value[:, :PROBE] for name, value in batch.items() if value.dim() > 1}
    asked["labels"] = _labels(asked["input_ids"])
    if counts:
        asked["num_items_in_batch"] = torch.tensor(7, device=asked["labels"].device)
    before, learning = device.random_state(), whole.training
    try:
        same = _agree(found, whole.eval(), asked, False) and _agree(found, whole.train(), asked, True)
    except UNFIT as error:
        if device.out_of_memory(error):
            raise
        same = False
    finally:
        whole.train(learning)
        device.restore_random(before)
    return (found, "") if same else (None, "it does more between its head and its loss")


def _labels(ids: torch.Tensor) -> torch.Tensor:
    labels = ids.clone()
    labels[:, 3::4] = IGNORED
    return labels


def _agree(found: Spared, whole: Any, asked: Mapping[str, Any], large: bool) -> bool:
    """Whether loss and gradients of the same hidden states are the same with all logits and without."""
    states: list[torch.Tensor] = []

    def hand(module: Any, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """The states of the first time, in float32: the network itself does not matter here."""
        if not states:
            plain = given[0].detach().float()
            peak = _whole(found.head, plain).abs().max() if large else torch.tensor(LARGE)
            states.append(plain * (LARGE / peak.detach().clamp_min(1e-3)))
        handed.append(states[0].clone().requires_grad_())
        return (handed[-1],)

    answers = []
    for spare in (False, True):
        handed: list[torch.Tensor] = []
        way = found.instead() if spare else replaced(found.head, "forward", lambda x: _whole(found.head, x))
        with found.head.register_forward_pre_hook(hand), way, torch.enable_grad():
            loss = whole(**asked).loss
            wanted = [*handed, *(one for one in found.head.parameters() if one.requires_grad)]
            answers.append((loss.detach(), torch.autograd.grad(loss, wanted)))
    (loss, slopes), (other, others) = answers
    return bool((loss - other).abs() <= NEAR * loss.abs()) and all(
        bool((one.float() - two.float()).norm() <= 10 * NEAR * one.float().norm())
        for one, two in zip(slopes, others, strict=True)
    )


def _whole(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """All logits in float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        bias: Any = head.bias
        bias = None if bias is None else bias.float()
        return functional.linear(hidden.float(), head.weight.float(), bias)
