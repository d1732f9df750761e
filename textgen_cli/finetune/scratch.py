"""Networks that begin at random: presets by size, any config.json, and a tokenizer trained on the data.

The tokenizer is byte-level BPE: it has a token for every byte, so that no text is foreign to it. Knows no trainer.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from textgen_cli.config.finetune import FinetuneConfig
from textgen_cli.errors import ModelError, SafetyError, UsageError
from textgen_cli.events import Notice, Progress, Report
from textgen_cli.finetune.prepared import Prepared
from textgen_cli.model.check import check_folder, knows_type
from textgen_cli.model.load import FAMILIES, HEADS, Family, Head, load_tokenizer
from textgen_cli.model.source import locate
from textgen_cli.model.tokenizer import Tokenizer
from textgen_cli.model.weights import read_json

# Preset -> width, layers, heads.
PRESETS = {"tiny": (128, 2, 4), "small": (256, 4, 4), "medium": (512, 8, 8), "base": (768, 12, 12)}
CONTEXT = 1024  # tokens of an input that a preset takes at most
ENCODER_CONTEXT = 512

# Family -> roles of its control tokens; each is the text of one, those of the same text are one token.
CONTROL: dict[str, dict[str, str]] = {
    "causal": {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
    "masked": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
    "seq2seq": {"pad_token": "<pad>", "eos_token": "</s>"},
}
CHAT = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<|pad|>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(
    config: FinetuneConfig, family: Family, prepared: Prepared, head: Head, report: Report
) -> tuple[Any, Tokenizer]:
    """A random network of a family and its tokenizer; the same ones for the same data, settings and seed.

    Raises UsageError E-PRESET, ModelError E-CONFIG, E-ARCH and E-TOKENIZER, SafetyError E-REMOTE-CODE.
    """
    name = config.way.from_scratch or ""
    tokenizer = _tokenizer(config, family, prepared, report)
    settings = _of_file(Path(name)) if is_file(name) else _of_preset(name, family)
    settings |= {"vocab_size": tokenizer.size} | _ids(tokenizer, family)
    if head.family in HEADS:
        settings |= head.settings | ({} if head.labels else {"num_labels": 2})
    try:
        shape = transformers.AutoConfig.for_model(**settings)
        net = getattr(transformers, FAMILIES[family][0]).from_config(shape)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise ModelError("E-CONFIG", name, str(error).partition("\n")[0]) from error
    report(Notice(f"from scratch: {shape.model_type} with {net.num_parameters():,} weights"))
    return net.float(), tokenizer


def is_file(name: str | None) -> bool:
    """Whether --from-scratch names a file, not a preset."""
    return name is not None and (name.endswith(".json") or "/" in name)


def _of_preset(name: str, family: Family) -> dict[str, Any]:
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise UsageError(
            "E-PRESET", f"--from-scratch {name}", "is no preset", hint=f"{known}, or ./config.json"
        )
    width, layers, heads = PRESETS[name]
    if family == "causal":
        return {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": width * 8 // 3 // 32 * 32,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": True,
        }
    if family == "seq2seq":
        # Not T5: by AdamW it learns far later which word of one text stands for which of the other (docs/results.md).
        # Its queries begin small and its embeddings large, which suits Adafactor, whose steps are in proportion.
        return {
            "model_type": "bart",
            "d_model": width,
            "encoder_layers": layers,
            "decoder_layers": layers,
            "encoder_attention_heads": heads,
            "decoder_attention_heads": heads,
            "encoder_ffn_dim": width * 4,
            "decoder_ffn_dim": width * 4,
            "max_position_embeddings": CONTEXT,
            "bos_token_id": None,
            "forced_eos_token_id": None,
        }
    return {
        "model_type": "bert",
        "hidden_size": width,
        "intermediate_size": width * 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": ENCODER_CONTEXT,
    }


def _of_file(path: Path) -> dict[str, Any]:
    """The settings of a config.json, of a kind that the library itself implements."""
    if not path.is_file():
        raise UsageError("E-FILE", f"--from-scratch {path}", "no such file")
    found = read_json(path, "E-CONFIG")
    kind = found.get("model_type")
    if not isinstance(kind, str) or not knows_type(kind):
        if found.get("auto_map"):
            raise SafetyError("E-REMOTE-CODE", path.name, "needs code from the model's publisher")
        raise ModelError("E-ARCH", path.name, f"unknown model type {str(kind)[:40]!r}")
    return {
        key: value
        for key, value in found.items()
        if key not in ("architectures", "auto_map", "dtype", "torch_dtype")
    }


def _ids(tokenizer: Tokenizer, family: Family) -> dict[str, Any]:
    backend = tokenizer.backend
    found = {f"{role}_token_id": getattr(backend, f"{role}_token_id", None) for role in ("bos", "eos", "pad")}
    if family == "seq2seq":
        found["decoder_start_token_id"] = backend.pad_token_id
    return {name: value for name, value in found.items() if value is not None}


# --- tokenizers


def _tokenizer(config: FinetuneConfig, family: Family, prepared: Prepared, report: Report) -> Tokenizer:
    given = config.way.tokenizer
    if given is not None:
        located = locate(replace(config.model, model=given), report)
        if not check_folder(located.folder).has_tokenizer:
            raise ModelError("E-TOKENIZER", located.label, "has no tokenizer")
        return load_tokenizer(located.folder, located.label)
    report(Progress("tokenize", "a tokenizer", 0, len(prepared.train), "examples"))
    kind = family if family in CONTROL else "masked"
    control = CHAT if prepared.task == "chat" else CONTROL[kind]
    fast = trained(_texts(prepared), kind, control, config.way.vocab_size)
    sides = ["token_type_ids"] if kind == "masked" else []
    names = ["input_ids", *sides, "attention_mask"]
    backend = PreTrainedTokenizerFast(tokenizer_object=fast, model_input_names=names, **control)
    if prepared.task == "chat":
        backend.chat_template = CHAT_TEMPLATE
    return Tokenizer(backend, "tokenizer")


def trained(texts: Iterator[str], kind: str, control: dict[str, str], size: int) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer` of at most `size` tokens, learnt from texts.

    `kind`: the family whose control tokens frame an input.
    """
    bpe: Any = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = list(dict.fromkeys(control.values()))
    trainer: Any = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    numbers = [(token, bpe.token_to_id(token)) for token in specials]
    if kind == "masked":
        bpe.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=numbers
        )
    elif kind == "seq2seq":
        bpe.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=numbers)
    return bpe


def _texts(prepared: Prepared) -> Iterator[str]:
    """All that is text in the examples to learn from."""
    for example in prepared.train:
        yield from _words(example)


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("role", "tags", "label"):
                yield from _words(item)
    elif isinstance(value, list):
        for item in value:
            yield from _words(item)
