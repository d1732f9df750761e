"""Which weights learn: all of them, an adapter beside them, those behind some layers, or new ones from scratch.

Gives the network that the trainer is to have, in the precision that suits the way. It knows no data and no trainer.
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from textgen_cli.config import Dtype
from textgen_cli.config.finetune import FinetuneConfig, WayConfig
from textgen_cli.errors import ModelError, UsageError
from textgen_cli.events import Notice, Report
from textgen_cli.finetune import scratch
from textgen_cli.finetune.encode import Encoded
from textgen_cli.finetune.prepared import Prepared
from textgen_cli.finetune.report import model_name
from textgen_cli.model import device, quantize
from textgen_cli.model.anatomy import context_of
from textgen_cli.model.change import LABELLING
from textgen_cli.model.load import HEADS, Family, Head, load, quiet
from textgen_cli.model.tokenizer import Tokenizer

FAMILIES: dict[str, Family] = {
    "clm": "causal",
    "chat": "causal",
    "mlm": "masked",
    "seq2seq": "seq2seq",
    "text-classification": "sequence-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
}


@dataclass(frozen=True)
class Base:
    """A network that can learn, with all that belongs to it."""

    net: Any
    family: Family
    tokenizer: Tokenizer
    device: torch.device
    name: str
    revision: str
    context: int | None
    autocast: bool  # computes in bfloat16 where that is exact enough, with weights in float32
    generation: dict[str, Any]
    folder: Path | None  # that the network came from
    quantized: quantize.Format | None = None  # codes that do not learn
    adapter: bool = False
    fresh: bool = False  # begins at random
    evaluates: bool = True

    @property
    def label_names(self) -> list[str]:
        """The columns that hold what is right."""
        return ["start_positions", "end_positions"] if self.family == "question-answering" else ["labels"]


def open_base(config: FinetuneConfig, prepared: Prepared, report: Report) -> Base:
    """Load or make the network and set which of its weights learn.

    Raises what `load` raises, ModelError E-ARCH, UsageError E-DTYPE and those of the way.
    """
    quiet()
    transformers.set_seed(config.training.seed)
    family = FAMILIES[prepared.task]
    base = _loaded(config, family, prepared, report)
    _freeze(base, config.way.freeze)
    if config.way.lora is not None:
        base = _adapted(base, config.way)
    learning = sum(p.numel() for p in base.net.parameters() if p.requires_grad)
    total = sum(p.numel() for p in base.net.parameters()) + quantize.stood_for(base.net)
    report(Notice(f"{learning:,} of {total:,} weights learn"))
    return replace(base, evaluates=prepared.valid is not None and len(prepared.valid) > 0)


def _loaded(config: FinetuneConfig, family: Family, prepared: Prepared, report: Report) -> Base:
    half = _half(config)
    labels = prepared.labels or (("score",) if prepared.problem == "regression" else ())
    head = Head(family, labels, prepared.problem)
    if config.way.from_scratch is not None:
        return _new(config, prepared, head, half, report)
    exact: Dtype = "bfloat16" if half and config.way.lora is not None else "float32"
    model = load(replace(config.model, dtype=exact), "finetune", report, head)
    if model.quantized and (config.way.lora is None or config.way.dora):
        fact = "has quantised weights, which do not learn themselves"
        raise ModelError("E-QUANTIZE", model.name, fact, hint="use --lora RANK, without --dora")
    _settle_padding(model.family, model.net, model.tokenizer)
    return Base(
        net=model.net,
        family=family,
        tokenizer=model.tokenizer,
        device=model.placement.device,
        name=model.name,
        revision=model.revision,
        context=model.context,
        autocast=half,
        generation=model.generation,
        folder=model.folder,
        quantized=model.quantized,
    )


def _new(config: FinetuneConfig, prepared: Prepared, head: Head, half: bool, report: Report) -> Base:
    net, tokenizer = scratch.make(config, head.family, prepared, head, report)
    placement = device.place(config.model, "finetune")
    _settle_padding(head.family, net, tokenizer)
    return Base(
        net=net.to(placement.device),
        family=head.family,
        tokenizer=tokenizer,
        device=placement.device,
        name=config.way.from_scratch or "",
        revision="",
        context=context_of(net.config.to_dict()),
        autocast=half,
        generation={},
        folder=None,
        fresh=True,
    )


def _half(config: FinetuneConfig) -> bool:
    """Whether to compute in bfloat16: where the device does so itself, on a CPU only where it is asked for."""
    asked = config.model.dtype
    if asked == "float16":
        raise UsageError(
            "E-DTYPE", "--dtype float16", "is too narrow to learn in", hint="use bfloat16 or float32"
        )
    placement = device.place(config.model, "finetune")
    half = placement.dtype == torch.bfloat16
    if half and placement.device.type == "cpu" and not device.cpu_has_bfloat16():
        raise UsageError(
            "E-DTYPE", "--dtype bfloat16", "this CPU has no bfloat16 arithmetic", hint="use float32"
        )
    return half


def _settle_padding(family: Family, net: Any, tokenizer: Tokenizer) -> None:
    """A classifier over a causal network looks for the last token that is no padding: it must know which that is."""
    config, backend = net.config, tokenizer.backend
    if family == "sequence-classification" and config.pad_token_id is None:
        found = backend.pad_token_id if backend.pad_token_id is not None else backend.eos_token_id
        config.pad_token_id = found if isinstance(found, int) else 0


def _freeze(base: Base, layers: int) -> None:
    """Keep the embeddings and the first layers as they are."""
    if not layers:
        return
    stacks = [module for module in base.net.modules() if isinstance(module, torch.nn.ModuleList)]
    if not stacks or len(stacks[0]) < layers:
        fact = f"the model has {len(stacks[0]) if stacks else 0} layers"
        raise UsageError("E-RANGE", "--freeze", fact)
    for part in (base.net.get_input_embeddings(), *stacks[0][:layers]):
        part.requires_grad_(False)
    if not any(p.requires_grad for p in base.net.parameters()):
        raise UsageError("E-RANGE", "--freeze", "leaves no weight that learns")


def _adapted(base: Base, way: WayConfig) -> Base:
    """The network with a LoRA adapter beside its linear layers; the adapter alone learns, and a head of labels."""
    import peft  # noqa: PLC0415 - it costs seconds, which few trainings have to pay

    from textgen_cli.model.adapter import on_codes  # noqa: PLC0415 - the same

    names = {name.rpartition(".")[2] for name, _ in base.net.named_modules()}
    targets: str | list[str] = "all-linear"
    if way.lora_targets is not None:
        targets = [name.strip() for name in way.lora_targets.split(",")]
        unknown = [name for name in targets if name not in names]
        if unknown:
            raise UsageError("E-TARGETS", "--lora-targets", f"the model has no layers named {unknown[0]!r}")
    elif base.quantized:
        targets = _all_linear(base.net)
    # They are new: all of their weights learn.
    heads = [name for name in LABELLING if name in names] if base.family in HEADS else []
    assert way.lora is not None
    alpha: Any = 2 * way.lora if way.lora_alpha is None else way.lora_alpha  # a fraction works as well
    settings = peft.LoraConfig(
        r=way.lora,
        lora_alpha=alpha,
        lora_dropout=way.lora_dropout,
        target_modules=targets,
        modules_to_save=heads or None,
        exclude_modules=heads or None,
        use_rslora=way.rslora,
        use_dora=way.dora,
        base_model_name_or_path=model_name(base.name),
        revision=base.revision or None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            net = peft.PeftModel(base.net, on_codes(settings), "default")
        except ValueError as error:
            raise ModelError("E-ADAPTER", base.name, str(error).partition("\n")[0]) from error
    return replace(base, net=net, adapter=True)


def _all_linear(net: Any) -> list[str]:
    """What peft's "all-linear" means of layers that it does not know: all but the last."""
    kinds, head = (quantize.QuantizedLinear, torch.nn.Linear), net.get_output_embeddings()
    return [name for name, layer in net.named_modules() if isinstance(layer, kinds) and layer is not head]


