"""load(ModelConfig) -> Model: the one place where weights become a network.

A model that is not whole is refused: missing, unexpected or mismatched weights and a tokenizer that does not
fit are errors here, because the library only logs them and then writes garbage.
"""

import gc
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from textgen_cli.config import ModelConfig
from textgen_cli.errors import ModelError, OutOfMemory
from textgen_cli.events import Notice, Progress, Report
from textgen_cli.model import attention, change, device, pack, quantize, reading
from textgen_cli.model.check import Checked, check_folder
from textgen_cli.model.device import Placement, Purpose
from textgen_cli.model.family import FAMILIES as FAMILIES
from textgen_cli.model.family import Family as Family
from textgen_cli.model.family import family_of as family_of
from textgen_cli.model.loaded import Model as Model
from textgen_cli.model.source import Located, locate
from textgen_cli.model.stamp import check_stamp, read_stamp
from textgen_cli.model.tokenizer import Tokenizer

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
class Head:
    """What a network is to end in where that need not be what its folder holds; a new one begins at random."""

    family: Family  # a family of labels or spans; another one must be the folder's own
    labels: tuple[str, ...] = ()  # names, in the order of the outputs
    problem: str | None = None  # a value of problem_type

    @property
    def settings(self) -> dict[str, Any]:
        """What of it stands in a config.json."""
        found: dict[str, Any] = {"problem_type": self.problem} if self.problem else {}
        if self.labels:
            found["id2label"] = dict(enumerate(self.labels))
            found["label2id"] = {name: number for number, name in enumerate(self.labels)}
        return found


HEADS = frozenset({"sequence-classification", "token-classification", "question-answering"})


def load(
    config: ModelConfig, purpose: Purpose, report: Report, head: Head | None = None, *, hasten: bool = True
) -> Model:
    """Find, check and load a model. `head`: what it is to end in, for training; `hasten`: by code of our own.

    Raises ModelError (unusable), SafetyError (refused), NetworkError (cannot be fetched), OutputError (cache),
    OutOfMemory and UsageError (name or device).
    """
    placement = device.place(config, purpose)
    located = locate(config, report)
    checked = check_folder(located.folder)
    for notice in checked.notices:
        report(notice)
    if not checked.has_tokenizer:
        raise ModelError("E-TOKENIZER", located.label, "has no tokenizer")
    stamp = read_stamp(located.folder, located.label)
    if stamp is not None:
        check_stamp(stamp, checked.config, located.label)
    report(Progress("load", located.label))
    family = _family(checked.config, located.label, head)
    quiet()
    trains = purpose == "finetune"
    form = quantize.form_of(checked.config)
    if form and head is not None and head.family in HEADS:
        fact = "has quantised weights, among which no new head can learn"
        raise ModelError("E-QUANTIZE", located.label, fact, hint="take the plain model with --quantize")
    plan = change.plan(config, form, located, report, trains=trains)
    if hasten and (form or config.quantize) and device.rounds_products(config, placement, purpose):
        reason = f"{placement.reason}; products with codes in bfloat16"
        plan, placement = replace(plan, rounds=True), replace(placement, reason=reason)
    # A GPU that holds an adapter's training beside codes may be too small for the weights that they are made of.
    at_first = replace(placement, device=torch.device("cpu")) if config.quantize and trains else placement
    net = _network(family, located, checked, at_first, head)
    net = change.made(net, plan, located.label, placement.device, report)
    if hasten and purpose not in ("explain", "finetune"):
        _hasten(net)
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
        context=_shortest(_context(net), stamp.limit if stamp and purpose != "finetune" else None),
        generation=generation,
        stamp=stamp,
        quantized=form or config.quantize,
    )


def bare(config: ModelConfig, report: Report) -> Any:
    """A network with its adapters merged and nothing else done to it, for a copy; raises what `load` raises."""
    placement = device.place(config, "generate")
    located = locate(config, report)
    checked = check_folder(located.folder)
    if "quantization_config" in checked.config:
        raise ModelError("E-QUANTIZE", located.label, "has quantised weights already")
    report(Progress("load", located.label))
    quiet()
    plan = change.plan(replace(config, quantize=None), None, located, report)
    net = _network(family_of(checked.config, located.label), located, checked, placement, None)
    return change.made(net, plan, located.label, torch.device("cpu"), report)


