"""`textgen score` as a program: ways in and out, failures, jobs that go on, a terminal, pipes, hostile texts."""

import json
import math
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parts.models import TEXT
from parts.program import Done, Program
from parts.shell import Shell

TEXTGEN = str(Path(sysconfig.get_path("scripts")) / "textgen")
TEXTS = ["Once upon", "the dog", "A", "Numbers such as", "café 你好", "token after another", "x y z", "quick"]
INPUT = b"".join(
    json.dumps({"id": at, "text": text, "tokens": "mine"}).encode() + b"\n" for at, text in enumerate(TEXTS)
)
Run = Callable[..., Done]


@pytest.fixture(name="known", scope="module")
def _known(small_model: Callable[..., Path]) -> list[str]:
    return ["-m", str(small_model("llama")), "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(name="run")
def _run(forked: Program, known: list[str], tmp_path: Path) -> Run:
    def run(*args: str, **more: Any) -> Done:
        return forked(tmp_path, "score", *known, *args, **more)

    return run


def lines(data: bytes) -> list[dict[str, Any]]:
    assert data.endswith(b"\n") or not data

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=refuse) for line in data.split(b"\n")[:-1]]


def pairs(done: Done) -> dict[str, str]:
    """The figures of one text, a name and value a line."""
    assert (done.returncode, done.stderr) == (0, b"")
    return dict(line.split("\t") for line in done.stdout.decode().splitlines())


def sums(data: bytes) -> list[float]:
    return [line["log_likelihood"] for line in lines(data)]


# --- ways in


def test_one_text(run: Run) -> None:
    argument = run("Once upon a time")
    found = pairs(argument)
    assert list(found)[:4] == ["log_likelihood", "tokens", "perplexity", "bits_per_byte"]
    assert run(stdin=b"Once upon a time\n") == argument
    assert run("-", stdin=b"Once upon a time") == argument
    assert pairs(run("Once", stdin=b"upon")) == pairs(run("Once\n\nupon"))
    (whole,) = lines(run("Once upon a time", "--jsonl").stdout)
    assert float(found["log_likelihood"]) == pytest.approx(whole["log_likelihood"], rel=1e-5)
    assert whole["text"] == "Once upon a time"


def test_every_way_in_gives_the_same_figures(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(INPUT)
    (tmp_path / "in.csv").write_text("id,text\n" + "".join(f"{at},{text}\n" for at, text in enumerate(TEXTS)))
    plain = "".join(f"{text}\n" for text in TEXTS).encode()
    piped = run("--jsonl", stdin=INPUT)
    assert (piped.returncode, piped.stderr) == (0, b"")
    found = lines(piped.stdout)
    assert [(line["id"], line["text"], line["input_tokens"]) for line in found] == [
        (at, text, "mine") for at, text in enumerate(TEXTS)
    ]
    assert list(found[0])[:5] == ["id", "text", "input_tokens", "log_likelihood", "tokens"]
    for args, given in (
        (["--lines"], plain), (["-i", "in.jsonl"], b""), (["-i", "in.csv"], b""),
        (["--csv"], (tmp_path / "in.csv").read_bytes()),
        (["--jsonl", "-i", "-"], INPUT),
    ):  # fmt: skip
        done = run(*args, "-o", "out.jsonl", stdin=given)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert sums((tmp_path / "out.jsonl").read_bytes()) == sums(piped.stdout)
        (tmp_path / "out.jsonl").unlink()
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".partial", ".state")]


def test_lines_for_people(run: Run) -> None:
    done = run("--lines", stdin=b"Once upon\na\tb\n")
    cells = [line.split("\t") for line in done.stdout.decode().splitlines()]
    assert [row[-1] for row in cells] == ["Once upon", "a\\tb"]
    assert float(cells[0][0]) < 0 and int(cells[0][1]) > 0


