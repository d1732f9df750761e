"""What a model folder must be before a library opens it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts.files import CONFIG, TOKENIZER, folder, safetensors, tensors
from safetensors import SafetensorError, safe_open

from textgen_cli.errors import ModelError, SafetyError, TextgenError
from textgen_cli.model.check import LOADABLE, check_folder, knows_type
from textgen_cli.model.weights import ITEM_BYTES, read_header


def refusal(path: Path) -> str:
    """The class and name of the error for a folder."""
    with pytest.raises(TextgenError) as caught:
        check_folder(path)
    return f"{type(caught.value).__name__} {caught.value.name}"


def test_a_whole_folder_passes(tmp_path: Path) -> None:
    checked = check_folder(folder(tmp_path))
    assert checked.folder == tmp_path
    assert checked.config == CONFIG
    assert checked.weights == (tmp_path / "model.safetensors",)
    assert (checked.has_tokenizer, checked.notices) == (True, ())


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5", "bert"])
def test_what_transformers_saves_passes(small_model: Callable[..., Path], architecture: str) -> None:
    checked = check_folder(small_model(architecture))
    assert checked.has_tokenizer and not checked.notices


def test_no_tokenizer_is_said_and_not_refused(tmp_path: Path) -> None:
    assert not check_folder(folder(tmp_path, files={"tokenizer.json": None})).has_tokenizer


def test_it_loads_nothing_heavy_and_takes_no_time(tmp_path: Path) -> None:
    folder(tmp_path)
    script = """
import sys, time
from pathlib import Path
from textgen_cli.model.check import check_folder
start = time.perf_counter()
check_folder(Path(sys.argv[1]))
print(time.perf_counter() - start)
heavy = {"torch", "transformers", "huggingface_hub", "numpy", "safetensors", "tokenizers"}
sys.exit(bool(heavy & {name.partition(".")[0] for name in sys.modules}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=60, check=True
    )
    assert float(done.stdout) < 0.3  # ten times what it takes, since tests share the machine


# --- code


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.EvilConfig"}},
        {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "other/repo--modeling.X"}},
        {"model_type": None, "auto_map": {"AutoConfig": "configuration_evil.EvilConfig"}},
        {"model_type": ["llama"], "auto_map": {"AutoConfig": "configuration_evil.EvilConfig"}},
        {"model_type": 'llama", "LlamaConfig', "auto_map": {"AutoConfig": "x.Y"}},
        {"_attn_implementation_internal": "evil/kernel"},
        {"_experts_implementation_internal": "evil/kernel"},
        {"attn_implementation": "evil/kernel"},
        {"attn_implementation": {"": "sdpa", "text_config": "evil/kernel:fn"}},
        {"attn_implementation": ["evil/kernel"]},
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"experts_implementation": "evil/kernel"},
        {"text_config": {"attn_implementation": "paged|evil/kernel"}},
        {"text_config": {"trust_remote_code": True}},
        {"list": [{"deep": {"trust_remote_code": 1}}]},
        {"trust_remote_code": "yes"},
        {"custom_generate": "evil/generate"},
    ],
    ids=lambda config: next(iter(config)),
)
def test_a_config_that_would_run_code_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    assert refusal(folder(tmp_path, config=config)) == "SafetyError E-REMOTE-CODE"


@pytest.mark.parametrize("value", [None, "eager", "sdpa", "flash_attention_2", {"": "sdpa"}])
def test_the_library_own_attention_is_allowed(tmp_path: Path, value: Any) -> None:
    check_folder(folder(tmp_path, config={"attn_implementation": value, "trust_remote_code": False}))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "settings", [{"trust_remote_code": True}, {"custom_generate": "evil/x"}, {"a": {"trust_remote_code": 1}}]
)
def test_code_in_other_settings_is_refused(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    assert (
        refusal(folder(tmp_path, files={name: json.dumps(settings).encode()})) == "SafetyError E-REMOTE-CODE"
    )


def test_code_beside_a_known_type_is_ignored_with_a_warning(tmp_path: Path) -> None:
    files = {
        "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": []}, "tokenizer_class": "BertTokenizer"}',
        "custom_generate/generate.py": b"raise SystemExit",
    }
    checked = check_folder(
        folder(tmp_path, config={"auto_map": {"AutoModelForCausalLM": "m.Evil"}}, files=files)
    )
    assert [notice.name for notice in checked.notices] == ["W-REMOTE-CODE-IGNORED"] * 3


