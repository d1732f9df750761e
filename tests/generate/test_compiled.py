"""Compiled decoding through the installed program: the same text as the eager engine, without transformers."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parts.models import CHAT_TEMPLATE, byte_tokenizer
from parts.program import Done, Program
from transformers.generation import logits_process as library

from textgen_cli.config import DecodingConfig, GenerateConfig, ModelConfig
from textgen_cli.errors import UsageError
from textgen_cli.events import silent
from textgen_cli.generate import compiled
from textgen_cli.generate.request import Request
from textgen_cli.model.compiled import find, open_model
from textgen_cli.model.load import load
from textgen_cli.model.quantize import QuantizedLinear

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"),
]


def program(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "textgen_cli", *args],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose context is longer than the first room of a past."""
    made = tmp_path_factory.mktemp("llama")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=700,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def made(folder: Path, cache: Path) -> Path:
    """What `download --compile` printed and left."""
    done = program("download", str(folder), "--compile", "--dtype", "float32", "--cache-dir", str(cache))
    assert (done.returncode, done.stderr) == (0, "")
    return Path(done.stdout.strip())


Ask = Callable[..., Done]


@pytest.fixture(scope="module")
def ask(
    forked: Program, folder: Path, cache: Path, made: Path, tmp_path_factory: pytest.TempPathFactory
) -> Ask:
    """`textgen generate` on that model, in a child of a process that has imported torch."""
    place = tmp_path_factory.mktemp("run")
    model = ("-m", str(folder), "--dtype", "float32", "--cache-dir", str(cache))
    return lambda *args: forked(place, "generate", *model, *args)


def test_the_folder_is_whole_and_holds_no_scraps(made: Path, folder: Path, cache: Path) -> None:
    names = {path.name for path in made.iterdir()}
    assert names == {
        "prompt.so",
        "step.so",
        "check.so",
        "weights.safetensors",
        "compiled.json",
        "tokenizer.json",
        "textgen.json",
    }
    before = (made / "step.so").stat().st_mtime_ns
    again = program("download", str(folder), "--compile", "--dtype", "float32", "--cache-dir", str(cache))
    assert (again.returncode, again.stdout.strip()) == (0, str(made))
    assert (made / "step.so").stat().st_mtime_ns == before


