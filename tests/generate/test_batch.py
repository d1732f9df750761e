"""Batches through the real program: formats, output files, failures, limits, signals and resuming."""

import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from parts.models import CHAT_TEMPLATE, build
from parts.program import Done, Program

TEXTGEN = str(Path(sysconfig.get_path("scripts")) / "textgen")
PROMPTS = [
    "Once upon",
    "the dog",
    "A",
    "Numbers such as",
    "café 你好",
    "token after another",
    "x y z",
    "quick",
]
INPUT = b"".join(
    json.dumps({"id": at, "prompt": prompt, "text": "mine"}).encode() + b"\n"
    for at, prompt in enumerate(PROMPTS)
)


@pytest.fixture(name="model", scope="module")
def _model(small_model: Callable[..., Path]) -> Path:
    return small_model("llama")


@pytest.fixture(name="run")
def _run(forked: Program, model: Path, tmp_path: Path) -> Callable[..., Done]:
    def run(*args: str, n: int = 6, **more: Any) -> Done:
        known = ["-m", str(model), "--dtype", "float32", "--device", "cpu", "-n", str(n)]
        return forked(tmp_path, "generate", *known, *args, **more)

    return run


Run = Callable[..., Done]


def lines(data: bytes) -> list[dict[str, Any]]:
    assert data.endswith(b"\n") or not data
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


def texts(done: Done) -> list[str]:
    return [line["text"] for line in lines(done.stdout)]


# --- formats


@pytest.mark.slow
def test_jsonl_keeps_fields_and_order(run: Run) -> None:
    done = run("--jsonl", stdin=INPUT)
    assert (done.returncode, done.stderr) == (0, b"")
    found = lines(done.stdout)
    assert [line["prompt"] for line in found] == PROMPTS
    assert [line["id"] for line in found] == list(range(len(PROMPTS)))
    names = ["id", "prompt", "input_text", "text", "finish_reason", "prompt_tokens", "completion_tokens"]
    assert all(list(line) == names and line["input_text"] == "mine" for line in found)
    assert len({line["text"] for line in found}) == len(PROMPTS)


@pytest.mark.slow
def test_every_way_in_gives_the_same_texts(run: Run, tmp_path: Path) -> None:
    want = texts(run("--jsonl", "--greedy", stdin=INPUT))
    plain = "".join(f"{prompt}\n" for prompt in PROMPTS).encode()
    (tmp_path / "in.csv").write_text("id,prompt\n" + "".join(f"{n},{p}\n" for n, p in enumerate(PROMPTS)))
    (tmp_path / "in.jsonl").write_bytes(INPUT)
    by_lines = run("--lines", "-o", "lines.jsonl", "--greedy", stdin=plain)
    by_csv = run("-i", "in.csv", "-o", "csv.jsonl", "--greedy")
    by_name = run("-i", "in.jsonl", "-o", "name.jsonl", "--greedy", "-v")
    assert [done.returncode for done in (by_lines, by_csv, by_name)] == [0, 0, 0]
    assert (by_lines.stdout, by_lines.stderr, by_csv.stderr) == (b"", b"", b"")
    for name in ("lines", "csv", "name"):
        found = lines((tmp_path / f"{name}.jsonl").read_bytes())
        assert [line["text"] for line in found] == want, name
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".partial", ".state")]
    assert [line["id"] for line in lines((tmp_path / "csv.jsonl").read_bytes())] == list("01234567")


