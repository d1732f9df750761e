"""LoRA adapters, found, checked and merged into the weights of a loaded base: decoding costs nothing extra.

One that learnt beside quantised weights (QLoRA) stays beside the same, for a sum would be rounded away by their codes.
Owns what an adapter may ask for and the proof that all of it reached the network. The base is the one that was chosen:
what an adapter says about its base is compared and never followed. Importing this costs seconds.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file

from textgen_cli.config import ModelConfig, split_weight
from textgen_cli.errors import ModelError, SafetyError, UsageError
from textgen_cli.events import Notice, Progress, Report
from textgen_cli.model import check, device
from textgen_cli.model.quantize import Format, QuantizedLinear
from textgen_cli.model.source import HUB_NAME, Located, locate, parse
from textgen_cli.model.weights import is_pickle, read_header, read_json

CONFIG, WEIGHTS, STAMP = "adapter_config.json", "adapter_model.safetensors", "textgen.json"
RANK_LIMIT = 1 << 16
PATTERN_LIMIT = 2000  # characters of a regular expression

# What textgen applies; each is handed to peft as it is.
APPLIED = frozenset({
    "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_bias", "modules_to_save", "r", "rank_pattern", "target_modules", "use_dora",
    "use_rslora",
})  # fmt: skip
# What speaks of training or of other files and changes nothing here; auto_mapping names code, is not read.
IGNORED = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode",
    "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
})  # fmt: skip
# Ways to begin training that leave the base as it is; the others change it and their adapters fit that one.
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")

_FAILURES = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError, re.error)


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk whose settings are safe to apply."""

    label: str
    weight: float
    folder: Path
    settings: peft.LoraConfig
    tensors: dict[str, torch.Tensor]  # float32
    beside: Format | None  # the form of the weights beside which it learnt

    @property
    def only_adds(self) -> bool:
        """Whether it is a sum of products and no more, so that it can be weighted and combined."""
        return not (self.settings.modules_to_save or self.settings.use_dora or self.settings.bias != "none")


def find(base: Located, config: ModelConfig, report: Report) -> list[Adapter]:
    """The adapters that `config` names, each a folder or Hub name with an optional =WEIGHT; no network is touched.

    Raises ModelError E-ADAPTER, SafetyError E-PICKLE and E-REMOTE-CODE, and the errors of a source.
    """
    found = [_open(name, base, config, report) for name in config.adapter]
    for adapter in found:
        if not adapter.only_adds and (len(found) > 1 or adapter.weight != 1):
            fact = "replaces weights (DoRA, bias or modules_to_save): it goes alone and with weight 1"
            raise _bad(adapter.label, fact)
    return found


