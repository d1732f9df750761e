"""The flow of finetune: checked examples, a network, a training, a finished folder; each part stands in its own module.

`fit` goes through all of it and is safe to be killed anywhere: `--resume` goes on.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from textgen_cli.config.finetune import FinetuneConfig
from textgen_cli.errors import ResumeError, UsageError
from textgen_cli.events import Notice, Report
from textgen_cli.finetune import divide, export, packing, scratch, zero
from textgen_cli.finetune.answers import Answerer
from textgen_cli.finetune.answers import final as final_figures
from textgen_cli.finetune.checkpoint import RESTART, STAMP, Found, Store, check_output, open_store, tidy
from textgen_cli.finetune.division import LAUNCHER, ZERO, Division, Zero
from textgen_cli.finetune.encode import DEFAULT_LENGTH, Encoded, encode
from textgen_cli.finetune.evaluate import Evaluation, evaluation
from textgen_cli.finetune.group import Group, joined
from textgen_cli.finetune.plan import batch_rows, check_tracker
from textgen_cli.finetune.prepared import Prepared
from textgen_cli.finetune.tell import answerer, sample_before, tell
from textgen_cli.finetune.train import Trained, train
from textgen_cli.finetune.ways import Base, merged, open_base
from textgen_cli.model import device
from textgen_cli.model.fingerprint import given, of_machine, of_model, of_program

LIBRARIES = ("peft", "datasets", "accelerate", "numpy")


def fit(config: FinetuneConfig, inputs: Sequence[Path], prepared: Prepared, report: Report) -> Path:
    """Train on checked examples; returns the finished folder.

    Raises UsageError, BusyError, ResumeError, ModelError, InputError, OutputError, OutOfMemory and what `load` raises.
    """
    with joined(device.place(config.model, "finetune").device.type == "cpu") as group:
        return _fit(config, inputs, prepared, group, report)


def _fit(
    config: FinetuneConfig, inputs: Sequence[Path], prepared: Prepared, group: Group, report: Report
) -> Path:
    check_tracker(config.training.report_to)
    out = _output(config, group)
    known = fingerprint(config, prepared, report) | _group(group)
    run_hash = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    if config.resume and group.first(group.leads and _finished(out, run_hash)):
        if group.leads:
            tidy(out)
        report(Notice(f"{out}: finished already", "hint"))
        return out
    with _store(config, out, known, group) as store:
        found = group.first(store.newest(previous=config.resume_previous) if group.leads else None)
        base = open_base(config, prepared, report)
        length = _length(config, base)
        folder = store.folder / f".rows-{group.number}"
        folder.mkdir(parents=True, exist_ok=True)
        encoded = encode(prepared, base.tokenizer, config.data, length, folder, config.training.seed)
        if config.data.pack:
            plain = encoded
            encoded = packing.packed(plain, prepared.task, length, folder)
            packing.prove(base.net, base.name, plain, base.device)
        parts = Parts(base, encoded, length, run_hash, group)
        _train(Job(config, inputs, prepared, report), parts, store, found)
        if group.leads:
            store.publish(store.folder / "final")
        group.wait()
    return out


@contextmanager
def _store(config: FinetuneConfig, out: Path, known: dict[str, Any], group: Group) -> Iterator[Store]:
    """The working folder, which the first process holds for all of them."""
    if not group.leads:
        group.wait()
        yield Store(out)
        return
    resume = config.resume or config.resume_previous
    with open_store(out, known, resume=resume, restart=config.restart) as store:
        group.wait()
        yield store


@dataclass(frozen=True)
class Job:
    """What a training is asked for."""

    config: FinetuneConfig
    inputs: Sequence[Path]
    prepared: Prepared
    report: Report


@dataclass(frozen=True)
class Parts:
    """What a training is made of."""

    base: Base
    encoded: Encoded
    length: int  # tokens of an example at most
    run: str  # the hash of all that decides its end
    group: Group  # who does it


def _train(job: Job, parts: Parts, store: Store, found: Found | None) -> None:
    """Train, and write the finished folder as `final` in the store's."""
    base, group = parts.base, parts.group
    by = answerer(base, parts.length)
    if not base.fresh and group.leads:
        sample_before(store.folder, job.prepared, by)
    group.wait()
    measures = evaluation(job.prepared)
    frame = _divided(base, group)
    trained = _learn(job, parts, store, found, measures, by)
    whole = _whole(base, frame, group)
    if group.leads:
        _finish(job, replace(parts, base=whole), store, trained, measures)