@pytest.mark.parametrize(
    "settings",
    [{}, {"tokenizer_class": "EvilTokenizer"}, {"tokenizer_class": 'Llama", "x'}, {"tokenizer_class": 1}],
)
def test_a_tokenizer_that_needs_code_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    content = json.dumps({"auto_map": {"AutoTokenizer": ["t.Evil", None]}, **settings}).encode()
    assert refusal(folder(tmp_path, files={"tokenizer_config.json": content})) == "SafetyError E-REMOTE-CODE"


def test_no_code_of_a_malicious_folder_runs_and_nothing_is_asked(tmp_path: Path) -> None:
    """Each file that could run touches a canary; an audit hook watches for what code would do."""
    canary = tmp_path / "canary"
    touch = f"open({str(canary)!r}, 'w')".encode()
    evil = folder(
        tmp_path / "model",
        config={
            "auto_map": {
                "AutoConfig": "configuration_evil.Evil",
                "AutoModelForCausalLM": "modeling_evil.Evil",
            }
        },
        files={
            "configuration_evil.py": touch,
            "modeling_evil.py": touch,
            "custom_generate/generate.py": touch,
            "pytorch_model.bin": b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.",
            "__init__.py": touch,
        },
    )
    script = """
import sys
from pathlib import Path
from textgen_cli.model.check import check_folder, knows_type
inside = False
def watch(event, args):
    banned = ("exec", "compile", "import", "socket.", "subprocess.", "os.system", "pickle.")
    if inside and event.startswith(banned):
        print(event, args, file=sys.stderr)
sys.addaudithook(watch)
knows_type("llama")
inside = True
checked = check_folder(Path(sys.argv[1]))
inside = False
assert sys.stdin.read() == "y\\n", "standard input was read"
"""
    done = subprocess.run(
        [sys.executable, "-c", script, evil],
        input="y\n",
        capture_output=True,
        text=True,
        timeout=60,
        cwd=evil.parent,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not canary.exists()


# --- paths


def test_links_stay_inside_or_lead_into_the_blobs_of_the_cache(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(tensors({"x": (1,)}))
    local = folder(tmp_path / "local")
    (local / "model.safetensors").rename(local / "real.bin.safetensors")
    (local / "model.safetensors").symlink_to("real.bin.safetensors")
    check_folder(local)
    (local / "model.safetensors").unlink()
    (local / "model.safetensors").symlink_to(secret)
    assert refusal(local) == "SafetyError E-PATH"

    home = tmp_path / "hub" / "models--org--name"
    cached = folder(home / "snapshots" / ("a" * 40))
    (home / "blobs").mkdir()
    (cached / "config.json").rename(home / "blobs" / ("b" * 40))
    (cached / "config.json").symlink_to(Path("../../blobs") / ("b" * 40))
    check_folder(cached)
    (cached / "config.json").unlink()
    (cached / "config.json").symlink_to("../../../../secret")
    assert refusal(cached) == "SafetyError E-PATH"


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "vocab.txt", "merges.txt"],
)
def test_only_regular_files_are_opened(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path, files={name: None})
    os.mkfifo(path / name)
    start = time.monotonic()
    assert refusal(path) == "SafetyError E-PATH"
    assert time.monotonic() - start < 1
    (path / name).unlink()
    (path / name).symlink_to("/dev/zero")
    assert refusal(path) == "SafetyError E-PATH"
    (path / name).unlink()
    (path / name).mkdir()
    assert refusal(path) == "SafetyError E-PATH"
    (path / name).rmdir()
    (path / name).symlink_to(name)
    assert refusal(path) == "ModelError E-MODEL"


@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "spm_file", "source_spm", "tokenizer_file"])
@pytest.mark.parametrize("value", ["/etc/passwd", "../x", "a/../../b", "~/x", "C:\\x", "..\\x"])
def test_settings_that_name_paths_outside_are_refused(tmp_path: Path, key: str, value: str) -> None:
    files = {"tokenizer_config.json": json.dumps({key: value}).encode(), "tokenizer.json": None}
    assert refusal(folder(tmp_path, files=files)) == "SafetyError E-PATH"


