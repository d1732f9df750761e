"""Writes what is made from the program: docs/cli.md, completions/* and the layout table of CONTRIBUTING.md.

`python docs/generate.py` writes the files; with `--check` it compares and exits 1 when one is stale.
It reads the Typer app, the completion scripts that the program prints, and docstrings; it knows no option.
"""

import ast
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parent.parent
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
COMPLETIONS = {  # shell -> the file name under which that shell looks for it
    "bash": "textgen.bash",
    "zsh": "_textgen",
    "fish": "textgen.fish",
    "powershell": "textgen.ps1",
}
# The program's script is made to be sourced. As a file of $fpath it runs at the first TAB, when it must
# complete and not only register itself: otherwise that first TAB does nothing.
ZSH_REGISTERS = "compdef _textgen_completion textgen\n"
ZSH_AUTOLOADS = """\
if [[ $funcstack[1] = _textgen ]]; then
  _textgen_completion "$@"
else
  compdef _textgen_completion textgen
fi
"""
HEAD = """\
# Command line reference

Written from the program by `python docs/generate.py`; do not edit.
"""


def program() -> str:
    """The installed console script beside this Python."""
    name = "textgen.exe" if os.name == "nt" else "textgen"
    return str(Path(sysconfig.get_path("scripts")) / name)


def completion(shell: str) -> str:
    """The completion script for `shell`, as the program itself prints it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TEXTGEN", "_T", "TYPER"))}
    done = subprocess.run(
        [program()],
        env=clean | {"_TEXTGEN_COMPLETE": f"source_{shell}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=False,
    )
    if not done.stdout.strip():
        raise SystemExit(f"docs/generate.py: textgen printed no completion script for {shell}")
    # zsh wants #compdef in line 1, and the program prints an empty line before it.
    script = done.stdout.strip() + "\n"
    if shell != "zsh":
        return script
    if not script.endswith(ZSH_REGISTERS):
        raise SystemExit("docs/generate.py: the zsh script ends otherwise than expected")
    return script.removesuffix(ZSH_REGISTERS) + ZSH_AUTOLOADS


def entry(param: Any, context: typer.Context) -> str:
    """One argument or option as a list item: its names, help, default and environment variable."""
    names, text = param.get_help_record(context)
    item = f"- `{names}`: {' '.join(text.split())}"
    return f"{item} [env var: {param.envvar}]" if param.envvar and param.envvar not in text else item


def panels(command: Any, context: typer.Context) -> Iterator[tuple[str, list[str]]]:
    """The parameters of a command by the panel that --help shows them in, in order of first appearance."""
    found: dict[str, list[str]] = {}
    for param in command.get_params(context):
        if getattr(param, "hidden", False) or param.get_help_record(context) is None:
            continue
        fallback = "Arguments" if param.param_type_name == "argument" else "Options"
        found.setdefault(getattr(param, "rich_help_panel", None) or fallback, []).append(
            entry(param, context)
        )
    yield from found.items()


def section(command: Any, context: typer.Context, level: int) -> Iterator[str]:
    """The lines of one command, then of the commands below it."""
    usage = " ".join(command.get_usage(context).removeprefix("Usage: ").split())
    yield from ("", f"{'#' * level} {context.command_path}", "", "```text", usage, "```")
    if command.help:
        yield from ("", command.help.strip())
    for title, entries in panels(command, context):
        yield from ("", f"**{title}**", "", *entries)
    if command.epilog:
        yield from ("", command.epilog.strip())
    for name, below in getattr(command, "commands", {}).items():
        if not below.hidden:
            yield from section(below, typer.Context(below, info_name=name, parent=context), level + 1)


def reference() -> str:
    """docs/cli.md: every command with its arguments and options."""
    from textgen_cli.cli.app import app

    command: Any = typer.main.get_command(app)
    lines = section(command, typer.Context(command, info_name="textgen", **command.context_settings), 2)
    return HEAD + "\n".join(line.rstrip() for line in lines) + "\n"


def layout() -> str:
    """CONTRIBUTING.md with a table of the package's files between its two marks."""
    rows = ["| file | |", "|---|---|"]
    for path in sorted((ROOT / "textgen_cli").rglob("*.py"), key=lambda path: (path.parent, path.name)):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = " ".join(doc.partition("\n\n")[0].split()).replace("|", "\\|")
        rows.append(f"| `{path.relative_to(ROOT / 'textgen_cli').as_posix()}` | {first} |")
    before, begin, rest = CONTRIBUTING.read_text(encoding="utf-8").partition("<!-- layout -->\n")
    _, end, after = rest.partition("<!-- /layout -->")
    if not (begin and end):
        raise SystemExit("docs/generate.py: CONTRIBUTING.md has lost the marks of its layout table")
    return "".join((before, begin, "\n", "\n".join(rows), "\n\n", end, after))


def generated() -> dict[Path, str]:
    """Every generated file with the text it should have."""
    files = {ROOT / "completions" / name: completion(shell) for shell, name in COMPLETIONS.items()}
    return files | {ROOT / "docs" / "cli.md": reference(), CONTRIBUTING: layout()}


def main(args: list[str]) -> int:
    """Write the files, or with --check name the stale ones on stderr; returns the exit code."""
    if args not in ([], ["--check"]):
        print("usage: python docs/generate.py [--check]", file=sys.stderr)
        return 2
    # Help texts are laid out for the width and colours of the terminal: fix both.
    os.environ.update(TERMINAL_WIDTH="100", NO_COLOR="1")
    stale = [
        (path, text)
        for path, text in generated().items()
        if not path.exists() or path.read_bytes() != text.encode()
    ]
    for path, text in stale:
        if args:
            print(f"{path.relative_to(ROOT)} is not current: run `make generate`", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode())
    return 1 if args and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
