"""Options from config dataclasses, and where their values come from."""

import inspect
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from textgen_cli import config
from textgen_cli.cli import settings
from textgen_cli.cli.app import app
from textgen_cli.cli.flags import OPTIONS, download, finetune, generate, score, shared
from textgen_cli.cli.options import COMMANDS, build, key, leaves
from textgen_cli.errors import UsageError

Run = Callable[..., subprocess.CompletedProcess[bytes]]
CONFIGS = [kind for _, kind in inspect.getmembers(config, inspect.isclass) if is_dataclass(kind)]
PANELS = [
    "Prompt", "Length and number", "Choice of words", "Form of the text", "What is asked", "Convention",
    "What is told", "What must not be said", "Why it says that", "Many records", "Data", "What learns", "Training",
    "Result", "Getting", "Knowing before it comes", "Keeping", "Copies in another form", "Model", "Server", "Run",
]  # fmt: skip


def test_every_field_is_an_option_and_every_option_a_field() -> None:
    assert {key(command, name) for command, names in COMMANDS.items() for name in names} == set(OPTIONS)


def test_no_option_is_declared_twice() -> None:
    """The files of flags/ are merged, where a second entry would hide the first."""
    modules = (download, finetune, generate, score, shared)
    parts = [vars(module)[name] for module in modules for name in module.__annotations__]
    declared = [name for part in parts for name in part]
    assert sorted(declared) == sorted(OPTIONS)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_has_no_field_twice_and_is_built_from_its_options(kind: type) -> None:
    names = [leaf.name for leaf in leaves(kind)]
    assert len(names) == len(set(names))
    assert build(kind, {leaf.name: leaf.default for leaf in leaves(kind)}) == kind()


def test_flags_are_unique() -> None:
    for command, names in COMMANDS.items():
        short = [flag for name in names if (flag := OPTIONS[key(command, name)].short)]
        assert len(short) == len(set(short))
        assert all(len(flag) == 2 and flag[0] == "-" for flag in short)
    assert {"-m": "model", "-n": "max_new_tokens", "-v": "verbose"}.items() <= {
        option.short: name for name, option in OPTIONS.items()
    }.items()


def test_the_order_and_the_panels_are_stable(run: Run) -> None:
    assert {command.callback.__name__ for command in app.registered_commands if command.callback} == set(
        COMMANDS
    )
    assert set(COMMANDS) >= {"generate", "download"}
    assert list(dict.fromkeys(option.panel for option in OPTIONS.values())) == PANELS
    for command, names in COMMANDS.items():
        entries = [key(command, name) for name in names]
        assert entries == [name for name in OPTIONS if name in entries]
        text = run(command, "--help").stdout.decode()
        found = [text.index(f"─ {panel} ─") for panel in PANELS if f"─ {panel} ─" in text]
        assert found == sorted(found)
        order = [text.index(f"│ {config.option_name(name)} ") for name in names]
        assert order == sorted(order)


def effective(run: Run, *args: str, command: str = "generate", **env: str) -> dict[str, tuple[object, str]]:
    """Each effective setting with its value and origin, as --dump-config tells them."""
    done = run(*args, **env)
    assert (done.returncode, done.stderr) == (0, b""), done
    text = done.stdout.decode()
    origins = dict(line.split(" = ", 1) for line in text.splitlines() if " = " in line)
    return {
        name: (value, origins[name].rpartition("  # ")[2])
        for name, value in tomllib.loads(text)[command].items()
    }


def test_the_dump_names_value_and_origin_by_precedence(run: Run, tmp_path: Path) -> None:
    user = tmp_path / ".config" / "textgen" / "config.toml"
    user.parent.mkdir(parents=True)
    user.write_text(
        'seed = 7\nmodel = "user"\ntop_k = 1\n[generate]\nmin_p = 0.5\ntop_k = 2\n[download]\nmodel = "d"\n'
    )
    chosen = tmp_path / "chosen.toml"
    chosen.write_text('top_k = 3\ngreedy = true\nstop = ["a b", "c"]\ntemperature = 0.5\ndtype = "float32"\n')
    found = effective(
        run, "--config", str(chosen), "generate", "x", "--dump-config", "-t", "0.25", "--no-greedy",
        TEXTGEN_TEMPERATURE="0.75", TEXTGEN_NO_STDIN="1", TEXTGEN_MODEL="from-env",
        TEXTGEN_SYSTEM='a "b"\x7f\n',
    )  # fmt: skip
    assert found["temperature"] == (0.25, "--temperature")
    assert found["greedy"] == (False, "--greedy")
    assert found["no_stdin"] == (True, "TEXTGEN_NO_STDIN")
    assert found["model"] == ("from-env", "TEXTGEN_MODEL")
    assert found["system"] == ('a "b"\x7f\n', "TEXTGEN_SYSTEM")
    assert found["top_k"] == (3, f"{chosen}: top_k")
    assert found["stop"] == (["a b", "c"], f"{chosen}: stop")
    assert found["dtype"] == ("float32", f"{chosen}: dtype")
    assert found["min_p"] == (0.5, f"{user}: min_p")
    assert found["seed"] == ("7", f"{user}: seed")
    assert found["device"] == ("auto", "default")
    assert "max_new_tokens" not in found
    assert effective(run, "download", "--dump-config", command="download")["model"] == ("d", f"{user}: model")


