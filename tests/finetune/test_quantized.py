"""QLoRA: an adapter that learns beside codes is that of plain transformers and peft on the weights that these mean."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from parts.training import configured, prepared
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from textgen_cli.config import DownloadConfig, ModelConfig
from textgen_cli.config.download import GettingConfig
from textgen_cli.config.finetune import FinetuneConfig, WayConfig
from textgen_cli.download.copies import make
from textgen_cli.errors import ModelError, UsageError
from textgen_cli.events import Event, Measured, Notice, silent
from textgen_cli.finetune import card, ways
from textgen_cli.finetune.run import fit
from textgen_cli.finetune.ways import open_base
from textgen_cli.model import quantize
from textgen_cli.model.load import load
from textgen_cli.model.quantize import QuantizedLinear

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # peft's own

Small = Callable[..., Path]
TASKS = {"llama": "clm", "gpt2": "clm", "t5": "seq2seq", "bert": "mlm"}
AUTO: dict[str, Any] = {
    "clm": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "mlm": transformers.AutoModelForMaskedLM,
}
IDS = torch.arange(20, 60).view(2, 20)
LEARNING = {"max_steps": 4, "learning_rate": 2e-2}


def meant(weight: torch.Tensor, form: str) -> torch.Tensor:
    """What the codes of a float32 matrix (N, K) mean, by the definition of the formats."""
    if form == "int8" or weight.shape[1] % 32:
        scale = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(1e-8)
        return (weight / scale).round() * scale
    groups = weight.view(weight.shape[0], -1, 32)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-8)
    return (((groups - low) / scale).round() * scale + low).view_as(weight)


def rounded(folder: Path, form: str, task: str = "clm") -> Any:
    """The plain network, every linear layer of it with the weights that its codes mean; a tied head apart."""
    net = AUTO[task].from_pretrained(folder, dtype=torch.float32).eval()
    for layer in [layer for layer in net.modules() if type(layer) in (nn.Linear, Conv1D)]:
        turned = type(layer) is Conv1D
        weight = layer.weight.detach()
        made = meant(weight.T.contiguous(), form).T.contiguous() if turned else meant(weight, form)
        layer.weight = nn.Parameter(made)
    return net


def logits(net: Any) -> torch.Tensor:
    extra = {"decoder_input_ids": IDS} if net.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = net.eval()(input_ids=IDS, **extra).logits
    return found


def alike(net: Any, expected: torch.Tensor) -> None:
    """To a float32's rounding, of which the random T5 makes the most; an adapter changes a hundred times as much."""
    torch.testing.assert_close(logits(net), expected, atol=1e-3 * float(expected.std()), rtol=0)


def trained(
    model: Path, out: Path, form: str | None, report: Any = silent, task: str = "clm", **rest: Any
) -> Path:
    base = {"quantize": form} if form else {}
    way = {"lora": 4, **rest.pop("way", {})}
    config = configured(model, out, way=way, base=base, training=LEARNING | rest.pop("training", {}))
    return fit(config, [], prepared(task, 16, 0), report)


def told(events: list[Event], name: str = "W-QUANTIZE") -> list[str]:
    return [e.text for e in events if isinstance(e, Notice) and e.name == name]


def measured(events: list[Event], name: str) -> list[float]:
    return [e.values[name] for e in events if isinstance(e, Measured) and name in e.values]


def test_the_loss_curve_is_that_of_a_plain_script(small_model: Small, tmp_path: Path) -> None:
    """Loss, gradients' length and the adapter that comes out, beside peft on plain weights: a float32's rounding.

    Most layers of this model are too narrow for groups of int4, and are in int8.
    """
    form = "int4"
    model, events = small_model("llama"), list[Event]()
    settings = {"max_steps": None, "epochs": 2.0, "learning_rate": 1e-3, "seed": 11, "order": "random",
                "batch_size": "1"}  # fmt: skip
    trained(model, tmp_path / "out", form, events.append, training=settings)

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = []
    for text in prepared("clm", 16, 0).train["text"]:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        parts = [ids[at : at + 128] for at in range(0, len(ids), 128)]
        rows += [{"input_ids": part, "labels": part} for part in parts if len(part) > 1]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "plain"), per_device_train_batch_size=1, num_train_epochs=2, learning_rate=1e-3,
        lr_scheduler_type="linear", warmup_steps=0.03, seed=11, logging_steps=1, save_strategy="no", use_cpu=True,
        disable_tqdm=True, report_to="none",
    )  # fmt: skip
    transformers.set_seed(11)
    adapter = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    net = peft.get_peft_model(rounded(model, form), adapter)
    plain = Trainer(net, arguments, train_dataset=rows)
    plain.train()
    for name in ("loss", "grad_norm"):
        theirs = [line[name] for line in plain.state.log_history if name in line]
        assert len(theirs) == 2 * len(rows)
        assert measured(events, name) == pytest.approx(theirs, rel=1e-4), name
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    expected = peft.get_peft_model_state_dict(net, save_embedding_layers=False)
    assert made.keys() == expected.keys()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "form"),
    [("llama", "int4"), ("llama", "int8"), ("gpt2", "int4"), ("t5", "int4"), ("bert", "int8")],
)
def test_beside_the_same_codes_it_runs_as_it_learnt(
    kind: str, form: Any, small_model: Small, tmp_path: Path
) -> None:
    """As peft's own model with plain weights in the place of codes; to a float32's rounding."""
    model, task = small_model(kind), TASKS[kind]
    out = trained(model, tmp_path / "out", form, task=task)
    assert json.loads((out / "textgen.json").read_text())["quantize"] == form
    events: list[Event] = []
    config = ModelConfig(str(model), quantize=form, adapter=(str(out),), dtype="float32", device="cpu")
    ours = load(config, "score", events.append).net
    base = rounded(model, form, task)
    before = logits(base)
    theirs = logits(peft.PeftModel.from_pretrained(base, str(out)))
    assert (theirs - before).abs().max() > 0.1 * before.std()
    alike(ours, theirs)
    assert told(events) == []


