"""load(ModelConfig) -> Model: the one place where weights become a network.

A model that is not whole is refused: missing, unexpected or mismatched weights and a tokenizer that does not
fit are errors here, because the library only logs them and then writes garbage.
"""

import gc
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from textgen_cli.config import ModelConfig
from textgen_cli.errors import ModelError, OutOfMemory, UsageError
from textgen_cli.events import Notice, Progress, Report
from textgen_cli.model import attention, device, quantize
from textgen_cli.model.check import check_folder
from textgen_cli.model.device import Placement, Purpose
from textgen_cli.model.source import Located, locate
from textgen_cli.model.tokenizer import Tokenizer

Family = Literal[
    "causal", "seq2seq", "masked", "sequence-classification", "token-classification", "question-answering"
]

# The transformers class of each family, and the endings of config.architectures[0] that mean it.
FAMILIES: dict[Family, tuple[str, tuple[str, ...]]] = {
    "masked": ("AutoModelForMaskedLM", ("ForMaskedLM", "ForPreTraining", "WithLMHeadModel")),
    "causal": ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
    "sequence-classification": ("AutoModelForSequenceClassification", ("ForSequenceClassification",)),
    "token-classification": ("AutoModelForTokenClassification", ("ForTokenClassification",)),
    "question-answering": ("AutoModelForQuestionAnswering", ("ForQuestionAnswering",)),
    "seq2seq": ("AutoModelForSeq2SeqLM", ("ForConditionalGeneration", "MTModel")),
}

# Weights of heads that a checkpoint may carry beside the one that is loaded.
_OTHER_HEADS = re.compile(r"(^|\.)(pooler|seq_relationship)\.")

# Where configs keep the longest input; the first that is there counts. None: no limit (T5's relative positions).
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")

_LOAD_FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    SafetensorError,
)


@dataclass(frozen=True)
class Model:
    """A network ready to run, with everything that belongs to it."""

    family: Family
    net: Any  # the transformers model, in eval mode on placement.device
    tokenizer: Tokenizer
    placement: Placement
    name: str
    revision: str  # commit of the Hub, or sha256 of a GGUF file, or "" for a plain folder
    folder: Path
    context: int | None  # longest input in tokens
    generation: dict[str, Any]  # the model's own generation settings, unchecked


def load(config: ModelConfig, purpose: Purpose, report: Report) -> Model:
    """Find, check and load a model.

    Raises ModelError (unusable), SafetyError (refused), NetworkError (cannot be fetched), OutputError (cache),
    OutOfMemory and UsageError (name or device).
    """
    if config.quantize and purpose == "finetune":
        raise UsageError(
            "E-QUANTIZE", "--quantize", "is for models that run; training needs the weights as they are"
        )
    placement = device.place(config, purpose)
    located = locate(config, report)
    checked = check_folder(located.folder)
    for notice in checked.notices:
        report(notice)
    if not checked.has_tokenizer:
        raise ModelError("E-TOKENIZER", located.label, "has no tokenizer")
    report(Progress("load", located.label))
    family = family_of(checked.config, located.label)
    _quiet()
    net = _adapted(_network(family, located, placement), located, config, report)
    generation = _own_generation(net)
    tokenizer = load_tokenizer(located.folder, located.label)
    _check_vocabulary(tokenizer, net, located.label)
    report(Notice(f"{located.label}: {family} model on {placement}"))
    return Model(
        family=family,
        net=net,
        tokenizer=tokenizer,
        placement=placement,
        name=located.label,
        revision=located.revision,
        folder=located.folder,
        context=_context(net),
        generation=generation,
    )


def family_of(config: dict[str, Any], name: str) -> Family:
    """Which family a config.json belongs to; ModelError E-ARCH when it is none that textgen runs."""
    architecture = next(iter(config.get("architectures") or []), "")
    if config.get("is_encoder_decoder") and architecture.endswith(FAMILIES["seq2seq"][1]):
        return "seq2seq"
    for family, (_, endings) in FAMILIES.items():
        if architecture.endswith(endings):
            return "causal" if family == "seq2seq" else family
    raise ModelError("E-ARCH", name, f"architecture {architecture or 'unnamed'} is not one that textgen runs")


def load_tokenizer(folder: Path, name: str) -> Tokenizer:
    """The tokenizer of a model folder; ModelError E-TOKENIZER when it cannot be read."""
    try:
        backend = _plain_tokenizer(folder) or transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except _LOAD_FAILURES as error:
        raise ModelError("E-TOKENIZER", name, _first_line(error)) from error
    return Tokenizer(backend, name)


