"""Each option once: its flags, help and panel, by the name of the config field it sets.

It makes a Typer command from a config dataclass: type and default come from the field. What a value may
be is checked by the dataclass; where values come from stands in settings.py.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, NamedTuple

import typer

from textgen_cli.cli import settings
from textgen_cli.cli.console import Output
from textgen_cli.config import DEFAULT_MODEL, option_name
from textgen_cli.errors import InputError, UsageError


@dataclass(frozen=True)
class Opt:
    """How a setting appears on the command line; its long name comes from the field's."""

    panel: str
    help: str
    short: str = ""
    metavar: str | None = None
    complete: Callable[[str], list[str]] | None = None


def words(*choices: str) -> Callable[[str], list[str]]:
    """A completion that offers these words."""
    return lambda incomplete: [word for word in choices if word.startswith(incomplete)]


def catalogue(incomplete: str) -> list[str]:
    """The catalogue's names as a completion."""
    from textgen_cli.model.catalog import CATALOG

    return words(DEFAULT_MODEL, *(name for name in CATALOG if name != DEFAULT_MODEL))(incomplete)


PROMPT, LENGTH, CHOICE, FORM = "Prompt", "Length and number", "Choice of words", "Form of the text"
BATCH, MODEL, SERVER, RUN = "Many records", "Model", "Server", "Run"