def test_elsewhere_it_is_added_with_a_warning(small_model: Small, tmp_path: Path) -> None:
    model = small_model("llama")
    out = trained(model, tmp_path / "out", "int4")
    for form in (None, "int8"):
        events: list[Event] = []
        config = ModelConfig(str(model), quantize=form, adapter=(str(out),), dtype="float32")
        net = load(config, "score", events.append).net
        assert told(events) == [
            f"{out}: learnt beside int4 weights, which are not here; --quantize int4 has them"
        ]
        assert not any(hasattr(module, "lora_A") for module in net.modules())


def test_two_stand_beside_the_codes_with_their_weights(small_model: Small, tmp_path: Path) -> None:
    model = small_model("llama")
    names = [str(trained(model, tmp_path / str(n), "int4", training={"seed": n})) for n in (1, 2)]
    config = ModelConfig(str(model), quantize="int4", adapter=(names[0], f"{names[1]}=0.5"), dtype="float32")
    base = rounded(model, "int4")
    for name, weight in zip(names, (1, 0.5), strict=True):
        base = peft.PeftModel.from_pretrained(base, name)
        for layer in base.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling["default"] *= weight
        base = base.merge_and_unload()
    net = load(config, "score", silent).net
    assert any(hasattr(module, "lora_A") for module in net.modules())
    alike(net, logits(base))


def test_a_plain_adapter_is_still_quantised_with_its_base(small_model: Small, tmp_path: Path) -> None:
    model = small_model("llama")
    out = trained(model, tmp_path / "out", None)
    assert json.loads((out / "textgen.json").read_text())["quantize"] is None
    config = ModelConfig(str(model), quantize="int8", adapter=(str(out),), dtype="float32")
    events: list[Event] = []
    net = load(config, "score", events.append).net
    assert told(events) == [] and not any(hasattr(module, "lora_A") for module in net.modules())


# Heads that share the table; matrices the other way round; a table that has an adapter of its own.
@pytest.mark.parametrize(
    ("kind", "targets"), [("gpt2", None), ("t5", None), ("llama", "embed_tokens,q_proj,lm_head")]
)
def test_merged_it_is_a_plain_model_that_says_the_same(
    kind: str, targets: str | None, small_model: Small, tmp_path: Path
) -> None:
    model, task = small_model(kind), TASKS[kind]
    for merge in (False, True):
        way = {"merge": merge, "lora_targets": targets}
        trained(model, tmp_path / str(merge), "int4", task=task, way=way)
    whole = AUTO[task].from_pretrained(tmp_path / "True", dtype=torch.float32)
    config = ModelConfig(str(model), quantize="int4", adapter=(str(tmp_path / "False"),), dtype="float32")
    beside = load(config, "score", silent).net
    alike(whole, logits(beside))
    settings = json.loads((tmp_path / "True" / "config.json").read_text())
    assert "quantization_config" not in settings
    assert settings["tie_word_embeddings"] is False
    assert json.loads((tmp_path / "True" / "textgen.json").read_text())["quantize"] is None
    plain = load(ModelConfig(str(tmp_path / "True"), dtype="float32"), "score", silent).net
    alike(plain, logits(whole))


