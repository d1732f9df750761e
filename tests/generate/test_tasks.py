"""Encoder-decoders by task, against transformers' own tokenizers and generate, token for token in float32."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parts.models import TEXT
from parts.seq2seq_models import MAKERS
from parts.shell import Shell

from textgen_cli.config import DecodingConfig, GenerateConfig, ModelConfig, PromptConfig
from textgen_cli.events import silent
from textgen_cli.generate.engines import open_engine
from textgen_cli.text.records import Record

NEW = 12


@pytest.fixture(scope="module")
def folder_of(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name.startswith("marian") or name == "m2m":
            pytest.importorskip("sentencepiece")
        if name not in made:
            made[name] = small_model("t5") if name == "t5" else MAKERS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return get


def texts(
    folder: Path, task: str, records: list[dict[str, Any]], options: dict[str, Any], **decoding: Any
) -> list[str]:
    config = GenerateConfig(
        model=ModelConfig(model=str(folder), dtype="float32", device="cpu"),
        decoding=DecodingConfig(max_new_tokens=NEW, **decoding),
        prompting=PromptConfig(task=task, **options),  # type: ignore[arg-type]
    )
    opened = open_engine(config, 0, silent)
    requests = [r for index, fields in enumerate(records) for r in opened.prompter(Record(index, fields))]
    found = {request.index: "" for request in requests}
    for chunk in opened.engine.stream(requests):
        assert chunk.final is None or chunk.final.error is None
        found[chunk.index] += chunk.text
    return list(found.values())


def reference(folder: Path, prompt: str, source: str | None, target: str | None, **settings: Any) -> str:
    """What transformers' own documentation says: src_lang on the tokenizer, forced_bos_token_id to generate."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    net: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    if source and target:
        tokenizer.src_lang = source
        known = hasattr(tokenizer, "get_lang_id")
        forced = tokenizer.get_lang_id(target) if known else tokenizer.convert_tokens_to_ids(target)
        settings["forced_bos_token_id"] = forced
    ids = net.generate(
        **tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=NEW, **settings
    )[0]
    if target:
        assert ids[1] == settings["forced_bos_token_id"]
    return str(tokenizer.decode(ids[1:], skip_special_tokens=True, clean_up_tokenization_spaces=False))


# task, options, fields of a record -> what the model must see, its source and its target code
CASES: list[Any] = [
    ("t5", "translate", {"to": "de"}, {"text": TEXT[0]}, f"translate English to German: {TEXT[0]}", None, None),
    ("t5", "summarize", {}, {"text": TEXT[1]}, f"summarize: {TEXT[1]}", None, None),
    ("t5", "qa", {"question": "who?"}, {"context": TEXT[1]}, f"question: who? context: {TEXT[1]}", None, None),
    ("bart", "summarize", {}, {"text": TEXT[1]}, TEXT[1], None, None),
    ("marian", "translate", {"to": "French"}, {"text": TEXT[0]}, TEXT[0], None, None),
    ("marian of several", "translate", {"to": "French"}, {"text": TEXT[0]}, f">>fra<< {TEXT[0]}", None, None),
    ("m2m", "translate", {"from_": "German", "to": "French"}, {"text": TEXT[0]}, TEXT[0], "de", "fr"),
    ("nllb", "translate", {"to": "French"}, {"text": TEXT[0]}, TEXT[0], "eng_Latn", "fra_Latn"),
    ("nllb", "translate", {}, {"text": TEXT[1], "from": "de", "to": "pol_Latn"}, TEXT[1], "deu_Latn", "pol_Latn"),
]  # fmt: skip


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[-1]}")
def test_equals_transformers(folder_of: Callable[[str], Path], case: Any, num_beams: int) -> None:
    name, task, options, fields, prompt, source, target = case
    folder = folder_of(name)
    expected = reference(folder, prompt, source, target, num_beams=num_beams)
    decoding: dict[str, Any] = {"greedy": True} if num_beams == 1 else {"num_beams": num_beams}
    [text] = texts(folder, task, [fields], options, **decoding)
    assert text == expected
    assert len(text) > 5 or num_beams > 1


@pytest.mark.parametrize("num_beams", [1, 2])
def test_records_of_one_batch_keep_their_languages(folder_of: Callable[[str], Path], num_beams: int) -> None:
    folder = folder_of("nllb")
    records = [
        {"text": text, "from": source, "to": target}
        for text in TEXT[:2]
        for source, target in (("English", "French"), ("German", "Polish"), ("English", "Polish"))
    ]
    codes = {"English": "eng_Latn", "German": "deu_Latn", "French": "fra_Latn", "Polish": "pol_Latn"}
    decoding: dict[str, Any] = {"greedy": True} if num_beams == 1 else {"num_beams": num_beams}
    assert texts(folder, "translate", records, {}, **decoding) == [
        reference(folder, r["text"], codes[r["from"]], codes[r["to"]], num_beams=num_beams) for r in records
    ]


@pytest.mark.slow
def test_from_the_command_line(warm: Shell, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("nllb")
    argv = [
        warm.program,
        "generate",
        "-m",
        str(folder),
        "--dtype",
        "float32",
        "--task",
        "translate",
    ]
    argv += ["--device", "cpu", "--greedy", "-n", str(NEW)]

    def run(*args: str, stdin: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [*argv, *args], input=stdin, capture_output=True, text=True, timeout=60, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    expected = reference(folder, TEXT[0], "eng_Latn", "fra_Latn")
    assert run("--to", "French", stdin=TEXT[0] + "\n") == (0, expected + "\n", "")
    code, out, err = run("--to", "Klingon", stdin=TEXT[0])
    assert (code, out) == (2, "")
    assert "[E-LANGUAGE] --to: this model has no code for 'Klingon'" in err
    argv[3] = str(folder_of("marian"))
    code, out, err = run("--to", "German", stdin=TEXT[0])
    assert (code, out) == (2, "")
    assert "[E-LANGUAGE] --to: this model translates into French" in err
    argv[3] = str(folder_of("bart"))
    code, out, err = run("--to", "German", stdin=TEXT[0])
    assert (code, len(out) > 5) == (0, True)
    assert err.startswith("textgen: warning: [W-LANGUAGE] ") and err.count("\n") == 1
