"""The loss without all logits is the loss with them; who does more between its head and its loss is found out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parts.models import CHAT_TEMPLATE
from parts.training import configured, prepared
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from textgen_cli.events import Event, Measured, Notice
from textgen_cli.finetune import headloss
from textgen_cli.finetune.headloss import Spared, proved, surprisal
from textgen_cli.finetune.run import fit
from textgen_cli.model import cost

Small = Callable[..., Path]
V, D = 61, 12
IGNORED = -100


def head(bias: bool, dtype: torch.dtype = torch.float64) -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(D, V, bias=bias, dtype=dtype)


@pytest.mark.parametrize("positions", [1, 7, 8, 24, 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_those_of_all_logits(
    positions: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces that end within, at and behind the last of 24 positions, some of which are ignored."""
    monkeypatch.setattr(headloss, "CHUNK", positions * V)
    made = head(bias)
    hidden = torch.randn(24, D, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, V, (24,))
    targets[[0, 7, 8, 23]] = IGNORED
    whole = functional.cross_entropy(made(hidden), targets, ignore_index=IGNORED, reduction="sum") / 5
    wanted = [hidden, *made.parameters()]
    right = torch.autograd.grad(3 * whole, wanted)
    loss, nats = surprisal(hidden, made.weight, made.bias, targets, 5)
    torch.testing.assert_close(loss, whole, rtol=1e-14, atol=0)
    assert not nats.requires_grad and nats[7] == 0
    torch.testing.assert_close(nats.sum() / 5, whole, rtol=1e-14, atol=0)
    for one, other in zip(torch.autograd.grad(3 * loss, wanted), right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)


def test_only_what_learns_gets_a_gradient_and_only_once() -> None:
    made = head(True).requires_grad_(False)
    hidden = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    loss, _ = surprisal(hidden, made.weight, made.bias, torch.arange(4), 4)
    loss.backward(retain_graph=True)
    assert made.weight.grad is None and made.bias.grad is None and hidden.grad is not None
    with pytest.raises(RuntimeError, match="gone"):
        loss.backward()


def test_what_is_no_word_fails() -> None:
    hidden, made = torch.randn(2, D, dtype=torch.float64), head(False)
    with pytest.raises(RuntimeError, match="out of bounds"):
        surprisal(hidden, made.weight, None, torch.tensor([1, V]), 2)


@pytest.mark.parametrize("learns", [False, True])
def test_under_autocast_it_is_as_near_as_all_logits_are(learns: bool) -> None:
    """Both round to bfloat16; what is exact is told by float64."""
    made = head(False, torch.float32).requires_grad_(learns)
    start, targets = torch.randn(40, D), torch.randint(0, V, (40,))
    found = []
    for way in ("exact", "whole", "ours"):
        hidden = start.clone().to(torch.float64 if way == "exact" else torch.float32).requires_grad_()
        weight = made.weight.detach().to(hidden.dtype).requires_grad_(learns)
        with torch.autocast("cpu", torch.bfloat16, enabled=way != "exact"):
            if way == "ours":
                loss = surprisal(hidden, weight, None, targets, 40)[0]
            else:
                logits = functional.linear(hidden, weight)
                loss = functional.cross_entropy(logits.to(hidden.dtype), targets)
        assert loss.dtype == hidden.dtype
        loss.backward()
        found.append([loss.detach(), hidden.grad, *([weight.grad] if learns else [])])
    for exact, whole, ours in zip(*found, strict=True):
        assert whole is not None and ours is not None and exact is not None
        allowed = 1.05 * (whole - exact).norm() + 1e-6
        assert (ours - exact).norm() <= allowed


class _Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.numel())
        return found