@pytest.mark.slow
def test_text_output_is_a_text_a_line(run: Run, tmp_path: Path) -> None:
    # --regex keeps line ends out of the texts.
    done = run("--lines", "--regex", "[a-z ]{3,5}", stdin=b"one\ntwo\nthree\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert [len(text) in (3, 4, 5) for text in done.stdout.decode().split("\n")[:-1]] == [True] * 3
    (tmp_path / "whole.txt").write_text("one\ntwo\n")
    whole, argument = run("-i", "whole.txt", "--jsonl"), run("one\ntwo", "--jsonl", stdin=INPUT)
    # --jsonl speaks of both sides: a text file is none.
    assert whole.returncode == 3
    assert [line["prompt"] for line in lines(argument.stdout)] == ["one\ntwo"]
    as_text = run("-i", "whole.txt")
    assert as_text.stdout.decode() == texts(argument)[0] + "\n"


def test_a_failed_record_in_text_mode(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "a"}\n{"id": 1}\n')
    done = run("-i", "in.jsonl", "--regex", "[a-z]{2}")
    assert done.returncode == 3
    assert done.stdout.endswith(b"\n\n")
    assert b"[W-RECORD] record 1: [E-FIELD] prompt: is missing\n" in done.stderr


def test_several_sequences(run: Run) -> None:
    done = run("--jsonl", "--num-return-sequences", "3", stdin=INPUT)
    found = lines(done.stdout)
    assert [line["sequence"] for line in found] == [0, 1, 2] * len(PROMPTS)
    assert [line["id"] for line in found] == [at for at in range(len(PROMPTS)) for _ in range(3)]
    # The first of several is the one that is drawn alone.
    assert [line["text"] for line in found[::3]] == texts(run("--jsonl", stdin=INPUT))


# --- failures


BAD = b'{"prompt": "a"}\n{bad\n{"id": 7}\n{"prompt": 5}\n{"prompt": "%s", "error": "mine"}\n' % (
    b"word " * 200
)


def test_error_records(run: Run) -> None:
    done = run("--jsonl", stdin=BAD)
    found = lines(done.stdout)
    assert done.returncode == 3
    assert [line.get("error", {}).get("code") for line in found] == [
        None, "E-JSON", "E-FIELD", "E-FIELD", "E-CONTEXT"
    ]  # fmt: skip
    assert found[1] == {"error": found[1]["error"]}
    assert found[1]["error"]["message"].startswith("line 2: ")
    assert list(found[2]) == ["id", "error"]
    assert list(found[4]) == ["prompt", "input_error", "error"]
    assert done.stderr == b"textgen: error: [E-RECORDS] 4 of 5 records: failed\n"


@pytest.mark.parametrize(("limit", "code", "written"), [("4", 3, 5), ("2", 3, 4), ("0", 3, 2), ("10%", 3, 5)])
def test_max_failures(run: Run, limit: str, code: int, written: int) -> None:
    done = run("--jsonl", "--max-failures", limit, stdin=BAD)
    assert (done.returncode, len(lines(done.stdout))) == (code, written)
    assert (b"stopped by --max-failures" in done.stderr) == (written < 5)


def test_strict(run: Run) -> None:
    done = run("--jsonl", "--strict", stdin=BAD)
    assert done.returncode == 4
    assert [line["prompt"] for line in lines(done.stdout)] == ["a"]  # what came before it is done
    assert b"[E-JSON] stdin: line 2: " in done.stderr


@pytest.mark.slow
def test_max_time_leaves_a_job_that_goes_on(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(INPUT)
    job = ("-i", "in.jsonl", "-o", "out.jsonl", "--batch-size", "1")
    stopped = run(*job, "--max-time", "0.000001")
    assert stopped.returncode == 3
    assert b"1 of 8 records" in stopped.stderr or b"stopped by --max-time" in stopped.stderr
    assert len(lines((tmp_path / "out.jsonl.partial").read_bytes())) == 1
    assert run(*job, "--resume").returncode == 0
    run("-i", "in.jsonl", "-o", "ref.jsonl", "--batch-size", "1")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "ref.jsonl").read_bytes()


@pytest.mark.slow
def test_shards_together_are_the_whole(run: Run) -> None:
    want = lines(run("--jsonl", stdin=INPUT).stdout)
    parts = [lines(run("--jsonl", "--shard", f"{at}/3", stdin=INPUT).stdout) for at in (1, 2, 3)]
    assert [len(part) for part in parts] == [3, 3, 2]
    assert sorted((line for part in parts for line in part), key=lambda line: line["id"]) == want


# --- output files


def test_nothing_to_do_imports_no_torch(run: Run, tmp_path: Path, model: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(INPUT)
    assert run("-i", "in.jsonl", "-o", "done.jsonl").returncode == 0
    before = (tmp_path / "done.jsonl").stat()
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    for more in (
        ["-i", "empty.jsonl", "-o", "new.jsonl"],
        ["-i", "in.jsonl", "-o", "done.jsonl", "--resume"],
    ):
        argv = [sys.executable, "-X", "importtime", "-m", "textgen_cli", "generate", "-m", str(model), *more]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stdout) == (0, "")
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "textgen_cli.generate.run" in imported
        assert not imported & {"torch", "transformers", "tokenizers"}
    assert (tmp_path / "new.jsonl").read_bytes() == b""
    after = (tmp_path / "done.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["-o", "in.jsonl"], 2, b"[E-SAME-FILE] in.jsonl: is the input"),
        (["-o", "there.jsonl"], 2, b"[E-EXISTS] there.jsonl: exists"),
        (["-o", "out.csv"], 2, b"[E-FORMAT]"),
        (["-o", "absent/out.jsonl"], 8, b"[E-WRITE]"),
        (["-i", "absent.jsonl"], 4, b"[E-INPUT] absent.jsonl"),
    ],
)
def test_refused_files(run: Run, tmp_path: Path, more: list[str], code: int, says: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes(INPUT)
    (tmp_path / "there.jsonl").write_bytes(b"kept")
    done = run("-i", "in.jsonl", *more)
    assert (done.returncode, done.stdout) == (code, b"")
    assert says in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "there.jsonl"]
    assert (tmp_path / "there.jsonl").read_bytes() == b"kept"
    assert (tmp_path / "in.jsonl").read_bytes() == INPUT


