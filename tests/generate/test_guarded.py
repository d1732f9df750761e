"""Judged engines: what becomes of unsafe prompts and texts, over every way that text comes in pieces."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parts.endpoint import DONE, Stub, event, events
from parts.pieces import Pieces, answered
from parts.program import Program
from parts.shell import Seat

from textgen_cli.config import DecodingConfig, GenerateConfig, ModelConfig, SafetyConfig
from textgen_cli.errors import SafetyError, UsageError
from textgen_cli.events import Event, Notice, silent
from textgen_cli.generate.engines import open_engine
from textgen_cli.generate.guarded import GuardedEngine
from textgen_cli.generate.request import Request
from textgen_cli.text.safety import read_rules


def guarded(folder: Path, action: str, texts: dict[str, list[str]], **more: Any) -> tuple[Any, list[str]]:
    (folder / "words.txt").write_text("bad word\n你好\n")
    told: list[str] = []

    def report(event: Event) -> None:
        assert isinstance(event, Notice) and event.name == "W-UNSAFE"
        told.append(event.text)

    return GuardedEngine(Pieces(texts), read_rules([folder / "words.txt"]), action, report, **more), told


MATCH = {"where": "text", "list": "words.txt", "line": 1, "rule": "bad word", "start": 3, "end": 11}


def test_flag_leaves_the_text_as_it_flows(tmp_path: Path) -> None:
    engine, told = guarded(tmp_path, "flag", {"p": ["so bad word"], "q": ["good"]})
    (pieces, end), (_, other) = answered(engine, "p", "q")
    assert pieces == list("so bad word")
    assert end.extra["safety"] == {"unsafe": True, "matches": [MATCH]}
    assert other.extra["safety"] == {"unsafe": False, "matches": []}
    assert (end.finish_reason, end.logprobs) == ("stop", [{"token": "x"}])
    assert told == ["record 0: text matches words.txt:1"]


def test_redact_gives_out_nothing_of_a_match(tmp_path: Path) -> None:
    engine, _ = guarded(tmp_path, "redact", {"p": ["so bad word; bad wood 你好"]})
    ((pieces, end),) = answered(engine, "p")
    assert "".join(pieces) == "so ████████; bad wood ██"
    assert not any(piece in "bad word" for piece in pieces[3:4])
    assert (end.finish_reason, end.logprobs, len(end.extra["safety"]["matches"])) == ("stop", None, 2)


def test_drop_gives_no_text(tmp_path: Path) -> None:
    engine, told = guarded(tmp_path, "drop", {"p": ["so bad word and"], "q": ["good"]})
    (pieces, end), (other, _) = answered(engine, "p", "q")
    assert (pieces, end.finish_reason, end.logprobs, end.error) == ([], "filter", None, None)
    assert end.extra["safety"]["matches"] == [MATCH]
    assert other == ["good"]
    assert told == ["record 0: text matches words.txt:1"]
    engine, told = guarded(tmp_path, "drop", {"p": ["so bad word"]}, alone=True)
    ((pieces, end),) = answered(engine, "p")
    assert (pieces, told) == ([], [])
    assert isinstance(end.error, SafetyError) and end.error.exit_code == 6


@pytest.mark.parametrize(("bad", "text"), [(1, "fine"), (3, "fine"), (4, None)])
def test_retry_draws_again_and_then_drops(tmp_path: Path, bad: int, text: str | None) -> None:
    engine, _ = guarded(tmp_path, "retry", {"p": ["so bad word"] * bad + ["fine"], "q": ["good"]})
    (pieces, end), (other, other_end) = answered(engine, "p", "q")
    assert ("".join(pieces) or None, other) == (text, ["good"])
    assert end.finish_reason == ("stop" if text else "filter")
    assert end.extra["safety"]["draws"] == min(bad + 1, 4)
    assert "draws" not in other_end.extra["safety"]
    seeds = [request.seed for request in engine.engine.asked if request.prompt == "p"]
    assert len(set(seeds)) == len(seeds) == min(bad + 1, 4)


@pytest.mark.parametrize("action", ["flag", "redact", "drop", "retry"])
def test_an_unsafe_prompt(tmp_path: Path, action: str) -> None:
    engine, told = guarded(tmp_path, action, {"a bad word": ["x"], "a ████████": ["x"]})
    ((pieces, end),) = answered(engine, "a bad word")
    seen = [request.prompt for request in engine.engine.asked]
    assert seen == {"flag": ["a bad word"], "redact": ["a ████████"]}.get(action, [])
    assert (pieces, end.finish_reason) == ((["x"], "stop") if seen else ([], "filter"))
    assert end.extra["safety"]["matches"] == [MATCH | {"where": "prompt", "start": 2, "end": 10}]
    assert told == ([] if action == "redact" else ["record 0: prompt matches words.txt:1"])


def test_a_phrase_over_the_seam_counts_where_the_prompt_is_continued(tmp_path: Path) -> None:
    for continues in (True, False):
        engine, _ = guarded(tmp_path, "redact", {"a bad": [" word"]}, continues=continues)
        ((pieces, _),) = answered(engine, "a bad")
        assert "".join(pieces) == ("█████" if continues else " word")


def test_messages_are_judged_one_by_one(tmp_path: Path) -> None:
    engine, _ = guarded(tmp_path, "redact", {"None": ["fine"]})
    messages = ({"role": "system", "content": "be good"}, {"role": "user", "content": "你好?"})
    (*_, last) = engine.stream([Request(0, 0, None, messages, 1)])
    (found,) = last.final.extra["safety"]["matches"]
    assert (found["where"], found["message"], found["start"], found["end"]) == ("prompt", 1, 0, 2)
    assert [message["content"] for message in engine.engine.asked[0].messages] == ["be good", "██?"]


# --- the program


def frequent(texts: list[str]) -> str:
    """A string of two letters that some of these texts hold, and some do not."""
    grams: Counter[str] = Counter()
    for text in texts:
        grams.update({text[at : at + 2] for at in range(len(text) - 1)})
    return next(
        gram for gram, n in grams.most_common() if gram.isalpha() and gram.isascii() and n < len(texts)
    )


def records(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


@pytest.mark.slow
def test_a_batch_its_verdicts_and_resuming(
    forked: Program, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    common = ["generate", "-m", str(small_model("llama")), "--dtype", "float32", "-n", "6"]
    prompts = "".join(f"word {n}\n" for n in range(8)).encode()
    (tmp_path / "in.txt").write_bytes(prompts)
    plain = records(
        forked(tmp_path, *common, "--lines", "--jsonl", "--batch-size", "1", stdin=prompts).stdout
    )
    word = frequent([record["text"] for record in plain])
    (tmp_path / "list").write_text(f"re:{word}\n")
    hits = [re.search(word, record["text"], re.IGNORECASE) for record in plain]

    def job(action: str, out: str, *more: str) -> list[str]:
        read = ["--lines", "-i", "in.txt", "--batch-size", "1"]
        return [*common, *read, "-o", out, "--safety", "list", "--on-unsafe", action, *more]

    for action in ("flag", "redact", "drop", "retry"):
        done = forked(tmp_path, *job(action, action))
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    found = {a: records((tmp_path / a).read_bytes()) for a in ("flag", "redact", "drop", "retry")}
    for at, (old, hit) in enumerate(zip(plain, hits, strict=True)):
        flag, redact, drop, retry = (found[a][at] for a in ("flag", "redact", "drop", "retry"))
        assert flag["text"] == old["text"]
        assert flag["safety"]["unsafe"] == redact["safety"]["unsafe"] == bool(hit)
        assert redact["text"] == re.sub(f"(?i){word}", "██", old["text"])
        assert (drop["text"], drop["finish_reason"]) == (
            ("", "filter") if hit else (old["text"], old["finish_reason"])
        )
        assert not re.search(word, retry["text"], re.IGNORECASE)
        assert ("draws" in retry["safety"]) == bool(hit)
    assert any(record["text"] for record, hit in zip(found["retry"], hits, strict=True) if hit)
    # Broken off and gone on with it is the same, also where texts were drawn again; with another list it is refused.
    assert forked(tmp_path, *job("retry", "again", "--max-time", "0.000001")).returncode == 3
    (tmp_path / "list").write_text(f"re:{word}\n\n")
    refused = forked(tmp_path, *job("retry", "again", "--resume"))
    assert refused.returncode == 10 and b"guarding.safety was" in refused.stderr
    (tmp_path / "list").write_text(f"re:{word}\n")
    assert forked(tmp_path, *job("retry", "again", "--resume")).returncode == 0
    assert (tmp_path / "again").read_bytes() == (tmp_path / "retry").read_bytes()


@pytest.mark.slow
def test_one_prompt_without_jsonl(forked: Program, small_model: Callable[..., Path], tmp_path: Path) -> None:
    common = ["generate", "word", "-m", str(small_model("llama")), "--dtype", "float32", "-n", "12"]
    text = forked(tmp_path, *common).stdout.decode()
    word = frequent([text, ""])
    (tmp_path / "list").write_text(f"re:{word}\n")
    job = [*common, "--safety", "list", "--on-unsafe"]
    done = forked(tmp_path, *job, "flag")
    warned = b"textgen: warning: [W-UNSAFE] text matches list:1\n"
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, text, warned)
    done = forked(tmp_path, *job, "redact")
    assert (done.stdout.decode(), done.stderr) == (re.sub(f"(?i){word}", "██", text), b"")
    done = forked(tmp_path, *job, "drop")
    assert (done.returncode, done.stdout) == (6, b"")
    assert done.stderr == b"textgen: error: [E-UNSAFE] text: matches list:1\n"
    (tmp_path / "list").write_text("re:(\n")
    done = forked(tmp_path, *job, "flag", "-m", "/nonexistent")  # told before a model is looked for
    assert done.returncode == 2 and b"[E-SAFETY] list:1: pattern" in done.stderr
    done = forked(tmp_path, *job, "retry", "--greedy")
    assert done.returncode == 2 and b"[E-CONFLICT] --on-unsafe retry" in done.stderr


@pytest.mark.slow
def test_what_a_terminal_shows_of_a_server_that_streams(forked: Program, tmp_path: Path) -> None:
    """A phrase over several events: at no time does any of it stand on the terminal."""
    (tmp_path / "list").write_text("bad word\n你好\n")
    texts = ["so b", "ad", " wo", "rd, bad wo", "ol 你", "好!"]
    pieces: list[bytes | float] = [part for text in texts for part in (event(text), 0.1)]
    pieces += [event(finish="stop"), DONE]
    with Stub([events(*pieces)]) as stub:
        argv = ["generate", "p", "-m", "m", "--endpoint", stub.url]
        argv += ["--safety", "list", "--on-unsafe", "redact"]
        seat = Seat(forked, tmp_path, argv)
        code, shown = seat.ended(), str(seat.screen.before)
    assert code == 0, shown
    assert "so ████████, bad wool ██!" in shown
    assert "你" not in shown
    # What has been written stays in what was read, so a match that was taken back would stand here.
    assert "bad w" not in shown.replace("bad wool", "")


@pytest.mark.parametrize("architecture", ["t5", "bert", "llama"])
def test_drawing_again_needs_a_model_that_draws(
    small_model: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    """An encoder-decoder is used greedily unless it says otherwise, and a masked model draws nothing at all."""
    (tmp_path / "words.txt").write_text("word\n")
    config = GenerateConfig(
        model=ModelConfig(model=str(small_model(architecture)), dtype="float32", device="cpu"),
        decoding=DecodingConfig(set=("temperature=0",) if architecture == "llama" else ()),
        guarding=SafetyConfig(safety=(tmp_path / "words.txt",), on_unsafe="retry"),
    )
    with pytest.raises(UsageError, match="would draw the same text without sampling"):
        open_engine(config, 0, silent)
