"""Lasting copies: what is loaded from them computes what the model in memory computes, to the bit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from parts import files
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from textgen_cli.config import DownloadConfig, ModelConfig
from textgen_cli.config.download import GettingConfig, KeepingConfig
from textgen_cli.download.copies import make
from textgen_cli.download.inventory import kept
from textgen_cli.errors import ModelError, OutputError
from textgen_cli.events import silent
from textgen_cli.model.load import load
from textgen_cli.model.weights import is_pickle

Small = Callable[..., Path]


def copied(model: ModelConfig, to: Path, *, convert: bool = False) -> dict[str, Any]:
    return make(DownloadConfig(model, GettingConfig(to=to), KeepingConfig(convert=convert)), silent)


def logits(config: ModelConfig) -> torch.Tensor:
    net = load(config, "score", silent).net
    ids = torch.arange(5, 25)[None]
    more = {"decoder_input_ids": ids} if net.config.is_encoder_decoder else {}
    with torch.inference_mode():
        found: torch.Tensor = net(input_ids=ids, **more).logits
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_folder_is_the_model_quantised_in_memory(
    small_model: Small, tmp_path: Path, architecture: str, form: Any, dtype: Any
) -> None:
    config = ModelConfig(
        str(small_model(architecture)), quantize=form, dtype=dtype, device="cpu", cache_dir=tmp_path
    )
    made = copied(config, tmp_path / "copy")
    assert (made["form"], made["folder"]) == (form, str(tmp_path / "copy"))
    again = ModelConfig(str(tmp_path / "copy"), dtype=dtype, device="cpu")
    assert torch.equal(logits(config), logits(again))
    assert not any(is_pickle(path.name) or path.suffix == ".py" for path in (tmp_path / "copy").iterdir())


def test_a_quantised_folder_is_smaller_listed_and_refused_where_it_cannot_serve(
    small_model: Small, tmp_path: Path
) -> None:
    config = ModelConfig(
        str(small_model("llama")), quantize="int8", dtype="float32", cache_dir=tmp_path / "cache"
    )
    copied(config, tmp_path / "copy")
    with safe_open(tmp_path / "copy" / "model.safetensors", "pt") as file:
        kinds = {str(file.get_tensor(key).dtype) for key in file.keys() if key.endswith("proj.weight")}  # noqa: SIM118
    assert kinds == {"torch.int8"}
    (row,) = kept(config)
    assert (row.model, row.form, row.folder, row.ours) == (config.model, "int8", tmp_path / "copy", True)
    name, adapter = str(tmp_path / "copy"), tmp_path / "adapter"
    plain = AutoModelForCausalLM.from_pretrained(config.model)
    peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(str(adapter))
    for refused, purpose in (
        (ModelConfig(name, quantize="int8"), "score"),
        (ModelConfig(name, adapter=(str(adapter),)), "score"),
    ):
        with pytest.raises(ModelError, match="E-QUANTIZE"):
            load(refused, purpose, silent)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="E-QUANTIZE"):
        copied(replace(config, model=name), tmp_path / "again")
    settings = json.loads((tmp_path / "copy" / "config.json").read_text())
    settings["quantization_config"]["group"] = 64
    (tmp_path / "copy" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="E-QUANTIZATION"):
        load(ModelConfig(name), "score", silent)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_plain_transformers_does_not_take_it_for_a_plain_model(
    small_model: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    from transformers.quantizers import auto

    copied(ModelConfig(str(small_model("llama")), quantize=form, cache_dir=tmp_path), tmp_path / "copy")
    monkeypatch.delitem(
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "textgen"
    )  # as it is where textgen is not imported
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "textgen")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "copy")


def test_a_converted_folder_has_the_dtype_asked_for_and_plain_transformers_loads_it(
    small_model: Small, tmp_path: Path
) -> None:
    origin = small_model("gpt2")
    made = copied(
        ModelConfig(str(origin), dtype="bfloat16", cache_dir=tmp_path), tmp_path / "half", convert=True
    )
    assert made["form"] == "bfloat16"
    theirs = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.bfloat16)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert ours.dtype == torch.bfloat16
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])
    same = copied(ModelConfig(str(origin), cache_dir=tmp_path), tmp_path / "same", convert=True)
    assert same["form"] == "converted"
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (
        origin / "model.safetensors"
    ).read_bytes()


def test_a_folder_that_is_there_is_not_touched_and_a_failure_leaves_none(
    small_model: Small, tmp_path: Path
) -> None:
    config = ModelConfig(str(small_model("llama")), quantize="int8", cache_dir=tmp_path / "cache")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("mine")
    with pytest.raises(OutputError, match="E-EXISTS"):
        copied(config, tmp_path / "taken")
    files.folder(tmp_path / "bad")  # weights of a llama are missing
    with pytest.raises(ModelError):
        copied(replace(config, model=str(tmp_path / "bad")), tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "bad"}
    assert (tmp_path / "taken" / "x").read_text() == "mine"