@pytest.mark.parametrize("length", [1, 2, 16, 17, 250, 256, 300])
def test_greedy_tokens_are_those_of_transformers(made: Path, folder: Path, cache: Path, length: int) -> None:
    """Float32, prompts of one token up to more than the first room, text that crosses its edge."""
    config = ModelConfig(model=str(folder), dtype="float32", cache_dir=cache)
    assert find(config, silent) == made
    net = open_model(made, config).net
    plain = load(config, "generate", silent, hasten=False).net
    ids = torch.randint(5, 390, (1, length), generator=torch.Generator().manual_seed(length)).tolist()[0]
    theirs = plain.generate(
        torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ours = list(ids)
    for _ in range(24):
        [logits] = net.logits(ours)
        with torch.inference_mode():
            true = plain(input_ids=torch.tensor([ours])).logits[0, -1]
        assert torch.allclose(logits, true, atol=2e-5, rtol=0)
        ours.append(int(logits.argmax()))
    assert ours == theirs[0].tolist()


@pytest.mark.parametrize(("start", "count"), [(1, 1), (1, 3), (2, 15), (9, 16), (40, 17), (250, 14)])
def test_guesses_are_checked_together(made: Path, folder: Path, cache: Path, start: int, count: int) -> None:
    """Each row is what transformers say of the same tokens: in one call, in two, over the edge of a room."""
    config = ModelConfig(model=str(folder), dtype="float32", cache_dir=cache)
    net, plain = open_model(made, config).net, load(config, "generate", silent, hasten=False).net
    ids = torch.randint(5, 390, (start + 1 + count,), generator=torch.Generator().manual_seed(start)).tolist()
    with torch.inference_mode():
        true = plain(input_ids=torch.tensor([ids])).logits[0]
    net.logits(ids[:start])
    calls = watched(net, "check")
    found = net.logits(ids[: start + 1], ids[start + 1 :])
    assert torch.allclose(found, true[start:], atol=2e-5, rtol=0)
    assert calls == [min(16, 1 + count - at) for at in range(0, 1 + count, 16) if count > at]
    # Guesses that were wrong leave nothing behind: the text goes on from what was right.
    assert torch.allclose(net.logits(ids[: start + 1])[0], true[start], atol=2e-5, rtol=0)


def watched(net: Any, *names: str) -> list[int]:
    """How many tokens each call of these graphs takes, from now on."""
    calls: list[int] = []
    for name in names:
        net.graphs[name] = _watched(net.graphs[name], calls)
    return calls


def _watched(graph: Any, calls: list[int]) -> Any:
    def call(ids: torch.Tensor, rest: Any) -> torch.Tensor:
        calls.append(ids.shape[1])
        found: torch.Tensor = graph(ids, rest)
        return found

    return call


@pytest.mark.parametrize(
    "decoding",
    [{"greedy": True}, {"temperature": 0.05}, {"temperature": 0.7}, {"greedy": True, "max_new_tokens": 1}],
    ids=str,
)
def test_prompt_lookup_says_the_same_in_fewer_calls(
    made: Path, folder: Path, cache: Path, decoding: dict[str, Any]
) -> None:
    texts, counts = [], []
    for lookup in (None, 1, 12):
        settings = DecodingConfig(**{"max_new_tokens": 90, "prompt_lookup": lookup} | decoding)
        model = open_model(made, ModelConfig(model=str(folder), dtype="float32", cache_dir=cache))
        calls = watched(model.net, "step", "check")
        engine = compiled.engine(GenerateConfig(decoding=settings), model, silent)
        assert engine is not None
        pieces = list(engine.stream([Request(0, 0, "One two three one two three one two", None, 7)]))
        assert len(pieces) > 1 or settings.max_new_tokens == 1  # as it grows
        texts.append("".join(piece.text for piece in pieces))
        counts.append(len(calls))
    assert texts[0] == texts[1] == texts[2]
    if decoding == {"greedy": True}:  # a network of random weights soon repeats itself
        assert counts[2] < counts[1] < counts[0]


def test_another_text_is_not_told_by_the_past_of_the_last(made: Path, folder: Path, cache: Path) -> None:
    net = open_model(made, ModelConfig(model=str(folder), dtype="float32", cache_dir=cache)).net
    alone = {ids: net.logits(ids) for ids in [(7, 8, 9), (7, 8, 10, 11), (12,)]}
    for ids in [(7, 8, 9, 20), (7, 8, 10, 11), (12,), (7, 8, 9), (7,), (7, 8, 10, 11), (7, 8, 9)]:
        found = net.logits(ids)
        if ids in alone:
            assert torch.allclose(found, alone[ids], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        ["--greedy"],
        ["--seed", "3"],
        [
            "--temperature",
            "1.3",
            "--top-k",
            "40",
            "--top-p",
            "0.9",
            "--min-p",
            "0.01",
            "--num-return-sequences",
            "3",
        ],
        ["--greedy", "--stop", "e"],
        ["--regex", "[ab]{3,5}c", "--seed", "2"],
        ["--jsonl", "--logprobs", "2", "--num-return-sequences", "2"],
        ["--chat"],
        ["--prompt-lookup", "5", "--greedy"],
    ],
    ids=" ".join,
)
def test_it_says_what_the_eager_engine_says(ask: Ask, options: list[str]) -> None:
    ours, theirs = (
        ask("Once upon a time", "-n", "12", *options, "--engine", name) for name in ("compiled", "eager")
    )
    assert (ours.returncode, ours.stderr) == (theirs.returncode, theirs.stderr) == (0, b"")
    if "--logprobs" in options:
        for mine, other in zip(ours.stdout.splitlines(), theirs.stdout.splitlines(), strict=True):
            one, two = json.loads(mine), json.loads(other)
            for token, same in zip(one.pop("logprobs"), two.pop("logprobs"), strict=True):
                assert token["token"] == same["token"]
                assert token["logprob"] == pytest.approx(same["logprob"], abs=1e-4)
            assert one == two
    else:
        assert ours.stdout == theirs.stdout


