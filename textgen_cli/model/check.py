"""Is this model folder safe and whole? Decided from names, JSON and headers, before any library opens it.

Owns what is refused: code, pickles, paths that leave the folder, sizes that no weights back up. It reads no
tensor data, imports no heavy package and fetches nothing.
"""

import importlib.util
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from textgen_cli.errors import ModelError, SafetyError
from textgen_cli.events import Notice
from textgen_cli.model.weights import FLOATS, Tensor, find_weights, is_pickle, no_weights, read_json

# The files that a model needs; nothing else is fetched, and nothing else is opened by the loader.
LOADABLE = re.compile(
    r"(config|generation_config|model\.safetensors\.index|special_tokens_map|added_tokens|chat_template)\.json"
    r"|tokenizer(_config|\.[\d.]+)?\.json|vocab(-src|-tgt)?\.json|(vocab|merges|dict)\.txt|bpe\.codes|tekken\.json"
    r"|(tokenizer|spiece|spm|sentencepiece(\.bpe)?)\.model|(source|target)\.spm|chat_template\.jinja"
    r"|adapter_config\.json|adapter_model\.safetensors|textgen\.json"
    r"|model\.safetensors|[\w.-]{1,80}-\d{5}-of-\d{5}\.safetensors",
    re.ASCII,
)
TOKENIZERS = frozenset({
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "spm.model",
    "sentencepiece.model", "sentencepiece.bpe.model", "source.spm", "tekken.json",
})  # fmt: skip

# Sizes that make a library loop or fill lists before it looks at a weight.
SIZE_LIMITS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
                     "decoder_layers", "num_decoder_layers", "num_encoder_layers", "num_experts",
                     "num_local_experts", "n_routed_experts"), 4096),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "hidden_size", "n_embd", "d_model",
                     "num_labels"), 1 << 20),
    **dict.fromkeys(("vocab_size", "intermediate_size", "d_ff", "n_inner", "type_vocab_size"), 1 << 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 1 << 31),
}  # fmt: skip
EMBEDDINGS = (
    "model.embed_tokens.weight", "transformer.wte.weight", "wte.weight", "shared.weight",
    "model.shared.weight", "transformer.word_embeddings.weight", "gpt_neox.embed_in.weight",
    "embeddings.word_embeddings.weight", "bert.embeddings.word_embeddings.weight",
    "roberta.embeddings.word_embeddings.weight",
)  # fmt: skip

ATTENTION = frozenset(
    {"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"}
)
EXPERTS = frozenset({"eager", "batched_mm", "grouped_mm"})
DTYPES = frozenset({"auto", "float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2"})
# Methods whose code is in transformers or in a package of this name; others would import what a config names.
QUANTIZATIONS = {"torchao": "torchao", "bitsandbytes": "bitsandbytes", "textgen": "textgen_cli"}


@dataclass(frozen=True)
class Checked:
    """A folder that may be handed to the loader."""

    folder: Path
    config: dict[str, Any]  # config.json
    weights: tuple[Path, ...]  # safetensors files, in the order of their names
    has_tokenizer: bool
    notices: tuple[Notice, ...]


def check_folder(folder: Path) -> Checked:
    """Check a model folder: its names, its JSON files and the headers of its weights.

    Raises ModelError (5) for what is missing, cut or contradictory, SafetyError (6) for what would run code
    or leave the folder.
    """
    try:
        return _check(folder)
    except OSError as error:
        name = Path(error.filename or folder).name
        raise ModelError("E-READ", name, (error.strerror or str(error)).lower()) from error


def _check(folder: Path) -> Checked:
    names = _names(folder)
    notices: list[Notice] = []
    config = read_json(folder / "config.json", "E-CONFIG") if "config.json" in names else None
    if config is None:
        if "adapter_config.json" in names:
            raise no_weights(folder.name, names)
        raise ModelError("E-CONFIG", "config.json", "is not in the model folder")
    notices += check_config(config)
    for name in sorted(names & {"tokenizer_config.json", "generation_config.json"}):
        settings = read_json(folder / name, "E-TOKENIZER" if name.startswith("tok") else "E-CONFIG")
        _check_settings(name, settings)
        if name == "tokenizer_config.json":
            notices += _check_tokenizer_settings(settings, names)
    _check_tokenizer_files(folder, names)
    weights, tensors = find_weights(folder, names)
    _check_sizes(config, tensors)
    notices += _ignored(folder, names)
    return Checked(folder, config, weights, bool(names & TOKENIZERS), tuple(notices))


