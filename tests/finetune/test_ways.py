"""Which weights learn, adapters and their merging, new networks, packed rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from parts.models import byte_tokenizer
from parts.training import configured, prepared
from safetensors.torch import load_file

from textgen_cli.config import ModelConfig
from textgen_cli.config.finetune import DataConfig
from textgen_cli.errors import ModelError, SafetyError, UsageError
from textgen_cli.events import Event, Measured, Notice, silent
from textgen_cli.finetune import packing
from textgen_cli.finetune.encode import encode
from textgen_cli.finetune.run import fit
from textgen_cli.finetune.ways import merged, open_base
from textgen_cli.model import device
from textgen_cli.model.load import load
from textgen_cli.model.pack import PackedLinear
from textgen_cli.model.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

Small = Callable[..., Path]


def test_an_adapter_gives_what_peft_makes_of_it(small_model: Small, tmp_path: Path) -> None:
    model = small_model("llama")
    settings = {"epochs": 4, "learning_rate": 3e-3}
    config = configured(model, tmp_path / "out", way={"lora": 4, "lora_alpha": 4.0}, training=settings)
    out = fit(config, [], prepared("clm"), silent)
    stored = json.loads((out / "adapter_config.json").read_text())
    assert (stored["r"], stored["lora_alpha"], stored["base_model_name_or_path"]) == (4, 4, model.name)
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = base(ids).logits.clone()
        theirs = peft.PeftModel.from_pretrained(base, str(out)).eval()(ids).logits
        ours = (
            load(ModelConfig(model=str(model), adapter=(str(out),), dtype="float32"), "score", silent)
            .net(ids)
            .logits
        )
    assert not torch.allclose(theirs, before, atol=1e-3)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_merged_adapter_says_the_same(small_model: Small, tmp_path: Path) -> None:
    model, found = small_model("llama"), []
    for merge in (False, True):
        way = {"lora": 4, "merge": merge}
        config = configured(
            model, tmp_path / str(merge), way=way, training={"epochs": 4, "learning_rate": 3e-3}
        )
        fit(config, [], prepared("clm"), silent)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "True").eval()
        found = whole(ids).logits
        base = transformers.AutoModelForCausalLM.from_pretrained(model)
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "False")).eval()(ids).logits
    torch.testing.assert_close(found, theirs, atol=1e-4, rtol=1e-4)
    assert not list((tmp_path / "True").glob("adapter*"))


@pytest.mark.skipif(not device.cpu_has_bfloat16(), reason="this CPU has no bfloat16 arithmetic")
def test_an_adapter_of_half_precision_is_merged_in_full(small_model: Small, tmp_path: Path) -> None:
    settings = {"epochs": 4, "learning_rate": 3e-3}
    config = configured(
        small_model("llama"),
        tmp_path / "out",
        way={"lora": 4, "merge": True},
        training=settings,
        base={"dtype": "bfloat16"},
    )
    out = fit(config, [], prepared("clm"), silent)
    assert all(value.dtype == torch.float32 for value in load_file(out / "model.safetensors").values())
    assert json.loads((out / "config.json").read_text()).get("use_cache", True)


def test_a_merge_that_changes_what_is_said_fails(
    small_model: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(small_model("llama"), tmp_path / "out", way={"lora": 4, "merge": True})
    data = prepared("clm")
    base = open_base(config, data, silent)
    encoded = encode(data, base.tokenizer, DataConfig(), 64, tmp_path, 0)
    with torch.no_grad():
        for name, weight in base.net.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    monkeypatch.setattr(type(base.net.base_model), "merge_and_unload", lambda self: self.unload())
    with pytest.raises(ModelError, match="E-MERGE"):
        merged(base, encoded, silent)


@pytest.mark.parametrize(("way", "share"), [({"lora": 2}, 0.3), ({"lora": 2, "dora": True}, 0.3), ({}, 1.0)])
def test_how_many_weights_learn_is_said(
    way: dict[str, Any], share: float, small_model: Small, tmp_path: Path
) -> None:
    events: list[Event] = []
    base = open_base(
        configured(small_model("llama"), tmp_path / "out", way=way), prepared("clm"), events.append
    )
    learning = sum(p.numel() for p in base.net.parameters() if p.requires_grad)
    total = sum(p.numel() for p in base.net.parameters())
    assert learning <= share * total
    assert any(isinstance(e, Notice) and e.text.startswith(f"{learning:,} of {total:,}") for e in events)


def test_a_new_head_learns_beside_an_adapter(small_model: Small, tmp_path: Path) -> None:
    config = configured(
        small_model("bert"), tmp_path / "out", way={"lora": 2}, training={"learning_rate": 1e-2}
    )
    out = fit(config, [], prepared("text-classification"), silent)
    tensors = load_file(out / "adapter_model.safetensors")
    assert any("classifier" in name and "lora" not in name for name in tensors)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_frozen_layers_stay_as_they_were(architecture: str, small_model: Small, tmp_path: Path) -> None:
    task = "mlm" if architecture == "bert" else "clm"
    model = small_model(architecture)
    config = configured(model, tmp_path / "out", way={"freeze": 1}, training={"learning_rate": 1e-2})
    out = fit(config, [], prepared(task), silent)
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    same = {name for name in before.keys() & after.keys() if torch.equal(before[name], after[name])}
    first = {name for name in before if ".0." in name or "wte" in name or "embed_tokens" in name}
    changed = {name for name in before if ".1." in name and "weight" in name}
    assert first and first <= same
    assert changed and not changed & same


def test_training_packs_no_weights_away(small_model: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network packed for inference could not learn."""
    monkeypatch.setattr("textgen_cli.model.device.cpu_has_bfloat16", lambda: True)
    config = ModelConfig(model=str(small_model("llama")), dtype="bfloat16", device="cpu")
    net = load(config, "finetune", silent).net
    assert not any(isinstance(module, PackedLinear) for module in net.modules())
    assert all(p.requires_grad for p in net.parameters())