@pytest.fixture(name="begun")
def _begun(run: Run, tmp_path: Path) -> tuple[str, ...]:
    """The command line of a job that has begun: one record of eight is there."""
    (tmp_path / "in.jsonl").write_bytes(INPUT)
    for name in ("template", "words"):
        (tmp_path / name).write_text("{prompt}" if name == "template" else "zebra\n")
    job = ("-i", "in.jsonl", "-o", "out.jsonl", "--batch-size", "1")
    files = ("--template-file", "template", "--bad-words", "words")
    assert run(*job, *files, "--max-time", "0.000001").returncode == 3
    return (*job, *files)


CHANGES: dict[str, tuple[Callable[[Path], None] | None, list[str], dict[str, str]]] = {
    "decoding.temperature": (None, ["--temperature", "0.5"], {}),
    "dtype": (None, ["--dtype", "bfloat16"], {}),
    "threads.OMP_NUM_THREADS": (None, [], {"OMP_NUM_THREADS": "2"}),
    "decoding.bad_words": (lambda folder: _write(folder / "words", "lion\n"), [], {}),
    "prompting.template_file": (lambda folder: _write(folder / "template", "{prompt}!"), [], {}),
    "input": (lambda folder: _write(folder / "in.jsonl", INPUT.decode() + "{}\n"), [], {}),
    "decoding.num_return_sequences": (None, ["--num-return-sequences", "2"], {}),
    "shard": (None, ["--shard", "1/2"], {}),
}


def _write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_job_is_refused(run: Run, tmp_path: Path, begun: tuple[str, ...], field: str) -> None:
    change, options, variables = CHANGES[field]
    if change is not None:
        change(tmp_path)
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    done = run(*begun, *options, "--resume", **variables)
    assert done.returncode == 10
    assert f"[E-RESUME] out.jsonl: {field} was ".encode() in done.stderr
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before
    assert run(*begun, *options, "--restart", **variables).returncode in (0, 3)