def check_config(config: dict[str, Any]) -> list[Notice]:
    """Check what a config.json says by itself. ModelError E-CONFIG, E-ARCH, E-QUANTIZATION; SafetyError."""
    _check_settings("config.json", config)
    return _check_type(config)


def _names(folder: Path) -> set[str]:
    """The names in the folder, those the loader may open checked to be regular files that stay inside."""
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise ModelError("E-MODEL", str(folder), (error.strerror or str(error)).lower()) from error
    root = folder.resolve()
    homes = [root]
    if root.parent.name == "snapshots":  # a Hub cache: CACHE/models--org--name/snapshots/COMMIT
        homes += [root.parents[1] / "blobs", root.parents[2] / "blobs"]
    for entry in entries:
        if LOADABLE.fullmatch(entry.name) or entry.suffix == ".safetensors":
            _check_regular(entry, homes)
    return {entry.name for entry in entries}


def _check_regular(entry: Path, homes: list[Path]) -> None:
    try:
        target = entry.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise ModelError("E-MODEL", entry.name, "is a link to nothing") from error
    if not stat.S_ISREG(mode):
        raise SafetyError("E-PATH", entry.name, "is not a regular file")
    if not any(target.is_relative_to(home) for home in homes):
        raise SafetyError("E-PATH", entry.name, "is a link that leaves the model folder")


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, Mapping):
            yield from item.items()
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _check_settings(name: str, settings: dict[str, Any]) -> None:
    for key, value in _walk(settings):
        if key == "trust_remote_code" and value:
            raise SafetyError("E-REMOTE-CODE", name, "asks for trust in code from elsewhere")
        if key.endswith("_implementation_internal"):
            raise SafetyError("E-REMOTE-CODE", name, f"sets {key}, which names code to run")
        if key.endswith(("attn_implementation", "experts_implementation")):
            allowed = EXPERTS if "experts" in key else ATTENTION
            chosen = value.values() if isinstance(value, dict) else [value]
            if any(item is not None and not (isinstance(item, str) and item in allowed) for item in chosen):
                raise SafetyError("E-REMOTE-CODE", name, f"{key} names code outside the library")
        if key == "custom_generate" and value:
            raise SafetyError("E-REMOTE-CODE", name, "names its own generate function")
        if key in ("quantization_config", "compression_config") and value is not None:
            _check_quantization(value if isinstance(value, dict) else {})


def _check_quantization(settings: dict[str, Any]) -> None:
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in QUANTIZATIONS:
        raise ModelError("E-QUANTIZATION", "config.json", f"quantization {method!r} is not supported",
                         hint=f"supported: {', '.join(QUANTIZATIONS)}")  # fmt: skip
    if importlib.util.find_spec(QUANTIZATIONS[method]) is None:
        raise ModelError("E-QUANTIZATION", "config.json", f"needs the package {QUANTIZATIONS[method]}")


def _check_type(config: dict[str, Any]) -> list[Notice]:
    """Is the model's type one that transformers itself implements?"""
    kind = config.get("model_type")
    code = config.get("auto_map")
    if not isinstance(kind, str) or not knows_type(kind):
        if code:
            raise SafetyError(
                "E-REMOTE-CODE", "config.json", f"model type {kind!r} needs code from the model's publisher"
            )
        raise ModelError(
            "E-ARCH", "config.json", f"unknown model type {kind!r}" if kind else "names no model type"
        )
    architectures = config.get("architectures")
    if architectures is not None and not _strings(architectures):
        raise ModelError("E-CONFIG", "config.json", "architectures is not a list of names")
    for key, value in _walk({key: value for key, value in config.items() if key != "quantization_config"}):
        known = value is None or (isinstance(value, str) and value.removeprefix("torch.") in DTYPES)
        if key in ("dtype", "torch_dtype") and not known:
            raise ModelError("E-CONFIG", "config.json", f"{key} is unknown")
        _check_limit(key, value)
    return [_ignored_code("config.json")] if code else []


def _check_limit(key: str, value: Any) -> None:
    limit = SIZE_LIMITS.get(key)
    if limit is None or value is None or isinstance(value, list | dict):
        return
    if type(value) is not int or not 0 <= value <= limit:
        raise ModelError("E-CONFIG", "config.json", f"{key} is not a number from 0 to {limit:,}")


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _ignored_code(name: str) -> Notice:
    return Notice(f"{name}: code that comes with the model is not run", "W-REMOTE-CODE-IGNORED")