def save_net(net: Any, folder: Path) -> None:
    """Write the weights that belong to a training, with their settings, as safetensors."""
    if hasattr(net, "peft_config"):
        # Otherwise it asks the Hub for the base's config, to see whether embeddings were added.
        net.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # a form to fill in
    else:
        net.save_pretrained(folder)


# --- folding an adapter in

NEAR = 1e-3  # logits of the merged network differ by so much of their spread at most


def merged(base: Base, encoded: Encoded, report: Report) -> Base:
    """The network with its adapter folded into the weights, in float32, after proof that it says the same.

    Codes are turned back for it into the weights that they mean. Raises ModelError E-MERGE where it does not.
    """
    rows = [encoded.train[number] for number in range(min(2, len(encoded.train)))]
    batch = {name: value.to(base.device) for name, value in encoded.collate(rows).items()}
    net = base.net.float().eval()
    before = _outputs(net, batch)
    if base.quantized:
        _turn_back(net)
    net = net.merge_and_unload()
    apart = max(_distance(old, new) for old, new in zip(before, _outputs(net, batch), strict=True))
    if not apart <= NEAR:
        raise ModelError(
            "E-MERGE", base.name, f"logits of the merged model differ by {apart:.2g} of their spread"
        )
    report(Notice(f"adapter merged: logits differ by {apart:.1g} of their spread"))
    return replace(base, net=net, adapter=False)


def _turn_back(net: Any) -> None:
    """Plain weights in the place of codes, under the adapter's layers, which have to know how theirs stand."""
    quantize.restore(net.get_base_model())
    for module in net.modules():
        under = module.get_base_layer() if hasattr(module, "fan_in_fan_out") else None
        if isinstance(under, torch.nn.Linear | Conv1D):
            module.fan_in_fan_out = isinstance(under, Conv1D)


@torch.no_grad()
def _outputs(net: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    found = net(**batch)
    names = [name for name in ("logits", "start_logits", "end_logits") if name in found]
    return [found[name].float() for name in names]


def _distance(old: torch.Tensor, new: torch.Tensor) -> float:
    return float((old - new).abs().max() / old.std().clamp_min(1e-6))
