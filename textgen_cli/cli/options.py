"""Makes a Typer command from a config dataclass: one parameter a field, its flags and help from flags/.

Type and default come from the field. What a value may be is checked by the dataclass; where values come from
stands in settings.py.
"""

import inspect
import os
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, NamedTuple

import typer

from textgen_cli.cli import settings
from textgen_cli.cli.console import Output
from textgen_cli.cli.flags import OPTIONS
from textgen_cli.config import option_name
from textgen_cli.errors import InputError, UsageError


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


def command(
    config_class: type, refuse: Callable[[Any, frozenset[str]], None] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a Typer command of a function that takes its own arguments and `config`, a `config_class`.

    `refuse` is asked whether what was typed on the command line, by the names of its settings, can go together.
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
            if refuse is not None:
                refuse(config, frozenset(n for n in values if settings.origin(ctx, n) == option_name(n)))
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