def test_a_dump_is_a_settings_file(run: Run, tmp_path: Path) -> None:
    first = run("generate", "--dump-config", "-n", "5", "--stop", 'é"\\', "--offline").stdout
    file = tmp_path / "dump.toml"
    file.write_bytes(first)
    again = effective(run, "--config", str(file), "generate", "--dump-config")
    assert {name: value for name, (value, _) in again.items()} == tomllib.loads(first.decode())["generate"]


# The text of a settings file -> what is wrong with it.
WRONG = {
    "tempratur = 1": "[E-CONFIG] {}: tempratur: is not a setting",
    "[generate]\nnope = 1": "[E-CONFIG] {}: generate.nope: is not a setting",
    "[download]\ntop_k = 1": "[E-CONFIG] {}: download.top_k: is not a setting",
    "[model]\nmodel = 1": "[E-CONFIG] {}: model: must be a text",
    "generate = 1": "[E-CONFIG] {}: generate: is not a setting",
    'top_k = "many"': '[E-CONFIG] {}: top_k: must be a whole number, not "many"',
    "top_k = true": "[E-CONFIG] {}: top_k: must be a whole number, not true",
    "temperature = true": "[E-CONFIG] {}: temperature: must be a number, not true",
    'greedy = "yes"': '[E-CONFIG] {}: greedy: must be true or false, not "yes"',
    'stop = "a"': '[E-CONFIG] {}: stop: must be a list of texts, not "a"',
    "model = 2001-01-01": '[E-CONFIG] {}: model: must be a text, not "2001-01-01"',
    "top_k = = 1": "[E-CONFIG] {}: is not TOML: ",
    "top_k = 1\xff": "[E-CONFIG] {}: is not TOML: ",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_settings_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError) as caught:
        settings.read(file, COMMANDS)
    assert str(caught.value).startswith(WRONG[text].format(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tempratur = 1", "[E-CONFIG] {}: tempratur: is not a setting"),
        ("temperature = nan", "[E-RANGE] {}: temperature: must be "),
        ('dtype = "int3"', "[E-USAGE] {}: dtype: 'int3' is not one of"),
    ],
)
def test_a_wrong_setting_is_named_with_its_file(text: str, message: str, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text(text)
    done = run("--config", str(file), "generate", "x")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith("textgen: error: " + message.format(file))


def test_help_is_there_with_a_broken_user_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / ".config" / "textgen" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text("nope = 1")
    assert run("generate", "x").returncode == 2
    assert run("generate", "--help").returncode == 0
    assert run("--version").returncode == 0


def test_a_settings_file_that_is_not_there(run: Run, tmp_path: Path) -> None:
    done = run("--config", "/no/such/file", "generate", "x")
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        2, b"textgen: error: [E-CONFIG] /no/such/file: no such file or directory",
    )  # fmt: skip
    assert run("--config", str(tmp_path), "generate", "x").returncode == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TEXTGEN_TOP_K", "many", "[E-USAGE] TEXTGEN_TOP_K: input should be a valid integer"),
        ("TEXTGEN_TOP_K", "-1", "[E-RANGE] TEXTGEN_TOP_K: must be >= 0"),
        ("TEXTGEN_GREEDY", "maybe", "[E-USAGE] TEXTGEN_GREEDY: "),
        ("TEXTGEN_DEVICE", "abacus", "[E-DEVICE] TEXTGEN_DEVICE: "),
    ],
)
def test_a_wrong_variable(name: str, value: str, message: str, run: Run) -> None:
    done = run("generate", "x", **{name: value})
    assert done.returncode == 2
    assert done.stderr.decode().startswith(f"textgen: error: {message}")


def test_nothing_is_read_from_the_current_folder(program: list[str], tmp_path: Path) -> None:
    for name in ("config.toml", "textgen.toml", "textgen/config.toml", "~/.config/textgen/config.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("nope = 1")
    done = subprocess.run(
        [*program, "download", "--dump-config"],
        cwd=tmp_path,
        env={"HOME": "~"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_type_of_a_setting() -> None:
    assert settings.plain_type(int | None) is int
    assert settings.plain_type(config.Dtype) is str


def test_a_key_of_a_settings_file_is_the_options_name(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('from = "German"\n[generate]\nto = "French"\n')
    command = [
        sys.executable,
        "-m",
        "textgen_cli",
        "--config",
        str(tmp_path / "x.toml"),
        "generate",
        "--dump-config",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    assert 'from = "German"' in done.stdout and 'to = "French"' in done.stdout
