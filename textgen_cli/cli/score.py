"""`textgen score`: a text from argument and standard input, or records; figures to standard output.

It knows which figures a line or table shows; not how they come about.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from textgen_cli.cli import explain
from textgen_cli.cli.console import Output, Reporter, reporter, require_stdout, tell
from textgen_cli.cli.inputs import batch_argument, check_single, is_batch, lead_stdin_away, obeyed, whole_text
from textgen_cli.cli.options import command
from textgen_cli.config import ScoreConfig
from textgen_cli.errors import UsageError
from textgen_cli.text import disk, flow, heat, records
from textgen_cli.text.figures import flat, shown
from textgen_cli.text.inputs import open_source

EXAMPLE = 'textgen score "The cat sat on the mat."'
EXAMPLES = """\
Examples:

textgen score "The cat sat on the mat."

textgen score --lines --jsonl < sentences.txt | jq 'select(.perplexity < 40)'

textgen score --context "The capital of France is" " Paris"

textgen score --jsonl -i questions.jsonl --template "Q: {question}\\nA:" --choices options --gold answer --summary"""

TextArgument = Annotated[
    str | None,
    typer.Argument(metavar="TEXT", help="What to score; piped text is added to it, `-` is piped text alone."),
]

# The figures that a line for people shows, in this order; the others are in JSON.
COLUMNS = (
    "log_likelihood",
    "pseudo_log_likelihood",
    "tokens",
    "perplexity",
    "pseudo_perplexity",
    "bits_per_byte",
    "bits_per_byte_difference",
    "kl_divergence",
    "prefers",
    "category",
    "prediction",
    "value",
    "watermarked",
    "green_fraction",
    "z",
    "p_value",
)


@command(ScoreConfig)
def score(config: ScoreConfig, text: TextArgument = None) -> None:
    """Tell what a model thinks of a text: how likely it is, which label it has, which choice fits best."""
    require_stdout()
    batches = _is_batch(config)
    explain.check(config.explaining, config.batch, config.html, single=not batches)
    lists = flow.writes_jsonl(config.batch) if batches else os.isatty(1) or config.html is not None
    if (config.scoring.tokens or config.scoring.words) and not lists:
        option = "--tokens" if config.scoring.tokens else "--words"
        raise UsageError("E-CONFLICT", option, "needs JSONL output", hint="add --jsonl or -o FILE")
    with reporter(config.verbose) as report:
        if batches:
            _batch(config, text, report)
            return
        check_single(replace(config.batch, input=None))
        if config.summary:
            raise UsageError("E-CONFLICT", "--summary", "needs records", hint="-i, --lines, --jsonl or --csv")
        if config.batch.input is not None:
            whole = _whole_file(config, text)
        else:
            whole = whole_text(text, "text", EXAMPLE, config.no_stdin, report)
        lead_stdin_away()
        _one(config, whole, report)


def _is_batch(config: ScoreConfig) -> bool:
    """Whether records are meant: not so where a file is one text, and nothing asks for its record."""
    batch, fields = config.batch, config.scoring.choices is not None
    if config.scoring.pairs and batch.input is not None:
        return True
    if batch.input is not None and is_batch(replace(batch, input=None)) is False and not fields:
        return flow.format_of(batch) != "text"
    return is_batch(batch) or fields


def _whole_file(config: ScoreConfig, text: str | None) -> str:
    """The text that an input file is."""
    batch_argument(config.batch, text, "text", config.no_stdin)
    assert config.batch.input is not None
    where: Path | int = 0 if config.batch.input == Path("-") else config.batch.input
    with open_source(where) as source:
        record = next(records.read(source.stream, "text", name=source.name))
    return str(record.fields["prompt"])


def _one(config: ScoreConfig, text: str, report: Reporter) -> None:
    """One text: on a terminal coloured, with its figures below; else a figure a line."""
    from textgen_cli.score.run import run

    on_terminal = os.isatty(1)
    plain = config.explaining.explain is None
    config = replace(config, explaining=explain.for_page(config.explaining, config.html))
    found = run(config, text, report, detail=plain and (on_terminal or config.html is not None))
    explanation = found.pop("explanation", None)
    report.hide()
    if config.html is not None:
        _write_page(config.html, text, found, explanation)
    if on_terminal:
        if explanation is not None:
            explain.draw(explanation)
        _draw(text, found, tokens=config.scoring.tokens)
    else:
        Output().write("".join(f"{name}\t{value}\n" for name, value in _pairs(found)))


def _draw(text: str, found: dict[str, Any], *, tokens: bool) -> None:
    """The text coloured by surprisal where its tokens are known, lists, and the figures."""
    from rich.console import Console

    from textgen_cli.cli import render

    screen = Console()
    if "token_scores" in found:
        scale = heat.surprisal(found["unit"])
        parts = heat.by_surprisal(text, found["token_scores"])
        shade = render.colours(screen)
        for line in render.heat_map([(piece, weight) for piece, weight, _ in parts], scale, shade):
            screen.print(line)
        screen.print(render.legend(scale, shade))
    out = Output()
    for name in ("choices", "entities", *(("token_scores",) if tokens else ()), "word_scores"):
        if found.get(name):
            entries = [dict(flat(entry)) for entry in found[name]]
            out.write("".join(f"{line}\n" for line in render.listing(entries, screen.width)))
    out.write("".join(f"{line}\n" for line in render.pairs(found)))


def _write_page(path: Path, text: str, found: dict[str, Any], explanation: dict[str, Any] | None) -> None:
    from textgen_cli.text import page

    blocks = []
    if explanation is not None:
        blocks += explain.blocks(explanation)
    elif "token_scores" in found:
        parts = heat.by_surprisal(text, found["token_scores"])
        notes = [page.note(entries) for _, _, entries in parts]
        pieces = [(piece, weight) for piece, weight, _ in parts]
        blocks.append(page.heat_map(pieces, heat.surprisal(found["unit"]), notes))
    else:
        blocks.append(page.paragraph(text))
    disk.write_whole(path, page.page("Score", [*blocks, page.figures(found)]).encode())


def _batch(config: ScoreConfig, text: str | None, report: Reporter) -> None:
    """Many records, or one: lines to standard output or a file, and what holds for all of them."""
    from textgen_cli.score.run import run_batch

    given = batch_argument(config.batch, text, "text", config.no_stdin)
    out = Output(before_terminal=report.hide)
    encode = None if flow.writes_jsonl(config.batch) else _encoder(config)
    with obeyed(config.batch, report) as (watch, ended), ExitStack() as stack:
        lines = out.lines()
        if config.summary and config.batch.output is None:
            lines = stack.enter_context(Path(os.devnull).open("wb"))
        summary, corpus = run_batch(config, given, lines, watch, encode)
        report.stop()
        if config.summary:
            out.write(_summary(config, corpus))
        elif os.isatty(2) and summary.records > 1:
            from textgen_cli.cli.render import pairs

            tell("".join(f"{line}\n" for line in pairs(corpus)))
        ended(summary)


def _encoder(config: ScoreConfig) -> Callable[[dict[str, Any]], bytes]:
    """A record's figures as a line: a row of a table on a terminal, tab-separated cells elsewhere."""
    field = config.scoring.text_field
    if not os.isatty(1):
        return lambda fields: _cells(fields, field)
    from textgen_cli.cli.render import Table

    table = Table(shutil.get_terminal_size().columns, field)
    return lambda fields: "".join(f"{line}\n" for line in table.lines(fields)).encode("utf-8", "replace")


