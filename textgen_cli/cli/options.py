"""Each option once: its flags, help and panel, by the name of the config field it sets.

It makes a Typer command from a config dataclass: type and default come from the field. What a value may
be is checked by the dataclass; where values come from stands in settings.py.
"""

import inspect
import os
import typing
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
    typed: bool = False  # on the command line alone: what a run does is not left to a variable or a file


def words(*choices: str) -> Callable[[str], list[str]]:
    """A completion that offers these words."""
    return lambda incomplete: [word for word in choices if word.startswith(incomplete)]


def catalogue(incomplete: str) -> list[str]:
    """The catalogue's names as a completion."""
    from textgen_cli.model.catalog import CATALOG

    return words(DEFAULT_MODEL, *(name for name in CATALOG if name != DEFAULT_MODEL))(incomplete)


PROMPT, LENGTH, CHOICE, FORM = "Prompt", "Length and number", "Choice of words", "Form of the text"
BATCH, MODEL, SERVER, RUN = "Many records", "Model", "Server", "Run"
ASKED, CONVENTION, TOLD = "What is asked", "Convention", "What is told"
WHY = "Why it says that"
SAFE = "What must not be said"
DATA, LEARNING, TRAINING, RESULT = "Data", "What learns", "Training", "Result"
GETTING, KEEPING, COPIES = "Getting", "Keeping", "Copies in another form"

