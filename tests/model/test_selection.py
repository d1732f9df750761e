"""Which files of a repository are fetched: rows T19 and T48 of what a repository may hold."""

import pytest

from textgen_cli.errors import ModelError, SafetyError
from textgen_cli.model.selection import Wanted, choose, loadable, runs_code
from textgen_cli.model.snapshot import File, is_inside

NAMES = [
    "config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE", "pytorch_model.bin", "tf_model.h5",
    "onnx/model.onnx", "onnx/config.json", "modeling_x.py", "model.gguf", "custom_generate/x.txt", ".gitattributes",
]  # fmt: skip


def files(*names: str) -> list[File]:
    return [File(name, len(name), "0" * 40) for name in names]


def chosen(wanted: Wanted, *names: str) -> tuple[set[str], list[str]]:
    found, refused = choose("org/name", files(*(names or NAMES)), wanted)
    return {file.name for file in found}, refused


NEEDED = {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Wanted(), NEEDED),
        (Wanted(exclude=("tok*",)), NEEDED - {"tokenizer.json"}),
        (Wanted(include=("*.md", "LICENSE")), {"README.md", "LICENSE"}),
        (Wanted(include=("onnx/",)), {"onnx/model.onnx", "onnx/config.json"}),
        (Wanted(include=("*.json",), exclude=("onnx/*",)), {"config.json", "tokenizer.json"}),
        (Wanted(include=("*.gguf",)), {"model.gguf"}),
        (
            Wanted(all_files=True, exclude=("*.gguf", "onnx/*")),
            NEEDED | {"README.md", "LICENSE", ".gitattributes"},
        ),
    ],
)
def test_what_is_chosen(wanted: Wanted, expected: set[str]) -> None:
    assert chosen(wanted)[0] == expected


def test_what_runs_code_is_left_out_and_named_and_alone_it_is_refused() -> None:
    found, refused = chosen(Wanted(all_files=True))
    assert refused == ["custom_generate/x.txt", "modeling_x.py", "pytorch_model.bin", "tf_model.h5"]
    assert not any(map(runs_code, found))
    for pattern, name in (("*.bin", "E-PICKLE"), ("*.h5", "E-PICKLE"), ("*.py", "E-REMOTE-CODE")):
        with pytest.raises(SafetyError) as caught:
            chosen(Wanted(include=(pattern,)))
        assert caught.value.name == name
    with pytest.raises(ModelError, match="E-NO-FILE"):
        chosen(Wanted(include=("*.nothing",)))


@pytest.mark.parametrize(
    "name", ["A.PY", "x.PKL", "a/b/c.Pt", "w.joblib", "lib.so", "x.tar.gz", "run.sh", "a.ipynb"]
)
def test_programs_and_pickles_by_any_spelling(name: str) -> None:
    assert runs_code(name)


UNSAFE = [
    "../x", "a/../../b", "/etc/passwd", "a//b", "./a", "a/.", "", "a\\b", "C:x", "CON", "a/nul.txt", "x" * 300, "a\nb",
    "\x1b[2J", "a\0b", "con.json", "trailing.", "space ", "a?b", "/".join("abcdefghijklmnopqrst"),
]  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE)
def test_a_name_that_leaves_the_folder_is_refused(name: str) -> None:
    assert not is_inside(name)
    with pytest.raises(SafetyError, match="E-PATH"):
        chosen(Wanted(all_files=True), "config.json", name)


@pytest.mark.parametrize(
    "name", ["config.json", ".gitattributes", "a/b-c_d.e", "模型.txt", "1", "console.json"]
)
def test_a_name_that_is_one(name: str) -> None:
    assert is_inside(name)


@pytest.mark.parametrize(
    "pair", [("Config.json", "config.json"), ("é.txt", "é.txt"), ("a", "A/b"), ("x/B", "X/b")]
)
def test_two_names_that_are_one_on_some_disks(pair: tuple[str, str]) -> None:
    with pytest.raises(ModelError, match="E-NAMES"):
        chosen(Wanted(all_files=True), *pair)
    assert chosen(Wanted(all_files=True), "x/a", "x/b", "y/a")[0] == {"x/a", "x/b", "y/a"}


def test_a_hundred_thousand_files_beside_the_model_change_nothing() -> None:
    """T48."""
    many = files(*NEEDED, *(f"junk-{number}.md" for number in range(100_000)))
    assert {file.name for file in loadable("org/name", many)} == NEEDED