def _cells(fields: dict[str, Any], text_field: str) -> bytes:
    """The figures that COLUMNS names, then the text; nothing for a failed record."""
    if "error" in fields:
        return b"\n"
    cells = [shown(fields[name]) for name in COLUMNS if name in fields]
    if "entities" in fields:
        cells.append(", ".join(f"{entity['text']}/{entity['type']}" for entity in fields["entities"]))
    text = str(fields.get(text_field, "")).replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")
    return "\t".join([*cells, text]).encode("utf-8", "replace") + b"\n"


def _summary(config: ScoreConfig, corpus: dict[str, Any]) -> str:
    if config.batch.jsonl:
        return records.line(corpus).decode()
    if os.isatty(1):
        from textgen_cli.cli import render

        return "".join(f"{line}\n" for line in render.pairs(corpus))
    return "".join(f"{name}\t{value}\n" for name, value in _pairs(corpus))


def _pairs(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) of every figure; what lists of records hold as `entities.0.type`, but for tokens and words."""
    for name, value in found.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            if name not in ("token_scores", "word_scores"):
                for number, entry in enumerate(value):
                    yield from ((f"{name}.{number}.{key}", shown(part)) for key, part in flat(entry))
        else:
            yield from ((key, shown(part)) for key, part in flat({name: value}))