# In the order of --help. `score.choices`: the option `choices` as the command score has it.
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
    "bias": Opt(CHOICE, "Add X to the score of TEXT's last token; repeatable.", metavar="TEXT=X"),
    "generate.watermark": Opt(
        CHOICE, "Favour tokens that this key chooses; score --watermark finds them.", metavar="KEY"
    ),
    "watermark_bias": Opt(CHOICE, "How much it favours them: added to their scores.", metavar="X"),
    "set": Opt(CHOICE, "Set any other field of GenerationConfig; repeatable.", metavar="KEY=VALUE"),
    "json_schema": Opt(FORM, "JSON that this schema allows: a file, or JSON itself.", metavar="FILE|JSON"),
    "json": Opt(FORM, "Any JSON."),
    "regex": Opt(FORM, "Text that matches this regular expression.", metavar="REGEX"),
    "choices": Opt(FORM, "One of these strings.", metavar="A,B,C"),
    "grammar": Opt(FORM, "Text of this grammar (Lark or GBNF).", metavar="FILE"),
    "text_field": Opt(ASKED, "Field of a record that is scored.", metavar="FIELD"),
    "context": Opt(
        ASKED,
        "What stands before the text and is not scored: a record's FIELD, or TEXT; an encoder-decoder's source.",
        metavar="FIELD|TEXT",
    ),
    "score.template": Opt(ASKED, "The context, with a record's named {fields}.", metavar="TEXT"),
    "score.template_file": Opt(ASKED, "File with such a template.", metavar="FILE"),
    "score.choices": Opt(ASKED, "Field with a list of continuations to choose from.", metavar="FIELD"),
    "labels": Opt(ASKED, "Choose from these for every record.", metavar="A,B,C"),
    "pairs": Opt(
        ASKED, "Each record is two texts (CrowS-Pairs, StereoSet, BLiMP, two columns): the likelier one."
    ),
    "second": Opt(
        ASKED,
        "The second texts of the pairs, where each line of -i is a first one (WinoBias).",
        metavar="FILE",
    ),
    "delimiter": Opt(
        ASKED, "Between context and text; nothing where not given, before a choice one space.", metavar="TEXT"
    ),
    "gold": Opt(ASKED, "Field with the right answer: how often it is met is summed up.", metavar="FIELD"),
    "against": Opt(
        ASKED,
        "A second model: bits per byte more or less, and the KL divergence.",
        metavar="MODEL",
        complete=catalogue,
    ),
    "watermark": Opt(
        ASKED, "Whether the text bears the watermark of this key; loads no weights.", metavar="KEY"
    ),
    "score.truncate": Opt(
        ASKED, "left: cut a context that is too long; classifiers: left or right.", metavar="SIDE"
    ),
    "normalization": Opt(
        CONVENTION,
        "What the pick among choices goes by: raw, token, byte or pmi.",
        metavar="RULE",
        complete=words("raw", "token", "byte", "pmi"),
    ),
    "bits": Opt(CONVENTION, "Bits instead of nats."),
    "bos": Opt(
        CONVENTION,
        "A token before the text, in every window: auto, always, never; first: in the first window alone.",
        metavar="WHEN",
        complete=words("auto", "always", "never", "first"),
    ),
    "window": Opt(CONVENTION, "Tokens the model sees at once; its context where not given.", metavar="N"),
    "stride": Opt(
        CONVENTION,
        "Tokens scored in each window behind the first; half a window where not given.",
        metavar="N",
    ),
    "pll": Opt(
        CONVENTION,
        "Masked models: hide a token with the rest of its word (within_word_l2r, the default), or alone (original).",
        metavar="KIND",
        complete=words("original", "within_word_l2r"),
    ),
    "tokens": Opt(TOLD, "Tell of every token: place, log-probability, rank, entropy."),
    "score.top": Opt(TOLD, "With --tokens: the K most likely alternatives of each.", metavar="K"),
    "words": Opt(TOLD, "Sum up by words; in Chinese and Japanese by characters."),
    "summary": Opt(TOLD, "Print the figures of the whole input alone."),
    "html": Opt(
        TOLD, "Write the text, coloured by surprisal or by what explains it, as a page.", metavar="FILE"
    ),
    "safety": Opt(
        SAFE,
        "Judge prompts and texts by this list: a word, a phrase or re:PATTERN a line; repeatable.",
        metavar="FILE",
    ),
    "safety_model": Opt(SAFE, "Judge them by this sequence classifier.", metavar="MODEL"),
    "safety_labels": Opt(SAFE, "The labels of it that are unsafe.", metavar="A,B,C"),
    "safety_threshold": Opt(
        SAFE, "The probability of such a label from which a text is unsafe.", metavar="P"
    ),
    "on_unsafe": Opt(
        SAFE,
        "What becomes of an unsafe text: flag, redact, drop or retry.",
        metavar="ACTION",
        complete=words("flag", "redact", "drop", "retry"),
    ),
    "bad_words": Opt(SAFE, "Never generate the words in this file, one a line.", metavar="FILE"),
    "explain": Opt(
        WHY,
        "attention, gradient, integrated-gradients, occlusion, logit-lens or contrast.",
        metavar="METHOD",
        complete=words(
            "attention", "gradient", "integrated-gradients", "occlusion", "logit-lens", "contrast"
        ),
    ),
    "contrast": Opt(
        WHY,
        "Why the answer rather than this text or label; the runner-up with --explain contrast.",
        metavar="TEXT",
    ),
    "explain_unit": Opt(
        WHY, "Give weights to each token or each word.", metavar="UNIT", complete=words("token", "word")
    ),
    "explain_target": Opt(
        WHY,
        "Explain the whole answer, or each of its tokens besides.",
        metavar="TARGET",
        complete=words("whole", "each"),
    ),
    "attention": Opt(
        WHY,
        "Which attention: mean, rollout, all, LAYER or LAYER.HEAD (from 0).",
        metavar="WHICH",
        complete=words("mean", "rollout", "all"),
    ),
    "generate.html": Opt(WHY, "Write the explanation as a page.", metavar="FILE"),
    "input": Opt(BATCH, "Read records from this file; - is standard input.", short="-i", metavar="FILE"),
    "output": Opt(BATCH, "Write JSONL to this file, whole or not at all.", short="-o", metavar="FILE"),
    "jsonl": Opt(BATCH, "JSONL out, and in where no other form is named; one object a record."),
    "lines": Opt(BATCH, "One prompt or text a line."),
    "csv": Opt(BATCH, "CSV in, with a header row."),
    "resume": Opt(BATCH, "Go on with the unfinished output file."),
    "restart": Opt(BATCH, "Start the output file anew."),
    "strict": Opt(BATCH, "Stop at the first record that cannot be read."),
    "unique_ids": Opt(BATCH, "Refuse an input file in which an id comes twice."),
    "max_failures": Opt(BATCH, "Stop when more than N records, or P% of them, have failed.", metavar="N|P%"),
    "max_time": Opt(BATCH, "Stop after so many seconds, ready to resume.", metavar="SECONDS"),
    "shard": Opt(BATCH, "Take every N-th record from the I-th on.", metavar="I/N"),
    "batch_size": Opt(
        BATCH, "Sequences computed together at most, or auto; 1: each result at once.", metavar="N"
    ),
    "finetune.task": Opt(
        DATA,
        "clm, mlm, chat, seq2seq, text-classification, token-classification or question-answering; told by the "
        "data's fields where not given.",
        metavar="TASK",
        complete=words(
            "clm",
            "mlm",
            "chat",
            "seq2seq",
            "text-classification",
            "token-classification",
            "question-answering",
        ),
    ),
    "format": Opt(
        DATA,
        "text, lines, jsonl, csv, tsv, parquet, conll or squad; told by a file's name where not given.",
        metavar="FORMAT",
        complete=words("text", "lines", "jsonl", "csv", "tsv", "parquet", "conll", "squad"),
    ),
    "finetune.text_field": Opt(DATA, "Field with the text, the prompt or the source.", metavar="FIELD"),
    "pair_field": Opt(DATA, "text-classification: field with a second text.", metavar="FIELD"),
    "label_field": Opt(DATA, "Field with the label, the tags or the target.", metavar="FIELD"),
    "source_prefix": Opt(
        DATA, "seq2seq: put this before every source; generate will do so too.", metavar="TEXT"
    ),
    "valid": Opt(DATA, "File with held-out data; repeatable.", metavar="FILE"),
    "valid_share": Opt(DATA, "Share of the data that is held out where no file is given.", metavar="X"),
    "skip_bad": Opt(DATA, "Leave out up to N rows that cannot be used.", metavar="N"),
    "finetune.max_length": Opt(DATA, "Tokens of an example at most.", metavar="N"),
    "finetune.truncate": Opt(DATA, "Cut an example that is longer instead of refusing it."),
    "pack": Opt(DATA, "Several short examples in one row."),
    "whole_words": Opt(DATA, "mlm: hide whole words."),
    "mlm_probability": Opt(DATA, "mlm: share of the tokens that are hidden.", metavar="X"),
    "check": Opt(DATA, "Read every row, tell what there is and what it would take, and stop."),
    "lora": Opt(LEARNING, "Train a LoRA adapter of rank N instead of all weights.", metavar="N"),
    "lora_alpha": Opt(LEARNING, "Strength of the adapter; twice its rank where not given.", metavar="X"),
    "lora_dropout": Opt(LEARNING, "Share of the adapter's inputs that are dropped.", metavar="X"),
    "lora_targets": Opt(LEARNING, "Names of the layers that get one; all linear ones.", metavar="A,B,C"),
    "rslora": Opt(LEARNING, "Divide alpha by the root of the rank."),
    "dora": Opt(LEARNING, "Learn directions and lengths of the weights apart."),
    "merge": Opt(LEARNING, "Fold the adapter into the weights, and prove that nothing else changed."),
    "freeze": Opt(LEARNING, "Leave the embeddings and the first N layers as they are.", metavar="N"),
    "from_scratch": Opt(
        LEARNING, "Begin with random weights: a preset's name, or a config.json.", metavar="PRESET|FILE"
    ),
    "tokenizer": Opt(LEARNING, "From scratch: take this model's tokenizer.", metavar="MODEL"),
    "vocab_size": Opt(LEARNING, "From scratch: tokens of the tokenizer that is trained.", metavar="N"),
    "learning_rate": Opt(
        TRAINING, "2e-4 with LoRA, 5e-5 for encoders, 5e-4 from scratch, else 2e-5.", metavar="X"
    ),
    "epochs": Opt(TRAINING, "How often every example is seen.", metavar="X"),
    "max_steps": Opt(TRAINING, "Stop after N steps.", metavar="N"),
    "finetune.max_time": Opt(TRAINING, "Stop after so many seconds.", metavar="SECONDS"),
    "finetune.batch_size": Opt(TRAINING, "Examples of one step, or auto.", metavar="N"),
    "accumulate": Opt(TRAINING, "Add up the gradients of N batches before each step.", metavar="N"),
    "order": Opt(
        TRAINING,
        "Rows of like length in a batch, or random ones; else the first, from scratch the second.",
        metavar="NAME",
        complete=words("length", "random"),
    ),
    "schedule": Opt(
        TRAINING,
        "How the learning rate goes on: linear, cosine or constant.",
        metavar="NAME",
        complete=words("linear", "cosine", "constant"),
    ),
    "warmup": Opt(TRAINING, "Steps in which it rises: a share, or from 1 on a number.", metavar="X"),
    "weight_decay": Opt(TRAINING, "Pull of the weights towards 0.", metavar="X"),
    "max_grad_norm": Opt(TRAINING, "Longest gradient; longer ones are shortened to it.", metavar="X"),
    "recompute": Opt(TRAINING, "Gradient checkpointing: less memory, some values are computed twice."),
    "eval_steps": Opt(TRAINING, "Measure the held-out data every N steps; else once an epoch.", metavar="N"),
    "save_steps": Opt(TRAINING, "Save a checkpoint every N steps; else with each measuring.", metavar="N"),
    "patience": Opt(TRAINING, "Stop after N measurings without a better one.", metavar="N"),
    "keep": Opt(TRAINING, "Checkpoints that stay besides the best.", metavar="N"),
    "finetune.seed": Opt(TRAINING, "Start of everything random.", metavar="N"),
    "report_to": Opt(TRAINING, "A tracker of transformers' Trainer, such as tensorboard.", metavar="NAME"),
    "finetune.output": Opt(
        RESULT, "Folder of the finished model, there whole or not at all.", short="-o", metavar="DIR"
    ),
    "finetune.resume": Opt(RESULT, "Go on from the newest checkpoint."),
    "resume_previous": Opt(RESULT, "Where that is damaged, go on from the one before it."),
    "finetune.restart": Opt(RESULT, "Begin anew in a folder of ours."),
    "include": Opt(
        GETTING, "Fetch the files that match this pattern alone; repeatable.", metavar="PATTERN", typed=True
    ),
    "exclude": Opt(
        GETTING, "Leave out the files that match this pattern; repeatable.", metavar="PATTERN", typed=True
    ),
    "all_files": Opt(GETTING, "Fetch every file that runs no code, not only what loading needs.", typed=True),
    "download.to": Opt(
        GETTING, "Put the model into this folder, whole or not at all.", metavar="DIR", typed=True
    ),
    "lock": Opt(
        GETTING,
        "Write to this file which model it is, to the byte; see --locked.",
        metavar="FILE",
        typed=True,
    ),
    "dry_run": Opt(GETTING, "Tell what would be fetched, removed or cleaned, and do nothing.", typed=True),
    "list": Opt(KEEPING, "List the models that are here.", typed=True),
    "verify": Opt(
        KEEPING, "Read the files of MODEL, or of all models, again and compare their hashes.", typed=True
    ),
    "remove": Opt(KEEPING, "Take MODEL out of the cache.", typed=True),
    "clean": Opt(KEEPING, "Take away what interrupted runs and older versions left.", typed=True),
    "download.quantize": Opt(
        COPIES,
        "Make a copy of MODEL in --to with weights in int8 or int4.",
        metavar="FORMAT",
        complete=words("int8", "int4"),
        typed=True,
    ),
    "convert": Opt(
        COPIES, "Make a copy of MODEL in --to as safetensors in --dtype, adapters merged.", typed=True
    ),
    "compile": Opt(
        COPIES, "Make native code of MODEL for this machine, which generate then takes.", typed=True
    ),
    "model": Opt(
        MODEL,
        "A catalogue name, org/name@revision on the Hugging Face Hub (ms:… on ModelScope), ./folder, or file.gguf.",
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
    "mirror": Opt(MODEL, "Address of a mirror of the Hugging Face Hub.", metavar="URL"),
    "locked": Opt(
        MODEL, "Take the model that this file of download --lock pins, to the byte.", metavar="FILE"
    ),
    "cache_dir": Opt(MODEL, "Folder for fetched and converted models.", metavar="FOLDER"),
    "endpoint": Opt(SERVER, "Address of an OpenAI-compatible server that generates.", metavar="URL"),
    "endpoint_server": Opt(
        SERVER, "vllm, sglang or llamacpp; asked of the server where not given.", metavar="KIND"
    ),
    "concurrency": Opt(SERVER, "Calls under way at one time.", metavar="N"),
    "split_sequences": Opt(SERVER, "One call for each sequence, for servers that ignore n."),
    "download.json": Opt(RUN, "One JSON object a line, for scripts.", typed=True),
    "logprobs": Opt(RUN, "Report the N most probable alternatives of each token.", metavar="N"),
    "engine": Opt(
        RUN,
        "auto, eager or compiled; auto: compiled for a single prompt where there is such a model.",
        metavar="ENGINE",
        complete=words("auto", "eager", "compiled"),
    ),
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
    """A value as its field has it: what may be repeated is a tuple there, a list of texts on the command line."""
    if not settings.is_list(annotation):
        return value
    kind = typing.get_args(annotation)[0]
    return tuple(kind(item) for item in value or ())


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


def key(command_name: str, name: str) -> str:
    """Where OPTIONS has a command's option: under its own name, or under one that other commands share."""
    own = f"{command_name}.{name}"
    return own if own in OPTIONS else name


def _parameter(leaf: Leaf, command_name: str) -> inspect.Parameter:
    option = OPTIONS[key(command_name, leaf.name)]
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
        envvar=None if repeats or option.typed else settings.variable(leaf.name),
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


def settable() -> dict[str, settings.Fields]:
    """The settings that files may hold, by command."""
    return {
        command: {name: kind for name, kind in names.items() if not OPTIONS[key(command, name)].typed}
        for command, names in COMMANDS.items()
    }


def command(config_class: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a Typer command of a function that takes its own arguments and `config`, a `config_class`.

    A bad value is a UsageError that names the option, variable or file it came from.
    """

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        order = list(OPTIONS)
        name = body.__name__
        options = sorted(leaves(config_class), key=lambda leaf: order.index(key(name, leaf.name)))
        COMMANDS[name] = {leaf.name: leaf.annotation for leaf in options}

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
                known = {leaf: value for leaf, value in values.items() if not OPTIONS[key(name, leaf)].typed}
                Output().write(settings.dump(ctx, known))
                return
            body(**arguments, config=config)

        own = [p for p in inspect.signature(body).parameters.values() if p.name != "config"]
        _disguise(run, body, own, [_parameter(leaf, name) for leaf in options])
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