# In the order of --help.
OPTIONS: dict[str, Opt] = {
    "chat": Opt(PROMPT, "Treat the prompt as a user's message: apply the model's chat template."),
    "system": Opt(PROMPT, "System message; implies --chat.", short="-s", metavar="TEXT"),
    "task": Opt(PROMPT, "translate, summarize, qa, chat or story.", metavar="TASK"),
    "from_": Opt(
        PROMPT, "translate: the language of the text (English where not given).", metavar="LANGUAGE"
    ),
    "to": Opt(PROMPT, "translate: the language wanted.", metavar="LANGUAGE"),
    "question": Opt(PROMPT, "qa: what is asked about the text.", metavar="TEXT"),
    "template": Opt(PROMPT, "Prompt with named fields, such as 'Name a {kind}: {text}'.", metavar="TEXT"),
    "template_file": Opt(PROMPT, "File with such a template.", metavar="FILE"),
    "top": Opt(PROMPT, "Masked models and qa: show the K best fillings or answers.", metavar="K"),
    "truncate": Opt(PROMPT, "Cut a prompt that is too long at its left or right end.", metavar="SIDE"),
    "show_prompt": Opt(PROMPT, "Print what the model would see, and stop."),
    "no_stdin": Opt(PROMPT, "Leave standard input alone."),
    "max_new_tokens": Opt(LENGTH, "Tokens to generate at most.", short="-n", metavar="N"),
    "min_new_tokens": Opt(LENGTH, "Do not end before this many tokens.", metavar="N"),
    "max_length": Opt(LENGTH, "Tokens of prompt and text together at most.", metavar="N"),
    "stop": Opt(LENGTH, "End the text before this string; repeatable.", metavar="TEXT"),
    "num_return_sequences": Opt(LENGTH, "Texts to generate for the prompt.", metavar="N"),
    "temperature": Opt(CHOICE, "Below 1: more predictable; above 1: more varied.", short="-t", metavar="X"),
    "top_k": Opt(CHOICE, "Draw from the K most probable tokens; 0: from all.", metavar="K"),
    "top_p": Opt(CHOICE, "Draw from the most probable tokens that together reach P.", metavar="P"),
    "min_p": Opt(CHOICE, "Drop tokens less probable than P times the most probable one.", metavar="P"),
    "typical_p": Opt(CHOICE, "Draw from the most typical tokens that together reach P.", metavar="P"),
    "greedy": Opt(CHOICE, "Always take the most probable token instead of drawing."),
    "seed": Opt(CHOICE, "Start of the random draw: a number, or 'random'.", metavar="SEED"),
    "num_beams": Opt(CHOICE, "Follow N texts at once and keep the most probable.", metavar="N"),
    "length_penalty": Opt(CHOICE, "For beams; above 0: favour longer texts.", metavar="X"),
    "repetition_penalty": Opt(CHOICE, "Above 1: repeat less.", metavar="X"),
    "no_repeat_ngram_size": Opt(CHOICE, "Let no run of N tokens occur twice; 0: allow it.", metavar="N"),
    "bad_words": Opt(CHOICE, "Never generate the words in this file, one a line.", metavar="FILE"),
    "bias": Opt(CHOICE, "Add X to the score of TEXT's last token; repeatable.", metavar="TEXT=X"),
    "set": Opt(CHOICE, "Set any other field of GenerationConfig; repeatable.", metavar="KEY=VALUE"),
    "json_schema": Opt(FORM, "JSON that this schema allows: a file, or JSON itself.", metavar="FILE|JSON"),
    "json": Opt(FORM, "Any JSON."),
    "regex": Opt(FORM, "Text that matches this regular expression.", metavar="REGEX"),
    "choices": Opt(FORM, "One of these strings.", metavar="A,B,C"),
    "grammar": Opt(FORM, "Text of this grammar (Lark or GBNF).", metavar="FILE"),
    "input": Opt(BATCH, "Read records from this file; - is standard input.", short="-i", metavar="FILE"),
    "output": Opt(BATCH, "Write JSONL to this file, whole or not at all.", short="-o", metavar="FILE"),
    "jsonl": Opt(BATCH, "JSONL out, and in where no other form is named; one object a record."),
    "lines": Opt(BATCH, "One prompt a line."),
    "csv": Opt(BATCH, "CSV in, with a header row."),
    "resume": Opt(BATCH, "Go on with the unfinished output file."),
    "restart": Opt(BATCH, "Start the output file anew."),
    "strict": Opt(BATCH, "Stop at the first record that cannot be read."),
    "max_failures": Opt(BATCH, "Stop when more than N records, or P% of them, have failed.", metavar="N|P%"),
    "max_time": Opt(BATCH, "Stop after so many seconds, ready to resume.", metavar="SECONDS"),
    "shard": Opt(BATCH, "Take every N-th record from the I-th on.", metavar="I/N"),
    "batch_size": Opt(
        BATCH, "Sequences computed together at most, or auto; 1: each result at once.", metavar="N"
    ),
    "model": Opt(
        MODEL,
        "A catalogue name, org/name@revision on the Hugging Face Hub, ./folder, or file.gguf.",
        short="-m",
        metavar="MODEL",
        complete=catalogue,
    ),
    "draft_model": Opt(MODEL, "A smaller model that guesses tokens.", metavar="MODEL", complete=catalogue),
    "prompt_lookup": Opt(MODEL, "Guess N tokens at once from the prompt.", metavar="N"),
    "device": Opt(
        MODEL,
        "auto, cpu, cuda, cuda:N or mps.",
        metavar="DEVICE",
        complete=words("auto", "cpu", "cuda", "mps"),
    ),
    "dtype": Opt(MODEL, "auto, float32, bfloat16 or float16.", metavar="DTYPE"),
    "threads": Opt(MODEL, "CPU threads; all cores where not given.", metavar="N"),
    "adapter": Opt(
        MODEL,
        "LoRA adapter, ./folder or org/name, to add with a weight or with 1; may be repeated.",
        metavar="ADAPTER[=WEIGHT]",
    ),
    "quantize": Opt(
        MODEL,
        "Keep the weights in int8 or int4: less memory; faster on a CPU, in bfloat16.",
        metavar="FORMAT",
        complete=words("int8", "int4"),
    ),
    "offline": Opt(MODEL, "Open no network connection."),
    "cache_dir": Opt(MODEL, "Folder for fetched and converted models.", metavar="FOLDER"),
    "endpoint": Opt(SERVER, "Address of an OpenAI-compatible server that generates.", metavar="URL"),
    "endpoint_server": Opt(
        SERVER, "vllm, sglang or llamacpp; asked of the server where not given.", metavar="KIND"
    ),
    "concurrency": Opt(SERVER, "Calls under way at one time.", metavar="N"),
    "split_sequences": Opt(SERVER, "One call for each sequence, for servers that ignore n."),
    "logprobs": Opt(RUN, "Report the N most probable alternatives of each token.", metavar="N"),
    "verbose": Opt(RUN, "Tell on standard error what is chosen and done.", short="-v"),
}


class Leaf(NamedTuple):
    """A field of a config, or of a config inside it, that is an option."""

    name: str
    annotation: Any
    default: Any


