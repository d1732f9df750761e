"""What the library's Trainer is told: its settings, made of ours and of what is usual for the way of training."""

import math
from pathlib import Path

from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from textgen_cli.config.finetune import TrainingConfig
from textgen_cli.errors import UsageError
from textgen_cli.finetune import zero
from textgen_cli.finetune.division import ZERO, Zero
from textgen_cli.finetune.group import Group
from textgen_cli.finetune.ways import Base

ROWS_LIMIT = 32  # rows of a batch that --batch-size auto takes at most
TOKENS = {"cpu": 2048}  # padded tokens of a batch that auto takes; elsewhere:
MORE_TOKENS = 16384
LINES = 200  # logs of a training, about


def batch_rows(config: TrainingConfig, lengths: list[int], kind: str) -> int:
    """Rows of one batch: as asked, or as many as make about TOKENS with rows of nearly the longest length."""
    if config.batch_size != "auto":
        return int(config.batch_size)
    usual = sorted(lengths)[int(len(lengths) * 0.9)]
    fitting = TOKENS.get(kind, MORE_TOKENS) // max(1, usual)
    return max(1, min(ROWS_LIMIT, 1 << max(0, fitting.bit_length() - 1)))


def learning_rate(config: TrainingConfig, base: Base) -> float:
    """As asked, or what is usual for this way of training."""
    if config.learning_rate is not None:
        return config.learning_rate
    if base.fresh:
        return 5e-4
    if base.adapter:
        return 2e-4
    return 2e-5 if base.family in ("causal", "seq2seq") else 5e-5


def check_tracker(name: str) -> None:
    """UsageError E-TRACKER where --report-to names none that is here."""
    if name in ("none", "all") or name in (here := get_available_reporting_integrations()):
        return
    fact = (
        f"{name!r} is not installed" if name in INTEGRATION_TO_CALLBACK else f"no tracker is called {name!r}"
    )
    shown = ", ".join(sorted(here))
    raise UsageError("E-TRACKER", "--report-to", fact, hint=f"here are {shown}" if shown else None)


def _check_stage(division: Zero, base: Base) -> None:
    """Stage 0 keeps the weights that learn in float32 where nobody can ask for them: what comes out were rounded."""
    stage = division.settings["zero_optimization"].get("stage", 0)
    if stage == 0 and base.autocast:
        fact = "would round what was learnt to bfloat16"
        raise UsageError("E-CONFLICT", f"{ZERO}: stage 0", fact, hint="stage 1, or --dtype float32")


def arguments(
    config: TrainingConfig, base: Base, rows: int, count: int, folder: Path, group: Group
) -> TrainingArguments:
    """The Trainer's settings; `count`: examples to train on, `rows` of them at a time in each process.

    Raises UsageError E-CONFLICT where DeepSpeed is told otherwise.
    """
    batches = math.ceil(math.ceil(count / rows) / group.size)
    an_epoch = max(1, math.ceil(batches / config.accumulate))
    steps = config.max_steps or math.ceil(an_epoch * config.epochs)
    evaluate = config.eval_steps or an_epoch
    found = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=learning_rate(config, base),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        activation_checkpointing=config.recompute,
        bf16=base.autocast,
        use_cpu=base.device.type == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        logging_strategy="steps",
        logging_steps=max(1, steps // LINES),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if base.evaluates else "no",
        eval_steps=evaluate,
        save_strategy="steps",
        save_steps=config.save_steps or evaluate,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        label_names=base.label_names,
        dataloader_num_workers=0,
        dataloader_pin_memory=base.device.type == "cuda",
        disable_tqdm=True,
        report_to=config.report_to,
        run_name="textgen",
        push_to_hub=False,
        # They are codes then, of which every process has the same.
        ddp_broadcast_buffers=False if base.quantized else None,
        deepspeed=dict(group.division.settings) if isinstance(group.division, Zero) else None,
    )
    if isinstance(group.division, Zero):
        _check_stage(group.division, base)
    for mismatch in getattr(getattr(found, "hf_deepspeed_config", None), "mismatches", ()):
        raise zero.refused(ValueError(mismatch))
    return found