def test_bfloat16_is_refused_where_the_processor_has_none(
    small_model: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("textgen_cli.model.device.cpu_has_bfloat16", lambda: False)
    config = configured(small_model("llama"), tmp_path / "out", base={"dtype": "bfloat16", "device": "cpu"})
    with pytest.raises(UsageError, match="E-DTYPE"):
        open_base(config, prepared("clm"), silent)


@pytest.mark.parametrize("way", [{}, {"lora": 2}])
def test_bfloat16_trains(
    way: dict[str, Any], small_model: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("textgen_cli.model.device.cpu_has_bfloat16", lambda: True)
    events: list[Event] = []
    base = {"dtype": "bfloat16", "device": "cpu"}
    config = configured(
        small_model("llama"), tmp_path / "out", base=base, way=way, training={"learning_rate": 3e-3}
    )
    out = fit(config, [], prepared("clm"), events.append)
    found = [e.values["eval_loss"] for e in events if isinstance(e, Measured) and "eval_loss" in e.values]
    assert found[-1] < found[0]
    assert {t.dtype for t in load_file(next(out.glob("*.safetensors"))).values()} == {torch.float32}


def test_a_model_of_another_kind_is_refused(small_model: Small, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="E-ARCH"):
        open_base(configured(small_model("bert"), tmp_path / "out"), prepared("clm"), silent)


# --- from scratch


def test_a_config_of_ones_own_is_taken(tmp_path: Path) -> None:
    settings = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    way = {"from_scratch": str(tmp_path / "config.json"), "vocab_size": 300}
    base = open_base(configured(tmp_path, tmp_path / "out", way=way), prepared("clm"), silent)
    assert base.net.config.n_embd == 32 and base.context == 64 and base.fresh
    assert base.net.config.vocab_size == base.tokenizer.size
    assert base.tokenizer.decode(base.tokenizer.encode("café 你好 🙂")) == "café 你好 🙂"


def test_a_config_that_needs_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "x.Y"}})
    )
    way = {"from_scratch": str(tmp_path / "config.json")}
    with pytest.raises(SafetyError, match="E-REMOTE-CODE"):
        open_base(configured(tmp_path, tmp_path / "out", way=way), prepared("clm"), silent)


def test_a_given_tokenizer_is_taken(small_model: Small, tmp_path: Path) -> None:
    way = {"from_scratch": "tiny", "tokenizer": str(small_model("llama"))}
    base = open_base(configured(tmp_path, tmp_path / "out", way=way), prepared("clm"), silent)
    assert base.tokenizer.size == len(byte_tokenizer())


def test_the_same_seed_gives_the_same_new_weights(tmp_path: Path) -> None:
    found = []
    for seed in (1, 1, 2):
        way = {"from_scratch": "tiny", "vocab_size": 300}
        config = configured(tmp_path, tmp_path / "out", way=way, training={"seed": seed})
        found.append(
            open_base(config, prepared("clm"), silent).net.state_dict()["model.layers.0.mlp.up_proj.weight"]
        )
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# --- packed rows


def test_packed_rows_hold_every_example_whole(small_model: Small, tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_tokenizer(), "bytes")
    encoded = encode(prepared("clm"), tokenizer, DataConfig(), 128, tmp_path, 0)
    found = packing.packed(encoded, "clm", 128, tmp_path)
    assert len(found.train) < len(encoded.train)
    pieces = []
    for row in found.train:
        assert row["length"] == len(row["input_ids"]) <= 128
        starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
        for begin, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            pieces.append(row["input_ids"][begin:end])
            assert row["labels"][begin:end] == [-100, *row["input_ids"][begin + 1 : end]]
    assert sorted(pieces) == sorted(encoded.train["input_ids"])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_packed_examples_are_kept_apart(architecture: str, small_model: Small, tmp_path: Path) -> None:
    events: list[Event] = []
    config = configured(
        small_model(architecture), tmp_path / "out", data={"pack": True}, training={"learning_rate": 3e-3}
    )
    fit(config, [], prepared("clm"), events.append)
    found = [e.values["eval_loss"] for e in events if isinstance(e, Measured) and "eval_loss" in e.values]
    assert found[-1] < found[0]


def test_a_model_that_mixes_packed_examples_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    config = transformers.OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, word_embed_proj_dim=32, init_std=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="E-PACK"):
        fit(
            configured(tmp_path / "model", tmp_path / "out", data={"pack": True}), [], prepared("clm"), silent
        )


def test_other_tasks_are_not_packed(small_model: Small, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--pack"):
        fit(
            configured(small_model("bert"), tmp_path / "out", data={"pack": True}),
            [],
            prepared("mlm"),
            silent,
        )
