"""What learns through an adapter holds half, has the library's gradients, and is left alone where it would not."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from parts.training import configured, prepared
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from textgen_cli.events import Event, Measured, Notice, silent
from textgen_cli.finetune import again, beside, thrift
from textgen_cli.finetune.again import Kept
from textgen_cli.finetune.run import fit
from textgen_cli.finetune.thrift import Thrift
from textgen_cli.finetune.ways import Base

Small = Callable[..., Path]
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=400, hidden_size=48, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=400, n_embd=48, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2,
        attn_pdrop=0.1, resid_pdrop=0.1,
    ),
}  # fmt: skip
IDS = torch.arange(3, 67).view(2, 32) * 5 % 397


def adapted(name: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A network with an adapter that has learnt something; its own weights in `dtype`."""
    transformers.set_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype)
    targets = ["c_attn", "c_proj", "c_fc"] if name == "gpt2" else "all-linear"
    net = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=targets, **settings))
    with torch.no_grad():
        for weight, found in net.named_parameters():
            if "lora_" in weight:
                found.data = found.data.to(torch.float64 if dtype == torch.float64 else torch.float32)
                found.normal_(0, 0.05)
    return net.train()


def base(net: Any, autocast: bool = False) -> Base:
    known: Any = {"family": "causal", "tokenizer": None, "name": "tiny", "revision": "", "context": 128}
    return Base(
        net=net,
        device=torch.device("cpu"),
        autocast=autocast,
        generation={},
        folder=None,
        adapter=True,
        **known,
    )


def gradients(
    net: Any, way: Thrift, computing: AbstractContextManager[Any] | None = None
) -> list[torch.Tensor]:
    """Of the adapter's weights, behind the loss."""
    torch.manual_seed(5)
    net.zero_grad()
    with way.learning():
        with way.holding(), computing or nullcontext():
            loss = net(input_ids=IDS, labels=IDS).loss
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters() if p.requires_grad)]


def half() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def lean(net: Any) -> Thrift:
    kept = Kept()
    return Thrift(layers=(*beside.steps(net, kept), *again.steps(net, kept)), kept=kept)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_beside_frozen_layers_are_the_library_s(name: str) -> None:
    net = adapted(name, torch.float64)
    way = Thrift(layers=tuple(beside.steps(net, None)))
    assert len(way.layers) == {"llama": 3 * 7, "gpt2": 2 * 4}[name]
    for one, other in zip(gradients(net, way), gradients(net, Thrift()), strict=True):
        # The library scales by a number in 32 bits and so do we; sums are in another order.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert other.abs().max() > 0


def test_in_bfloat16_they_are_as_near_to_the_exact_ones_as_the_library_s() -> None:
    net = adapted(dtype=torch.bfloat16)
    plain = gradients(net, Thrift(), half())
    ours = gradients(net, Thrift(layers=tuple(beside.steps(net, None))), half())
    exact = gradients(net.double(), Thrift())
    apart = [
        sum(float((a - b).double().norm() ** 2) for a, b in zip(found[1:], exact[1:], strict=True)) ** 0.5
        for found in (ours, plain)
    ]
    assert 0 < apart[0] <= 1.1 * apart[1]
    assert {p.dtype for p in net.parameters() if p.requires_grad} == {torch.float64}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_what_is_made_again_changes_no_gradient(name: str, bfloat16: bool) -> None:
    net = adapted(name, torch.bfloat16 if bfloat16 else torch.float32)
    plain = Thrift(layers=tuple(beside.steps(net, None)))
    right = gradients(net, plain, half() if bfloat16 else None)
    for one, other in zip(gradients(net, lean(net), half() if bfloat16 else None), right, strict=True):
        # But for the order in which what comes back to a norm's input is added up.
        assert (one - other).norm() <= 1e-6 * other.norm()


