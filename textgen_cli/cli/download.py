"""`textgen download`: models come, stay, are looked after and go; paths and tables to standard output.

It knows how what was done is told: as paths, as a table for people, as tabs or JSON for scripts.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer

from textgen_cli.cli.console import Output, Reporter, reporter, require_stdout, tell_error
from textgen_cli.cli.flags.opt import catalogue
from textgen_cli.cli.options import command
from textgen_cli.config import DownloadConfig, option_name
from textgen_cli.errors import TextgenError, UsageError
from textgen_cli.text.figures import scaled, shown, size

EXAMPLES = """\
Examples:

textgen download

textgen download org/name@v1.0 --dry-run

textgen download org/name --lock models.lock && textgen generate --locked models.lock "Once upon a time"

textgen download org/name --quantize int4 --to ./small

textgen download --list

textgen download org/name --info

textgen download org/name --for finetune --method lora --length 512

textgen download --catalog translation

ls "$(textgen download)\""""

NAMELESS = ("list", "clean")  # modes that are about no model


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="The model it is about, named as with --model; with --catalog a use.",
        autocompletion=catalogue,
    ),
]


@command(DownloadConfig)
def download(config: DownloadConfig, name: ModelArgument = None) -> None:
    """Fetch a model, check it, and print the folder where it lies; or look after the models that are here."""
    require_stdout()
    mode = next(iter(config.modes), None)
    if name is not None and mode in NAMELESS:
        raise UsageError("E-USAGE", option_name(str(mode)), "takes no MODEL")
    if name is None and mode == "remove":
        raise UsageError(
            "E-USAGE", "--remove", "needs a MODEL", hint="textgen download --list shows what is here"
        )
    with reporter(config.verbose) as report:
        if mode == "list":
            _list(config)
        elif mode == "catalog":
            _catalog(config, name)
        elif mode in ("info", "for_"):
            _info(config, name, report)
        elif mode == "verify":
            _verify(config, name, report)
        elif mode is not None:
            _take_away(config, name, report)
        else:
            _fetch(config, name, report)


def _named(config: DownloadConfig, name: str) -> DownloadConfig:
    return replace(config, model=replace(config.model, model=name))


def _fetch(config: DownloadConfig, name: str | None, report: Reporter) -> None:
    """Fetch each model that is meant, and print its folder, or what would be done."""
    from textgen_cli.download import run as wing

    output = Output(before_terminal=report.stop)
    wanted = wing.names(config, name)
    if len(wanted) > 1 and config.getting.to is not None:
        raise UsageError("E-CONFLICT", "--to", "is for one model", hint=f"name one of {', '.join(wanted)}")
    for one in wanted:
        if config.getting.dry_run:
            planned = wing.plan(_named(config, one), report).fields()
            _write_plan(output, config, planned)
        elif config.keeping.compile:
            _write(output, config, wing.compiled(_named(config, one), report).fields())
        elif config.keeping.convert or config.model.quantize is not None:
            from textgen_cli.download.copies import make

            _write(output, config, make(_named(config, one), report))
        else:
            _write(output, config, wing.run(_named(config, one), report).fields())


def _write(output: Output, config: DownloadConfig, found: Mapping[str, Any]) -> None:
    output.write(_json(found) if config.json else f"{found['folder']}\n")


def _write_plan(output: Output, config: DownloadConfig, planned: Mapping[str, Any]) -> None:
    if config.json:
        output.write(_json(planned))
        return
    rows = [
        {"size": f["size"], "here": "here" if f["here"] else "", "file": f["name"]} for f in planned["files"]
    ]
    _table(output, rows)
    if os.isatty(1):
        output.write(
            f"{size(planned['needed'])} of {size(planned['bytes'])} to fetch, {size(planned['free'])} free\n"
        )


def _list(config: DownloadConfig) -> None:
    from textgen_cli.download.inventory import kept

    found = [one.fields() for one in kept(config.model)]
    output = Output()
    if config.json:
        output.write("".join(map(_json, found)))
        return
    columns = ("bytes", "last_used", "source", "revision", "form", "ours", "model", "folder")
    rows = [_shortened({name: one[name] for name in columns}) for one in found]
    if os.isatty(1):  # where the caches lie is no news, and long
        rows = [{**row, "folder": row["folder"] if row["source"] == "folder" else ""} for row in rows]
    _table(output, rows)