def test_a_quantised_copy_is_as_good_a_base(small_model: Small, tmp_path: Path) -> None:
    model, copy = small_model("llama"), tmp_path / "copy"
    config = ModelConfig(str(model), quantize="int4", dtype="float32")
    make(DownloadConfig(config, GettingConfig(to=copy)), silent)
    found = []
    for base, form in ((model, "int4"), (copy, None)):
        out = trained(base, tmp_path / f"of-{base.name}", form)
        found.append(load_file(out / "adapter_model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    beside = ModelConfig(str(copy), adapter=(str(tmp_path / "of-copy"),), dtype="float32")
    theirs = logits(peft.PeftModel.from_pretrained(rounded(model, "int4"), str(tmp_path / "of-copy")))
    alike(load(beside, "score", silent).net, theirs)
    with pytest.raises(ModelError, match="E-QUANTIZE"):
        fit(configured(copy, tmp_path / "whole"), [], prepared("clm"), silent)
    with pytest.raises(ModelError, match="no new head"):
        trained(copy, tmp_path / "judge", None, task="text-classification")
    merged = trained(copy, tmp_path / "merged", None, way={"merge": True})
    whole = AUTO["clm"].from_pretrained(merged, dtype=torch.float32)
    alike(whole, theirs)


def test_a_new_head_of_labels_learns_whole(small_model: Small, tmp_path: Path) -> None:
    out = trained(small_model("bert"), tmp_path / "out", "int4", task="text-classification")
    tensors = load_file(out / "adapter_model.safetensors")
    assert any("classifier" in name and "lora" not in name for name in tensors)


def test_in_bfloat16_and_computed_twice_it_learns(
    small_model: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("textgen_cli.model.device.cpu_has_bfloat16", lambda: True)
    events: list[Event] = []
    settings = {"learning_rate": 3e-3, "recompute": True}
    config = configured(
        small_model("llama"), tmp_path / "out", way={"lora": 4, "lora_targets": "q_proj,down_proj"},
        base={"quantize": "int4", "dtype": "bfloat16", "device": "cpu"}, training=settings,
    )  # fmt: skip
    base = open_base(config, prepared("clm"), silent)
    assert not any(layer.kernel for layer in quantize.layers(base.net).values())  # which knows no gradient
    out = fit(config, [], prepared("clm"), events.append)
    losses = measured(events, "loss")
    assert losses[-1] < losses[0]
    tensors = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all("q_proj" in name or "down_proj" in name for name in tensors)


def test_what_learns_is_counted_among_all_weights(small_model: Small, tmp_path: Path) -> None:
    said = []
    for form in (None, "int4"):
        events: list[Event] = []
        config = configured(
            small_model("gpt2"), tmp_path, way={"lora": 2}, base={"quantize": form} if form else {}
        )
        base = open_base(config, prepared("clm"), events.append)
        said += [e.text for e in events if isinstance(e, Notice) and e.text.endswith("weights learn")]
    head = base.net.get_output_embeddings()
    assert isinstance(head, QuantizedLinear)
    # The head shared the table, and has codes of its own now.
    counts = [int(text.split(" of ")[1].split()[0].replace(",", "")) for text in said]
    assert counts[1] - counts[0] == head.in_features * head.out_features
    assert said[0].split(" of ")[0] == said[1].split(" of ")[0]


@pytest.mark.parametrize(
    ("way", "option"),
    [({}, "--quantize"), ({"from_scratch": "tiny"}, "--quantize"), ({"lora": 4, "dora": True}, "--dora")],
)
def test_what_cannot_learn_beside_codes_is_refused(way: dict[str, Any], option: str) -> None:
    with pytest.raises(UsageError, match="E-CONFLICT") as caught:
        FinetuneConfig(model=ModelConfig(quantize="int4"), way=WayConfig(**way))
    assert caught.value.subject == option


def test_card_and_report_say_beside_what(small_model: Small, tmp_path: Path) -> None:
    out = trained(small_model("llama"), tmp_path / "out", "int4")
    text = (out / card.CARD).read_text()
    assert "LoRA of rank 4 beside weights in int4" in text
    assert "--quantize int4 --adapter ./out" in text
    assert "LoRA of rank 4 beside weights in int4" in (out / "report.html").read_text()


def test_a_merge_of_other_weights_fails(
    small_model: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof sees weights that are turned back wrongly: off by a step of their codes."""
    real = QuantizedLinear.dense

    def wrong(self: QuantizedLinear) -> Any:
        layer = real(self)
        with torch.no_grad():
            layer.weight += self.scale.flatten()[0] if self.form == "int8" else 0.01
        return layer

    monkeypatch.setattr(QuantizedLinear, "dense", wrong)
    with pytest.raises(ModelError, match="E-MERGE"):
        trained(small_model("llama"), tmp_path / "out", "int4", way={"merge": True})
    assert ways.NEAR == 1e-3
