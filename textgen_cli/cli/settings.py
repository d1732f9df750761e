"""Settings from files, and where each setting came from.

It owns config.toml: `key = value` at the top for every command that has the option, `[generate]` and the
like for one command. It does not know what a setting means; the config dataclasses check that.
"""

import json
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import platformdirs
import typer

from textgen_cli.config import BUILT_IN, option_name
from textgen_cli.errors import UsageError

Fields = dict[str, Any]  # the name of a setting -> its type


@dataclass
class Settings:
    """What the files say: values by command and setting, and the file each value stands in."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[tuple[str, str], Path] = field(default_factory=dict)


def user_file() -> Path | None:
    """The user's config.toml, or None where there is no home to hold one."""
    path = platformdirs.user_config_path("textgen") / "config.toml"
    # Without a home the path is relative, and nothing is read from the current directory.
    return path if path.is_absolute() else None


def read(chosen: Path | None, commands: dict[str, Fields]) -> Settings:
    """The user's file, if there is one, under the file that was chosen on the command line.

    Raises:
        UsageError: a file cannot be read, or holds an unknown key or a value of the wrong type.
    """
    settings = Settings()
    default = user_file()
    if default is not None:
        _add(settings, default, _load(default, required=False), commands)
    if chosen is not None:
        _add(settings, chosen, _load(chosen, required=True), commands)
    return settings


def _load(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        # A home that is not ours to read holds no settings of ours.
        if not required:
            return {}
        raise UsageError("E-CONFIG", str(path), (error.strerror or "cannot be read").lower()) from error
    except OSError as error:
        raise UsageError("E-CONFIG", str(path), (error.strerror or "cannot be read").lower()) from error
    except ValueError as error:  # tomllib.TOMLDecodeError, UnicodeDecodeError
        raise UsageError("E-CONFIG", str(path), f"is not TOML: {error}") from error


def _add(settings: Settings, path: Path, table: dict[str, Any], commands: dict[str, Fields]) -> None:
    """Put a file's keys over what is there; a command's own table wins over the keys at the top."""
    known = {name for names in commands.values() for name in names}
    table = {_field(key, known): value for key, value in table.items()}
    for key, value in table.items():
        if key not in known and not (key in commands and isinstance(value, dict)):
            raise UsageError(
                "E-CONFIG", f"{path}: {key}", "is not a setting", hint=_guess(known | set(commands))
            )
    for command, names in commands.items():
        own = {_field(key, known): value for key, value in table.get(command, {}).items()}
        for key in own:
            if key not in names:
                raise UsageError(
                    "E-CONFIG", f"{path}: {command}.{key}", "is not a setting", hint=_guess(names)
                )
        shared = {key: value for key, value in table.items() if key in names}
        for key, value in (shared | own).items():
            _check_type(f"{path}: {key}", value, names[key])
            settings.values.setdefault(command, {})[key] = value
            settings.files[command, key] = path


def _field(key: str, known: set[str]) -> str:
    """The setting a key means: `from` is a word of Python, so its field is `from_`."""
    return f"{key}_" if f"{key}_" in known else key


def _guess(names: typing.Iterable[str]) -> str:
    return "known are " + ", ".join(sorted(name.rstrip("_") for name in names))


def _check_type(subject: str, value: Any, annotation: Any) -> None:
    """A value must have its setting's type: a wish like `"yes"` for a flag is not guessed at."""
    kind = plain_type(annotation)
    if is_list(annotation):
        fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
        wanted = "a list of texts"
    elif kind is bool:
        fits, wanted = isinstance(value, bool), "true or false"
    elif kind is int:
        fits, wanted = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif kind is float:
        fits, wanted = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    elif typing.get_origin(kind) is tuple:
        fits, wanted = (
            isinstance(value, list) and all(isinstance(one, str) for one in value),
            "a list of texts",
        )
    else:  # text; the seed may stand there as a number
        fits, wanted = isinstance(value, str | int) and not isinstance(value, bool), "a text"
    if not fits:
        raise UsageError("E-CONFIG", subject, f"must be {wanted}, not {json.dumps(value, default=str)}")


def is_list(annotation: Any) -> bool:
    """Whether the option may be repeated."""
    return typing.get_origin(annotation) is tuple


def plain_type(annotation: Any) -> Any:
    """The type without `| None`; a Literal is the type of its values."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    if typing.get_origin(annotation) is Literal:
        return type(typing.get_args(annotation)[0])
    return annotation


def origin(context: typer.Context, name: str) -> str:
    """Where a setting's value came from: an option, a variable, a file and key, or `default`."""
    source = context.get_parameter_source(name)
    match source.name if source is not None else "DEFAULT":
        case "COMMANDLINE":
            return option_name(name)
        case "ENVIRONMENT":
            return variable(name)
        case "DEFAULT_MAP":
            files = context.find_root().obj.files
            return f"{files[context.info_name, name]}: {name}"
    return "default"


def is_bytes(context: typer.Context, name: str) -> bool:
    """Whether a setting came as bytes of the locale's encoding: from the command line or the environment."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def variable(name: str) -> str:
    """`max_new_tokens` -> `TEXTGEN_MAX_NEW_TOKENS`."""
    return "TEXTGEN_" + name.rstrip("_").upper()


def dump(context: typer.Context, values: dict[str, Any]) -> str:
    """The effective settings of a command as TOML that `--config` reads, each with its origin."""
    lines = [f"[{context.info_name}]"]
    for name, value in values.items():
        if value not in (None, ()):
            lines.append(f"{name.rstrip('_')} = {_toml(value)}  # {_comment(origin(context, name))}")
        elif name in BUILT_IN:
            lines.append(f"# {name}: what the model's generation config says, else {_toml(BUILT_IN[name])}")
        else:
            lines.append(f"# {name.rstrip('_')}: not set")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    # JSON's text escapes are TOML's, but for DEL, which TOML wants escaped too.
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")


def _comment(text: str) -> str:
    return text.replace("\n", "\\n")
