"""`textgen finetune`: files of examples in, the folder of a finished model out.

It knows what is printed where; not how a model is trained.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from textgen_cli.cli.console import Output, require_stdout, was_closed
from textgen_cli.cli.live import training
from textgen_cli.cli.options import command
from textgen_cli.config.finetune import FinetuneConfig
from textgen_cli.errors import InputError, UsageError
from textgen_cli.events import Report, silent
from textgen_cli.text.figures import flat, shown

EXAMPLES = """\
Examples:

textgen finetune reviews.csv -m ./encoder --task text-classification -o ./judge

textgen finetune talks.jsonl --lora 16 -o ./talker

textgen finetune plays.txt --from-scratch tiny -o ./playwright

textgen finetune reviews.csv -m ./encoder --check"""

DataArgument = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="DATA...", help="Text, JSONL, CSV, TSV, Parquet, CoNLL or SQuAD JSON; - is standard input."
    ),
]

TURN = 10.0  # seconds in which the first of several processes has told what is wrong


@command(FinetuneConfig)
def finetune(config: FinetuneConfig, data: DataArgument = None) -> None:
    """Train a model on examples of one's own, and print the folder where it lies."""
    require_stdout()
    inputs = _inputs(data or [])
    if Path("-") in inputs and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(
            "E-CONFLICT", "-", "several processes cannot share standard input", hint="give files"
        )
    if config.output is None and not config.data.check:
        raise UsageError("E-USAGE", "textgen finetune", "no folder for the model", hint="give one: -o DIR")
    with _in_turn(), training(config.verbose) as view:
        _division()
        report: Report = view if _speaks() else silent
        if config.data.check:
            _check(config, inputs, report, view.stop)
            return
        folder = _train(config, inputs, report)
    if _speaks():
        Output().write(f"{folder}\n")


def _train(config: FinetuneConfig, inputs: list[Path], report: Report) -> Path:
    """Every row is read before anything heavy is imported."""
    from textgen_cli.finetune.check import checked
    from textgen_cli.finetune.checkpoint import check_output

    if _speaks():
        resume = config.resume or config.resume_previous
        check_output((config.output or Path()).absolute(), resume=resume, restart=config.restart)
    # Asked of torch before it is imported: large tensors in huge pages, which a step fills in less time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with checked(config, inputs, report) as prepared:
        from textgen_cli.finetune.run import fit

        return fit(config, inputs, prepared, report)


def _inputs(data: list[Path]) -> list[Path]:
    """The files of examples; standard input where none is named and something is piped in."""
    if data:
        return data
    if os.isatty(0):
        raise UsageError("E-USAGE", "textgen finetune", "no data", hint="give files, or pipe examples in")
    if was_closed(0):
        raise InputError("E-STDIN-CLOSED", "stdin", "is closed, and no data is given")
    return [Path("-")]


@contextmanager
def _in_turn() -> Iterator[None]:
    """Leave it to the first process to tell what stops all of them, or what breaks off when it ends: whoever started
    them ends the others then."""
    try:
        yield
    except Exception:
        if not _speaks():
            time.sleep(TURN)
        raise


def _division() -> None:
    """Refuse a launcher that would divide the weights in a way that we cannot, before a row is read."""
    from textgen_cli.finetune.division import asked

    asked()


def _speaks() -> bool:
    """Whether this is the one of several processes that speaks; torchrun and accelerate number them so."""
    return os.environ.get("RANK", "0") == "0"


def _check(config: FinetuneConfig, inputs: list[Path], report: Report, before: Callable[[], None]) -> None:
    """Tell what is known of the data: for people on a terminal, else a fact a line. Raises what a training would."""
    from textgen_cli.finetune.check import checked, refusal

    with checked(config, inputs, report) as prepared:
        facts = prepared.facts
        if "flops" in facts:
            from textgen_cli.finetune.measure import pace

            facts |= pace(config, facts)
    if _speaks():
        Output(before).write("".join(f"{line}\n" for line in _lines(facts)))
    if error := refusal(facts, config.data):
        raise error


def _lines(facts: dict[str, Any]) -> Iterable[str]:
    known = {name: value for name, value in facts.items() if value != []}
    if not os.isatty(1):
        return (f"{name}\t{shown(value)}" for name, value in flat(known))
    from textgen_cli.cli.render import pairs

    return pairs(known)