def _family(config: dict[str, Any], name: str, head: Head | None) -> Family:
    if head is not None and head.family in HEADS:
        return head.family
    found = family_of(config, name)
    if head is not None and head.family != found:
        raise ModelError("E-ARCH", name, f"is a {found} model, this task trains {head.family} ones")
    return found


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
    return PreTrainedTokenizerFast(tokenizer_file=str(whole), **plain)


def _network(
    family: Family, located: Located, checked: Checked, placement: Placement, head: Head | None
) -> Any:
    auto = getattr(transformers, FAMILIES[family][0])
    options = {"dtype": placement.dtype, "output_loading_info": True}
    if head is not None and head.family in HEADS:
        options |= head.settings | {"ignore_mismatched_sizes": True}
    try:
        if _read_here(checked, placement):
            net, info = _in_memory(auto, checked, options)
        else:
            net, info = auto.from_pretrained(
                located.folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                **options,
            )
        _check_weights(info if head is None else _of_base(info, net), net, located.label)
        net = net.to(placement.device).eval()
    except _LOAD_FAILURES as error:
        if device.out_of_memory(error):
            raise OutOfMemory(
                "E-MEMORY", located.label, f"weights do not fit into the memory of {placement.device}"
            ) from error
        raise ModelError("E-LOAD", located.label, _first_line(error)) from error
    finally:
        if not gc.isenabled():  # the program starts with it off, which makes the imports faster
            gc.freeze()  # they stay: no collection needs to walk them
            gc.enable()
    return net


def _read_here(checked: Checked, placement: Placement) -> bool:
    """Whether weights are read one by one: on a CPU in the dtype they have, where the library would compute with the
    file itself, and in bfloat16, where it would hold them in both dtypes at once."""
    if placement.device.type != "cpu":
        return False
    return placement.dtype == torch.bfloat16 or placement.dtype in reading.dtypes(checked.weights[:1])


def _in_memory(auto: Any, checked: Checked, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The network with its weights read and not mapped."""
    shape = {name: options[name] for name in ("id2label", "label2id", "problem_type") if name in options}
    config = transformers.AutoConfig.from_pretrained(checked.folder, local_files_only=True, **shape)
    with torch.device("meta"):
        empty = auto.from_config(config, dtype=options["dtype"])
    kind = options["dtype"] if _is_of(options["dtype"], empty) else torch.float32
    state = dict(reading.tensors(checked.weights, kind))
    rest = {name: value for name, value in options.items() if name not in shape}
    net, info = type(empty).from_pretrained(None, config=config, state_dict=state, **rest)
    if net.can_generate() and (checked.folder / "generation_config.json").is_file():
        net.generation_config = transformers.GenerationConfig.from_pretrained(checked.folder)
    return net, info


def _is_of(dtype: torch.dtype, net: Any) -> bool:
    """Whether all that a network holds in floating point is of this dtype: nothing of it stays in float32."""
    kinds = {tensor.dtype for tensor in net.state_dict().values() if tensor.is_floating_point()}
    return kinds == {dtype} and not net._keep_in_fp32_modules_strict


def _hasten(net: Any) -> None:
    """What makes a network faster that only runs: no gradient comes through it any more."""
    attention.choose(net)
    if pack.suits(net):
        pack.apply(net)


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


def _of_base(info: dict[str, Any], net: PreTrainedModel) -> dict[str, Any]:
    """What of a loading concerns the network below its head, which may be new and other than the folder's."""

    def below(key: Any) -> bool:
        name = key if isinstance(key, str) else key[0]
        return name.startswith(f"{net.base_model_prefix}.") and not _OTHER_HEADS.search(name)

    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return info | {kind: [key for key in info[kind] if below(key)] for kind in kinds}


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


def _shortest(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def quiet() -> None:
    """Keep the library from writing to our streams."""
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
