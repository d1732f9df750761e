"""The one loading layer: families, tokenizers, and models that are not whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parts.models import CHAT_TEMPLATE
from safetensors.torch import load_file, save_file

from textgen_cli.config import ModelConfig
from textgen_cli.errors import ModelError, UsageError
from textgen_cli.events import Notice, silent
from textgen_cli.model.load import family_of, load, load_tokenizer

TEXTS = ["Once upon a time", "naïve 你好 🙂\n\n<|end|> x", "", " leading", "<|user|>hi<|end|>"]


@pytest.fixture
def copy(small_model: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_model("gpt2"), tmp_path / "model"))


def refused(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load(ModelConfig(model=str(folder), device="cpu"), "generate", silent)
    assert caught.value.exit_code == 5
    return caught.value


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5", "bert"])
def test_the_short_way_to_a_tokenizer_reads_what_the_library_reads(
    small_model: Any, architecture: str
) -> None:
    folder = small_model(architecture, CHAT_TEMPLATE)
    ours = load_tokenizer(folder, "x").backend
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.all_special_ids == theirs.all_special_ids
    assert ours.chat_template == theirs.chat_template and len(ours) == len(theirs)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])


@pytest.mark.slow
def test_the_default_models_tokenizer_is_the_librarys(default_model: Path) -> None:
    ours = load_tokenizer(default_model, "x").backend
    theirs = transformers.AutoTokenizer.from_pretrained(default_model)
    assert ours.get_vocab() == theirs.get_vocab() and ours.all_special_tokens == theirs.all_special_tokens
    messages = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(
        messages, tokenize=False
    )


@pytest.mark.parametrize(
    ("architecture", "encoder_decoder", "family"),
    [
        ("LlamaForCausalLM", False, "causal"),
        ("GPT2LMHeadModel", False, "causal"),
        ("Gemma3ForConditionalGeneration", False, "causal"),
        ("T5ForConditionalGeneration", True, "seq2seq"),
        ("MarianMTModel", True, "seq2seq"),
        ("BertForMaskedLM", False, "masked"),
        ("BertForPreTraining", False, "masked"),
        ("BertForQuestionAnswering", False, "question-answering"),
        ("BartForSequenceClassification", True, "sequence-classification"),
    ],
)
def test_families(architecture: str, encoder_decoder: bool, family: str) -> None:
    assert family_of({"architectures": [architecture], "is_encoder_decoder": encoder_decoder}, "x") == family


@pytest.mark.parametrize("config", [{}, {"architectures": ["BertModel"]}, {"architectures": []}])
def test_a_model_without_a_head_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="E-ARCH"):
        family_of(config, "x")


def test_missing_weights(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights.pop("transformer.h.0.attn.c_attn.weight")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    error = refused(copy)
    assert error.name == "E-WEIGHTS" and "1 missing: transformer.h.0.attn.c_attn.weight" in error.fact


def test_unexpected_weights(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["transformer.h.2.ln_1.weight"] = torch.ones(48)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    error = refused(copy)
    assert error.name == "E-WEIGHTS" and "1 unexpected" in error.fact


def test_weights_of_another_shape(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"] = torch.ones(48, 48)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert "mismatch" in str(refused(copy)).lower()


def test_a_tokenizer_larger_than_the_embeddings(copy: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens([f"<extra-{n}>" for n in range(5)])
    tokenizer.save_pretrained(copy)
    assert refused(copy).name == "E-VOCAB"


def test_no_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    assert refused(copy).name == "E-TOKENIZER"


def test_code_beside_a_known_model_never_runs(copy: Path) -> None:
    """A known type with auto_map and custom_generate loads as the library's own class; the file is not touched."""
    canary = copy.parent / "canary"
    evil = f"open({str(canary)!r}, 'w')\nclass Evil: pass\n"
    (copy / "modeling_evil.py").write_text(evil)
    (copy / "custom_generate").mkdir()
    (copy / "custom_generate" / "generate.py").write_text(evil)
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (copy / "config.json").write_text(json.dumps(config))
    told: list[Any] = []
    model = load(ModelConfig(model=str(copy), device="cpu"), "generate", told.append)
    assert type(model.net).__name__ == "GPT2LMHeadModel"
    assert any(isinstance(event, Notice) and event.name == "W-REMOTE-CODE-IGNORED" for event in told)
    assert not canary.exists()


def test_a_device_that_is_absent_is_an_error(small_model: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is present")
    with pytest.raises(UsageError, match="E-DEVICE"):
        load(ModelConfig(model=str(small_model("gpt2")), device="cuda"), "generate", silent)


def test_the_choice_of_device_and_dtype_is_told_with_its_reason(small_model: Any) -> None:
    told: list[Any] = []
    load(ModelConfig(model=str(small_model("gpt2")), device="cpu", dtype="float32"), "generate", told.append)
    [notice] = [event for event in told if isinstance(event, Notice)]
    assert "causal model on cpu, float32 (asked for; dtype asked for)" in notice.text


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert"])
def test_weights_brought_to_bfloat16_are_the_librarys(small_model: Any, name: str) -> None:
    folder = small_model(name)
    config = ModelConfig(model=str(folder), dtype="bfloat16", device="cpu")
    ours = load(config, "score", silent, hasten=False).net
    theirs = type(ours).from_pretrained(folder, dtype=torch.bfloat16)
    found, want = (dict([*net.named_parameters(), *net.named_buffers()]) for net in (ours, theirs))
    assert found.keys() == want.keys()
    for key, value in want.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