def merge(net: Any, found: Sequence[Adapter], report: Report) -> Any:
    """Merge adapters into a network; returns it. ModelError E-ADAPTER if one does not fit the base entirely.

    The sum is formed in float32 and rounded once to the dtype of each layer.
    """
    dtypes = {name: parameter.dtype for name, parameter in net.named_parameters(remove_duplicate=False)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they speak of is checked here
        net = _attached(net, found, report)
        _merge(net, _names(found))
        net = net.unload()
    for name, parameter in net.named_parameters(remove_duplicate=False):
        parameter.data = parameter.data.to(dtypes[name])
    for adapter in found:
        fact = f"adapter of rank {adapter.settings.r} merged with weight {adapter.weight:g}"
        report(Notice(f"{adapter.label}: {fact}"))
        if adapter.beside:
            fact = f"learnt beside {adapter.beside} weights, which are not here"
            report(Notice(f"{adapter.label}: {fact}; --quantize {adapter.beside} has them", "W-QUANTIZE"))
    return net.requires_grad_(True).eval()


def attach(net: Any, found: Sequence[Adapter], report: Report) -> Any:
    """Leave adapters beside the quantised weights of a network; returns it. ModelError E-ADAPTER."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = _attached(net, found, report)
    net.base_model.set_adapter(_names(found))
    for adapter in found:
        fact = f"adapter of rank {adapter.settings.r} beside {adapter.beside} with weight {adapter.weight:g}"
        report(Notice(f"{adapter.label}: {fact}"))
    return net.get_base_model().requires_grad_(True).eval()


def on_codes(settings: peft.LoraConfig) -> peft.LoraConfig:
    """Settings by which peft puts an adapter beside quantised layers as beside plain ones."""
    settings._register_custom_module({QuantizedLinear: peft.tuners.lora.Linear})
    return settings


def _names(found: Sequence[Adapter]) -> list[str]:
    """What peft is to call them."""
    return [f"a{number}" for number in range(len(found))]


def _attached(net: Any, found: Sequence[Adapter], report: Report) -> Any:
    for name, adapter in zip(_names(found), found, strict=True):
        report(Progress("load", adapter.label))
        try:
            net = _attach(net, adapter, name)
        except _FAILURES as error:
            if device.out_of_memory(error):
                raise
            raise _bad(adapter.label, _first_line(error)) from error
    return net


def _open(name: str, base: Located, config: ModelConfig, report: Report) -> Adapter:
    """Find and check an adapter without touching the network."""
    name, weight = split_weight(name)
    if parse(name).kind not in ("folder", "hub"):
        raise UsageError("E-ADAPTER", name, "is no adapter", hint="./folder or org/name@revision")
    located = locate(replace(config, model=name, adapter=()), report)
    names = check._names(located.folder)
    if CONFIG not in names:
        raise _bad(located.label, f"has no {CONFIG}")
    if WEIGHTS not in names:
        if any(is_pickle(other) for other in names):
            raise SafetyError(
                "E-PICKLE",
                located.label,
                "has its weights only as a pickle, which can run code when it is read",
            )
        raise _bad(located.label, f"has no {WEIGHTS}")
    stored = read_json(located.folder / CONFIG, "E-ADAPTER")
    settings = _settings(located.label, stored)
    _check_base(located.label, stored.get("base_model_name_or_path"), base, report)
    stamp = read_json(located.folder / STAMP, "E-ADAPTER") if STAMP in names else {}
    _check_stamp(located.label, stamp, base)
    tensors = _tensors(located.label, located.folder / WEIGHTS)
    return Adapter(located.label, weight, located.folder, settings, tensors, stamp.get("quantize"))


def _settings(label: str, stored: dict[str, Any]) -> peft.LoraConfig:
    """The settings of an adapter_config.json as peft's own: only what is understood and harmless."""
    if stored.get("peft_type") != "LORA":
        raise _bad(label, f"is of type {str(stored.get('peft_type'))[:40]}, textgen applies LORA")
    if stored.get("megatron_config") is not None:
        raise SafetyError("E-REMOTE-CODE", label, "asks for a module of another package to be imported")
    if stored.get("init_lora_weights") not in PLAIN_STARTS:
        raise _bad(label, "was made on a base whose weights its start of training had changed",
                   hint="convert it with peft's path_initial_model_for_weight_conversion")  # fmt: skip
    unknown = stored.keys() - APPLIED - IGNORED - {"megatron_config", "megatron_core"}
    for key in sorted(unknown):
        if stored[key] not in (None, False, {}, []):
            raise _bad(label, f"uses {key[:40]}, which textgen does not apply")
    applied = {key: value for key, value in stored.items() if key in APPLIED and value is not None}
    _check_numbers(label, applied)
    _check_patterns(label, applied)
    try:
        return on_codes(peft.LoraConfig(**applied, inference_mode=True))
    except _FAILURES as error:
        raise _bad(label, _first_line(error)) from error


def _check_numbers(label: str, applied: dict[str, Any]) -> None:
    ranks = [applied.get("r"), *_values(label, applied, "rank_pattern")]
    for rank in ranks:
        if type(rank) is not int or not 1 <= rank <= RANK_LIMIT:
            raise _bad(label, f"rank {str(rank)[:40]} is not a number from 1 to {RANK_LIMIT:,}")
    for alpha in [applied.get("lora_alpha"), *_values(label, applied, "alpha_pattern")]:
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise _bad(label, f"lora_alpha {str(alpha)[:40]} is not a finite number")


def _values(label: str, applied: dict[str, Any], key: str) -> list[Any]:
    found = applied.get(key) or {}
    if not isinstance(found, dict):
        raise _bad(label, f"{key} is not a map")
    return list(found.values())


def _check_patterns(label: str, applied: dict[str, Any]) -> None:
    """Refuse regular expressions that could take for ever: repetition of what is repeated already."""
    sides = [applied.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")]
    patterns = [side for side in sides if isinstance(side, str)]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns += applied.get(key) or {}
    for pattern in patterns:
        if len(pattern) > PATTERN_LIMIT or re.search(r"[+*}]\??\)+[+*{]", pattern):
            raise _bad(label, f"pattern {pattern[:40]!r} is too long or repeats what is repeated")


def _check_base(label: str, named: Any, base: Located, report: Report) -> None:
    """Compare the base that the adapter names with the one in use; nothing is fetched for it."""
    if not isinstance(named, str) or not named or named in (base.source.name, base.label):
        return
    here = base.source
    if here.kind == "hub" and "/" in named and HUB_NAME.fullmatch(named) and "/" in here.name:
        if named.lower() != here.name.lower():
            raise _bad(label, f"was made for {named}, the model is {here.name}", hint=f"use -m {named}")
        return
    report(Notice(f"{label}: made for {named}; whether {base.label} is the same cannot be told by the name"))


def _check_stamp(label: str, stamp: dict[str, Any], base: Located) -> None:
    """Compare the commit that our own finetune trained on with the one in use."""
    if stamp.get("quantize") not in (None, *get_args(Format)):
        raise _bad(label, f"quantize of {STAMP} has no value that finetune writes")
    revision = stamp.get("revision")
    if not isinstance(revision, str) or not revision or not base.revision or revision == base.revision:
        return
    hint = f"use -m {base.source.name}@{revision}" if base.source.kind == "hub" else None
    raise _bad(
        label,
        f"was trained on {stamp.get('base', 'a base')} {revision}, the model is {base.revision}",
        hint=hint,
    )


def _tensors(label: str, path: Path) -> dict[str, torch.Tensor]:
    read_header(path)
    try:
        tensors = {key: tensor.float() for key, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise _bad(label, _first_line(error)) from error
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise _bad(label, f"{key} holds NaN or infinity")
    return tensors


def _attach(net: Any, adapter: Adapter, name: str) -> Any:
    """Put an adapter beside the weights, every tensor of it in its place."""
    if isinstance(net, peft.PeftModel):
        net.add_adapter(name, adapter.settings)
    else:
        net = peft.PeftModel(net, adapter.settings, name)
    tensors = _covering(net, adapter, name)
    peft.set_peft_model_state_dict(net, tensors, adapter_name=name)
    for module in net.modules():
        if isinstance(module, LoraLayer) and name in module.scaling:
            module.scaling[name] *= adapter.weight
    return net


def _covering(net: Any, adapter: Adapter, name: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, after proof that they are exactly those that its settings need.

    A copy of the base's embeddings, which peft saves beside some, must equal the base's and is left out.
    """
    # Never with "auto", which asks the Hub for the base that the adapter names.
    needed = peft.get_peft_model_state_dict(net, adapter_name=name, save_embedding_layers=False)
    copies = peft.get_peft_model_state_dict(net, adapter_name=name, save_embedding_layers=True)
    missing, alien = needed.keys() - adapter.tensors.keys(), adapter.tensors.keys() - copies.keys()
    for what, keys in (("missing", missing), ("alien", alien)):
        if keys:
            raise _bad(adapter.label, f"{len(keys)} {what} keys: {min(keys)} (first)")
    for key, tensor in adapter.tensors.items():
        if copies[key].shape != tensor.shape:
            fact = f"{key} has the shape {tuple(tensor.shape)}, the model needs {tuple(copies[key].shape)}"
            raise _bad(adapter.label, fact)
        if key not in needed and not torch.allclose(tensor.to(copies[key]), copies[key]):
            raise _bad(adapter.label, f"was made on a base with another {key}")
    return {key: tensor for key, tensor in adapter.tensors.items() if key in needed}


def _merge(net: Any, names: list[str]) -> None:
    """Add every adapter to each layer in float32, one layer at a time."""
    uses = Counter(id(parameter) for _, parameter in net.named_parameters(remove_duplicate=False))
    for module in net.modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module.get_base_layer()
        dtype = layer.weight.dtype
        if (
            uses[id(layer.weight)] > 1
        ):  # a head that shares the embedding table: the change is meant for one of them
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
            net.config.tie_word_embeddings = False
        layer.float()
        module.merge(adapter_names=names)
        layer.to(dtype)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _bad(label: str, fact: str, *, hint: str | None = None) -> ModelError:
    return ModelError("E-ADAPTER", label, fact, hint=hint)