def test_context_choices_and_gold(run: Run) -> None:
    record = {"question": "The quick", "text": " brown fox", "options": ["brown fox", "lazy"], "gold": "lazy"}
    given = json.dumps(record).encode() + b"\n"
    (behind,) = lines(run("--jsonl", "--context", "question", stdin=given).stdout)
    (whole,) = lines(run("--jsonl", "--context", "The quick", stdin=given).stdout)
    assert behind["log_likelihood"] == whole["log_likelihood"]
    chosen = ("--jsonl", "--context", "question", "--choices", "options", "--gold", "gold")
    (told,) = lines(run(*chosen, stdin=given).stdout)
    assert told["choices"][0]["log_likelihood"] == pytest.approx(behind["log_likelihood"], abs=1e-4)
    assert set(told["correct"]) == {"raw", "token", "byte", "pmi"}
    labelled = run("--labels", "good,bad", "--template", "It was {text}:", "--jsonl", "a film")
    assert [choice["text"] for choice in lines(labelled.stdout)[0]["choices"]] == ["good", "bad"]
    summary = run(*chosen, "--summary", stdin=given)
    assert lines(summary.stdout)[0]["accuracy"].keys() >= {"raw", "pmi"}


# --- failures

BAD = b'{"text": "a"}\n{bad\n{"id": 7}\n{"text": 5}\n{"text": "", "error": "mine"}\n'


def test_error_records(run: Run) -> None:
    done = run("--jsonl", stdin=BAD)
    found = lines(done.stdout)
    codes = [line.get("error", {}).get("code") for line in found]
    assert (done.returncode, codes) == (3, [None, "E-JSON", "E-FIELD", "E-FIELD", "E-EMPTY"])
    assert list(found[4]) == ["text", "input_error", "error"]
    assert done.stderr == b"textgen: error: [E-RECORDS] 4 of 5 records: failed\n"


@pytest.mark.parametrize(("limit", "written"), [("4", 5), ("2", 4), ("0", 2), ("10%", 5)])
def test_max_failures(run: Run, limit: str, written: int) -> None:
    done = run("--jsonl", "--max-failures", limit, stdin=BAD)
    assert (done.returncode, len(lines(done.stdout))) == (3, written)
    assert (b"stopped by --max-failures" in done.stderr) == (written < 5)


def test_strict(run: Run) -> None:
    done = run("--jsonl", "--strict", stdin=BAD)
    assert (done.returncode, [line["text"] for line in lines(done.stdout)]) in [(4, []), (4, ["a"])]
    assert b"[E-JSON] stdin: line 2: " in done.stderr


