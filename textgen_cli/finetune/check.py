"""Data that is read and checked whole before any weight is loaded: the door to every training.

Owns which task data are for, what stops a training, which examples are held out, and what all of them hash to. What
needs a tokenizer stands in measure.py, and is not imported before every row was found good.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from textgen_cli.config.finetune import DataConfig, FinetuneConfig
from textgen_cli.errors import InputError, UsageError
from textgen_cli.events import Notice, Report
from textgen_cli.finetune import spool
from textgen_cli.finetune.intake import Intake, Numbered, Side, Tally, rows_of
from textgen_cli.finetune.labels import LABEL_TYPES, final_label
from textgen_cli.finetune.prepared import Prepared
from textgen_cli.finetune.rows import STDIN
from textgen_cli.finetune.split import held_out
from textgen_cli.finetune.tasks import TASKS, Binding, bind
from textgen_cli.model.check import check_folder
from textgen_cli.model.source import locate

HEAD = 16  # good rows whose fields tell the task


@contextmanager
def checked(config: FinetuneConfig, inputs: Sequence[Path], report: Report) -> Iterator[Prepared]:
    """`prepare` in a working folder that is removed when the block ends."""
    with spool.working_folder(config.model.cache_dir) as folder:
        yield prepare(config, inputs, report, folder)


def prepare(config: FinetuneConfig, inputs: Sequence[Path], report: Report, folder: Path) -> Prepared:
    """Read, check and split all data, "-" being standard input; `folder`, empty before, holds them from then on.

    Examples stand in the order of the files. Which are held out depends on their content, --valid-share and --seed,
    with the same share of every label. `facts` is what --check tells.

    Raises InputError: what `rows.read` raises, E-EMPTY where no row is usable, E-TASK, E-FIELD and E-LABELS where the
    data cannot be told, and what `refusal` gives; with --check the caller raises that one, having told the facts.
    OutputError where the folder cannot be written; with a model that is not there what `locate` raises.
    """
    paths = [*inputs, *config.data.valid]
    if paths.count(STDIN) > 1:
        raise UsageError("E-CONFLICT", "-", "standard input can be read once only")
    tally = Tally(paths)
    source = rows_of(range(len(inputs)), tally, config.data, report)
    head, binding = _begin(source, tally, config, report)
    if config.data.source_prefix and binding.task != "seq2seq":
        raise UsageError("E-CONFLICT", "--source-prefix", f"means nothing to {binding.task}")
    intake = Intake(binding, tally, config.training.seed, config.data.source_prefix)
    train = intake.spool(chain(head, source), folder / "read.arrow")
    valid = None
    if config.data.valid:
        more = rows_of(range(len(inputs), len(paths)), tally, config.data, report)
        valid = intake.hold_out(more, folder / "held.arrow")
    tally.tell(config.data, report)
    facts = {"task": binding.task, "fields": binding.fields, **tally.facts()}
    _stop_unless_check(facts, config.data)
    if not train.keys or (valid is not None and not valid.keys):
        raise tally.empty(range(len(inputs)) if not train.keys else range(len(inputs), len(paths)))
    prepared = _finish(config, intake, train, valid, facts, report)
    _stop_unless_check(prepared.facts, config.data)
    return prepared


def refusal(facts: dict[str, Any], data: DataConfig) -> InputError | None:
    """Why no training on data of these facts may begin: bad rows (E-DATA), or too long ones (E-CONTEXT)."""
    bad, first = facts["bad_rows"], next(iter(facts["bad"]), None)
    if first is not None and bad > data.skip_bad:
        fact = f"{bad:,} of {facts['rows']:,} are bad, the first at {first['place']}: {first['fact']}"
        return InputError("E-DATA", f"rows of {first['file']}" if len(facts["files"]) == 1 else "rows", fact,
                          hint=f"mend them, or leave them out with --skip-bad {bad}")  # fmt: skip
    over = facts.get("tokens", {}).get("over", 0)
    if over and not data.truncate and facts["task"] in CUT:
        longest = facts["longest"][0]
        fact = f"{over:,} examples have more than {facts['tokens']['limit']:,} tokens, the longest "
        fact += f"{longest['tokens']:,} ({longest['file']}, {longest['place']})"
        return InputError("E-CONTEXT", "data", fact, hint="use --truncate, or a larger --max-length")
    return None


# Tasks whose examples are one row each; those of the others go into windows, so that none is too long.
CUT = ("chat", "seq2seq", "text-classification", "token-classification")


def _stop_unless_check(facts: dict[str, Any], data: DataConfig) -> None:
    if not data.check and (error := refusal(facts, data)):
        raise error


def _begin(
    source: Iterator[Numbered], tally: Tally, config: FinetuneConfig, report: Report
) -> tuple[list[Numbered], Binding]:
    """The first rows, and the task they tell."""
    head: list[Numbered] = []
    good: list[dict[str, Any]] = []
    for number, row in source:
        head.append((number, row))
        good += [row.fields] if row.fact is None else []
        if len(good) >= HEAD:
            break
    if not good:
        for number, row in head:
            tally.refuse(number, row.place, row.fact or "")
        tally.tell(config.data, report)
        raise tally.empty(tally.rows)
    binding = bind(good, config.data)
    if config.data.task is None:
        if binding.task == "clm" and _is_masked(config, report):
            binding = Binding("mlm", binding.fields)
        report(Notice(f"task: {binding}", "hint"))
    return head, binding


def _is_masked(config: FinetuneConfig, report: Report) -> bool:
    """Whether the model fills in words: then that is what text alone is for."""
    if config.way.from_scratch is not None:
        return False
    kinds = check_folder(locate(config.model, report).folder).config.get("architectures") or [""]
    return str(kinds[0]).endswith(("ForMaskedLM", "ForPreTraining"))


# --- from what was read to what is learnt from


def _finish(
    config: FinetuneConfig,
    intake: Intake,
    train: Side,
    valid: Side | None,
    facts: dict[str, Any],
    report: Report,
) -> Prepared:
    """Split, write both sides with their labels, and measure them."""
    problem = intake.labels.problem if intake.binding.task == "text-classification" else None
    about = intake.facts(problem)
    names = tuple(sorted(about.get("labels", ())))
    _tell_labels(problem, names, sorted(intake.unlearnt), report)
    held = _held(config.data, train, valid, problem, report)
    other, chosen = (train, held) if valid is None else (valid, np.ones(len(valid.keys), dtype=bool))
    final = Final(intake.binding.task, problem)
    places = [train.path.with_name(f"{name}.arrow") for name in ("train", "valid")]
    facts["examples"] = final.write(train.path, places[0], ~held)
    facts["held_out"] = final.write(other.path, places[1], chosen)
    facts |= about
    for path in {train.path, other.path}:
        path.unlink()
    files = np.concatenate([np.asarray(train.files)[~held], np.asarray(other.files)[chosen]])
    lines = np.concatenate([np.asarray(train.lines)[~held], np.asarray(other.lines)[chosen]])

    from textgen_cli.finetune import measure

    prepared = Prepared(
        task=intake.binding.task,
        train=measure.opened(places[0]),
        valid=measure.opened(places[1]) if facts["held_out"] else None,
        labels=names,
        problem=problem,
        sha256=final.digest.hexdigest(),
        facts=facts,
    )
    facts |= measure.measured(config, prepared, intake.locator(files.tolist(), lines.tolist()), report)
    return prepared


def _held(
    data: DataConfig, train: Side, valid: Side | None, problem: str | None, report: Report
) -> NDArray[np.bool_]:
    """Which of the training files' examples are held out: none where there are files for that."""
    keys = np.asarray(train.keys)
    if valid is not None:
        if again := int(np.isin(np.asarray(valid.keys), keys).sum()):
            report(
                Notice(f"{again:,} of {len(valid.keys):,} held-out examples are among those learnt", "W-LEAK")
            )
        return np.zeros(len(keys), dtype=bool)
    strata = np.zeros(len(keys), dtype=np.int32) if problem == "regression" else np.asarray(train.strata)
    held = held_out(keys, strata, data.valid_share)
    if data.valid_share and not held.any():
        report(Notice("too few different examples to hold any out: nothing is evaluated", "W-VALID"))
    return held


