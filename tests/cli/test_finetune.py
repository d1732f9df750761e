"""The face of finetune: what it refuses, what it says where, and that the model it leaves is used by the others."""

import json
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from parts.program import Done, Program

from textgen_cli.cli import finetune, live
from textgen_cli.cli.console import Reporter
from textgen_cli.events import Event, Measured, Notice, Progress

pytestmark = pytest.mark.slow

Small = Callable[..., Path]
Run = Callable[..., Done]


@pytest.fixture(name="program")
def _program(forked: Program, tmp_path: Path) -> Run:
    """Run `textgen` in a folder, its cache there too."""
    return partial(forked, XDG_CACHE_HOME=str(tmp_path / "cache"))


@pytest.fixture(name="work")
def _work(tmp_path: Path, small_model: Small) -> Path:
    """A folder with examples and a model."""
    words = {"good": ["fine", "warm", "bright"], "bad": ["dull", "cold", "grim"]}
    rows = [f"The play was {words[mood][n % 3]} {n}.,{mood}" for n in range(40) for mood in words]
    (tmp_path / "reviews.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (tmp_path / "base").symlink_to(small_model("bert"))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("reviews.csv", "E-USAGE"),  # no -o
        ("reviews.csv -o out --dora", "E-CONFLICT"),
        ("reviews.csv -o out --vocab-size 500", "E-CONFLICT"),
        ("reviews.csv -o out --from-scratch tiny --tokenizer x --vocab-size 500", "E-CONFLICT"),
        ("reviews.csv -o out --task clm --whole-words", "E-CONFLICT"),
        ("reviews.csv -o out --task clm --mlm-probability 0.3", "E-CONFLICT"),
        ("reviews.csv -o out --patience 2 --valid-share 0", "E-CONFLICT"),
        ("reviews.csv -o out --task poetry", "E-USAGE"),
        ("reviews.csv -o out --batch-size none", "E-RANGE"),
        ("reviews.csv -o out --seed random", "E-USAGE"),
    ],
)
def test_a_command_line_that_cannot_be_obeyed(line: str, name: str, program: Run, work: Path) -> None:
    done = program(work, "finetune", *line.split())
    assert (done.returncode, done.stdout) == (2, b"")
    assert f"[{name}]".encode() in done.stderr
    assert not (work / "out").exists()


def trained(program: Run, work: Path, *more: str) -> Done:
    args = ("reviews.csv", "-m", "./base", "-o", "out", "--epochs", "1", "--batch-size", "16")
    return program(work, "finetune", *args, *more)