def test_paths_that_old_files_carry_and_nobody_opens_pass(tmp_path: Path) -> None:
    old = {
        "tokenizer_file": "/home/x/.cache/x.json",
        "special_tokens_map_file": "/home/x/y",
        "name_or_path": "/data",
        "vocab_file": None,
    }
    check_folder(folder(tmp_path, files={"tokenizer_config.json": json.dumps(old).encode()}))


def index(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"t{number}": shard for number, shard in enumerate(shards)}}).encode()


def shard(*names: str) -> bytes:
    return tensors(dict.fromkeys(names, (2,)))


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_shards_pass_when_they_hold_what_the_index_says(tmp_path: Path) -> None:
    files = {
        "model.safetensors": None,
        "model.safetensors.index.json": index(ONE, TWO),
        ONE: shard("t0"),
        TWO: shard("t1"),
    }
    assert check_folder(folder(tmp_path, files=files)).weights == (tmp_path / ONE, tmp_path / TWO)


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"model.safetensors.index.json": index("../../other/secret.safetensors")}, "SafetyError E-PATH"),
        ({"model.safetensors.index.json": index("/dev/zero")}, "SafetyError E-PATH"),
        ({"model.safetensors.index.json": index("a\\b.safetensors")}, "SafetyError E-PATH"),
        ({"model.safetensors.index.json": index("pytorch_model.bin")}, "SafetyError E-PATH"),
        ({"model.safetensors.index.json": index("x.safetensors\n")}, "SafetyError E-PATH"),
        (
            {"model.safetensors.index.json": index(*(f"{n}.safetensors" for n in range(5000)))},
            "ModelError E-SHARD",
        ),
        ({"model.safetensors.index.json": index(ONE, TWO), ONE: shard("t0")}, "ModelError E-SHARD"),
        (
            {"model.safetensors.index.json": index(ONE, TWO), ONE: shard("t0"), TWO: shard("t0", "t1")},
            "ModelError E-SHARD",
        ),
        (
            {"model.safetensors.index.json": index(ONE, TWO), ONE: shard("t0"), TWO: shard("t2")},
            "ModelError E-SHARD",
        ),
        ({"model.safetensors.index.json": index(ONE), ONE: shard("t0")[:-1]}, "ModelError E-TRUNCATED"),
        ({"model.safetensors.index.json": b'{"weight_map": {"t0": 1}}'}, "ModelError E-SHARD"),
        ({"model.safetensors.index.json": b'{"weight_map": {}}'}, "ModelError E-SHARD"),
        ({"model.safetensors.index.json": b'{"weight_map": []}'}, "ModelError E-SHARD"),
        ({"model.safetensors.index.json": b"{}"}, "ModelError E-SHARD"),
        ({"model.safetensors.index.json": b"not JSON"}, "ModelError E-SHARD"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, files: dict[str, bytes | None], name: str) -> None:
    assert refusal(folder(tmp_path, files={"model.safetensors": None, **files})) == name


# --- settings


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (None, "E-CONFIG"),
        (b"", "E-CONFIG"),
        (b"{", "E-CONFIG"),
        (b"[]", "E-CONFIG"),
        (b"null", "E-CONFIG"),
        (b"\xff{}", "E-CONFIG"),
        (b"\xef\xbb\xbf{}", "E-CONFIG"),
        (b"[" * 200_000, "E-CONFIG"),
        (b'{"a":' * 200_000, "E-CONFIG"),
        (b"{}", "E-ARCH"),
        (b'{"model_type": "foo"}', "E-ARCH"),
        (b'{"model_type": ""}', "E-ARCH"),
        (b'{"model_type": 1}', "E-ARCH"),
        (b'{"a": ' + b"1" * 5000 + b"}", "E-CONFIG"),
        (b" " * (1 << 26) + b"{}", "E-CONFIG"),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else str(value),
)
def test_a_config_that_is_none(tmp_path: Path, content: bytes | None, name: str) -> None:
    assert refusal(folder(tmp_path, files={"config.json": content})) == f"ModelError {name}"


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 2**40},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": "1"},
        {"num_hidden_layers": 1.5},
        {"num_hidden_layers": True},
        {"num_labels": 10**9},
        {"text_config": {"n_layer": 10**9}},
        {"torch_dtype": "evil"},
        {"dtype": 1},
        {"text_config": {"torch_dtype": "os.system"}},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [1]},
        {"vocab_size": 33},
        {"hidden_size": 16},
    ],
    ids=str,
)
def test_sizes_and_types_that_no_weights_back_up(tmp_path: Path, config: dict[str, Any]) -> None:
    start = time.monotonic()
    assert refusal(folder(tmp_path, config=config)) == "ModelError E-CONFIG"
    assert time.monotonic() - start < 1