def _tell_labels(problem: str | None, names: Sequence[str], unlearnt: Sequence[str], report: Report) -> None:
    if problem == "regression":
        report(Notice("labels: numbers on a scale (regression)", "hint"))
    elif problem is not None:
        several = " any number of which an example has" if problem.startswith("multi") else ""
        report(Notice(f"labels: {len(names):,} names{several}: {_shown(names)}", "hint"))
        if len(names) < 2:
            report(Notice("there is one label only: nothing can be learnt from it", "W-LABELS"))
    if unlearnt and problem != "regression":
        fact = f"labels of held-out examples alone, which cannot be learnt: {_shown(unlearnt)}"
        report(Notice(fact, "W-LABELS"))


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


@dataclass
class Final:
    """Examples with their labels as the training has them, written and hashed in order."""

    task: str
    problem: str | None
    digest: Any = field(default_factory=hashlib.sha256)

    def write(self, source: Path, target: Path, chosen: NDArray[np.bool_]) -> int:
        """Write the chosen examples of a file to another; returns their number."""
        schema = TASKS[self.task].schema
        if self.problem is not None:
            at = schema.get_field_index("label")
            schema = schema.set(at, pa.field("label", LABEL_TYPES[self.problem]))
        with spool.Writer(target, schema) as writer:
            for example, wanted in zip(spool.read(source), chosen, strict=True):
                if not wanted:
                    continue
                if self.problem is not None:
                    example["label"] = final_label(json.loads(example["label"]), self.problem)
                content = json.dumps(example, ensure_ascii=False, sort_keys=True)
                self.digest.update(content.encode() + b"\n")
                writer.add(example, len(content))
        self.digest.update(b"\n")  # an example on the other side is another set of data
        return writer.count