class _Alive(TorchDispatchMode):
    """Notes all storages that are made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[tuple[Any, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, torch.Tensor):
                self.made.append((StorageWeakRef(one.untyped_storage()), one.untyped_storage().nbytes()))
        return found

    def bytes(self) -> int:
        return int(sum({ref.cdata: size for ref, size in self.made if not ref.expired()}.values()))


def held(net: Any, way: Thrift, bfloat16: bool) -> int:
    """Bytes that are there when the way forth has ended."""
    with way.learning(), way.holding(), half() if bfloat16 else nullcontext(), _Alive() as alive:
        hidden = net.get_base_model().model(IDS, use_cache=False).last_hidden_state
        found: int = alive.bytes()
    hidden.sum().backward()
    return found


@pytest.mark.parametrize("bfloat16", [False, True])
def test_much_of_what_the_library_holds_is_not_held(bfloat16: bool) -> None:
    net = adapted(dtype=torch.bfloat16 if bfloat16 else torch.float32)
    plain, ours = (held(net, way, bfloat16) for way in (Thrift(), lean(net)))
    assert ours < (0.7 if bfloat16 else 0.8) * plain


def test_what_does_more_than_add_goes_the_library_s_way() -> None:
    for settings in ({"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}):
        net = adapted(**settings)
        assert not list(beside.steps(net, None)), settings
        told: list[Event] = []
        found = thrift.found(base(net), {"input_ids": IDS[:1], "labels": IDS[:1]}, True, False, told.append)
        assert found.layers == () and found.kept is None and found.spared is not None
        assert [e.text for e in told if isinstance(e, Notice)] == [
            "tiny: the adapter's layers are the library's"
        ]


def test_the_proof_leaves_all_as_it_was() -> None:
    net = adapted("gpt2")
    before, state = [p.clone() for p in net.parameters()], torch.get_rng_state()
    found = thrift.found(base(net), {"input_ids": IDS[:1], "labels": IDS[:1]}, True, False, silent)
    assert found.layers and found.kept is not None
    assert torch.equal(state, torch.get_rng_state()) and net.training
    assert all(torch.equal(one, other) for one, other in zip(before, net.parameters(), strict=True))
    assert all(p.grad is None for p in net.parameters())
    assert not any("forward" in vars(module) for module in net.modules())


class NoisyNorm(torch.nn.Module):
    """Looks like a norm and gives another result every time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rand_like(x)


def test_what_cannot_be_made_again_is_found_out() -> None:
    """Chance within a norm; and an input that is changed behind it, which in 16 bits the library does not mind."""

    def change(module: Any, given: Any, made: Any) -> None:
        given[0].mul_(1.5)

    noisy = adapted()
    noisy.get_base_model().model.norm = NoisyNorm()
    changed = adapted(dtype=torch.bfloat16)
    layer = changed.get_base_model().model.layers[1]
    layer.input_layernorm.register_forward_hook(change)
    for net, autocast in ((noisy, False), (changed, True)):
        found = thrift.found(
            base(net, autocast), {"input_ids": IDS[:1], "labels": IDS[:1]}, True, False, silent
        )
        assert found.layers and found.kept is None


@pytest.mark.slow
def test_curves_are_those_of_the_library_s_layers(
    small_model: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = []
    for name in ("ours", "plain"):
        if name == "plain":
            monkeypatch.setattr(thrift, "found", lambda base, *_: Thrift())
        events: list[Event] = []
        config = configured(
            small_model("llama"), tmp_path / name, way={"lora": 4}, training={"learning_rate": 3e-3}
        )
        fit(config, [], prepared("clm"), events.append)
        curves.append([e.values for e in events if isinstance(e, Measured)])
    assert len(curves[0]) == len(curves[1]) > 12
    for one, other in zip(*curves, strict=True):
        for figure in one.keys() & {"loss", "grad_norm", "eval_loss"}:
            assert one[figure] == pytest.approx(other[figure], rel=1e-4), figure
