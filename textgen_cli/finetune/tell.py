"""Puts together what is told of a training: samples before it, and report, card and log in the finished folder.

Knows where each fact comes from; how it looks stands in report.py and card.py.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from textgen_cli.config.finetune import FinetuneConfig
from textgen_cli.finetune.answers import Answerer, Sample, samples
from textgen_cli.finetune.card import write_card
from textgen_cli.finetune.prepared import Prepared
from textgen_cli.finetune.report import LOG, DataFile, Told, model_name, told_settings, write_report
from textgen_cli.finetune.train import Trained
from textgen_cli.finetune.ways import Base
from textgen_cli.model.cache import sha256
from textgen_cli.text import disk

BEFORE = "before.json"  # samples of the base, in the working folder
SHOWN = 5  # samples


def answerer(base: Base, length: int) -> Answerer:
    """What answers with this network; `length`: tokens of an example at most."""
    return Answerer(base.net, base.tokenizer, length, base.generation)


def sample_before(folder: Path, prepared: Prepared, by: Answerer) -> None:
    """Keep the base's answers in the working folder, where they are not there yet. OutputError E-WRITE."""
    path = folder / BEFORE
    if not path.exists():
        disk.write_whole(path, json.dumps(samples(prepared, by, SHOWN)).encode())


def tell(
    final: Path,
    working: Path,
    config: FinetuneConfig,
    inputs: Sequence[Path],
    prepared: Prepared,
    base: Base,
    by: Answerer,
    trained: Trained,
    tables: dict[str, Any],
    versions: dict[str, str],
) -> None:
    """Write report.html, README.md and metrics.jsonl into the finished folder `final`.

    `tables`: of the evaluation of the weights that were kept. OutputError E-WRITE.
    """
    told = Told(
        name=_name(config),
        task=prepared.task,
        base="" if base.fresh else model_name(base.name),
        revision=base.revision,
        way=way(config, base.quantized),
        data=_files(prepared.facts, [*inputs, *config.data.valid]),
        settings=told_settings(config),
        facts={name: value for name, value in prepared.facts.items() if name not in ("files", "bad")},
        history=trained.history,
        before={} if base.fresh else trained.before,
        after=trained.after,
        tables=tables,
        samples_before=[] if base.fresh else _before(working),
        samples_after=samples(prepared, by, SHOWN),
        run={"steps": trained.last, "best_step": trained.step, "seconds": round(trained.seconds, 1)},
        versions=versions,
        adapter=base.adapter,
        quantize=config.model.quantize,
        hub=not base.fresh and base.folder is not None and base.folder.parent.name == "snapshots",
    )
    write_report(final, told)
    write_card(final, told)
    with disk.guard(final):
        shutil.copyfile(working / LOG, final / LOG)


def way(config: FinetuneConfig, quantized: str | None = None) -> str:
    """Which weights learnt, in words. `quantized`: the form of the others."""
    chosen = config.way
    if chosen.lora is not None:
        kind = "DoRA" if chosen.dora else "LoRA"
        codes = f" beside weights in {quantized}" if quantized else ""
        return f"{kind} of rank {chosen.lora}{codes}{', merged' if chosen.merge else ''}"
    return f"all weights but the first {chosen.freeze} layers" if chosen.freeze else "all weights"


def _name(config: FinetuneConfig) -> str:
    return config.output.absolute().name if config.output is not None else "model"


def _files(facts: dict[str, Any], paths: Sequence[Path]) -> tuple[DataFile, ...]:
    """The files of examples as `check` counted them, in the order of `paths`."""
    counted = facts.get("files", {})
    return tuple(
        DataFile(name, about["rows"], sha256(path) if path.is_file() else "")
        for path, (name, about) in zip(paths, counted.items(), strict=True)
    )


def _before(working: Path) -> list[Sample]:
    path = working / BEFORE
    with disk.guard(path):
        found: list[Sample] = json.loads(path.read_bytes()) if path.exists() else []
    return found