def test_auto_takes_it_and_imports_no_transformers(folder: Path, cache: Path, made: Path) -> None:
    model = ["-m", str(folder), "--dtype", "float32", "--cache-dir", str(cache), "-n", "4"]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "textgen_cli", "generate", "Once upon", *model],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.stdout and "torch" in names
    assert not {name for name in names if name.partition(".")[0] == "transformers"}


def test_auto_falls_back_and_says_why(ask: Ask) -> None:
    done = ask("Once upon", "-n", "4", "--num-beams", "2", "-v")
    assert done.returncode == 0 and b"eager engine" in done.stderr and b"--num-beams" in done.stderr


def test_what_cannot_be_obeyed_is_refused(ask: Ask, cache: Path) -> None:
    done = ask("Once upon", "--engine", "compiled", "--repetition-penalty", "1.2")
    assert done.returncode == 2 and b"[E-ENGINE]" in done.stderr and b"--repetition-penalty" in done.stderr
    none = ask("Once upon", "--engine", "compiled", "--dtype", "bfloat16")
    assert none.returncode == 2 and b"no compiled form" in none.stderr
    assert none.stdout == b""


def test_a_folder_that_others_may_write_is_not_run(ask: Ask, made: Path) -> None:
    library_file = made / "step.so"
    mode = library_file.stat().st_mode
    library_file.chmod(mode | 0o022)
    try:
        done = ask("Once upon", "-n", "2")
        assert done.returncode == 6 and b"[E-COMPILED]" in done.stderr and done.stdout == b""
    finally:
        library_file.chmod(mode)


def test_a_broken_library_is_an_error_and_no_crash(ask: Ask, made: Path) -> None:
    library_file = made / "step.so"
    aside = library_file.rename(made / "aside")  # it is mapped into this process: it must not be written anew
    try:
        library_file.write_bytes(b"\0" * aside.stat().st_size)
        done = ask("Once upon", "-n", "2")
        assert done.returncode == 5 and b"[E-COMPILED]" in done.stderr and done.stdout == b""
    finally:
        aside.rename(library_file)


def test_a_model_that_cannot_be_compiled_leaves_nothing(
    small_model: Callable[..., Path], folder: Path, tmp_path: Path
) -> None:
    sliding = shutil.copytree(folder, tmp_path / "sliding")
    config = transformers.MistralConfig(
        vocab_size=400, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=16,
    )  # fmt: skip
    transformers.MistralForCausalLM(config).save_pretrained(sliding)
    for model in (sliding, small_model("t5")):
        done = program(
            "download", str(model), "--compile", "--dtype", "float32", "--cache-dir", str(tmp_path)
        )
        assert done.returncode == 5 and "[E-COMPILE]" in done.stderr and done.stdout == ""
    assert [path.name for path in (tmp_path / "compiled").iterdir() if path.suffix != ".lock"] == []


def test_no_compiler_is_said_before_the_model_loads(folder: Path, tmp_path: Path) -> None:
    done = program(
        "download",
        str(folder),
        "--compile",
        "--dtype",
        "float32",
        "--cache-dir",
        str(tmp_path),
        CXX="no-such-compiler",
    )
    assert done.returncode == 2 and "[E-COMPILER]" in done.stderr and done.stdout == ""
    assert not list(tmp_path.glob("compiled/*"))


