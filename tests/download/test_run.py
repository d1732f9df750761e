"""`download`: a model of the Hub becomes a folder that transformers loads; what is unsafe does not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from parts import files
from parts.hub import Hub

from textgen_cli.config import DownloadConfig, ModelConfig
from textgen_cli.download.run import run
from textgen_cli.errors import ModelError, SafetyError, TextgenError
from textgen_cli.events import Event, Notice, silent


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def cache(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return server.use(monkeypatch, tmp_path / "hf")


def config(model: str) -> DownloadConfig:
    return DownloadConfig(ModelConfig(model))


def test_the_folder_is_one_that_transformers_loads(
    server: Hub, cache: Path, small_model: Callable[..., Path]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    origin = small_model("llama")
    server.add("org/small", origin)
    folder = run(config("org/small"), silent).folder
    assert folder != origin
    prompt = AutoTokenizer.from_pretrained(folder, local_files_only=True)(
        "Once upon a time", return_tensors="pt"
    )
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path, local_files_only=True)(**prompt).logits
        for path in (folder, origin)
    )
    assert torch.equal(ours, theirs)


def test_it_needs_no_torch_and_a_second_run_no_network(server: Hub, tmp_path: Path) -> None:
    server.add("org/small", files.folder(tmp_path / "model"))
    script = """
import sys
from textgen_cli.config import DownloadConfig, ModelConfig
from textgen_cli.download.run import run

print(run(DownloadConfig(ModelConfig("org/small", offline=sys.argv[1] == "offline")), lambda event: None).folder)
heavy = {"torch", "transformers", "numpy", "safetensors", "tokenizers", "gguf"}
assert not heavy & {name.partition(".")[0] for name in sys.modules}, sys.modules
"""
    environment = {**os.environ, **server.settings(tmp_path / "hf")}
    outputs = []
    for mode in ("online", "offline"):
        done = subprocess.run(
            [sys.executable, "-c", script, mode],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        outputs.append(done.stdout)
        seen, server.log = server.log, []
    assert outputs[0] == outputs[1]
    assert seen == []


def test_a_known_type_with_code_loads_natively_and_the_code_is_not_even_fetched(
    server: Hub, cache: Path, tmp_path: Path
) -> None:
    evil = files.folder(
        tmp_path / "model",
        config={"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}},
        files={"modeling_evil.py": b"boom"},
    )
    server.add("org/evil", evil)
    events: list[Event] = []
    folder = run(config("org/evil"), events.append).folder
    assert not (folder / "modeling_evil.py").exists()
    assert [event.name for event in events if isinstance(event, Notice)] == ["W-REMOTE-CODE-IGNORED"]


PICKLE = b"cposix\nsystem\n(S'touch %s'\ntR."


@pytest.mark.parametrize(
    ("changes", "content", "error"),
    [
        (
            {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.Evil"}},
            {},
            (SafetyError, "E-REMOTE-CODE"),
        ),
        (
            {"model_type": "evil", "auto_map": {"AutoConfig": "other/repo--modeling.X"}},
            {},
            (SafetyError, "E-REMOTE-CODE"),
        ),
        ({"model_type": "evil"}, {}, (ModelError, "E-ARCH")),
        ({"attn_implementation": "evil/kernel"}, {}, (SafetyError, "E-REMOTE-CODE")),
        ({}, {"model.safetensors": None, "pytorch_model.bin": PICKLE}, (SafetyError, "E-PICKLE")),
        ({}, {"model.safetensors": PICKLE}, (ModelError, "E-SAFETENSORS")),
        ({}, {"model.safetensors": b"\x80\x04\x95" + PICKLE}, (SafetyError, "E-PICKLE")),
        ({}, {"tokenizer_config.json": b'{"vocab_file": "/etc/passwd"}'}, (SafetyError, "E-PATH")),
        ({}, {"config.json": b"{"}, (ModelError, "E-CONFIG")),
    ],
)
def test_an_unsafe_model_runs_nothing_and_asks_nobody(
    server: Hub,
    tmp_path: Path,
    changes: dict[str, object],
    content: dict[str, bytes | None],
    error: tuple[type[TextgenError], str],
) -> None:
    """The canary is a file that any of the model's code would make; the audit hook sees other ways."""
    canary = tmp_path / "canary"
    touch = f"open({str(canary)!r}, 'w')".encode()
    content = {
        name: value % str(canary).encode() if value and PICKLE in value else value
        for name, value in content.items()
    }
    code = {"configuration_evil.py": touch, "modeling_evil.py": touch, "custom_generate/generate.py": touch}
    server.add("org/evil", files.folder(tmp_path / "model", config=changes, files={**code, **content}))
    script = """
import json, sys
from textgen_cli.config import DownloadConfig, ModelConfig
from textgen_cli.download.run import run
from textgen_cli.errors import TextgenError
seen = []
def watch(event, args):
    if event in ("os.system", "subprocess.Popen", "os.exec", "pickle.find_class", "socket.connect"):
        seen.append([event, repr(args[1:])])
sys.addaudithook(watch)
try:
    run(DownloadConfig(ModelConfig("org/evil")), lambda event: None)
except TextgenError as error:
    print(json.dumps([type(error).__name__, error.name, seen, sys.stdin.read()]))
"""
    environment = {**os.environ, **server.settings(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        input="y\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    kind, name, seen, stdin = json.loads(done.stdout)
    assert (kind, name, stdin, done.stderr) == (error[0].__name__, error[1], "y\n", "")
    assert all(
        event == "socket.connect" and str(server.server.server_address[1]) in address
        for event, address in seen
    )
    assert not any("other/repo" in request.path for request in server.log)
    assert not canary.exists()
    assert not list((tmp_path / "hf").rglob("*.py")) and not list((tmp_path / "hf").rglob("*.bin"))


def test_a_local_folder_is_checked_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files.folder(tmp_path / "model")
    assert run(config("./model"), silent).folder == tmp_path / "model"
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        run(config("./model"), silent)
