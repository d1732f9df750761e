"""The flow of generate: records become requests, an engine answers, results go where they were asked for.

One prompt streams its text; many records go through text/flow.py. Knows no torch and no terminal: engines
are opened in engines.py.
"""

import secrets
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, BinaryIO

from textgen_cli.config import GenerateConfig
from textgen_cli.errors import SafetyError, UsageError
from textgen_cli.events import Notice, Report, silent
from textgen_cli.generate import many, ranked
from textgen_cli.generate.engines import Opened, check, open_engine, talker
from textgen_cli.generate.fingerprint import fingerprint
from textgen_cli.generate.request import Chunk
from textgen_cli.generate.talk import Conversation
from textgen_cli.text import flow
from textgen_cli.text.batch import Result, Summary
from textgen_cli.text.flow import Meter
from textgen_cli.text.records import Record


def run(config: GenerateConfig, prompt: str, report: Report) -> Iterator[Chunk]:
    """Generate from one prompt; chunks of sequence 0 first, then of 1, and so on.

    Raises what `model.load` raises; a sequence that fails raises its own error, one that is dropped as unsafe behind
    the others.
    """
    opened = _open_for_one(config, settle_seed(config.decoding.seed, report), report)
    requests = opened.prompter(Record(0, {"prompt": prompt}))
    keys = [(request.index, request.sequence) for request in requests]
    unsafe: SafetyError | None = None
    for chunk in in_order(keys, opened.engine.stream(requests)):
        error = chunk.final.error if chunk.final else None
        if isinstance(error, SafetyError):
            unsafe = unsafe or error
        elif error is not None:
            raise error
        else:
            yield ranked.as_lines(chunk)
            if gaps := ranked.unseen(chunk):
                fact = f"the text has {gaps} gaps; --jsonl shows the fillings of each"
                report(Notice(fact, name="W-TOP"))
    if unsafe is not None:
        raise unsafe


def show(config: GenerateConfig, prompt: str, report: Report) -> str:
    """What the model would see of a prompt, as text with its special tokens."""
    opened = _open_for_one(config, 0, report)
    return opened.rendered(opened.prompter(Record(0, {"prompt": prompt}))[0])


def _open_for_one(config: GenerateConfig, seed: int, report: Report) -> Opened:
    check(config, plain=True)
    return open_engine(config, seed, report, alone=True)


def conversation(config: GenerateConfig, report: Report) -> Conversation:
    """A conversation with the model, which is loaded once; settings may change under way."""
    check(config, plain=True)
    seed = settle_seed(config.decoding.seed, report)
    return Conversation(config.decoding, talker(config, report), seed, config.prompting.system)


def run_batch(config: GenerateConfig, prompt: str | None, stdout: BinaryIO, report: Report) -> Summary:
    """Generate for every record of the input, or for one prompt as a record, into the output file or stdout.

    Raises what `flow.run` and `model.load` raise.
    """
    batching = config.batch
    given = None if prompt is None else {"prompt": prompt}
    check(config, plain=given is not None or flow.format_of(batching) in ("text", "lines"))
    if config.prompting.show_prompt and batching.output is not None:
        raise UsageError("E-CONFLICT", "--show-prompt", "cannot be used with -o", hint="drop -o")

    def compute(
        found: Iterator[Record], done: int, pinned: dict[str, Any], meter: Meter
    ) -> Iterator[list[Result]]:
        if config.decoding.seed == "random":
            report(Notice(f"seed {pinned['seed']}"))

        def opening() -> Opened:
            opened = open_engine(config, int(pinned["seed"]), report, datetime.fromisoformat(pinned["date"]))
            meter.begin(done)
            return opened

        if config.prompting.show_prompt:
            return many.shown(found, opening)
        return flow.results(found, done, flow.window(batching), opening, many.window)

    wing = flow.Wing(
        stage="generate",
        field="prompt",
        fingerprint=lambda form, given, source: fingerprint(config, form, given, source, report),
        compute=compute,
        encode=None if flow.writes_jsonl(batching) else _plain_line,
    )
    # What must stay as it was: the number that is drawn from, and the date that templates see.
    pinned = {
        "seed": settle_seed(config.decoding.seed, silent),
        "date": datetime.now().isoformat(),  # noqa: DTZ005 - templates mean local time
    }
    return flow.run(wing, batching, given, stdout, report, pinned)


def _plain_line(fields: dict[str, Any]) -> bytes:
    """A text alone with a line end; a failed record is an empty line."""
    return str("" if "error" in fields else fields["text"]).encode("utf-8", "replace") + b"\n"


def settle_seed(seed: str, report: Report) -> int:
    """The number a run draws from; `random` picks one and says it."""
    if seed != "random":
        return int(seed)
    drawn = secrets.randbits(63)
    report(Notice(f"seed {drawn}"))
    return drawn


def in_order(keys: Iterable[tuple[int, int]], chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Chunks of interleaved sequences, one sequence after another in the order of `keys` (index, sequence).

    The chunks of the sequence whose turn it is pass at once; the others wait.
    """
    waiting: dict[tuple[int, int], list[Chunk]] = {key: [] for key in keys}
    for chunk in chunks:
        waiting[chunk.index, chunk.sequence].append(chunk)
        while waiting:
            turn = next(iter(waiting))
            held, waiting[turn] = waiting[turn], []
            yield from held
            if not (held and held[-1].final):
                break
            del waiting[turn]