def test_a_size_that_differs_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hidden_size 64, weights have 8"):
        check_folder(folder(tmp_path, config={"hidden_size": 64}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "torch.float16", "auto", None])
def test_known_types_of_numbers_pass(tmp_path: Path, dtype: str | None) -> None:
    check_folder(folder(tmp_path, config={"torch_dtype": dtype, "dtype": dtype}))


@pytest.mark.parametrize("method", ["gptq", "awq", "evil", "", None, ["torchao"], "mxfp4", "fp8"])
def test_a_quantization_outside_the_list_is_refused(tmp_path: Path, method: Any) -> None:
    assert (
        refusal(folder(tmp_path, config={"quantization_config": {"quant_method": method}}))
        == "ModelError E-QUANTIZATION"
    )


def test_a_quantization_deep_in_the_config_is_refused_too(tmp_path: Path) -> None:
    config = {"text_config": {"quantization_config": {"quant_method": "evil"}}}
    assert refusal(folder(tmp_path, config=config)) == "ModelError E-QUANTIZATION"


def test_every_model_type_of_transformers_is_known() -> None:
    from transformers import CONFIG_MAPPING

    assert [kind for kind in CONFIG_MAPPING if not knows_type(kind)] == []
    assert not any(knows_type(kind) for kind in ("evil", "", "LlamaConfig", "llama2", "lla", ".*", "llama\n"))


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"tokenizer.json": b""}, "E-TOKENIZER"),
        ({"tokenizer.json": b"[]"}, "E-TOKENIZER"),
        ({"tokenizer.json": json.dumps(TOKENIZER).encode()[:-20]}, "E-TOKENIZER"),
        ({"tokenizer.json": b"\x80\x04\x95"}, "E-TOKENIZER"),
        ({"tokenizer_config.json": b"nonsense"}, "E-TOKENIZER"),
        ({"tokenizer_config.json": b"[]"}, "E-TOKENIZER"),
        ({"special_tokens_map.json": b"{"}, "E-TOKENIZER"),
        ({"added_tokens.json": b"x"}, "E-TOKENIZER"),
        ({"vocab.json": b"<html>"}, "E-TOKENIZER"),
        ({"generation_config.json": b"x"}, "E-CONFIG"),
        (
            {"tokenizer_config.json": b'{"chat_template": [{"name": "../../x", "template": ""}]}'},
            "E-TEMPLATE",
        ),
        ({"tokenizer_config.json": b'{"chat_template": [{"template": ""}]}'}, "E-TEMPLATE"),
        ({"tokenizer_config.json": b'{"chat_template": ["x"]}'}, "E-TEMPLATE"),
        ({"tokenizer_config.json": b'{"chat_template": {"../x": ""}}'}, "E-TEMPLATE"),
        ({"tokenizer_config.json": b'{"chat_template": 1}'}, "E-TEMPLATE"),
    ],
)
def test_tokenizer_files_that_are_none(tmp_path: Path, files: dict[str, bytes], name: str) -> None:
    assert refusal(folder(tmp_path, files=files)) == f"ModelError {name}"


@pytest.mark.parametrize(
    "template",
    ["{{ x }}", None, [], [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]],
)
def test_templates_with_plain_names_pass(tmp_path: Path, template: Any) -> None:
    check_folder(
        folder(tmp_path, files={"tokenizer_config.json": json.dumps({"chat_template": template}).encode()})
    )


# --- weights