def test_a_run_says_its_folder_and_nothing_else(program: Run, work: Path) -> None:
    done = trained(program, work)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, f"{work / 'out'}\n", b"")
    report = (work / "out" / "report.html").read_text()
    assert "held-out loss" in report
    assert "reviews.csv" in report
    lines = [json.loads(line) for line in (work / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0
    assert "eval_accuracy" in lines[0]
    assert any("loss" in line for line in lines)
    told = "".join(
        p.read_text() for p in (work / "out").iterdir() if p.suffix in (".json", ".jsonl", ".md", ".html")
    )
    assert str(work) not in told
    judged = program(work, "score", "--jsonl", "-m", "./out", "The play was grim 7.")
    assert json.loads(judged.stdout)["prediction"] in ("good", "bad")
    stamp = work / "out" / "textgen.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"labels": ["good", "bad"]}))
    refused = program(work, "score", "-m", "./out", "The play was grim 7.")
    assert refused.returncode == 5
    assert b"[E-STAMP]" in refused.stderr


def test_verbose_tells_of_steps_in_plain_lines(program: Run, work: Path) -> None:
    text = trained(program, work, "-v").stderr.decode()
    assert re.search(r"^textgen: train \./base: 1/\d+ steps, ", text, re.MULTILINE)
    assert re.search(r"^textgen: step 0: held-out loss [\d.]+, accuracy [\d.]+", text, re.MULTILINE)
    assert "\x1b" not in text


def test_one_of_several_processes_speaks(program: Run, work: Path) -> None:
    # A process that is not the first of its group says nothing; alone, it can still be run.
    done = program(work, "finetune", "reviews.csv", "-m", "./base", "--check", "-v", RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    piped = (work / "reviews.csv").read_bytes()
    done = program(work, "finetune", "-", "--check", stdin=piped, WORLD_SIZE="2")
    assert done.returncode == 2
    assert b"[E-CONFLICT] -: several processes cannot share" in done.stderr


def test_what_breaks_off_where_another_process_ends_is_told_by_that_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        with pytest.raises(RuntimeError, match="closed by peer"), finetune._in_turn():
            raise RuntimeError("connection closed by peer")
    assert slept == [finetune.TURN]


def test_a_launcher_that_divides_the_weights_in_other_ways_is_refused(program: Run, work: Path) -> None:
    given = (
        "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0 x"
    )
    arguments = launch_command_parser().parse_args(["--use_fsdp", *given.split()])
    prepare: Any = prepare_multi_gpu_env
    told = {name: value for name, value in prepare(arguments).items() if "ACCELERATE" in name}
    done = program(work, "finetune", "reviews.csv", "-m", "./base", "-o", "out", **told)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"[E-CONFLICT] accelerate launch --use_fsdp: is version 1" in done.stderr
    assert not list(work.glob("out*"))


def test_check_tells_of_the_data(program: Run, work: Path) -> None:
    done = program(work, "finetune", "reviews.csv", "-m", "./base", "--check")
    facts = dict(line.split("\t") for line in done.stdout.decode().splitlines())
    assert (done.returncode, done.stderr) == (0, b"")
    assert {"task": "text-classification", "rows": "80", "labels.good": "40"}.items() <= facts.items()
    piped = (work / "reviews.csv").read_bytes() + b"no label\n"
    done = program(work, "finetune", "--format", "csv", "-m", "./base", "--check", stdin=piped)
    assert done.returncode == 4
    assert b"bad_rows\t1\n" in done.stdout
    assert b"[E-DATA]" in done.stderr


def test_files_of_held_out_data_come_from_the_command_line_and_from_settings(
    program: Run, work: Path
) -> None:
    (work / "held.csv").write_text("text,label\nIt was fine.,good\nIt was dull.,bad\n")
    (work / "more.csv").write_text("text,label\nIt was warm.,good\n")
    (work / "mine.toml").write_text('[finetune]\nvalid = ["held.csv"]\n')
    for before, after, count in (
        ((), ("--valid", "held.csv", "--valid", "more.csv"), 3),
        (("--config", "mine.toml"), (), 2),
    ):
        done = program(work, *before, "finetune", "reviews.csv", "-m", "./base", "--check", *after)
        facts = dict(line.split("\t") for line in done.stdout.decode().splitlines())
        assert (done.returncode, facts["examples"], facts["held_out"]) == (0, "80", str(count))


# --- what is said while it trains


class Screen:
    """A terminal, or none, and a clock that a test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, draws: bool, verbose: bool) -> None:
        self.now, self.said, self.drawn = 0.0, "", os.pipe()
        monkeypatch.setattr(live, "draws", lambda: draws)
        monkeypatch.setattr(live, "tell", self.hear)
        self.view = live.Training(verbose, Reporter(verbose), lambda: self.now)

    def hear(self, text: str) -> None:
        self.said += text

    def show(self, seconds: float, *events: Event) -> str:
        """What is said of these events, that many seconds later."""
        self.now += seconds
        self.said = ""
        for event in events:
            self.view(event)
        return self.said


def step(done: int) -> Progress:
    return Progress("train", "base", done, 100, "steps")


def test_plain_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, draws=False, verbose=True)
    memory = r", [\d.]+ GB"
    assert re.fullmatch(rf"textgen: train base: 1/100 steps{memory}\n", screen.show(0, step(1)))
    figures = Measured(
        2, {"loss": 1.25, "learning_rate": 1e-5, "tokens_per_second": 1234.5, "peak_bytes": 2e9}
    )
    assert screen.show(1, figures, step(2)) == ""
    assert screen.show(10, step(12)) == (
        "textgen: train base: 12/100 steps, loss 1.25, rate 1e-05, 1,234 tokens/s, 2.00 GB, 1:28 left\n"
    )
    held_out = Measured(12, {"eval_loss": 1.5, "eval_macro_f1": 0.5, "eval_runtime": 3.0})
    assert screen.show(0, held_out) == "textgen: step 12: held-out loss 1.5, macro f1 0.5\n"


def test_nothing_is_said_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, draws=False, verbose=False)
    assert screen.show(9, step(1), Measured(1, {"loss": 1.0, "eval_loss": 2.0}), step(2)) == ""


def test_the_picture_shows_the_curve_and_is_taken_away(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    screen = Screen(monkeypatch, draws=True, verbose=False)
    monkeypatch.setenv("TERM", "xterm")
    screen.show(0, Progress("load", "base"), Measured(0, {"eval_loss": 2.0}), step(1))
    for number in range(2, 12):
        screen.show(1, Measured(number, {"loss": 12.0 - number, "peak_bytes": 1e9}), step(number))
    screen.show(0, Notice("careful", "W-TEST"), Progress("evaluate", "held-out", 3, 8, "examples"))
    screen.view.stop()
    screen.view(step(12))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capfd.readouterr().err)
    assert "11/100 steps, 1:29 left" in shown
    assert "loss 1, 1.00 GB  █▇▆▆▅▄▃▃▂▁" in shown
    assert "textgen: warning: [W-TEST] careful" in shown
    assert "evaluate held-out 3/8 examples" in shown
    assert "12/100" not in shown


@pytest.mark.parametrize(
    ("count", "lengths"), [(0, 0), (1, 1), (24, 24), (25, 24), (47, 24), (100, 24), (400, 24)]
)
def test_a_curve_is_averaged_to_its_width(count: int, lengths: int) -> None:
    found = live.averaged([float(n) for n in range(count)], 24)
    assert len(found) == lengths
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("seconds", "told"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (-1, "0:00")]
)
def test_durations(seconds: float, told: str) -> None:
    assert live._duration(seconds) == told


def test_generate_puts_the_prefix_of_training_before_a_source(
    program: Run, work: Path, small_model: Small
) -> None:
    (work / "t5").symlink_to(small_model("t5"))
    rows = [{"source": f"word {n}", "target": f"WORD {n}"} for n in range(12)]
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ("pairs.jsonl", "-m", "./t5", "-o", "out", "--max-steps", "1", "--source-prefix", "shout {it}: ")
    done = program(work, "finetune", *args)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "shout {it}: word" in (work / "out" / "report.html").read_text()
    shown = program(work, "generate", "-m", "./out", "--show-prompt", "--no-stdin", "word 3")
    assert shown.stdout.startswith(b"shout {it}: word 3")
    done = program(work, "finetune", "reviews.csv", "-m", "./base", "-o", "no", "--source-prefix", "x")
    assert done.returncode == 2
    assert b"[E-CONFLICT] --source-prefix" in done.stderr
