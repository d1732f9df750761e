"""What a training leaves to read: the log, the page and the card."""

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from textgen_cli.config import ModelConfig
from textgen_cli.config.finetune import DataConfig, FinetuneConfig, TrainingConfig, WayConfig
from textgen_cli.errors import OutputError
from textgen_cli.finetune import card, report
from textgen_cli.finetune.report import DataFile, Told
from textgen_cli.text import chart, page

TOLD = Told(
    name="judge",
    task="text-classification",
    base="bert",
    revision="0" * 40,
    way="all weights",
    data=(DataFile("reviews.csv", 4000, "ab" * 32),),
    settings={"epochs": 3.0, "seed": 0},
    facts={"examples": 3800, "labels": {"good": 1900, "bad": 1900}},
    history=[
        {"step": 0, "eval_loss": 0.69, "eval_accuracy": 0.5},
        *({"step": n, "loss": 0.7 / n, "learning_rate": 1e-5 * (200 - n)} for n in range(1, 201)),
        {"step": 100, "eval_loss": 0.5, "eval_accuracy": 0.8},
        {"step": 200, "eval_loss": 0.4, "eval_accuracy": 0.9},
    ],
    before={"loss": 0.69, "accuracy": 0.5},
    after={"loss": 0.4, "accuracy": 0.9, "macro_f1": 1e-5},
    tables={
        "confusion": {"good": {"good": 90, "bad": 10}, "bad": {"good": 7, "bad": 93}},
        "classes": {"good": {"precision": 0.9, "recall": 0.9, "f1": 0.9, "support": 100}},
    },
    samples_before=[{"input": "fine <b>", "expected": "good", "answer": "bad"}],
    samples_after=[{"input": "fine <b>", "expected": "good", "answer": "good"}],
    run={"steps": 200, "seconds": 61.5},
    versions={"torch": "2.13.0"},
)


def front(text: str) -> dict[str, Any]:
    """What the Hub's own library reads at the head of a card."""
    card_data: Any = ModelCard(text).data
    return dict(card_data.to_dict())


# --- metrics.jsonl


def test_the_log_grows_by_lines_of_finite_numbers(tmp_path: Path) -> None:
    report.begin_log(tmp_path)
    report.log(tmp_path, 1, {"loss": 2.5, "epoch": 0.5, "grad_norm": math.inf, "note": "x", "done": True})
    report.log(tmp_path, 2, {"eval_loss": 1, "eval_f1": math.nan})
    lines = [json.loads(line) for line in (tmp_path / report.LOG).read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.5, "epoch": 0.5}, {"step": 2, "eval_loss": 1}]
    assert report.read_log(tmp_path) == lines


def test_a_resumed_log_is_cut_back_to_its_checkpoint(tmp_path: Path) -> None:
    for step in (0, 10, 20, 30):
        report.log(tmp_path, step, {"loss": float(step)})
    with (tmp_path / report.LOG).open("ab") as file:
        file.write(b'{"step": 40, "lo')  # killed here
    report.begin_log(tmp_path, 20)
    report.log(tmp_path, 30, {"loss": 3.0})
    assert [line["step"] for line in report.read_log(tmp_path)] == [0, 10, 20, 30]
    assert report.read_log(tmp_path)[-1]["loss"] == 3.0
    report.begin_log(tmp_path)
    assert (tmp_path / report.LOG).read_bytes() == b""


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="E-WRITE"):
        report.log(tmp_path / "absent", 1, {"loss": 1.0})
    assert report.read_log(tmp_path / "absent") == []


# --- settings


def test_settings_tell_no_folder_and_no_user() -> None:
    config = FinetuneConfig(
        model=ModelConfig(model="/home/anna/models/base", cache_dir=Path("/home/anna/cache")),
        data=DataConfig(valid=(Path("/home/anna/held out.csv"),)),
        way=WayConfig(from_scratch="/home/anna/small.json", tokenizer="./anna/tok"),
        training=TrainingConfig(learning_rate=1e-4),
        output=Path("/home/anna/out"),
    )
    told = report.told_settings(config)
    assert "anna" not in json.dumps(told)
    assert told["valid"] == ["held out.csv"]
    assert (told["from_scratch"], told["tokenizer"]) == ("small.json", "tok")
    assert (told["learning_rate"], told["seed"]) == (1e-4, 0)
    assert not told.keys() & {"output", "cache_dir", "verbose", "resume"}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("org/name", "org/name"), ("/home/anna/base", "base"), ("./base", "base"), ("base.gguf", "base.gguf"),
        ("a/b.gguf", "b.gguf"), ("smollm2-135m-instruct", "smollm2-135m-instruct"), ("~/x/base", "base"),
    ],
)  # fmt: skip
def test_a_model_is_told_without_its_folder(name: str, told: str) -> None:
    assert report.model_name(name) == told


# --- report.html


def written(tmp_path: Path, told: Told) -> str:
    report.write_report(tmp_path, told)
    return (tmp_path / report.REPORT).read_text()


def test_the_page_has_all_parts_and_loads_nothing(tmp_path: Path) -> None:
    text = written(tmp_path, TOLD)
    heads = re.findall(r"<h2[^>]*>([^<]*)</h2>", text)
    assert heads == ["On held-out data", "Curves", "Confusion", "By class", "Samples", "Data", "Examples", "Settings",
                     "Run"]  # fmt: skip
    assert text.count("<svg") == 3  # losses, learning rate, accuracy
    assert "training loss" in text
    assert "held-out loss" in text
    assert "fine &lt;b&gt;" in text
    assert not re.search(r"(src|href|url)\s*[=(]", text)
    assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text
    assert re.search(r'<td class="number p9">90</td><td class="number p1">10</td>', text)


