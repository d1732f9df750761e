"""The Typer app and the one place where failures become messages and exit codes.

It owns the root options and `run`; the commands stand in their own modules.
"""

import os
import re
import signal
import sys
import traceback
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from textgen_cli import __version__
from textgen_cli.cli import console, settings, signals
from textgen_cli.cli.download import EXAMPLES as DOWNLOAD_EXAMPLES
from textgen_cli.cli.download import download
from textgen_cli.cli.finetune import EXAMPLES as FINETUNE_EXAMPLES
from textgen_cli.cli.finetune import finetune
from textgen_cli.cli.generate import EXAMPLES as GENERATE_EXAMPLES
from textgen_cli.cli.generate import generate
from textgen_cli.cli.options import COMMANDS, settable
from textgen_cli.cli.score import EXAMPLES as SCORE_EXAMPLES
from textgen_cli.cli.score import score
from textgen_cli.config import option_name
from textgen_cli.errors import InternalError, OutOfMemory, TextgenError, UsageError

EPILOG = (
    "Every option --some-name of a command, but those that say what download does, is also the key some_name in "
    "config.toml and, unless it is repeatable, the variable TEXTGEN_SOME_NAME; `textgen COMMAND --dump-config` "
    "shows what holds and why."
)

HELP = ["-h", "--help"]
COMPLETE = "_TEXTGEN_COMPLETE"  # the variable through which a shell asks for completion

app = typer.Typer(
    name="textgen",
    help="Language models in the Unix toolbox.",
    epilog=EPILOG,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": HELP},
)
for _command, _examples in (
    (generate, GENERATE_EXAMPLES),
    (score, SCORE_EXAMPLES),
    (finetune, FINETUNE_EXAMPLES),
    (download, DOWNLOAD_EXAMPLES),
):
    app.command(epilog=_examples, context_settings={"help_option_names": HELP})(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"textgen {__version__}")
        raise typer.Exit(0)


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Read settings from this TOML file.", envvar="TEXTGEN_CONFIG"),
    ] = None,
    _version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Read the settings files, or show the help where no command is given."""
    if ctx.invoked_subcommand is None:
        with redirect_stdout(console.forgiving_stderr()):
            typer.echo(ctx.get_help())
        raise typer.Exit(2)
    ctx.obj = settings.read(config, settable())
    ctx.default_map = ctx.obj.values


def run(arguments: list[str], closed: frozenset[int] = frozenset()) -> int:
    """Run the program; returns the exit code, or dies of the signal that ended it.

    `closed`: the descriptors among 0 to 2 that were closed at the start.
    """
    signals.install()
    try:
        code = _guarded(arguments, closed)
    except (KeyboardInterrupt, signals.Interrupted):
        signals.die(signals.received() or signal.SIGINT)
    signals.uninstall()
    if (signum := signals.received()) is not None:  # also where a library swallowed the exception
        signals.die(signum)
    return code


def _guarded(arguments: list[str], closed: frozenset[int]) -> int:
    """Every failure of the program as an exit code, its message told."""
    _set_environment()
    console.open_streams(closed)
    try:
        code = _invoke(arguments)
        sys.stdout.flush()
    except Exception as error:  # noqa: BLE001 - the one border
        # What fails while a signal unwinds is a consequence of the signal.
        return _tell(error, arguments) if signals.received() is None else 0
    return code


def _invoke(arguments: list[str]) -> int:
    command, name = typer.main.get_command(app), "textgen"
    commands = getattr(command, "commands", {})
    if len(arguments) == 2 and arguments[1] in HELP and arguments[0] in commands:
        # The help of a command reads no settings: a third faster, and there when a settings file is broken.
        command, name = commands[arguments[0]], f"textgen {arguments[0]}"
        arguments = arguments[1:]
    try:
        result = command.main(args=arguments, prog_name=name, complete_var=COMPLETE, standalone_mode=False)
    except SystemExit as leave:
        # Completion leaves this way, and Typer where it takes a foreign broken pipe for that of stdout.
        if isinstance(leave.__context__, OSError):
            raise leave.__context__ from None
        if leave.code is not None and not isinstance(leave.code, int):
            raise InternalError("E-INTERNAL", "SystemExit", str(leave.code)) from leave
        result = leave.code
    return result if isinstance(result, int) else 0


def _set_environment() -> None:
    """Settle what the libraries of the face would else guess from variables."""
    if not sys.warnoptions and not _debugging():
        warnings.simplefilter("ignore")  # words of libraries to their developers
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("COLUMNS", "TERMINAL_WIDTH"):
        if not re.fullmatch(r"[2-9]\d|[1-9]\d{2,3}", os.environ.get(name, "")):
            os.environ.pop(name, None)
    if not os.isatty(1):
        # Some CI systems' variables would put colours into a help text that goes to a file.
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"


def _debugging() -> bool:
    return os.environ.get("TEXTGEN_DEBUG", "0") not in ("", "0")


def _tell(error: Exception, arguments: list[str]) -> int:
    """Show an error; returns its exit code."""
    known = _known(error, arguments)
    if _debugging():
        console.tell_traceback("".join(traceback.format_exception(error)))
    console.tell_error(known)
    return known.exit_code


def _known(error: Exception, arguments: list[str]) -> TextgenError:
    """The error in our own words."""
    if isinstance(error, TextgenError):
        return error
    if isinstance(error, typer.TyperException) and error.exit_code == UsageError.exit_code:
        return _usage(error, arguments)
    if _is_memory(error):
        return OutOfMemory(
            "E-MEMORY",
            "memory",
            "is not enough",
            hint="use a smaller model, fewer tokens, or --dtype bfloat16",
        )
    return InternalError(
        "E-INTERNAL",
        type(error).__name__,
        str(error) or "unexpected",
        hint="set TEXTGEN_DEBUG=1 to see where",
    )


def _usage(error: typer.TyperException, arguments: list[str]) -> UsageError:
    """Typer's complaint about the command line; it carries the context and the parameter it is about."""
    context = getattr(error, "ctx", None)
    known = [name for name in arguments[:1] if name in COMMANDS]
    path = context.command_path if context is not None else " ".join(["textgen", *known])
    param = getattr(error, "param", None)
    if isinstance(error, typer.BadParameter) and error.message and param is not None and context is not None:
        place = settings.origin(context, param.name)
        subject = param.opts[0] if place in ("default", option_name(param.name)) else place
        fact = error.message.removeprefix("Value error, ")
    else:
        subject, fact = path, error.format_message()
    fact = fact[:1].lower() + fact[1:].rstrip(".")
    return UsageError("E-USAGE", subject, fact, hint=f"run `{path} --help`")


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out; torch's classes are known by name, since it may not be imported."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