def _learn(
    job: Job, parts: Parts, store: Store, found: Found | None, measures: Evaluation, by: Answerer
) -> Trained:
    base, encoded, training = parts.base, parts.encoded, job.config.training
    rows = batch_rows(training, encoded.lengths, base.device.type)
    job.report(Notice(f"{len(encoded.train):,} rows of {parts.length:,} tokens at most, {rows} in a batch"))
    return train(
        base,
        encoded,
        training,
        rows,
        store,
        found,
        measures,
        job.report,
        lambda: final_figures(job.prepared, by, job.report),
        parts.group,
    )


def _finish(job: Job, parts: Parts, store: Store, trained: Trained, measures: Evaluation) -> None:
    """Write the model, its stamp, its card and its report."""
    config, base, final = job.config, parts.base, store.folder / "final"
    base = merged(base, parts.encoded, job.report) if config.way.merge else base
    stamp = export.stamp_of(base, job.prepared, parts.length, config.data.source_prefix, parts.run)
    export.write_model(base, stamp, final)
    by = answerer(base, parts.length)
    tables, versions = measures.tables, export.versions()
    tell(final, store.folder, config, job.inputs, job.prepared, base, by, trained, tables, versions)


def _group(group: Group) -> dict[str, Any]:
    """What of the processes decides the weights; checkpoints of divided ones are other ones besides."""
    found: dict[str, Any] = {"processes": group.size}
    if isinstance(group.division, Zero):
        return found | {"deepspeed": dict(group.division.settings)}
    return found | ({} if group.division is None else {"divided": True})


def _divided(base: Base, group: Group) -> Any:
    """The empty frame of a network that is divided among the processes, now or when DeepSpeed begins; None where each
    has all of it."""
    if group.division is None:
        return None
    fsdp = isinstance(group.division, Division)
    divide.divisible(base.net, f"{LAUNCHER} --use_fsdp" if fsdp else ZERO)
    # DeepSpeed computes with all weights in half precision, and keeps those that learn beside them.
    frame = divide.empty_frame(base.net, rounds=not fsdp and base.autocast and group.leads)
    if isinstance(group.division, Division):
        divide.divide(base.net, group.division, group.size, base.device)
    return frame


def _whole(base: Base, frame: Any, group: Group) -> Base:
    """The base with all weights of a divided network, on the CPU of the first process."""
    if group.division is None:
        return base
    if isinstance(group.division, Zero):
        zero.end()
        full = zero.full
    else:
        divide.own(base.net)  # what was gathered is given up
        full = divide.full
    return replace(
        base, net=divide.whole(base.net, frame, full, here=group.leads), device=torch.device("cpu")
    )


def _output(config: FinetuneConfig, group: Group) -> Path:
    if config.output is None:
        raise UsageError("E-MISSING", "-o", "names the folder of the finished model")
    out = config.output.absolute()
    if group.leads:
        check_output(out, resume=config.resume or config.resume_previous, restart=config.restart)
    return out


def _finished(out: Path, run_hash: str) -> bool:
    stamp = out / STAMP
    if not stamp.is_file():
        return False
    try:
        found = json.loads(stamp.read_bytes())["run"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ResumeError("E-RESUME-STATE", str(stamp), "is damaged", hint=RESTART) from error
    if found != run_hash:
        fact = "holds a model finished with other data or settings"
        raise ResumeError("E-RESUME", str(out), fact, hint=RESTART)
    return True


def _length(config: FinetuneConfig, base: Base) -> int:
    asked = config.data.max_length
    limit = base.context
    if asked is not None and limit is not None and asked > limit:
        raise UsageError("E-RANGE", "--max-length", f"must be <= {limit}, the model's context, not {asked}")
    return asked or min(limit or DEFAULT_LENGTH, DEFAULT_LENGTH)


def fingerprint(config: FinetuneConfig, prepared: Prepared, report: Report) -> dict[str, Any]:
    """All that decides the weights that come out, what a user changes most often first.

    The data come behind the settings that decide what is read and held out: of these it is that one is told.
    """
    plain = replace(config.data, valid=(), check=False, skip_bad=0)
    learning = replace(config.training, keep=2, report_to="none", max_time=None)
    from_file = scratch.is_file(config.way.from_scratch)
    return {
        "task": prepared.task,
        "seed": config.training.seed,
        "training": given(learning),
        "way": given(config.way, files=("from_scratch",) if from_file else ()),
        "encoding": given(plain),
        "data": prepared.sha256,
        **_of_base(config, report),
        **of_program(),
    }


def _of_base(config: FinetuneConfig, report: Report) -> dict[str, Any]:
    """The weights that it begins with, or the tokenizer where they begin at random, and what computes."""
    model = config.model
    if config.way.from_scratch is None:
        return of_model(model, report, LIBRARIES)
    if config.way.tokenizer is not None:
        return of_model(replace(model, model=config.way.tokenizer), report, LIBRARIES)
    return of_machine(model, LIBRARIES)
