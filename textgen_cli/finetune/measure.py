"""Checked examples as data sets, and what they come to with a model's tokenizer: lengths, steps, memory.

Lengths are those of the encoding that trains, so what fits here fits there. No weight is read.
"""

import itertools
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from heapq import nlargest
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from textgen_cli.config.finetune import FinetuneConfig
from textgen_cli.errors import ModelError, UsageError
from textgen_cli.events import Notice, Progress, Report, silent
from textgen_cli.finetune.encode import DEFAULT_LENGTH, ENCODERS, Setting
from textgen_cli.finetune.memory import estimate
from textgen_cli.finetune.plan import batch_rows
from textgen_cli.finetune.prepared import Prepared
from textgen_cli.finetune.ways import FAMILIES
from textgen_cli.model import anatomy, device, quantize, speed
from textgen_cli.model.check import Checked, check_folder
from textgen_cli.model.load import load_tokenizer
from textgen_cli.model.source import locate
from textgen_cli.model.tokenizer import Tokenizer

NO_LIMIT = 1 << 30  # tokens
LONGEST = 20  # examples that are named
GLANCE = 0.5  # seconds of measuring
PULSE = 1000  # examples between two events of progress


def opened(path: Path) -> datasets.Dataset:
    """The examples of an Arrow file, mapped and not read. The library stays silent and offline."""
    datasets.config.HF_DATASETS_OFFLINE = True
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    return datasets.Dataset.from_file(str(path))


@dataclass
class Lengths:
    """Tokens of all examples, and of the rows that training makes of those it learns from."""

    examples: "array[int]" = field(default_factory=lambda: array("I"))
    rows: "array[int]" = field(default_factory=lambda: array("I"))
    short: int = 0  # examples of which no token can be predicted
    epoch: int = 0


def measured(
    config: FinetuneConfig, prepared: Prepared, place: Callable[[int], dict[str, str]], report: Report
) -> dict[str, Any]:
    """Facts for --check; `place`: where an example came from, by its number, those of `train` first.

    Empty where a tokenizer is still to be trained. Raises ModelError and what `locate` raises, UsageError for
    --max-length beyond the model's context.
    """
    scratch = config.way.from_scratch is not None
    name = config.way.tokenizer if scratch else config.model.model
    if name is None:
        return {}
    located = locate(replace(config.model, model=name), report)
    checked = check_folder(located.folder)
    if not checked.has_tokenizer:
        raise ModelError("E-TOKENIZER", located.label, "has no tokenizer")
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    tokenizer = load_tokenizer(located.folder, located.label)
    limit = _limit(config, None if scratch else anatomy.context_of(checked.config))
    found = _lengths(prepared, tokenizer, limit, report)
    if found.short:
        report(Notice(f"{found.short:,} examples are too short to learn from and left out", "W-SHORT"))
    facts: dict[str, Any] = {"tokens": _token_facts(found, limit)}
    ranked = nlargest(LONGEST, range(len(found.examples)), key=found.examples.__getitem__)
    facts["longest"] = [
        place(at) | {"tokens": found.examples[at]} for at in ranked if found.examples[at] > limit
    ]
    return facts | _run_facts(config, prepared, found, limit, None if scratch else checked)


def _limit(config: FinetuneConfig, context: int | None) -> int:
    asked = config.data.max_length
    if asked is not None and context is not None and asked > context:
        fact = f"must be <= {context}, the model's context, not {asked}"
        raise UsageError("E-RANGE", "--max-length", fact)
    return asked or min(context or DEFAULT_LENGTH, DEFAULT_LENGTH)


def _lengths(prepared: Prepared, tokenizer: Tokenizer, limit: int, report: Report) -> Lengths:
    whole = Setting(tokenizer, NO_LIMIT, truncate=False, labels=prepared.labels, problem=prepared.problem)
    cut = replace(whole, length=limit, truncate=True)
    make = ENCODERS[prepared.task]
    found = Lengths()
    total = len(prepared.train) + len(prepared.valid or ())
    for number, example in enumerate(itertools.chain(prepared.train, prepared.valid or ())):
        rows = make(example, whole)
        size = max((_size(row) for row in rows), default=0)
        found.examples.append(size)
        if number < len(prepared.train):
            rows = make(example, cut) if size > limit else rows
            found.short += not rows
            found.rows.extend(len(row["input_ids"]) for row in rows)
            found.epoch += sum(_tokens(row) for row in rows)
        if number % PULSE == PULSE - 1:
            report(Progress("check", "tokens", number + 1, total, "examples"))
    return found


def _size(row: dict[str, Any]) -> int:
    """Tokens of a row that count against the limit: of source and target the more."""
    labels = row.get("labels")
    return max(len(row["input_ids"]), len(labels) if isinstance(labels, list) else 0)


def _tokens(row: dict[str, Any]) -> int:
    """Tokens that the network sees."""
    labels = row.get("labels")
    target = len(labels) if isinstance(labels, list) and len(labels) != len(row["input_ids"]) else 0
    return len(row["input_ids"]) + target


def _token_facts(found: Lengths, limit: int) -> dict[str, Any]:
    ranked = sorted(found.examples)
    over = sum(size > limit for size in ranked)
    shares = {f"p{p}": ranked[math.ceil(len(ranked) * p / 100) - 1] for p in (50, 90, 99)}
    more = {"max": ranked[-1], "limit": limit, "over": over, "over_share": over / len(ranked)}
    return shares | more | {"epoch": found.epoch}


def _run_facts(
    config: FinetuneConfig, prepared: Prepared, found: Lengths, limit: int, checked: Checked | None
) -> dict[str, Any]:
    """Steps, memory and operations; how long these take is for `pace` to measure."""
    if not found.rows:
        return {}
    placement = device.place(config.model, "finetune")
    rows = list(found.rows)
    if config.data.pack and prepared.task in ("clm", "chat"):
        rows = [limit] * math.ceil(sum(rows) / limit)
    batch = batch_rows(config.training, rows, placement.device.type)
    an_epoch = math.ceil(math.ceil(len(rows) / batch) / config.training.accumulate)
    steps = config.training.max_steps or math.ceil(an_epoch * config.training.epochs)
    facts: dict[str, Any] = {"steps": {"batch": batch, "rows": len(rows), "an_epoch": an_epoch, "all": steps}}
    if checked is None:
        return facts
    memory, operations = estimate(
        checked,
        config.way,
        FAMILIES[prepared.task],
        batch,
        max(rows),
        half=placement.dtype == torch.bfloat16,
        recompute=config.training.recompute,
        form=quantize.form_of(checked.config) or config.model.quantize,
    )
    if not memory:
        return facts
    a_token = operations / (batch * max(rows))
    passes = steps * config.training.accumulate * batch / len(rows)
    return facts | {"memory_bytes": memory, "flops": round(a_token * sum(rows) * passes)}


def pace(config: FinetuneConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """How long a training of these facts takes on this machine, about, by what a glance at it measures."""
    if "flops" not in facts:
        return {}
    located = locate(config.model, silent)
    sizes = anatomy.sizes(check_folder(located.folder).config)
    assert sizes is not None  # what is counted has sizes
    tokens = facts["steps"]["batch"] * min(facts["tokens"]["max"], facts["tokens"]["limit"])
    placement = device.place(config.model, "finetune")
    rate = speed.operations(placement, tokens, sizes.hidden, sizes.inner, learns=True, seconds=GLANCE)
    return {"seconds": round(facts["flops"] / rate, 1)}