# A tokenizer_config.json with these alone says nothing that tokenizer.json does not hold already.
_PLAIN_KEYS = {"bos_token", "eos_token", "pad_token", "unk_token", "model_max_length", "padding_side"}
_SILENT_KEYS = {"backend", "tokenizer_class", "is_local", "local_files_only", "clean_up_tokenization_spaces"}


def _plain_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer read by `tokenizers` alone, where nothing more is needed; a third of a second faster."""
    settings, whole = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not (settings.is_file() and whole.is_file()):
        return None
    found = json.loads(settings.read_text(encoding="utf-8"))
    plain = {key: value for key, value in found.items() if key not in _SILENT_KEYS}
    if found.get("tokenizer_class") not in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return None
    if not plain.keys() <= _PLAIN_KEYS or any(isinstance(value, dict) for value in plain.values()):
        return None
    if (folder / "special_tokens_map.json").exists() or (folder / "added_tokens.json").exists():
        return None
    template = folder / "chat_template.jinja"
    if template.is_file():
        plain["chat_template"] = template.read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_file(str(whole)), **plain)


def _network(family: Family, located: Located, placement: Placement) -> Any:
    auto = getattr(transformers, FAMILIES[family][0])
    try:
        net, info = auto.from_pretrained(
            located.folder,
            dtype=placement.dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        _check_weights(info, net, located.label)
        net = net.to(placement.device).eval()
    except _LOAD_FAILURES as error:
        if device.out_of_memory(error):
            raise OutOfMemory(
                "E-MEMORY", located.label, f"weights do not fit into the memory of {placement.device}"
            ) from error
        raise ModelError("E-LOAD", located.label, _first_line(error)) from error
    finally:
        gc.enable()  # the program starts with it off, which makes the imports faster
    return net


def _adapted(net: Any, located: Located, config: ModelConfig, report: Report) -> Any:
    """The network with its adapters merged, its weights quantised and its attention chosen."""
    try:
        if config.adapter:
            from textgen_cli.model import adapter  # peft costs seconds

            net = adapter.apply(net, config.adapter, located, config, report)
        if config.quantize:
            quantize.apply(net, config.quantize, located.label, report)
    except (RuntimeError, MemoryError) as error:
        if not device.out_of_memory(error):
            raise
        raise OutOfMemory(
            "E-MEMORY", located.label, "does not fit into memory while it is changed"
        ) from error
    attention.choose(net)
    return net


def _own_generation(net: Any) -> dict[str, Any]:
    """Take the model's generation settings off it: fields left open must not fall back to unchecked ones."""
    own = getattr(net, "generation_config", None)  # only models that generate have one
    found = own.to_dict() if own is not None else {}
    net.generation_config = transformers.GenerationConfig()
    return {name: value for name, value in found.items() if value is not None}


def _check_weights(info: dict[str, Any], net: PreTrainedModel, name: str) -> None:
    unexpected = {key for key in info["unexpected_keys"] if not _OTHER_HEADS.search(key)}
    for what, keys in (
        ("missing", info["missing_keys"]),
        ("unexpected", unexpected),
        ("mismatched", info["mismatched_keys"]),
    ):
        if keys:
            raise ModelError("E-WEIGHTS", name, f"{len(keys)} {what}: {_first(keys)} (first)")
    if info.get("error_msgs"):
        raise ModelError("E-WEIGHTS", name, str(info["error_msgs"][0]).splitlines()[0])
    stray = [key for key, value in net.named_parameters() if value.is_meta]
    if stray:
        raise ModelError("E-WEIGHTS", name, f"{len(stray)} without data: {stray[0]} (first)")


def _first(keys: Iterable[Any]) -> str:
    return str(min(key if isinstance(key, str) else key[0] for key in keys))


def _check_vocabulary(tokenizer: Tokenizer, net: PreTrainedModel, name: str) -> None:
    embeddings: Any = net.get_input_embeddings()
    rows = embeddings.weight.shape[0]  # (V, D)
    if tokenizer.size > rows:
        raise ModelError(
            "E-VOCAB", name, f"tokenizer has {tokenizer.size:,} tokens, the model has {rows:,} embeddings"
        )


def _context(net: PreTrainedModel) -> int | None:
    text_config = net.config.get_text_config()
    values = (getattr(text_config, field, None) for field in _CONTEXT_FIELDS)
    found = next((value for value in values if isinstance(value, int) and value > 0), None)
    # RoBERTa and its kin number positions from behind the padding's own.
    table = getattr(getattr(net.base_model, "embeddings", None), "position_embeddings", None)
    reserved = getattr(table, "padding_idx", None)
    return found if found is None or reserved is None else found - reserved - 1


def _quiet() -> None:
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
