"""`textgen generate`: the prompt from argument and standard input, the text to standard output.

It knows how a prompt is put together and how texts are separated; not how they are made.
"""

import gc
import os
from collections.abc import Generator
from dataclasses import replace
from typing import Annotated, Any

import typer

from textgen_cli.cli import explain, idle
from textgen_cli.cli.console import Output, Reporter, reporter, require_stdout
from textgen_cli.cli.inputs import batch_argument, check_single, is_batch, lead_stdin_away, obeyed, whole_text
from textgen_cli.cli.options import command
from textgen_cli.config import GenerateConfig
from textgen_cli.errors import UsageError

EXAMPLE = 'textgen generate "Once upon a time"'
EXAMPLES = """\
Examples:

textgen generate "Once upon a time"

textgen generate --chat "Name three rivers." --greedy -n 40

git diff | textgen generate --chat "Describe this change in one line."

textgen generate "Once upon a time" --max-length 50 --num-return-sequences 5 --no-repeat-ngram-size 2"""

PromptArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT", help="What to continue; piped text is added to it, `-` is piped text alone."
    ),
]


@command(GenerateConfig, idle.refuse)
def generate(config: GenerateConfig, prompt: PromptArgument = None) -> None:
    """Continue a text, or answer a message with --chat; many of them with -i, --jsonl, --lines or --csv."""
    require_stdout()
    jsonl = config.batch.jsonl or config.batch.output is not None
    shown_alone = {"--logprobs": config.decoding.logprobs is not None}
    shown_alone["--top"] = config.prompting.top != 1 and is_batch(config.batch)
    for option, given in shown_alone.items():
        if given and not jsonl:
            raise UsageError("E-CONFLICT", option, "needs JSONL output", hint="add --jsonl or -o FILE")
    explain.check(config.explaining, config.batch, config.html, single=not is_batch(config.batch))
    with reporter(config.verbose) as report:
        if is_batch(config.batch):
            _batch(config, prompt, report)
            return
        check_single(config.batch)
        if _is_conversation(config, prompt):
            if config.explaining.explain is not None:
                raise UsageError(
                    "E-CONFLICT", "--explain", "cannot be used in a conversation", hint="give a prompt"
                )
            _converse(config, report)
            return
        whole = whole_text(prompt, "prompt", EXAMPLE, config.no_stdin, report)
        lead_stdin_away()
        if config.prompting.show_prompt:
            _show(config, whole, report)
        else:
            _write(config, whole, report)


def _is_conversation(config: GenerateConfig, prompt: str | None) -> bool:
    """Whether somebody sits there who can be talked with."""
    asked = config.prompting
    wanted = asked.chat or asked.task == "chat"
    plain = not (asked.show_prompt or asked.template or asked.template_file) and asked.task in (None, "chat")
    return wanted and plain and prompt is None and os.isatty(0) and os.isatty(1) and not config.no_stdin


def _converse(config: GenerateConfig, report: Reporter) -> None:
    from textgen_cli.cli.chat import converse
    from textgen_cli.generate.run import conversation

    converse(conversation(config, report), report)


def _show(config: GenerateConfig, prompt: str, report: Reporter) -> None:
    from textgen_cli.generate.run import show

    text = show(config, prompt, report)
    Output(before_terminal=report.hide).write(text + "\n")


def _batch(config: GenerateConfig, prompt: str | None, report: Reporter) -> None:
    """Many records, or one as JSONL: the input is a file, standard input, or the prompt argument."""
    from textgen_cli.generate.run import run_batch

    given = batch_argument(config.batch, prompt, "prompt", config.no_stdin)
    with obeyed(config.batch, report) as (watch, ended):
        ended(run_batch(config, given, Output(before_terminal=report.hide).lines(), watch))


def _write(config: GenerateConfig, prompt: str, report: Reporter) -> None:
    """Write each text as it comes, a line end behind it and a blank line between two."""
    from textgen_cli.generate.run import run

    output = Output(before_terminal=report.hide)
    current = None
    config = replace(config, explaining=explain.for_page(config.explaining, config.html))
    explanations: list[dict[str, Any]] = []
    chunks = run(config, prompt, report)
    try:
        for chunk in chunks:
            if current is None:  # everything heavy is imported and loaded by now: collect again
                gc.freeze()
                gc.enable()
            between = "\n" if current is not None and chunk.sequence != current else ""
            current = chunk.sequence
            output.write(between + chunk.text + ("\n" if chunk.final else ""))
            if chunk.final and (explanation := chunk.final.extra.get("explanation")):
                explanations.append(explanation)
                if os.isatty(1):
                    report.hide()
                    explain.draw(explanation)
    finally:
        if isinstance(chunks, Generator):
            chunks.close()  # stop computing at once when the reader is gone
    if config.html is not None:
        explain.write_page(config.html, "Explanation", explanations)
