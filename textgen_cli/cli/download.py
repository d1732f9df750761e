"""`textgen download`: fetch a model into the cache and print its folder."""

from dataclasses import replace
from typing import Annotated

import typer

from textgen_cli.cli.console import Output, reporter, require_stdout
from textgen_cli.cli.options import catalogue, command
from textgen_cli.config import DownloadConfig

EXAMPLES = """\
Examples:

textgen download

textgen download org/name@v1.0

ls "$(textgen download)\""""


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="The model to fetch, named as with --model.", autocompletion=catalogue
    ),
]


@command(DownloadConfig)
def download(config: DownloadConfig, name: ModelArgument = None) -> None:
    """Fetch a model, check it, and print the folder where it lies."""
    require_stdout()
    if name is not None:
        config = replace(config, model=replace(config.model, model=name))
    from textgen_cli.download.run import run

    with reporter(config.verbose) as report:
        path = run(config, report)
    Output().write(f"{path}\n")