@cache
def _library_text(name: str) -> str:
    """The source of a table of transformers, read as text: importing it would import torch."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return ""
    path = Path(spec.submodule_search_locations[0], "models", "auto", name)
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def knows_type(kind: str) -> bool:
    """Whether transformers has a model type; True where its tables have moved, so that it decides."""
    texts = [_library_text(name) for name in ("auto_mappings.py", "configuration_auto.py")]
    entry = re.compile(rf'"{re.escape(kind)}"[,:] "\w+Config"')
    return any(entry.search(text) for text in texts) or not any('"BertConfig"' in text for text in texts)


def _knows_tokenizer(class_name: str) -> bool:
    text = _library_text("tokenization_auto.py")
    plain = class_name.removesuffix("Fast")
    return (
        plain in ("PreTrainedTokenizer", "TokenizersBackend", "SentencePieceBackend")
        or f'"{plain}' in text
        or not text
    )


def _check_tokenizer_settings(settings: dict[str, Any], names: set[str]) -> list[Notice]:
    name = "tokenizer_config.json"
    for key, value in settings.items():
        # Old files carry their author's paths here; the library opens the model's own file instead.
        harmless = key == "special_tokens_map_file" or (key == "tokenizer_file" and "tokenizer.json" in names)
        if isinstance(value, str) and key.endswith(("_file", "_spm")) and not harmless and _leaves(value):
            raise SafetyError("E-PATH", name, f"{key} names a path outside the model folder")
    templates = settings.get("chat_template")
    if isinstance(templates, list):
        named = [item.get("name") if isinstance(item, dict) else None for item in templates]
        if not all(isinstance(item, str) and re.fullmatch(r"[\w-]{1,100}", item) for item in named):
            raise ModelError("E-TEMPLATE", name, "a chat template has a name that is none")
    elif not isinstance(templates, str | None):
        raise ModelError("E-TEMPLATE", name, "chat_template is not text")
    if not settings.get("auto_map"):
        return []
    class_name = settings.get("tokenizer_class")
    if not isinstance(class_name, str) or not _knows_tokenizer(class_name):
        raise SafetyError("E-REMOTE-CODE", name, "the tokenizer needs code from the model's publisher")
    return [_ignored_code(name)]


def _leaves(value: str) -> bool:
    return value.startswith(("/", "~", "\\")) or ".." in re.split(r"[/\\]", value) or value[1:2] == ":"


def _check_tokenizer_files(folder: Path, names: set[str]) -> None:
    for name in sorted(names & {"special_tokens_map.json", "added_tokens.json"}):
        read_json(folder / name, "E-TOKENIZER")
    for name in sorted(
        names & {"tokenizer.json", "vocab.json"}
    ):  # megabytes: the tokenizer parses them itself
        with (folder / name).open("rb") as file:
            first = file.read(64).lstrip()[:1]
            file.seek(max(0, file.seek(0, 2) - 64))
            last = file.read().rstrip()[-1:]
        if (first, last) != (b"{", b"}"):
            raise ModelError("E-TOKENIZER", name, "not JSON, or cut")


def _check_sizes(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Compare what config.json says of the embeddings with the weights; other shapes the loader compares."""
    if "quantization_config" in config:
        return
    found = next((tensors[name] for name in EMBEDDINGS if name in tensors), None)
    if found is None or found.dtype not in FLOATS or len(found.shape) != 2:
        return
    for side, keys in enumerate(
        (("vocab_size",), ("embedding_size", "word_embed_proj_dim", "hidden_size", "n_embd", "d_model"))
    ):
        key = next((key for key in keys if type(config.get(key)) is int), None)
        if key and config[key] != found.shape[side]:
            raise ModelError(
                "E-CONFIG", "config.json", f"{key} {config[key]}, weights have {found.shape[side]}"
            )


def _ignored(folder: Path, names: set[str]) -> list[Notice]:
    notices = []
    if pickles := sorted(name for name in names if is_pickle(name)):
        notices.append(
            Notice(f"{pickles[0]}: not opened, the safetensors weights are used", "W-PICKLE-IGNORED")
        )
    if (folder / "custom_generate").exists():
        notices.append(_ignored_code("custom_generate"))
    return notices