def _shortened(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what people need of it."""
    row["revision"] = (row["revision"] or "")[:12]
    row["ours"] = "ours" if row["ours"] else ""
    return {name: "" if value is None else value for name, value in row.items()}


def _catalog(config: DownloadConfig, use: str | None) -> None:
    """Models worth knowing, all of them or those for a use."""
    from textgen_cli.download.known import USES, chosen
    from textgen_cli.model import room

    if use is not None and use not in USES:
        raise UsageError("E-USAGE", "--catalog", f"knows no use {use!r}", hint=f"one of {', '.join(USES)}")
    free = room.free()
    rows = [model.fields(free) for model in chosen(use)]
    output = Output()
    if config.json:
        output.write("".join(map(_json, rows)))
    elif os.isatty(1):
        _table(output, map(_short, rows))
        output.write(f"memory: the weights; fits: into the {size(free)} that are free here\n" if free else "")
    else:
        _table(output, rows)


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the catalogue as a terminal has room for it."""
    return {
        "model": row["model"],
        "use": row["use"],
        "size": scaled(row["parameters"]),
        "memory": size(row["memory"]),
        "fits": {True: "yes", False: "no", None: "?"}[row["fits"]],
        "licence": row["licence"] + (" (gated)" if row["gated"] else ""),
        "languages": " ".join(row["languages"][:3]) + (" …" if len(row["languages"]) > 3 else ""),
        "good for": row["good_for"],
    }


def _info(config: DownloadConfig, name: str | None, report: Reporter) -> None:
    """What is known of each model that is meant, or what work with it takes."""
    from textgen_cli.cli import knowing
    from textgen_cli.download.run import names
    from textgen_cli.model.inspect import inspect

    output = Output(before_terminal=report.stop)
    for one in names(config, name):
        if config.knowing.for_ is None:
            found = inspect(_named(config, one).model, report, config.getting.include)
            fields, lines = found.fields(), knowing.lines
        else:
            from textgen_cli.download.work import estimate

            fields, lines = estimate(_named(config, one), report), knowing.work_lines
        output.write(_json(fields) if config.json else "".join(lines(fields)))


def _verify(config: DownloadConfig, name: str | None, report: Reporter) -> None:
    """A line for each model; exit code of the worst problem, the problems themselves on stderr."""
    from textgen_cli.download.run import names
    from textgen_cli.download.upkeep import verify

    output = Output(before_terminal=report.stop)
    problems: list[TextgenError] = []
    wanted = names(config, name) if name is not None or config.model.locked is not None else [None]
    for one in wanted:
        for found in verify(config if one is None else _named(config, one), one, report):
            fields = found.fields()
            word = "damaged" if found.problem else "ok" if found.files else "no hashes"
            line = f"{word}\t{found.files}\t{found.model}\n"
            output.write(_json(fields) if config.json else line)
            if found.problem is not None:
                report.stop()
                problems.append(found.problem)
    for problem in problems[:-1]:
        tell_error(problem)
    if problems:
        raise problems[-1]


def _take_away(config: DownloadConfig, name: str | None, report: Reporter) -> None:
    from textgen_cli.download.upkeep import clean, remove

    found = clean(config) if name is None else remove(config, name)
    rows = [one.fields() for one in found]
    report.stop()
    output = Output()
    if config.json:
        output.write("".join(map(_json, rows)))
        return
    _table(output, rows)
    if os.isatty(1):
        total = size(sum(one.bytes for one in found))
        output.write(f"{total} {'would be' if config.getting.dry_run else 'are'} free again\n")


# --- how it is told


def _json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"


def _table(output: Output, rows: Iterable[Mapping[str, Any]]) -> None:
    """For people a table with sizes in round numbers, else a line of tabs a row, without a head."""
    rows = list(rows)
    if not os.isatty(1):
        output.write("".join("\t".join(map(shown, row.values())) + "\n" for row in rows))
        return
    from textgen_cli.cli.render import listing

    sized = [
        {k: size(v) if k in ("bytes", "size") and isinstance(v, int) else v for k, v in row.items()}
        for row in rows
    ]
    output.write("".join(f"{line}\n" for line in listing(sized, shutil.get_terminal_size().columns)))