def test_a_folder_without_safetensors(tmp_path: Path) -> None:
    without: dict[str, bytes | None] = {"model.safetensors": None}
    assert refusal(folder(tmp_path / "a", files=without)) == "ModelError E-WEIGHTS"
    assert (
        refusal(folder(tmp_path / "b", files={**without, "pytorch_model.bin": b"\x80"}))
        == "SafetyError E-PICKLE"
    )
    assert (
        refusal(folder(tmp_path / "c", files={**without, "training_args.bin": b"\x80"}))
        == "ModelError E-WEIGHTS"
    )
    assert (
        refusal(folder(tmp_path / "d", files={**without, "adapter_config.json": b"{}"}))
        == "ModelError E-ADAPTER"
    )
    assert refusal(folder(tmp_path / "e", files={**without, "tf_model.h5": b"x"})) == "ModelError E-WEIGHTS"
    assert refusal(tmp_path / "absent") == "ModelError E-MODEL"


def test_a_pickle_beside_the_weights_is_ignored_with_a_warning(tmp_path: Path) -> None:
    files = {"pytorch_model.bin": b"\x80\x04.", "training_args.bin": b"\x80", "optimizer.pt": b"\x80"}
    checked = check_folder(folder(tmp_path, files=files))
    assert [(notice.name, notice.text.partition(":")[0]) for notice in checked.notices] == [
        ("W-PICKLE-IGNORED", "pytorch_model.bin")
    ]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94.", "SafetyError E-PICKLE"),
        (b"PK\x03\x04\x14\0\0\0\0\0" + b"x" * 50, "SafetyError E-PICKLE"),
        (b"version https://git-lfs.github.com/spec/v1\n", "ModelError E-SAFETENSORS"),
        (b"", "ModelError E-TRUNCATED"),
        (b"1234567", "ModelError E-TRUNCATED"),
        (b"\x08" + b"\0" * 7, "ModelError E-TRUNCATED"),
        (safetensors({}), "ModelError E-WEIGHTS"),
    ],
)
def test_content_that_is_no_safetensors(tmp_path: Path, content: bytes, name: str) -> None:
    assert refusal(folder(tmp_path, files={"model.safetensors": content})) == name


def test_a_file_cut_anywhere_is_truncated(tmp_path: Path) -> None:
    whole = tensors({"a": (16, 16), "b": (300,)})
    path = tmp_path / "model.safetensors"
    for part in range(20):
        path.write_bytes(whole[: len(whole) * part // 20])
        with pytest.raises(ModelError) as caught:
            read_header(path)
        assert caught.value.name == "E-TRUNCATED", part
        assert f"{len(whole) * part // 20:,} of" in caught.value.fact or "tensor data" in caught.value.fact


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


LIES: dict[str, bytes] = {
    "length 2^63": safetensors({}, length=1 << 63),
    "length of 200 MB": safetensors({}, length=200_000_000),
    "not JSON": safetensors(b"{nonsense}"),
    "an array": safetensors(b"[]"),
    "not UTF-8": safetensors(b'{"\xff": 1}'),
    "blank first": safetensors(b" {}"),
    "BOM": safetensors(b"\xef\xbb\xbf{}"),
    "deep": safetensors(b'{"a":' * 50_000),
    "overlap": safetensors({"a": entry(), "b": entry(offsets=(2, 6))}, b"\0" * 6),
    "same place": safetensors({"a": entry(), "b": entry()}, b"\0" * 4),
    "hole": safetensors({"a": entry(), "b": entry(offsets=(8, 12))}, b"\0" * 12),
    "hole first": safetensors({"a": entry(offsets=(4, 8))}, b"\0" * 8),
    "trailing": safetensors({"a": entry()}, b"\0" * 5),
    "shape overflow": safetensors({"a": entry(shape=(1 << 32, 1 << 32, 4))}, b"\0" * 4),
    "shape times zero": safetensors({"a": entry(shape=(1 << 63, 0), offsets=(0, 0))}),
    "shape of other size": safetensors({"a": entry(shape=(2,))}, b"\0" * 4),
    "negative shape": safetensors({"a": entry(shape=(-1,))}, b"\0" * 4),
    "minus zero": safetensors(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
    "negative offset": safetensors({"a": entry(offsets=(-4, 0))}, b"\0" * 4),
    "backwards": safetensors({"a": entry(offsets=(4, 0))}, b"\0" * 4),
    "float shape": safetensors({"a": entry(shape=(1.0,))}, b"\0" * 4),
    "true shape": safetensors({"a": entry(shape=(True,))}, b"\0" * 4),
    "exponent": safetensors(b'{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', b"\0" * 4),
    "NaN": safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"\0" * 4),
    "unknown dtype": safetensors({"a": entry("F33")}, b"\0" * 4),
    "dtype is a list": safetensors({"a": entry(["F32"])}, b"\0" * 4),
    "duplicate name": safetensors(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"\0" * 4,
    ),
    "duplicate key": safetensors(
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4
    ),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}}),
    "metadata a list": safetensors({"__metadata__": []}),
    "three offsets": safetensors({"a": entry(offsets=(0, 2, 4))}, b"\0" * 4),
    "no shape": safetensors({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"\0" * 4),
    "half a surrogate": safetensors(
        b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4
    ),
    "huge number": safetensors(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', b"\0" * 4
    ),
    "an entry is a number": safetensors({"a": 1}),
    "control character": safetensors(
        b'{"a\x01":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4
    ),
}


