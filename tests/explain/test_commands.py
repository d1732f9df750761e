"""`--explain` as a user meets it: records, a terminal, a page in a browser, and what is refused beforehand."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parts.browser import opened
from parts.program import Done, Program
from parts.shell import Seat

pytestmark = pytest.mark.slow

TEXT = "the quick brown fox jumps over the dog"


@pytest.fixture
def run(forked: Program, tmp_path: Path, small_model: Callable[..., Path]) -> Callable[..., Done]:
    def go(command: str, model: str, *args: str, stdin: bytes = b"") -> Done:
        return forked(tmp_path, command, "-m", str(small_model(model)), *args, stdin=stdin)

    return go


def explanation(done: Done) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["explanation"]
    return found


METHODS = ["attention", "gradient", "integrated-gradients", "occlusion", "logit-lens", "contrast"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["llama", "t5", "bert"])
def test_generate_explains_its_answer(run: Any, model: str, method: str) -> None:
    prompt = "the ___ brown fox" if model == "bert" else "the quick brown fox"
    length = [] if model == "bert" else ["-n", "3", "--greedy"]
    done = run("generate", model, prompt, *length, "--jsonl", "--explain", method)
    found = explanation(done)
    assert found["method"] == method
    sizes = {len(found[name]) for name in ("tokens", "offsets", "weights") if name in found}
    assert len(sizes) == 1
    assert "weights" in found or found["steps"]
    for token, span in zip(found["tokens"], found["offsets"], strict=True):
        if span is not None and model == "llama":
            assert "\ufffd" in token or found["text"][slice(*span)] == token
    if model == "llama":
        line = json.loads(done.stdout)
        assert found["text"] == line["prompt"] + line["text"]
        assert found["target"] == line["text"]


def test_the_log_likelihood_is_the_one_of_logprobs(run: Any) -> None:
    done = run("generate", "llama", TEXT, "-n", "4", "--greedy", "--jsonl", "--logprobs", "0", "--explain", "gradient",
               "--dtype", "float32")  # fmt: skip
    line = json.loads(done.stdout)
    told = sum(entry["logprob"] for entry in line["logprobs"])
    assert line["explanation"]["score"] == pytest.approx(told, abs=1e-3)


def test_beams_and_several_sequences_and_chats(
    run: Any, forked: Program, small_model: Any, tmp_path: Path
) -> None:
    done = run("generate", "llama", TEXT, "-n", "3", "--num-beams", "2", "--num-return-sequences", "2", "--jsonl",
               "--explain", "gradient")  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["explanation"]["target"] for line in lines] == [line["text"] for line in lines]
    from parts.models import CHAT_TEMPLATE

    chat = str(small_model("llama", CHAT_TEMPLATE))
    found = explanation(
        forked(
            tmp_path,
            "generate",
            "-m",
            chat,
            "--chat",
            "the dog",
            "-n",
            "2",
            "--jsonl",
            "--explain",
            "occlusion",
        )
    )
    assert found["text"].startswith("the dog")
    controls = [token for token, span in zip(found["tokens"], found["offsets"], strict=True) if span is None]
    assert "<|user|>" in controls and "<|assistant|>" in controls


def test_a_contrast_of_continuations(run: Any) -> None:
    found = explanation(run("generate", "llama", TEXT, "-n", "2", "--greedy", "--jsonl", "--explain", "gradient",
                            "--contrast", " sleeps"))  # fmt: skip
    assert found["contrast"] == " sleeps"
    filled = run("generate", "bert", "the ___ fox", "--jsonl", "--explain", "contrast", "--contrast", "dog")
    assert explanation(filled)["contrast"] == "dog"


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_choices_are_explained_against_the_next_best(run: Any, model: str) -> None:
    done = run(
        "score", model, "the quick brown", "--labels", "fox,dog,model", "--jsonl", "--explain", "contrast"
    )
    line = json.loads(done.stdout)
    found = explanation(done)
    ranked = sorted(line["choices"], key=lambda choice: -choice["log_likelihood"])
    assert [found["target"], found["contrast"]] == [choice["text"] for choice in ranked[:2]]
    apart = ranked[0]["log_likelihood"] - ranked[1]["log_likelihood"]
    assert found["score"] == pytest.approx(apart, abs=1e-3)


@pytest.mark.parametrize(
    ("model", "figure"),
    [("llama", "log_likelihood"), ("bert", "pseudo_log_likelihood"), ("gpt2-classifier", None)],
)
def test_what_is_explained_is_the_score(run: Any, model: str, figure: str | None) -> None:
    done = run("score", model, TEXT, "--jsonl", "--explain", "gradient")
    found, line = explanation(done), json.loads(done.stdout)
    if figure is None:
        assert (found["target"], found["measure"]) == (line["prediction"], "log_odds")
    else:
        assert found["score"] == pytest.approx(line[figure], abs=1e-3)
    assert found["text"] == TEXT


def test_records_that_cannot_be_explained_fail_alone(run: Any, tmp_path: Path) -> None:
    lines = b'{"text": "the dog"}\n{"text": "%s"}\n{"text": "a fox"}\n' % (b"the lazy dog " * 60)
    done = run("score", "llama", "--jsonl", "--explain", "gradient", stdin=lines)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 3
    assert ["explanation" in line for line in found] == [True, False, True]
    assert found[1]["error"]["code"] == "E-CONTEXT"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "generate x --explain gradient --endpoint http://127.0.0.1:9/v1 --jsonl",
            "cannot be used with --endpoint",
        ),
        (
            "generate x --explain gradient --quantize int8 --dtype bfloat16 --jsonl",
            "--explain gradient needs",
        ),
        ("generate x --explain gradient", "needs JSONL output"),
        ("generate x --explain gradient --show-prompt --jsonl", "cannot be used with --show-prompt"),
        ("generate x --html a.html", "needs --explain"),
        ("generate x --explain gradient --jsonl --html a.html", "shows one text"),
        ("generate x --explain gradient --html -", "--html -: is no file"),
        ("generate x --explain gradient -o -", "-o -: is no file"),
        ("score x --explain gradient -o -", "-o -: is no file"),
        ("score x --explain gradient", "needs JSONL output"),
        ("score --lines --explain gradient --html a.html", "needs JSONL output"),
        ("score x --jsonl --explain gradient --against y", "cannot be used with --against"),
        ("score x --jsonl --contrast y", "needs --explain"),
        ("score x --jsonl --explain attention --contrast y", "cannot be used with --explain attention"),
        ("score x --jsonl --explain attention --attention mean.1", "must be mean, rollout"),
        ("score x --jsonl --explain gradient --attention rollout", "needs --explain attention"),
        (
            "score x --jsonl --explain gradient --contrast y --explain-target each",
            "cannot be used with --contrast",
        ),
        (
            "score x --jsonl --explain logit-lens --explain-unit word",
            "cannot be used with --explain logit-lens",
        ),
        ("score x --jsonl --explain guess", "guess"),
    ],
)
def test_what_is_refused_before_a_model_loads(forked: Program, tmp_path: Path, line: str, said: str) -> None:
    done = forked(tmp_path, *line.split(), "-m", "./no-such-model")
    assert done.returncode == 2, done.stderr
    assert done.stdout == b""
    assert said in re.sub(r"[│\s]+", " ", done.stderr.decode())


def test_a_contrast_without_a_context(run: Any) -> None:
    done = run("score", "llama", TEXT, "--jsonl", "--explain", "gradient", "--contrast", "y")
    assert done.returncode == 2 and b"needs a context" in done.stderr
    done = run("score", "bert", TEXT, "--jsonl", "--explain", "gradient", "--contrast", "y")
    assert done.returncode == 2 and b"hidden in turn" in done.stderr


def test_on_a_terminal(forked: Program, small_model: Any, tmp_path: Path) -> None:
    args = ["-m", str(small_model("llama")), TEXT, "-n", "3", "--explain", "attention"]
    seat = Seat(forked, tmp_path, ["generate", *args], {"TERM": "xterm-256color"}, size=(40, 60))
    assert seat.ended() == 0
    shown = str(seat.screen.before)
    assert re.search(r"\x1b\[[0-9;]*48;", shown)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown))
    assert any(line.startswith("why ") and line.endswith("attention (mean)") for line in lines)
    assert any(line.startswith(" 0 t ") for line in lines)
    assert max(len(line) for line in lines if re.match(r" ?\d+ ", line)) <= 60


# --- the page


@pytest.fixture
def page(run: Any, tmp_path: Path) -> Path:
    done = run("score", "bert", TEXT, "--explain", "attention", "--html", "page.html")
    assert done.returncode == 0, done.stderr
    return tmp_path / "page.html"


def test_layers_and_heads_are_chosen_in_a_browser(run: Any, page: Path, tmp_path: Path) -> None:
    found = explanation(run("score", "bert", TEXT, "--jsonl", "--explain", "attention", "--attention", "all"))
    with opened(page, tmp_path / "browser") as seen:

        def told() -> list[float]:
            cells = "[...document.querySelectorAll('.grid td')]"
            values: list[float] = seen.value(f"{cells}.map(cell => +cell.dataset.note.split(': ').pop())")
            return values

        def flat(matrix: list[list[float]]) -> Any:
            return pytest.approx([value for row in matrix for value in row], abs=1e-3)

        assert told() == flat(found["matrix"])
        orange = seen.picture()
        for number in range(2):  # layer, head
            seen.value(f"document.querySelectorAll('select')[{number}].focus()")
            seen.press("ArrowDown", 2)
        assert told() == flat(found["layers"][1][1])
        assert seen.picture() != orange
        assert seen.value("document.getElementById('note').hidden")
        seen.point(".grid tbody tr:nth-child(3) td:nth-child(5)")
        row, column = found["queries"][2].strip(), found["tokens"][3].strip()
        note = seen.value("document.getElementById('note').innerText")
        assert re.fullmatch(rf"{re.escape(row)} looks at {re.escape(column)}: 0\.\d{{4}}", note)
        assert float(note.split()[-1]) == pytest.approx(found["layers"][1][1][2][3], abs=1e-3)
        assert not seen.value("document.getElementById('note').hidden")
        assert (seen.requests, seen.complaints) == ([page.as_uri()], [])
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(orange)).convert("RGB")
    colours = image.tobytes()
    assert sum(red > blue + 60 for red, blue in zip(colours[::3], colours[2::3], strict=True)) > 2000


def test_the_page_loads_nothing(page: Path) -> None:
    source = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|innerHTML", source)
    assert source.count("<script>") == 1
    assert source.count("<option") == 1 + 2 + 1 + 4  # mean and two layers, mean and four heads