def leaves(config_class: type) -> Iterator[Leaf]:
    """The options of a config dataclass; configs inside it are flattened."""
    for field in fields(config_class):
        if is_dataclass(field.type):
            assert isinstance(field.type, type)
            yield from leaves(field.type)
        else:
            assert field.default is not MISSING, field.name
            yield Leaf(field.name, field.type, field.default)


def as_field(annotation: Any, value: Any) -> Any:
    """A value as its field has it: what may be repeated is a tuple there, a list on the command line."""
    return tuple(value or ()) if settings.is_list(annotation) else value


def build(config_class: type, values: dict[str, Any]) -> Any:
    """The config object with these option values; the reverse of `leaves`."""
    return config_class(
        **{
            field.name: build(field.type, values)
            if isinstance(field.type, type) and is_dataclass(field.type)
            else values[field.name]
            for field in fields(config_class)
        }
    )


def _parameter(leaf: Leaf) -> inspect.Parameter:
    option = OPTIONS[leaf.name]
    name = option_name(leaf.name)
    is_flag = leaf.annotation is bool
    repeats = settings.is_list(leaf.annotation)
    if is_flag:  # both ways, so that the command line can overrule a variable or file
        name += "/--" + (name.removeprefix("--no-") if name.startswith("--no-") else "no-" + name[2:])
    info = typer.Option(
        *filter(None, (name, option.short)),
        help=option.help,
        rich_help_panel=option.panel,
        metavar="" if is_flag else option.metavar,
        autocompletion=option.complete,
        # A variable would be split at spaces, which such a text may hold.
        envvar=None if repeats else settings.variable(leaf.name),
        show_envvar=False,
        show_default=not is_flag and not repeats,
    )
    kind = list[str] if repeats else leaf.annotation
    default = list(leaf.default) if repeats else leaf.default
    annotation: Any = Annotated[kind, info]
    return inspect.Parameter(
        leaf.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


DumpOption = Annotated[
    bool,
    typer.Option(
        "--dump-config", help="Print the effective settings as TOML, each with its origin, and exit."
    ),
]

# Command name -> the settings it knows, for configuration files.
COMMANDS: dict[str, settings.Fields] = {}


def command(config_class: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a Typer command of a function that takes its own arguments and `config`, a `config_class`.

    A bad value is a UsageError that names the option, variable or file it came from.
    """

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        order = list(OPTIONS)
        options = sorted(leaves(config_class), key=lambda leaf: order.index(leaf.name))
        COMMANDS[body.__name__] = {leaf.name: leaf.annotation for leaf in options}

        def run(ctx: typer.Context, dump_config: bool, **arguments: Any) -> None:
            values = {
                leaf.name: as_field(leaf.annotation, _utf8(ctx, leaf.name, arguments.pop(leaf.name)))
                for leaf in options
            }
            try:
                config = build(config_class, values)
            except UsageError as error:
                raise _located(error, ctx, values) from error
            if dump_config:
                Output().write(settings.dump(ctx, values))
                return
            body(**arguments, config=config)

        own = [p for p in inspect.signature(body).parameters.values() if p.name != "config"]
        _disguise(run, body, own, [_parameter(leaf) for leaf in options])
        return run

    return decorate


def _utf8(context: typer.Context, name: str, value: Any) -> Any:
    """Texts of the command line and the environment read as UTF-8, whatever the locale took their bytes for."""
    if isinstance(value, list):
        return [_utf8(context, name, item) for item in value]
    if not isinstance(value, str) or not settings.is_bytes(context, name):
        return value
    try:
        return os.fsencode(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("E-UTF8", option_name(name), f"is not UTF-8 at byte {error.start}") from error


def _located(error: UsageError, context: typer.Context, values: dict[str, Any]) -> UsageError:
    """The error with the variable or file as its subject where the value is not from the command line."""
    name = next((name for name in values if option_name(name) == error.subject), None)
    if name is None or settings.origin(context, name) in ("default", error.subject):
        return error
    return UsageError(error.name, settings.origin(context, name), error.fact, hint=error.hint)


def _disguise(
    run: Callable[..., None],
    body: Callable[..., None],
    own: list[inspect.Parameter],
    options: list[inspect.Parameter],
) -> None:
    """Give `run` the name, text and parameters that Typer shall read."""
    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    dump = inspect.Parameter(
        "dump_config", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DumpOption
    )
    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    parameters = [context, *keyword_only, *options, dump]
    run.__name__, run.__doc__ = body.__name__, body.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # any function may bear one
