"""Weights in parts: what a launcher may ask for, and that a divided network learns and ends as a whole one.

Here all parts are those of one process; test_group.py has two.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from parts.training import configured, prepared
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from textgen_cli.errors import UsageError
from textgen_cli.events import silent
from textgen_cli.finetune import run
from textgen_cli.finetune.divide import divide, divisible, empty_frame, full, own, whole
from textgen_cli.finetune.division import Division, asked, taken
from textgen_cli.finetune.group import ALONE, Group
from textgen_cli.model import device, quantize

Small = Callable[..., Path]
CPU = torch.device("cpu")
ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(name="parted")
def _parted(tmp_path: Path) -> Iterator[Group]:
    """A group of one process that has all the parts."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield Group(division=Division())
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("variables", "option"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "--use_megatron_lm"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "--use_parallelism_config"),
        ({"ACCELERATE_USE_FSDP": "true"}, "--use_fsdp"),
        (ASKED | {"FSDP_VERSION": "1"}, "--use_fsdp"),
        (ASKED | {"FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params"),
        (ASKED | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--fsdp_activation_checkpointing"),
        (ASKED | {"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "--fsdp_reshard_after_forward full_shard"),
        (ASKED | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "--fsdp_auto_wrap_policy SIZE_BASED_WRAP"),
    ],
)
def test_what_cannot_be_divided_so_is_refused(
    variables: dict[str, str], option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"E-CONFLICT.*{option}"):
        asked()


@pytest.mark.parametrize(
    ("variables", "division"),
    [
        ({}, None),
        ({"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}, None),
        (ASKED, Division()),
        (
            ASKED | {"FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"},
            Division((), False),
        ),
        (ASKED | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "A, B"}, Division(("A", "B"))),
    ],
)
def test_what_the_launcher_asks_for(
    variables: dict[str, str], division: Division | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert asked() == taken() == division
    assert taken() is None  # so that no library divides what is divided


WAYS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("clm", "llama", {}, {}),
    ("clm", "llama", {"lora": 4, "merge": True}, {"recompute": True}),
    ("seq2seq", "t5", {}, {"accumulate": 2, "epochs": 1}),
    ("question-answering", "bert", {"freeze": 1}, {"learning_rate": 5e-2, "epochs": 4}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kind", "way", "training"), WAYS)
def test_a_divided_network_ends_as_a_whole_one(
    task: Any,
    kind: str,
    way: dict[str, Any],
    training: dict[str, Any],
    small_model: Small,
    tmp_path: Path,
    parted: Group,
) -> None:
    model, data = small_model(kind), prepared(task)
    for name, group in (("whole", ALONE), ("parts", parted)):
        config = configured(model, tmp_path / name, way=way, training=training)
        run._fit(config, [], data, group, silent)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "parts")]
    assert files[0] == files[1]
    assert (tmp_path / "whole" / "config.json").read_text() == (
        tmp_path / "parts" / "config.json"
    ).read_text()
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_half_precision_is_the_same_in_parts(small_model: Small, tmp_path: Path, parted: Group) -> None:
    if not device.cpu_has_bfloat16():
        pytest.skip("this CPU has no bfloat16 arithmetic")
    for name, group in (("whole", ALONE), ("parts", parted)):
        config = configured(small_model("t5"), tmp_path / name, base={"dtype": "bfloat16"})
        run._fit(config, [], prepared("seq2seq"), group, silent)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(other[name], value) for name, value in one.items())


def small(**settings: Any) -> Any:
    shape = transformers.AutoConfig.for_model(
        "bart", vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16, **settings
    )  # fmt: skip
    return transformers.AutoModelForSeq2SeqLM.from_config(shape)


def test_layers_that_are_left_out_by_chance_are_refused() -> None:
    with pytest.raises(UsageError, match=r"E-CONFLICT.*encoder_layerdrop 0\.1"):
        divisible(small(encoder_layerdrop=0.1), "launch")


def test_packed_weights_are_refused() -> None:
    net = small()
    net.lm_head.scale = torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UsageError, match=r"E-CONFLICT.*lm_head\.scale is of a kind that cannot"):
        divisible(net, "launch")


def test_codes_are_refused() -> None:
    net = small()
    quantize.apply(net, "int8", "small", silent)
    with pytest.raises(UsageError, match=r"E-CONFLICT.*--quantize"):
        divisible(net, "launch")


def test_what_does_not_learn_comes_back_as_it_was() -> None:
    net = small()
    net.model.shared.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    frame = empty_frame(net, rounds=True)
    net.bfloat16()
    again = whole(net, frame, lambda p: p, here=True).state_dict()
    assert torch.equal(again["lm_head.weight"], state["lm_head.weight"])
    learnt = "model.encoder.layers.0.fc1.weight"
    assert torch.equal(again[learnt], state[learnt].bfloat16().float())


def test_layers_that_are_not_there_are_refused(parted: Group) -> None:
    with pytest.raises(UsageError, match=r"E-CONFLICT.*LlamaDecoderLayer: the model has no such layers"):
        divide(small(), Division(("LlamaDecoderLayer",)), 1, CPU)


LAYERS = {"BartEncoderLayer", "BartDecoderLayer"}
# All embeddings have one weight in common, so none of them can be apart.
NAMED = ("BartScaledWordEmbedding", "BartEncoderLayer")


@pytest.mark.parametrize(
    ("layers", "alone"),
    [(None, LAYERS), ((), set()), (NAMED, {"BartEncoderLayer"})],
    ids=["all", "none", "named"],
)
def test_the_whole_is_what_was_divided(
    layers: tuple[str, ...] | None, alone: set[str], parted: Group
) -> None:
    net = small()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    frame = empty_frame(net)
    divide(net, Division(layers), 1, CPU)
    found = {type(module).__name__ for module in net.modules() if isinstance(module, FSDPModule)}
    assert found == {f"FSDP{name}" for name in alone | {"BartForConditionalGeneration"}}
    net(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None])  # leaves whole weights behind
    assert own(net).keys() == {name for name, _ in frame.named_parameters()}
    again = whole(net, frame, full, here=True)
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert again.lm_head.weight is again.model.shared.weight


class Row(torch.nn.Module):
    """A layer that gives a view."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y.view(1, -1, 4)


class Rows(torch.nn.Module):
    config = transformers.PreTrainedConfig()

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Row(), Row(), Row()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            x += 1.0
        return x


def test_a_layer_that_changes_a_view_learns_the_same(parted: Group) -> None:
    torch.manual_seed(0)
    net = Rows()
    given = torch.randn(1, 3, 4)
    net(given.clone()).square().sum().backward()
    right = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad(set_to_none=True)
    divide(net, Division(), 1, CPU)
    net(given.clone()).square().sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad.to_local(), right[name])  # type: ignore[union-attr]