@pytest.mark.slow
def test_a_drawn_seed_and_the_date_stay(
    forked: Program, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    template = CHAT_TEMPLATE.replace("{% for", "{{ strftime_now('%H:%M:%S') }}{% for", 1)
    (tmp_path / "in.jsonl").write_bytes(INPUT)
    model = str(small_model("llama", template))
    common = ["generate", "-m", model, "--dtype", "float32", "-n", "6", "--chat", "--batch-size", "1"]
    job = [*common, "-i", "in.jsonl", "-o", "out.jsonl", "--seed", "random"]
    assert forked(tmp_path, *job, "--max-time", "0.000001").returncode == 3
    state = json.loads((tmp_path / "out.jsonl.state").read_bytes().split(b"\n")[0])
    time.sleep(1)
    assert forked(tmp_path, *job, "--resume").returncode == 0
    found = lines((tmp_path / "out.jsonl").read_bytes())
    # The same job from its state alone: all of it is computed later, with the date of the start.
    again = [*common, "-i", "in.jsonl", "-o", "again.jsonl", "--seed", "random"]
    (tmp_path / "again.jsonl.state").write_text(json.dumps(state) + "\n")
    assert forked(tmp_path, *again, "--resume").returncode == 0
    assert lines((tmp_path / "again.jsonl").read_bytes()) == found
    other = forked(tmp_path, *common, "--jsonl", "--seed", str(state["pinned"]["seed"]), stdin=INPUT)
    assert lines(other.stdout) != found  # today is not the date of the start


# --- what the model sees


def test_show_prompt(forked: Program, small_model: Callable[..., Path], tmp_path: Path) -> None:
    chat = str(small_model("llama", CHAT_TEMPLATE))
    records = b'{"id": 1, "prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n{"id": 3}\n'
    args = ["generate", "-m", chat, "--system", "S", "--show-prompt", "--jsonl"]
    done = forked(tmp_path, *args, stdin=records)
    found = lines(done.stdout)
    assert done.returncode == 3
    system = "<|system|>S<|end|><|user|>"
    assert [line.get("text") for line in found] == [
        f"{system}a<|end|><|assistant|>", f"{system}b<|end|><|assistant|>", None
    ]  # fmt: skip
    assert (found[0]["id"], found[2]["error"]["code"]) == (1, "E-FIELD")
    plain = forked(tmp_path, *args[:3], "--lines", "--show-prompt", "--template", "<{text}>", stdin=b"x\ny\n")
    assert plain.stdout == b"<x>\n<y>\n"


@pytest.mark.slow
def test_a_chat_in_records(forked: Program, small_model: Callable[..., Path], tmp_path: Path) -> None:
    args = ["generate", "-m", str(small_model("llama", CHAT_TEMPLATE)), "--dtype", "float32", "-n", "5"]
    one = forked(tmp_path, *args, "--jsonl", "--chat", stdin=b'{"prompt": "hi"}\n')
    other = forked(tmp_path, *args, "--jsonl", stdin=b'{"messages": [{"role": "user", "content": "hi"}]}\n')
    raw = forked(tmp_path, *args, "--jsonl", stdin=b'{"prompt": "hi"}\n')
    assert [done.returncode for done in (one, other, raw)] == [0, 0, 0]
    assert texts(one) == texts(other) != texts(raw)
    task = [*args, "--jsonl", "--task", "translate", "--to", "French", "--show-prompt"]
    done = forked(
        tmp_path, *task, stdin=b'{"text": "one", "from": "German"}\n{"prompt": "two", "from": "x"}\n'
    )
    assert [("German" in text, "French" in text) for text in texts(done)] == [(True, True), (False, True)]


SERVER = ("--endpoint", "http://127.0.0.1:1/v1")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["x", "--to", "French"], "[E-CONFLICT] --to: needs --task translate"),
        (["x", "--from", "French", "--task", "qa"], "[E-CONFLICT] --from: "),
        (["x", "--question", "why"], "[E-CONFLICT] --question: needs --task qa"),
        (["x", "--task", "qa"], "[E-CONFLICT] --task qa: needs --question"),
        (["--lines", "--task", "translate"], "[E-CONFLICT] --task translate: needs --to"),
        (["x", "--template", "{other}"], "[E-TEMPLATE] template: field {other}"),
        (["x", "--template", "{", "--jsonl"], "[E-TEMPLATE] template: "),
        (["x", "--lines"], "[E-CONFLICT] --lines: "),
        (["x", "-i", "f"], "[E-CONFLICT] -i: "),
        (["--jsonl", "--no-stdin"], "[E-CONFLICT] --no-stdin: "),
        (["--jsonl", "-o", "o.jsonl", "--show-prompt"], "[E-CONFLICT] --show-prompt: "),
        (["--jsonl", "--max-failures", "x"], "[E-RANGE] --max-failures: "),
        (["--jsonl", "--regex", "("], "[E-GRAMMAR]"),
        (["x", "--choices", ""], "--choices"),
        (["x", "--max-time", "3"], "[E-CONFLICT] --max-time: "),
        (["x", "--shard", "1/2"], "[E-CONFLICT] --shard: "),
        (["--lines", "--top", "2"], "[E-CONFLICT] --top: needs JSONL output"),
        (["x", "--concurrency", "2"], "[E-CONFLICT] --concurrency: needs --endpoint"),
        (["x", "--greedy", "--top-k", "5"], "[E-CONFLICT] --top-k: means nothing to --greedy"),
        (["x", "--split-sequences"], "[E-CONFLICT] --split-sequences: needs --endpoint"),
        (["x", "--watermark-bias", "3"], "[E-CONFLICT] --watermark-bias: needs --watermark"),
        (["x", *SERVER, "--dtype", "float32"], "[E-CONFLICT] --dtype: means nothing to a server"),
        (["x", *SERVER, "--threads", "2"], "[E-CONFLICT] --threads: means nothing to a server"),
        (["--jsonl", *SERVER, "--batch-size", "4"], "[E-CONFLICT] --batch-size: means nothing to a server"),
        (["x", *SERVER, "--engine", "compiled"], "[E-ENDPOINT-OPTION] --engine: cannot be asked of a server"),
    ],
)
def test_wrong_combinations_need_no_model(
    forked: Program, tmp_path: Path, args: list[str], says: str
) -> None:
    done = forked(tmp_path, "generate", "-m", "./absent", *args, stdin=b"")
    assert (done.returncode, done.stdout) == (2, b""), done.stderr
    assert says in done.stderr.decode()
    assert not list(tmp_path.iterdir())