def test_fewer_bits_are_proved_and_used(folder: Path, cache: Path) -> None:
    """The compiler's own loops or torch's kernels for products with such weights; the proof compares with float32.

    One layer is too narrow for int4 and is in int8, some have no kernel for their number of rows.
    """
    config = ModelConfig(model=str(folder), dtype="bfloat16", quantize="int4", cache_dir=cache)
    options = ("--quantize", "int4", "--dtype", "bfloat16", "--cache-dir", str(cache))
    done = program("download", str(folder), "--compile", *options)
    assert (done.returncode, done.stderr) == (0, "")
    made = Path(done.stdout.strip())
    net = open_model(made, config).net
    assert torch.int8 in {value.dtype for value in net.graphs["step"]._constants.values()}
    eager = load(config, "generate", silent).net
    layers = [layer for layer in eager.modules() if isinstance(layer, QuantizedLinear)]
    assert {(layer.form, layer.kernel) for layer in layers} == {
        ("int4", True),
        ("int4", False),
        ("int8", True),
    }
    ids = torch.randint(5, 390, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.inference_mode():
        true = (
            eager(input_ids=torch.tensor([ids])).logits[0].float()
        )  # of the same weights, rounded elsewhere
    prompt, step, several = net.logits(ids[:20]), net.logits(ids[:21]), net.logits(ids[:22], ids[22:30])
    found = torch.cat([prompt, step, several])
    assert float((found - true[19:30]).abs().amax()) < 0.1 * float(true.std())
    done = program(
        "generate", "-m", str(folder), "--dtype", "bfloat16", "--quantize", "int4", "--cache-dir", str(cache),
        "Once upon", "-n", "4", "-v",
    )  # fmt: skip
    assert done.returncode == 0 and "compiled model" in done.stderr


# --- what needs no compiled model


def test_samplers_are_those_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    ids: Any = torch.zeros(1, 1, dtype=torch.long)
    for number in range(60):
        scores = torch.randn(1, 1500, generator=generator) * (1 + number % 5)
        given: dict[str, Any] = {
            "temperature": [None, 0.5, 1.7][number % 3],
            "top_k": [0, 5, 1000, 5000][number % 4],
            "top_p": [None, 0.2, 0.95, 0.9999][number // 2 % 4],
            "min_p": [None, 0.05][number % 2],
        }
        expected = scores
        if given["temperature"]:
            expected = library.TemperatureLogitsWarper(given["temperature"])(ids, expected)
        if given["top_k"]:
            expected = library.TopKLogitsWarper(given["top_k"])(ids, expected)
        if given["top_p"]:
            expected = library.TopPLogitsWarper(given["top_p"])(ids, expected)
        if given["min_p"]:
            expected = library.MinPLogitsWarper(given["min_p"])(ids, expected)
        ours = compiled._sampled(scores[0], compiled.settings_of(do_sample=True, **given))
        # The library adds chances up from the other end: just at top_p one may cut what the other keeps.
        border = ours.isinf() != expected[0].isinf()
        assert torch.equal(ours[~border], expected[0][~border]), given
        assert float(scores[0].softmax(-1)[border].sum()) < 1e-6, given


def test_without_a_home_or_a_compiled_model_nothing_is_looked_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nowhere = "org/of-a-hub-that-nobody-asks"
    assert find(ModelConfig(model=nowhere, cache_dir=tmp_path), silent) is None
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    assert find(ModelConfig(model=nowhere), silent) is None


def test_every_option_is_obeyed_or_unfit() -> None:
    assert compiled.unfit(GenerateConfig()) is None
    assert compiled.unfit(GenerateConfig(decoding=DecodingConfig(prompt_lookup=3))) is None
    for given in (
        {"num_beams": 2},
        {"repetition_penalty": 1.1},
        {"bias": ("a=1",)},
        {"draft_model": "other"},
    ):
        option = compiled.unfit(GenerateConfig(decoding=DecodingConfig(**given)))
        assert option == "--" + next(iter(given)).replace("_", "-")
    with pytest.raises(ValueError, match="suppress_tokens"):
        compiled.settings_of(suppress_tokens=[3])


def test_a_model_s_own_settings_may_ask_for_more(folder: Path) -> None:
    with pytest.raises(UsageError, match="E-ENGINE"):
        compiled.open_if_fit(
            GenerateConfig(engine="compiled", decoding=DecodingConfig(no_repeat_ngram_size=2)), silent
        )