@pytest.mark.parametrize("spared", [False, True])
def test_the_logits_of_a_batch_are_never_there(spared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 rows of 32 tokens: neither forth nor back, nor where it is measured."""
    monkeypatch.setattr(headloss, "CHUNK", 16 * 400)
    net = network("llama")
    ids = torch.randint(3, 400, (4, 32))
    found, why = proved(net, {"input_ids": ids}, True)
    assert found is not None, why
    with _Largest() as largest, found.instead() if spared else torch.enable_grad():
        net(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            net(input_ids=ids, labels=ids)
    weights = 400 * 48  # the head's, whose gradient has to be
    assert (largest.numbers <= weights) == spared
    assert spared or largest.numbers == 4 * 32 * 400


def test_the_estimate_knows_how_many_are_there() -> None:
    assert cost.LEARNT == headloss.CHUNK


SIZES: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OTHERS: dict[str, Any] = {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2}
NETWORKS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(**OTHERS, n_embd=48, n_layer=2, n_head=4),
    "biased": lambda: transformers.PhiConfig(**SIZES),
    "scaled": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.25),
    "divided": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=8.0),
    "experts": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True),
    "bound": lambda: transformers.Gemma2Config(**SIZES, head_dim=12),
    "hardly bound": lambda: transformers.Gemma2Config(**SIZES, head_dim=12, final_logit_softcapping=90.0),
    "own loss": lambda: transformers.BartConfig(
        **OTHERS, d_model=48, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=96
    ),
}


def network(name: str) -> Any:
    transformers.set_seed(0)
    return transformers.AutoModelForCausalLM.from_config(NETWORKS[name]()).train()


def losses(net: Any, batch: dict[str, Any], spared: Spared | None = None) -> list[torch.Tensor]:
    """Of a batch, and the gradients of all that learns."""
    net.zero_grad()
    if spared is None:
        loss = net(**batch).loss
    else:
        with spared.instead():
            loss = net(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "biased", "scaled", "divided", "experts"])
def test_a_network_learns_the_same(name: str) -> None:
    net, ids = network(name), torch.randint(3, 400, (3, 20))
    labels = ids.clone()
    labels[0, 5:] = IGNORED  # as padded rows have it
    labels[1, :12] = IGNORED  # as a prompt has it
    state = torch.get_rng_state()
    found, why = proved(net, {"input_ids": ids}, True)
    assert found is not None, why
    assert torch.equal(state, torch.get_rng_state()) and net.training
    for items in ({}, {"num_items_in_batch": torch.tensor(50)}, {"num_items_in_batch": 50}):
        batch = {"input_ids": ids, "labels": labels, **items}
        torch.manual_seed(3)
        right = losses(net, batch)
        torch.manual_seed(3)
        for one, other in zip(losses(net, batch, found), right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert net(input_ids=ids).logits.shape == (3, 20, 400), "behind the block the head is there again"
    assert net.loss_function is ForCausalLMLoss and "forward" not in vars(found.head)


@pytest.mark.parametrize("name", ["bound", "hardly bound", "own loss"])
def test_who_does_more_is_found_out(name: str) -> None:
    net, ids = network(name), torch.randint(3, 400, (3, 20))
    assert proved(net, {"input_ids": ids}, name != "own loss") == (
        None, "it does more between its head and its loss"
    )  # fmt: skip
    assert net(input_ids=ids).logits.shape == (3, 20, 400)


def test_a_loss_of_its_own_and_a_head_that_learns_beside_are_left_alone() -> None:
    import peft

    net, ids = network("llama"), torch.randint(3, 400, (1, 8))
    net.loss_function = lambda logits, labels, **rest: logits.sum()
    assert proved(net, {"input_ids": ids}, True) == (None, "its loss is one of its own")
    net = peft.get_peft_model(network("llama"), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    assert proved(net, {"input_ids": ids}, True) == (None, "its head is no plain layer")


def test_each_row_is_measured_by_itself() -> None:
    net, ids = network("llama").eval(), torch.randint(3, 400, (3, 20))
    labels = ids.clone()
    labels[1, 4:] = IGNORED
    labels[2] = IGNORED
    found, _ = proved(net, {"input_ids": ids}, True)
    assert found is not None
    with torch.no_grad():
        logits = net(input_ids=ids).logits.double()
        with found.instead():
            net(input_ids=ids, labels=labels)
    for row in range(3):
        known = labels[row, 1:] != IGNORED
        nats = functional.cross_entropy(logits[row, :-1][known], labels[row, 1:][known], reduction="sum")
        assert found.told is not None and found.told[row, 1] == known.sum()
        assert float(found.told[row, 0]) == pytest.approx(float(nats), rel=1e-5)


# --- a whole training


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "model", "way", "training"),
    [
        ("clm", "llama", {}, {"accumulate": 2}),
        ("clm", "gpt2", {}, {}),
        ("chat", "llama", {"lora": 4}, {"recompute": True}),
    ],
)
def test_curves_are_the_same_with_and_without(
    task: str, model: str, way: Any, training: Any, small_model: Small, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base = small_model(model, template=CHAT_TEMPLATE if task == "chat" else None)
    found, told = [], []
    for spared in (True, False):
        if not spared:
            monkeypatch.setattr("textgen_cli.finetune.thrift.proved", lambda *_: (None, "a test"))
        events: list[Event] = []
        config = configured(
            base, tmp_path / str(spared), way=way, training=training | {"learning_rate": 1e-3}
        )
        fit(config, [], prepared(task), events.append)
        found.append([e.values for e in events if isinstance(e, Measured)])
        told.append([e.text for e in events if isinstance(e, Notice) and "logits" in e.text])
    assert told[0] == [] and told[1] == [f"{base}: all logits of a batch are held at once: a test"]
    for one, other in zip(*found, strict=True):
        for name in one.keys() & {"loss", "grad_norm", "eval_loss", "eval_perplexity"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4), name


@pytest.mark.slow
def test_a_network_that_bounds_its_logits_learns_with_all_of_them(tmp_path: Path) -> None:
    config = transformers.Gemma2Config(**SIZES, head_dim=12)
    (tmp_path / "config.json").write_text(config.to_json_string())
    events: list[Event] = []
    way = {"from_scratch": str(tmp_path / "config.json"), "vocab_size": 400}
    fit(
        configured(tmp_path, tmp_path / "out", way=way, training={"max_steps": 2}),
        [], prepared("clm"), events.append,
    )  # fmt: skip
    said = [e.text for e in events if isinstance(e, Notice) and "logits" in e.text]
    assert len(said) == 1
    assert said[0].endswith(
        "all logits of a batch are held at once: it does more between its head and its loss"
    )