def test_a_default_for_other_runs_is_left_alone(forked: Program, tmp_path: Path) -> None:
    """From a variable or a settings file, what would be refused if typed says nothing about this run."""
    known: Any = {"TEXTGEN_CONCURRENCY": "2", "TEXTGEN_ENDPOINT_SERVER": "vllm"}
    done = forked(tmp_path, "generate", "-m", "./absent", "--no-stdin", "x", **known)
    assert (done.returncode, b"./absent" in done.stderr) == (5, True), done.stderr


@pytest.mark.slow
def test_a_template_nobody_has(run: Run) -> None:
    for option in (["--chat"], ["--system", "S"]):
        done = run("--jsonl", *option, stdin=INPUT)
        assert (done.returncode, done.stdout) == (5, b"")
        assert f"has no chat template, which {option[0]} needs".encode() in done.stderr
    no_top = run("--jsonl", "--top", "3", stdin=INPUT)
    assert (no_top.returncode, no_top.stdout) == (2, b"")


# --- processes of their own


@pytest.fixture(name="start")
def _start(model: Path, tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    keep = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    started = []

    def start(*args: str) -> "subprocess.Popen[bytes]":
        argv = [TEXTGEN, "generate", "-m", str(model), "--dtype", "float32", "--device", "cpu", *args]
        child = subprocess.Popen(
            argv, cwd=tmp_path, env=keep | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.mark.slow
def test_a_result_comes_before_the_next_record(start: Start) -> None:
    child = start("--jsonl", "--batch-size", "1", "-n", "4")
    pipes: Any = child
    for name in ("a", "b"):
        pipes.stdin.write(json.dumps({"prompt": name}).encode() + b"\n")
        pipes.stdin.flush()
        assert json.loads(pipes.stdout.readline())["prompt"] == name  # would wait for ever
    rest, said = child.communicate(timeout=30)
    assert (child.returncode, rest, said) == (0, b"", b"")


def many(folder: Path, count: int) -> None:
    with (folder / "many.jsonl").open("wb") as file:
        for at in range(count):
            file.write(json.dumps({"id": at, "prompt": PROMPTS[at % 8] * (at % 5 + 1)}).encode() + b"\n")


def wait_for(path: Path, size: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and not (path.exists() and path.stat().st_size > size):
        time.sleep(0.01)
    assert path.stat().st_size > size


@pytest.mark.slow
def test_an_interrupted_job_says_how_to_go_on(start: Start, run: Run, tmp_path: Path) -> None:
    many(tmp_path, 3000)
    job = ("-i", "many.jsonl", "-o", "out.jsonl", "-n", "20")
    child = start(*job)
    wait_for(tmp_path / "out.jsonl.partial", 1000)
    late = start(*job, "--resume")
    _, said = late.communicate(timeout=30)
    assert (late.returncode, said) == (
        9, f"textgen: error: [E-LOCKED] out.jsonl: held by pid {child.pid}\n".encode()
    )  # fmt: skip
    child.send_signal(signal.SIGINT)
    out, said = child.communicate(timeout=30)
    done = len(lines((tmp_path / "out.jsonl.partial").read_bytes()))
    assert 0 < done < 3000
    line = f"textgen: interrupted: {done} of 3000 records written; resume with --resume\n"
    assert (child.returncode, out, said.decode()) == (-signal.SIGINT, b"", line)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
def test_a_reader_that_is_gone(start: Start, tmp_path: Path) -> None:
    many(tmp_path, 3000)
    child = start("-i", "many.jsonl", "--jsonl", "-n", "20")
    pipes: Any = child
    assert json.loads(pipes.stdout.readline())["id"] == 0
    pipes.stdout.close()
    began = time.monotonic()
    assert child.wait(timeout=30) == -signal.SIGPIPE
    assert time.monotonic() - began < 10
    assert pipes.stderr.read() == b""


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--num-return-sequences", "2"], ["--greedy"]])
def test_killed_at_random_moments(run: Callable[..., Done], tmp_path: Path, how: list[str]) -> None:
    """SIGKILL 25 times at random moments, from the start on to the last write; each time resumed."""
    many(tmp_path, 900)
    chance = random.Random(len(how))
    job = ["-i", "many.jsonl", *how]
    began = time.monotonic()
    assert run(*job, "-o", "ref.jsonl", n=12).returncode == 0
    took = time.monotonic() - began
    reference = (tmp_path / "ref.jsonl").read_bytes()
    kills = 0
    while kills < 25:
        done = run(*job, "-o", "out.jsonl", "--resume", n=12, kill_after=chance.uniform(0.05, 0.4) * took)
        kills += done.returncode == -signal.SIGKILL
        if (tmp_path / "out.jsonl").exists():
            assert (tmp_path / "out.jsonl").read_bytes() == reference
            for left in tmp_path.glob("out.jsonl*"):  # killed behind the renaming, it leaves its state
                left.unlink()
    assert run(*job, "-o", "out.jsonl", "--resume", n=12).returncode == 0
    assert (tmp_path / "out.jsonl").read_bytes() == reference


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(start: Start, tmp_path: Path) -> None:
    """Peak of 50,000 tiny records within 12 MB of that of 2,000: of 200,000 it would be within 50 MB."""
    model, peaks = tmp_path / "tiny", []
    model.mkdir()
    build("tiny", model)
    for count in (2_000, 50_000):
        many(tmp_path, count)
        child = start("-m", str(model), "-i", "many.jsonl", "-o", f"{count}.jsonl", "-n", "1", "--greedy")
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        with (tmp_path / f"{count}.jsonl").open("rb") as file:
            assert sum(1 for _ in file) == count
        peaks.append(usage.ru_maxrss / 1024)
    assert peaks[1] < peaks[0] + 12, peaks