def test_a_page_without_held_out_data_says_so(tmp_path: Path) -> None:
    bare = replace(TOLD, before={}, after={}, tables={}, samples_after=(), samples_before=(), history=[])
    text = written(tmp_path, bare)
    assert "No data was held out" in text
    assert "<svg" not in text
    assert "Samples" not in text
    assert report.summary(replace(TOLD, base="")) == "all weights, from random ones"


def test_many_classes_show_the_commonest_confusions(tmp_path: Path) -> None:
    names = [f"c{n}" for n in range(40)]
    confusion = {name: dict.fromkeys(names, 0) | {name: 5} for name in names}
    confusion["c3"]["c7"] = 4
    confusion["c9"]["c1"] = 6
    text = written(tmp_path, replace(TOLD, tables={"confusion": confusion}))
    rows = re.findall(
        r'<td dir="auto">(c\d+)</td><td dir="auto">(c\d+)</td><td class="number">(\d)</td>', text
    )
    assert rows == [("c9", "c1", "6"), ("c3", "c7", "4")]


@pytest.mark.parametrize("hostile", ["</title><script>alert(1)</script>", "a\x1b[31m\u202e", "|`x`|\n# no"])
def test_nothing_that_is_told_becomes_markup(hostile: str, tmp_path: Path) -> None:
    told = replace(
        TOLD, name=hostile, base=hostile, data=(DataFile(hostile, 1, ""),), settings={hostile: hostile},
        facts={hostile: 1}, after={"accuracy": 1.0}, tables={"confusion": {hostile: {hostile: 1}}},
        samples_after=[{"input": hostile, "expected": hostile, "answer": hostile}], versions={hostile: "1"},
        history=[{"step": 1, f"eval_{hostile}": 1.0}, {"step": 2, f"eval_{hostile}": 2.0}],
    )  # fmt: skip
    text = written(tmp_path, told)
    assert "<script>alert" not in text
    assert not re.search("[\x1b\u202e]", text)
    body = card.card(told)
    assert front(body)["model-index"][0]["name"] == hostile
    below = body.split("\n---\n", 1)[1]
    assert "<script>" not in below
    assert not re.search("[\x1b\u202e]", below)
    assert re.findall(r"^#+ .*$", below, re.MULTILINE)[1:] == [
        "## Held-out data", "## Training data", "## Use", "## Settings", "## Versions",
    ]  # fmt: skip


# --- curves


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0, 1, False, [0, 0.5, 1]), (0.31, 0.69, False, [0.3, 0.4, 0.5, 0.6, 0.7]),
        (0, 200, True, [0, 50, 100, 150, 200]), (1, 3, True, [1, 2, 3]), (7, 7, True, [7, 8]),
        (2.0, 2.0, False, [1, 1.5, 2, 2.5, 3]), (-3, 3, False, [-4, -2, 0, 2, 4]), (0, 0, False, [-1, -0.5, 0, 0.5, 1]),
        (1e-8, 5e-5, False, [0, 2e-5, 4e-5, 6e-5]),
    ],
)  # fmt: skip
def test_axes_have_round_numbers(low: float, high: float, whole: bool, expected: list[float]) -> None:
    assert chart.nice(low, high, whole=whole) == pytest.approx(expected)


def test_a_long_line_is_thinned_and_keeps_its_ends() -> None:
    points = [(float(n), float(n % 7)) for n in range(10_001)]
    thin = chart.thinned(points)
    assert len(thin) <= chart.MOST
    assert (thin[0], thin[-1]) == (points[0], points[-1])
    assert all(first[0] < second[0] for first, second in pairwise(thin))
    assert chart.thinned(points[:10]) == points[:10]


def test_points_stand_where_their_values_are() -> None:
    drawn = chart.chart({"loss": [(0, 1.0), (10, 0.0), (5, math.nan)]})
    circles = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert circles == [(chart.LEFT, chart.TOP), (chart.WIDTH - chart.RIGHT, chart.HEIGHT - chart.BOTTOM)]
    assert "nan" not in drawn
    assert chart.chart({"loss": [(1, 2.0)]}) == chart.chart({}) == ""
    assert page.charts([{"loss": [(1, 2.0)]}]) == '<div class="charts"></div>'


# --- README.md


def test_the_card_has_what_the_hub_reads(tmp_path: Path) -> None:
    card.write_card(tmp_path, replace(TOLD, hub=True, base="org/bert"))
    text = (tmp_path / "README.md").read_text()
    assert front(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["textgen", "text-classification"],
        "base_model": "org/bert",
        "model-index": [
            {
                "name": "judge",
                "results": [
                    {
                        "task": {"type": "text-classification"},
                        "dataset": {"name": "held-out part of reviews.csv", "type": "custom"},
                        "metrics": [
                            {"type": "accuracy", "value": 0.9, "name": "accuracy"},
                            {"type": "macro_f1", "value": 1e-5, "name": "macro f1"},
                        ],
                    }
                ],
            }
        ],
    }
    assert 'textgen score -m ./judge "A text."' in text
    assert f"| reviews.csv | 4000 | {'ab' * 32} |" in text
    assert "| accuracy | 0.5 | 0.9 |" in text


def test_the_card_of_an_adapter_names_its_base() -> None:
    text = card.card(replace(TOLD, task="clm", adapter=True, hub=True, base="org/base", name="my talker"))
    assert "textgen generate -m org/base --adapter ./FOLDER" in text
    text = card.card(replace(TOLD, task="clm", adapter=True, base="base"))
    assert "textgen generate -m ./base --adapter ./judge" in text
    assert front(text)["library_name"] == "peft"
    assert "base_model" not in front(text)