def accepted_by_the_library(path: Path) -> bool:
    try:
        with safe_open(path, framework="np") as file:
            list(file.keys())
    except (SafetensorError, OSError):
        return False
    return True


def accepted_by_us(path: Path) -> bool:
    try:
        read_header(path)
    except (ModelError, SafetyError):
        return False
    return True


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(LIES[lie])
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert caught.value.name in ("E-SAFETENSORS", "E-TRUNCATED")
    assert time.monotonic() - start < 1


NAMES = st.text(max_size=4) | st.sampled_from(["a", "b", "__metadata__"])
NUMBERS = st.integers(-1, 9) | st.sampled_from(
    [1 << 31, 1 << 53, 1 << 63, (1 << 64) - 1, 1 << 64, 4.0, True, None, "4"]
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*ITEM_BYTES, "F4", "C64", "F8_E8M0", "f32", "", None]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
    },
    optional={"extra": st.none()},
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(NAMES, ENTRIES | st.dictionaries(NAMES, NAMES), max_size=3),
    data=st.integers(0, 12),
    pad=st.integers(0, 3),
)
def test_never_accepts_a_header_that_the_library_refuses(
    tmp_path: Path, header: Any, data: int, pad: int
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(json.dumps(header).encode("utf-8") + b" " * pad, b"\0" * data))
    assert accepted_by_the_library(path) or not accepted_by_us(path)


WHOLE = safetensors(
    {"__metadata__": {"format": "pt"}, "a": entry("I8", (3,), (0, 3)), "é": entry("F16", (2, 1), (3, 7))},
    b"\0" * 7,
)


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(max_size=2)), min_size=0, max_size=3))
def test_never_accepts_a_damaged_file_that_the_library_refuses(
    tmp_path: Path, edits: list[tuple[int, bytes]]
) -> None:
    content = WHOLE
    for at, new in edits:
        content = content[:at] + new + content[at + 1 :]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert accepted_by_the_library(path) or not accepted_by_us(path)
    if not edits:
        assert accepted_by_us(path)


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=4,
    )
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reads_what_the_library_reads(tmp_path: Path, wanted: dict[str, tuple[str, list[int]]]) -> None:
    header, at = {}, 0
    for name, (dtype, shape) in wanted.items():
        size = ITEM_BYTES[dtype]
        for side in shape:
            size *= side
        header[name] = entry(dtype, shape, (at, at + size))
        at += size
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(header, b"\0" * at))
    if not accepted_by_the_library(path):
        return  # names that the library keeps for itself
    found = read_header(path)
    with safe_open(path, framework="np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert shapes == {name: list(tensor.shape) for name, tensor in found.items()}


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        ONE,
        "spiece.model",
        "chat_template.jinja",
        "tokenizer.4.0.json",
    ],
)
def test_what_is_fetched(name: str) -> None:
    assert LOADABLE.fullmatch(name)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "modeling_x.py",
        "README.md",
        "training_args.bin",
        "onnx/model.onnx",
        "../config.json",
        "config.json\n",
        "x/config.json",
        "model.fp16.safetensors",
        "consolidated.safetensors",
        "tf_model.h5",
        ".gitattributes",
        "/config.json",
        "model.pkl",
    ],
)
def test_what_is_not(name: str) -> None:
    assert not LOADABLE.fullmatch(name)