GOOD = [b'{"id": 0, "text": "Once upon"}', b'{"id": 2, "text": "the dog"}']
FAULTS = {
    "F37": (b'{"text": "\xff"}', "E-UTF8"),
    "F42 NUL": (b'{"text": "a\0b"}', "E-JSON"),
    "F43 no object": (b"[1]", "E-FIELD"),
    "F43 no text": (b'{"prompt": "a"}', "E-FIELD"),
    "F43 null": (b'{"text": null}', "E-FIELD"),
    "F43 empty": (b'{"text": ""}', "E-EMPTY"),
    "F44": (b'{"text": "' + b"a" * (16 << 20) + b'"}', "E-LINE-TOO-LONG"),
    "F45": (b'{"text": "a", "b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "E-JSON-DEPTH"),
    "F46 digits": (b'{"text": "a", "b": ' + b"7" * 5000 + b"}", "E-JSON"),
    "F46 too large": (b'{"text": "a", "b": 1e999}', "E-JSON"),
    "F46 NaN": (b'{"text": "a", "b": NaN}', "E-JSON"),
    "F47": (b'{"text": "\\ud800"}', "E-UTF8"),
    "F48": (b'{"text": "a", "text": "b"}', "E-JSON-DUPKEY"),
    "F50": (b'{"text": "a", "id": "' + b"i" * 5000 + b'"}', "E-FIELD"),
}


@pytest.fixture(name="good", scope="module")
def _good(forked: Program, known: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    done = forked(tmp_path_factory.mktemp("good"), "score", *known, "--jsonl", stdin=b"\n".join(GOOD))
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.splitlines(keepends=True)


@pytest.mark.slow
@pytest.mark.parametrize("row", FAULTS)
def test_a_bad_record_leaves_the_others_alone(run: Run, good: list[bytes], row: str) -> None:
    line, code = FAULTS[row]
    done = run("--jsonl", stdin=b"\n".join([GOOD[0], line, GOOD[1]]))
    assert (done.returncode, done.stderr) == (3, b"textgen: error: [E-RECORDS] 1 of 3 records: failed\n")
    first, failed, last = done.stdout.splitlines(keepends=True)
    assert [first, last] == good
    assert json.loads(failed)["error"]["code"] == code


FORMS = {
    "F38 byte order mark": b"\xef\xbb\xbf" + b"\n".join(GOOD),
    "F40 CRLF": b"\r\n".join(GOOD) + b"\r\n",
    "F40 last LF": b"\n".join(GOOD) + b"\n",
    "F51 blank lines": b"\n \n\t\n".join([b"", *GOOD, b"\r\n"]),
}


@pytest.mark.parametrize("row", FORMS)
def test_forms_of_the_same_input(run: Run, good: list[bytes], row: str) -> None:
    assert run("--jsonl", stdin=FORMS[row]) == Done(0, b"".join(good), b"")


STRANGE = {
    "F41 separators": "a\u2028b\u2029c\x85d\x0be",
    "F42 escaped NUL": "a\0b",
    "F47 pair": "\U0001f600",
    "F64 control tokens": "<|end|><|begin|>",
    "F64 combining marks": "\u0301\u0327\u20dd",
    "F64 emoji over tokens": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "F64 right to left": "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "one token": "a",
    "blanks": " \t\n ",
}


def test_strange_texts_have_figures(run: Run) -> None:
    given = b"".join(json.dumps({"row": row, "text": text}).encode() + b"\n" for row, text in STRANGE.items())
    done = run("--jsonl", "--tokens", "--words", "--top", "2", stdin=given)
    assert (done.returncode, done.stderr) == (0, b"")
    for line in lines(done.stdout):
        assert line["text"] == STRANGE[line["row"]]
        assert math.isfinite(line["perplexity"]) and line["tokens"] == len(line["token_scores"])
    assert run("--jsonl", "--tokens", "--words", "--top", "2", stdin=given) == done


UNUSABLE: dict[str, tuple[bytes | None, list[str], int, str]] = {
    "F39": ("abc\nd\n".encode("utf-16"), ["--lines", "-i", "in"], 4, "[E-ENCODING] in: "),
    "F53": (b"\n \n", ["-i", "in"], 4, "[E-EMPTY] in: "),
    "F53 stdin": (None, [], 4, "[E-EMPTY] stdin: "),
    "F56 absent": (None, ["-i", "in", "--jsonl"], 4, "[E-INPUT] in: no such file or directory"),
    "single options": (None, ["x", "--max-failures", "3"], 2, "[E-CONFLICT] --max-failures: "),
    "summary of one": (None, ["x", "--summary"], 2, "[E-CONFLICT] --summary: "),
    "page of many": (None, ["--lines", "--html", "a.html"], 2, "[E-CONFLICT] --html: "),
    "argument and file": (None, ["x", "-i", "f"], 2, "[E-CONFLICT] -i: "),
    "top alone": (None, ["x", "--top", "3"], 2, "[E-CONFLICT] --top: "),
    "stride": (None, ["x", "--window", "8", "--stride", "9"], 2, "[E-CONFLICT] --stride: "),
    "window": (None, ["x", "--window", "1"], 2, "[E-RANGE] --window: "),
    "two contexts": (None, ["x", "--context", "a", "--template", "{text}"], 2, "[E-CONFLICT] "),
    "template without a field": (None, ["x", "--template", "a"], 2, "[E-TEMPLATE] "),
    "tokens of choices": (None, ["x", "--labels", "a,b", "--tokens"], 2, "[E-CONFLICT] --tokens: "),
    "gold of plain text": (None, ["x", "--gold", "g"], 2, "[E-CONFLICT] --gold: "),
    "gold of lines": (None, ["--lines", "--gold", "g"], 2, "[E-CONFLICT] --gold: "),
    "choices of plain text": (None, ["--lines", "--choices", "c"], 2, "[E-CONFLICT] --choices: "),
    "pairs of plain text": (None, ["--lines", "--pairs"], 2, "[E-CONFLICT] --pairs: "),
    "text field of plain text": (None, ["x", "--text-field", "y"], 2, "[E-CONFLICT] --text-field: "),
    "text field of lines": (None, ["--lines", "--text-field", "y"], 2, "[E-CONFLICT] --text-field: "),
    "text field of pairs": (
        None,
        ["--jsonl", "--pairs", "--text-field", "y"],
        2,
        "[E-CONFLICT] --text-field: ",
    ),
    "text field of choices": (
        None,
        ["--jsonl", "--choices", "c", "--context", "q", "--text-field", "y"],
        2,
        "[E-CONFLICT] --text-field: ",
    ),
    "template of plain text": (None, ["x", "--template", "{q}", "--labels", "a,b"], 2, "[E-TEMPLATE] "),
    "stride behind a context": (None, ["x", "--context", "a", "--stride", "2"], 2, "[E-CONFLICT] --stride: "),
    "explained pairs": (
        None,
        ["--jsonl", "--pairs", "--explain", "occlusion"],
        2,
        "[E-CONFLICT] --explain: ",
    ),
    "weights of a watermark": (
        None,
        ["x", "--watermark", "k", "--quantize", "int8"],
        2,
        "[E-CONFLICT] --watermark: ",
    ),
    "no labels": (None, ["x", "--labels", ""], 2, "[E-RANGE] --labels: must name two labels at least"),
    "one label": (None, ["x", "--labels", "a"], 2, "[E-RANGE] --labels: must name two labels at least"),
    "a label twice": (None, ["x", "--labels", "a,b, a"], 2, "[E-RANGE] --labels: names 'a' twice"),
    "an empty label": (None, ["x", "--labels", "a,,b"], 2, "[E-RANGE] --labels: has an empty label"),
    "tokens of lines": (None, ["--lines", "--tokens"], 2, "[E-CONFLICT] --tokens: needs JSONL output"),
    "words of lines": (None, ["--lines", "--words"], 2, "[E-CONFLICT] --words: needs JSONL output"),
    "csv out": (None, ["--lines", "-o", "a.csv"], 2, "[E-FORMAT] "),
}


@pytest.mark.parametrize("row", UNUSABLE)
def test_refused_before_a_model_loads(forked: Program, tmp_path: Path, row: str) -> None:
    data, args, code, said = UNUSABLE[row]
    if data is not None:
        (tmp_path / "in").write_bytes(data)
    before = sorted(tmp_path.iterdir())
    done = forked(tmp_path, "score", "-m", "./absent", *args)
    assert (done.returncode, done.stdout) == (code, b""), done.stderr
    assert said in done.stderr.decode()
    assert sorted(tmp_path.iterdir()) == before


MEANINGLESS = {
    "llama": (
        ["--pll", "original"],
        ["--truncate", "right"],
        ["--jsonl", "--gold", "g"],
        ["--truncate", "left"],
    ),
    "bert": (["--window", "8"], ["--bos", "never"], ["--labels", "a,b"], ["--truncate", "left"]),
    "t5": (
        ["--window", "8"],
        ["--stride", "2"],
        ["--context", "a", "--delimiter", "-"],
        ["--words"],
        ["--pll", "original"],
    ),
    "bert-classifier": (["--bits"], ["--tokens"], ["--labels", "a,b"], ["--against", "x"]),
}


@pytest.mark.parametrize("name", MEANINGLESS)
def test_options_that_a_model_would_not_obey(
    forked: Program, small_model: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    for options in MEANINGLESS[name]:
        records = b'{"text": "a b", "g": 1}\n' if "--jsonl" in options else b"a b"
        done = forked(tmp_path, "score", "-m", str(small_model(name)), *options, stdin=records)
        assert (done.returncode, done.stdout) == (2, b""), (options, done)
        assert options[-2 if len(options) > 1 else 0].encode() in done.stderr


def test_an_empty_input_is_an_empty_output(forked: Program, tmp_path: Path) -> None:
    """F52: and no model is looked for."""
    for data in (b"", b"\n", b"\xef\xbb\xbf", b" \r\n\n"):
        assert forked(tmp_path, "score", "-m", "./absent", "--jsonl", stdin=data) == Done(0, b"", b"")
    done = forked(tmp_path, "score", "-m", "./absent", "--jsonl", "--summary")
    assert lines(done.stdout) == [{"records": 0, "failed": 0}]


@pytest.mark.slow
def test_weights_that_are_no_numbers(
    forked: Program, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("llama", "bert", "bert-classifier", "bert-tagger"):
        folder = tmp_path / name
        shutil.copytree(small_model(name), folder)
        tensors = safetensors(folder)
        for tensor in tensors.values():
            tensor.view(-1)[0] = math.nan
        save(tensors, folder)
        done = forked(tmp_path, "score", "-m", f"./{name}", "--jsonl", stdin=INPUT)
        assert done.returncode == 3
        assert {line["error"]["code"] for line in lines(done.stdout)} == {"E-NAN"}
        one = forked(tmp_path, "score", "-m", f"./{name}", "a b c")
        assert (one.returncode, one.stdout) == (5, b"")
        assert b"[E-NAN]" in one.stderr and b"nan" not in done.stdout.lower().replace(b"e-nan", b"")


def safetensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def save(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.slow
def test_a_long_text(forked: Program, small_model: Callable[..., Path], tmp_path: Path) -> None:
    """1 MB is scored by windows: every token once."""
    text = ("".join(f"{line}\n" for line in TEXT) * 3100)[:1_000_000]
    given = json.dumps({"text": text}).encode()
    done = forked(
        tmp_path, "score", "-m", str(small_model("tiny")), "--jsonl", "--stride", "128", stdin=given
    )
    (line,) = lines(done.stdout)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(small_model("tiny"))
    assert line["tokens"] == len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert (line["characters"], line["window"], line["stride"]) == (1_000_000, 128, 128)
    assert 1 < line["perplexity"] < 1e6


# --- jobs


def test_shards_together_are_the_whole(run: Run) -> None:
    want = lines(run("--jsonl", "--batch-size", "1", stdin=INPUT).stdout)
    parts = [
        lines(run("--jsonl", "--batch-size", "1", "--shard", f"{at}/3", stdin=INPUT).stdout)
        for at in (1, 2, 3)
    ]
    assert [len(part) for part in parts] == [3, 3, 2]
    assert sorted((line for part in parts for line in part), key=lambda line: line["id"]) == want


@pytest.fixture(name="begun")
def _begun(run: Run, tmp_path: Path) -> list[str]:
    """The command line of a job that has begun: one record of eight is there."""
    (tmp_path / "in.jsonl").write_bytes(INPUT)
    (tmp_path / "template").write_text("{id}")
    job = ["-i", "in.jsonl", "-o", "out.jsonl", "--batch-size", "1", "--template-file", "template"]
    assert run(*job, "--max-time", "0.000001").returncode == 3
    return job


# An input that ends in a blank more is another one, too.
CHANGES: dict[str, tuple[str, list[str]]] = {
    "scoring.bits": ("", ["--bits"]),
    "scoring.window": ("", ["--window", "64"]),
    "scoring.tokens": ("", ["--tokens"]),
    "dtype": ("", ["--dtype", "bfloat16"]),
    "shard": ("", ["--shard", "1/2"]),
    "scoring.template_file": ("template", []),
    "input": ("in.jsonl", []),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_job_is_refused(run: Run, tmp_path: Path, begun: list[str], field: str) -> None:
    name, options = CHANGES[field]
    if name:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b" ")
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    done = run(*begun, *options, "--resume")
    assert done.returncode == 10
    assert f"[E-RESUME] out.jsonl: {field} was ".encode() in done.stderr
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before


def test_a_summary_counts_earlier_records(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(INPUT)
    job = ["-i", "in.jsonl", "--batch-size", "1", "--jsonl", "--summary"]
    (alone,) = lines(run(*job).stdout)
    assert (alone["records"], alone["failed"]) == (8, 0)
    assert run(*job, "-o", "out.jsonl", "--max-time", "0.000001").returncode == 3
    (resumed,) = lines(run(*job, "-o", "out.jsonl", "--resume").stdout)
    (again,) = lines(run(*job, "-o", "out.jsonl", "--resume").stdout)  # nothing is left to do
    assert alone == resumed == again
    written = lines((tmp_path / "out.jsonl").read_bytes())
    mean = math.fsum(line["log_likelihood"] for line in written) / sum(line["tokens"] for line in written)
    assert alone["perplexity"] == pytest.approx(math.exp(-mean))
    people = run("-i", "in.jsonl", "--summary").stdout.decode()
    assert f"perplexity\t{alone['perplexity']:.6g}\n" in people


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--choices", "options", "--context", "text"]], ids=["texts", "choices"])
def test_killed_at_random_moments(run: Run, tmp_path: Path, how: list[str]) -> None:
    """SIGKILL at random moments, from the start on to the last write; each time resumed: the same bytes."""
    chance = random.Random(len(how))
    with (tmp_path / "many.jsonl").open("w") as file:
        for at in range(1300):
            text = " ".join(chance.choices(" ".join(TEXT).split(), k=1 + at % 12))
            options = chance.sample(["yes", "no", "so it is", f"a dog {at % 40}", "the lazy fox"], 3)
            file.write(json.dumps({"id": at, "text": text, "options": options}) + "\n")
    began = time.monotonic()
    assert run("-i", "many.jsonl", *how, "-o", "ref.jsonl").returncode == 0
    took = time.monotonic() - began
    reference = (tmp_path / "ref.jsonl").read_bytes()
    assert len(lines(reference)) == 1300
    kills = 0
    while kills < 6:
        done = run(
            "-i",
            "many.jsonl",
            *how,
            "-o",
            "out.jsonl",
            "--resume",
            kill_after=chance.uniform(0.3, 1.0) * took,
        )
        kills += done.returncode == -signal.SIGKILL
        if (tmp_path / "out.jsonl").exists():
            assert (tmp_path / "out.jsonl").read_bytes() == reference
            for left in tmp_path.glob("out.jsonl*"):  # killed behind the renaming, it leaves its state
                left.unlink()
    assert run("-i", "many.jsonl", *how, "-o", "out.jsonl", "--resume").returncode == 0
    assert (tmp_path / "out.jsonl").read_bytes() == reference


# --- the whole process: pipes, pages, terminals


def environment(folder: Path, **more: str) -> dict[str, str]:
    keep = {name: os.environ[name] for name in ("LANG",) if name in os.environ}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return keep | {"PATH": path, "HOME": str(folder), "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(name="shell")
def _shell(warm: Shell) -> Callable[[str, Path], Done]:
    def shell(command: str, folder: Path) -> Done:
        known = environment(folder)
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"], cwd=folder, capture_output=True, timeout=120, check=False,
            env=known | {"PATH": f"{warm.programs}{os.pathsep}{known['PATH']}"},
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    return shell


PIPE = 'textgen generate -m "./tiny" -n 8 --jsonl < p.jsonl | textgen score -m "./tiny" --jsonl'


@pytest.fixture(name="prompts")
def _prompts(small_model: Callable[..., Path], tmp_path: Path) -> Path:
    (tmp_path / "tiny").symlink_to(small_model("tiny"))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return tmp_path


@pytest.mark.slow
def test_generated_texts_are_scored(shell: Callable[[str, Path], Done], prompts: Path) -> None:
    done = shell(PIPE, prompts)
    assert (done.returncode, done.stderr) == (0, b"")
    found = lines(done.stdout)
    assert [line["prompt"] for line in found] == TEXTS
    assert all(line["perplexity"] > 1 and line["completion_tokens"] == 8 for line in found)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_a_pipe_with_jq(shell: Callable[[str, Path], Done], prompts: Path) -> None:
    every = lines(shell(PIPE, prompts).stdout)
    limit = sorted(line["perplexity"] for line in every)[4]
    done = shell(f"{PIPE} | jq -c 'select(.perplexity < {limit!r})'", prompts)
    assert (done.returncode, done.stderr) == (0, b"")
    assert [line["prompt"] for line in lines(done.stdout)] == [
        line["prompt"] for line in every if line["perplexity"] < limit
    ]
    as_shown = shell(f"{PIPE} | jq 'select(.perplexity < 40)'", prompts)
    assert (as_shown.returncode, as_shown.stderr) == (0, b"")


@pytest.mark.slow
def test_a_reader_that_is_gone(shell: Callable[[str, Path], Done], prompts: Path) -> None:
    (prompts / "many.txt").write_text("the quick brown fox\n" * 20_000)
    command = "(textgen score -m ./tiny --lines --jsonl < many.txt; echo $? > status) | head -1"
    done = shell(command, prompts)
    assert (len(lines(done.stdout)), done.stderr) == (1, b"")
    assert (prompts / "status").read_text() == f"{128 + signal.SIGPIPE}\n"


@pytest.mark.slow
def test_help_imports_no_torch(tmp_path: Path) -> None:
    argv = [sys.executable, "-X", "importtime", "-m", "textgen_cli", "score", "--help"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert (done.returncode, "textgen_cli.cli.score" in imported) == (0, True)
    assert not imported & {"torch", "transformers", "tokenizers", "numpy"}
    assert "--pll" in done.stdout


def test_a_page_is_there_whole_or_not_at_all(run: Run, tmp_path: Path) -> None:
    done = run("Once <b> upon", "--html", "a.html")
    assert done.returncode == 0
    page = (tmp_path / "a.html").read_text()
    assert page.startswith("<!") and page.rstrip().endswith("</html>") and "<b>" not in page
    assert "perplexity" in page and "perplexity" in done.stdout.decode()
    failed = run("Once", "--html", "absent/a.html")
    assert (failed.returncode, failed.stdout) == (8, b"")
    assert run("", "--html", "b.html", stdin=b"").returncode == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html"]


def test_a_page_takes_the_place_of_files_alone(forked: Program, tmp_path: Path) -> None:
    """Not of a folder, a pipe or a link, as /dev/stdout is one; before a model is looked for."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("victim")
    (tmp_path / "victim").write_text("mine")
    for name, fact in (
        ("", "is a directory"),
        ("folder", "is a directory"),
        ("pipe", "is not a regular file"),
        ("link", "is not a regular file"),
    ):
        done = forked(tmp_path, "score", "-m", "./absent", "a b", "--html", name)
        said = f"textgen: error: [E-WRITE] {name or '.'}: {fact}\n".encode()
        assert done == Done(8, b"", said)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    assert (tmp_path / "victim").read_text() == "mine"


def on_terminal(
    forked: Program, folder: Path, *args: str, stdin: bytes | None = None, **variables: str
) -> tuple[int | None, str]:
    """Run it with a terminal of 60 columns; what it shows there."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 60))
    reading, writing = os.pipe()
    streams = [slave if stdin is None else reading, slave, slave]
    known = {"TERM": "xterm-256color", "HOME": str(folder)}
    started = forked.start(streams, folder, ["score", *args], known | variables, terminal=True)
    os.write(writing, stdin or b"")
    for end in (slave, reading, writing):
        os.close(end)
    shown = b""
    with suppress(OSError):  # its end
        while select.select([master], [], [], 60)[0]:
            piece = os.read(master, 65536)
            if not piece:
                break
            shown += piece
    os.close(master)
    return started.wait(), shown.decode()


def plain(shown: str) -> Sequence[str]:
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown))


@pytest.mark.slow
def test_on_a_terminal(forked: Program, tmp_path: Path, known: list[str]) -> None:
    code, shown = on_terminal(forked, tmp_path, *known, "Once upon a time")
    assert code == 0
    assert any("Once upon a time" in line for line in plain(shown))
    assert re.search(r"\x1b\[[0-9;]*48;", shown)  # a background: the heat
    assert any(line.startswith("perplexity") for line in plain(shown))
    code, bare = on_terminal(forked, tmp_path, *known, "Once upon a time", NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*[34]8;", bare)
    assert any(line.startswith("perplexity") for line in plain(bare))


@pytest.mark.slow
def test_a_table_on_a_terminal(forked: Program, tmp_path: Path, known: list[str]) -> None:
    code, shown = on_terminal(forked, tmp_path, *known, "--lines", stdin=b"Once upon\nthe dog\n\x1b[31mred\n")
    assert code == 0
    rows = plain(shown)
    assert any("Once upon" in row for row in rows) and any("the dog" in row for row in rows)
    assert "\x1b[31m" not in shown
    assert not [row for row in rows if len(row) > 60]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")
def test_memory_of_the_real_model(default_model: Path, tmp_path: Path) -> None:
    """At most 600 MB besides the weights, for windows of up to 2,000 tokens."""
    weights = sum(path.stat().st_size for path in default_model.glob("*.safetensors"))
    (tmp_path / "in.txt").write_text(
        "".join(f"{line} {line}\n" for line in TEXT * 16) + " ".join(TEXT * 20) + "\n"
    )
    model = ["-m", str(default_model), "--dtype", "float32"]
    argv = [TEXTGEN, "score", *model, "--lines", "--jsonl", "-i", "in.txt"]
    with (tmp_path / "out").open("wb") as out:
        child = subprocess.Popen(argv, cwd=tmp_path, env=environment(tmp_path), stdout=out)
    # Not the status that a wait gives: a child begins with the peak of the process that started it.
    status, peak = Path(f"/proc/{child.pid}/status"), 0
    while child.poll() is None:
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.05)
    assert child.returncode == 0
    assert weights < peak < weights + 600e6
