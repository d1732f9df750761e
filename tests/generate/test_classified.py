"""A classifier that judges prompts and texts: its verdicts against transformers alone, and what becomes of them."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parts.endpoint import DONE, Stub, event, events
from parts.models import MOODS, TEXT
from parts.pieces import Pieces, answered

from textgen_cli.config import (
    BatchConfig,
    DecodingConfig,
    EndpointConfig,
    GenerateConfig,
    ModelConfig,
    SafetyConfig,
)
from textgen_cli.errors import ModelError, ResumeError, SafetyError, TextgenError, UsageError
from textgen_cli.events import silent
from textgen_cli.generate.classified import Classifier, classifier
from textgen_cli.generate.guarded import GuardedEngine
from textgen_cli.generate.run import run, run_batch
from textgen_cli.model.load import load
from textgen_cli.text.safety import Label, Rules, read_rules
from textgen_cli.text.segments import sentences

SmallModel = Callable[..., Path]
Shares = Callable[[str], dict[str, float]]


def settings(folder: Path | str, labels: str = "glad", threshold: float = 0.5, **more: Any) -> GenerateConfig:
    guarding = SafetyConfig(
        safety_model=str(folder), safety_labels=labels, safety_threshold=threshold, **more
    )
    return GenerateConfig(model=ModelConfig(device="cpu"), guarding=guarding)


def opened(config: GenerateConfig) -> Classifier:
    return classifier(load(config.judge(), "score", silent), config.guarding, silent)


def shares_of(folder: Path) -> Shares:
    """transformers' own probabilities of one text, by its rule for the model's kind."""
    net: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    judge: Any = transformers.pipeline(
        "text-classification", model=net, tokenizer=tokenizer, device="cpu", top_k=None
    )
    return lambda text: {one["label"]: one["score"] for one in judge([text])[0]}


@pytest.mark.parametrize("name", ["bert-classifier", "bert-multilabel", "bert-grade", "gpt2-classifier"])
def test_verdicts_are_those_of_the_pipeline(small_model: SmallModel, name: str) -> None:
    folder = small_model(name)
    labels = ["grade"] if name == "bert-grade" else list(MOODS.values())
    shares = shares_of(folder)
    judge = opened(settings(folder, ",".join(labels), 0.3))
    unsafe = 0
    for text in [*TEXT, *(word for line in TEXT for word in line.split()[:6])]:
        found, theirs = judge.judge(text), shares(text)
        assert found.probabilities == pytest.approx(theirs, abs=1e-5)
        told = [match.rule for match in found.matches]
        over = [label for label, share in theirs.items() if share >= 0.3]
        assert {rule.label for rule in told if isinstance(rule, Label)} == set(over)
        assert all((match.start, match.end) == (0, len(text)) for match in found.matches)
        unsafe += bool(found.matches)
    assert unsafe


def test_a_text_longer_than_the_model_takes_is_as_unsafe_as_its_worst_window(small_model: SmallModel) -> None:
    folder = small_model("bert-classifier")
    net: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    text = " ".join(TEXT * 6)
    windows = tokenizer(
        text, truncation=True, max_length=128, stride=63, return_overflowing_tokens=True, padding=False
    )["input_ids"]
    assert len(windows) > 4
    last = tokenizer(text, add_special_tokens=False)["input_ids"][-126:]
    rows = [*windows[:-1], [tokenizer.cls_token_id, *last, tokenizer.sep_token_id]]
    with torch.inference_mode():
        shares = [net(input_ids=torch.tensor([row])).logits.softmax(-1)[0] for row in rows]
    found = opened(settings(folder, "sad,glad,neither")).judge(text).probabilities
    assert list(found.values()) == pytest.approx(torch.stack(shares).amax(0).tolist(), abs=1e-5)


# --- what becomes of a verdict


Some = tuple[Path, str, str, str, float]


@pytest.fixture(name="some", scope="module")
def _some(small_model: SmallModel) -> Some:
    """A classifier, two safe sentences, an unsafe one, and the threshold between them."""
    folder = small_model("bert-classifier")
    shares = shares_of(folder)
    parts = [part.rstrip(".") + "." for line in TEXT for part in line.split(", ")]
    (_, safe), (low, other), *_, (high, unsafe) = sorted((shares(part)["glad"], part) for part in parts)
    assert high - low > 0.1
    return folder, safe, other, unsafe, (low + high) / 2


def guarded(some: Some, action: Any, texts: dict[str, list[str]], **more: Any) -> Any:
    folder, safe, other, unsafe, threshold = some
    judge = opened(settings(folder, "glad", threshold, on_unsafe=action))
    assert judge.judge(unsafe).matches
    assert not (judge.judge(safe).matches or judge.judge(other).matches)
    return GuardedEngine(Pieces(texts), Rules(), action, silent, judge, **more)


@pytest.mark.parametrize("action", ["flag", "redact", "drop", "retry"])
def test_what_becomes_of_texts(some: Some, action: str) -> None:
    """A safe one passes; an unsafe one flows, is hidden, is not given or is drawn again."""
    _, safe, other, unsafe, threshold = some
    engine = guarded(some, action, {safe: [unsafe, safe], other: [safe]}, continues=False)
    (pieces, end), (others, other_end) = answered(engine, safe, other)
    assert "".join(others) == safe and len(others) == (len(safe) if action == "flag" else 1)
    told = other_end.extra["safety"]
    assert not told["unsafe"] and 0 < told["probabilities"]["text"]["glad"] < threshold
    told = end.extra["safety"]
    if action == "retry":
        assert ("".join(pieces), told["draws"], told["unsafe"]) == (safe, 2, False)
        return
    assert told["probabilities"]["text"]["glad"] >= threshold
    (match,) = told["matches"]
    assert (match["where"], match["label"], match["start"], match["end"]) == ("text", "glad", 0, len(unsafe))
    assert match["model"] and match["probability"] == told["probabilities"]["text"]["glad"]
    expected = {"flag": unsafe, "redact": "█" * len(unsafe), "drop": ""}[action]
    assert "".join(pieces) == expected
    assert (end.finish_reason, end.logprobs) == (
        ("filter", None) if action == "drop" else ("stop", None if action == "redact" else [{"token": "x"}])
    )


def test_redact_hides_the_sentences_that_are_unsafe_and_gives_out_nothing_before(
    some: Some,
) -> None:
    """What is left of a text is safe by the classifier's own word, or there is none of it."""
    _, safe, other, unsafe, _ = some
    engine = guarded(some, "redact", {}, continues=False)
    stayed = 0
    for text in (
        f"{safe} {unsafe}",
        f"{unsafe} {safe}",
        f"{other} {unsafe} {safe}",
        f"{unsafe}\n{safe} {other}",
    ):
        found = engine.classifier.judge(text, blocks=True)
        if not found.matches:
            continue
        spans = {(match.start, match.end) for match in found.matches}
        kept = " ".join(text[a:b] for a, b in sentences(text) if not any(s <= a and b <= e for s, e in spans))
        assert not kept or not engine.classifier.judge(kept).matches
        engine = guarded(some, "redact", {safe: [text]}, continues=False)
        ((pieces, _),) = answered(engine, safe)
        assert len(pieces) == 1 and pieces[0].replace("█", "").split() == kept.split()
        stayed += bool(kept)
    assert stayed, "no text had a sentence that could stay"


def test_a_text_is_judged_behind_its_prompt_too(some: Some) -> None:
    folder, safe, *_ = some
    judge = opened(settings(folder, "glad"))
    text = " and some more"
    both = judge.judge(safe + text).probabilities["glad"]
    alone = judge.judge(text).probabilities["glad"]
    assert judge.judge(text, safe).probabilities["glad"] == max(alone, both) != min(alone, both)


@pytest.mark.parametrize("action", ["flag", "redact", "drop"])
def test_an_unsafe_prompt(some: Some, action: str) -> None:
    _, safe, _, unsafe, _ = some
    engine = guarded(some, action, {unsafe: [safe], "█" * len(unsafe): [safe]})
    ((pieces, end),) = answered(engine, unsafe)
    seen = [request.prompt for request in engine.engine.asked]
    assert seen == {"flag": [unsafe], "redact": ["█" * len(unsafe)], "drop": []}[action]
    assert "".join(pieces) == ("" if action == "drop" else safe)
    (match,) = end.extra["safety"]["matches"]
    assert (match["where"], match["start"], match["end"]) == ("prompt", 0, len(unsafe))


def test_a_text_that_cannot_be_judged_does_not_pass(some: Some) -> None:
    _, safe, other, _, _ = some
    engine = guarded(some, "drop", {safe: [other[:-1]]}, continues=False)
    net = engine.classifier._model.net
    with torch.no_grad():
        net.classifier.bias.fill_(torch.nan)
    ((pieces, end),) = answered(engine, safe)  # which has been judged
    assert pieces == [] and isinstance(end.error, ModelError) and end.error.name == "E-NAN"


# --- refused before anything is generated


@pytest.mark.parametrize(
    ("model", "labels", "code", "says"),
    [
        ("llama", "glad", "E-FAMILY", "is a causal model, no sequence classifier"),
        ("bert-tagger", "B-PER", "E-FAMILY", "is a token-classification model"),
        ("bert-regression", "grade", "E-FAMILY", "no probabilities"),
        ("bert-classifier", "glad,toxic", "E-LABEL", "--safety-labels toxic: is no label of"),
    ],
)
def test_models_and_labels_that_cannot_judge(
    small_model: SmallModel, model: str, labels: str, code: str, says: str
) -> None:
    config = settings(small_model(model), labels)
    with pytest.raises(UsageError, match=says) as caught:
        run(replace(config, model=ModelConfig(model="/nonexistent")), "p", silent).__next__()
    assert caught.value.name == code
    assert code != "E-LABEL" or caught.value.hint == "its labels: sad, glad, neither"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"safety_model": "m"}, "--safety-model: needs --safety-labels"),
        ({"safety_model": "m", "safety_labels": " , "}, "--safety-model: needs --safety-labels"),
        ({"safety_labels": "a"}, "--safety-labels: needs --safety-model"),
        ({"safety_threshold": 0.9}, "--safety-threshold: needs --safety-model"),
        (
            {"safety_model": "m", "safety_labels": "a", "safety_threshold": 0},
            "--safety-threshold: must be > 0",
        ),
        ({"safety_model": "m", "safety_labels": "a", "safety_threshold": 1.01}, "<= 1, not 1.01"),
        ({"on_unsafe": "drop"}, "--on-unsafe: needs --safety FILE or --safety-model"),
    ],
)
def test_options_that_contradict(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        SafetyConfig(**given)


# --- the whole flow


def batch(config: GenerateConfig, folder: Path, **more: Any) -> list[dict[str, Any]]:
    config = replace(
        config, batch=BatchConfig(input=folder / "in.txt", lines=True, output=folder / "out.jsonl", **more)
    )
    run_batch(config, None, io.BytesIO(), silent)
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_a_batch_is_judged_and_not_gone_on_with_under_another_judge(
    small_model: SmallModel, some: Some, tmp_path: Path
) -> None:
    folder, safe, _, unsafe, threshold = some
    (tmp_path / "in.txt").write_text(f"{safe}\n{unsafe}\n")
    config = replace(
        settings(folder, "glad", threshold, on_unsafe="drop"),
        model=ModelConfig(model=str(small_model("tiny")), dtype="float32"),
        decoding=DecodingConfig(max_new_tokens=4),
    )
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/in.txt").write_text(f"{safe}\n{unsafe}\n")
    first, second = whole = batch(config, tmp_path / "whole", batch_size="1")
    assert first["safety"]["probabilities"]["prompt"]["glad"] < threshold
    assert (second["text"], second["finish_reason"], second["prompt_tokens"]) == ("", "filter", None)
    run_batch(
        replace(
            config,
            batch=BatchConfig(
                input=tmp_path / "in.txt", lines=True, output=tmp_path / "out.jsonl", batch_size="1", max_time=1e-6
            ),
        ),
        None, io.BytesIO(), silent,
    )  # fmt: skip
    changes: dict[str, Any] = {
        "safety_threshold": 0.9,
        "safety_labels": "sad",
        "safety_model": str(small_model("bert-multilabel")),
    }
    for name, value in changes.items():
        other = replace(config, guarding=replace(config.guarding, **{name: value}))
        with pytest.raises(ResumeError, match=f"guarding.{name} was"):
            batch(other, tmp_path, batch_size="1", resume=True)
    assert batch(config, tmp_path, batch_size="1", resume=True) == whole


@pytest.mark.parametrize("action", ["flag", "redact", "drop"])
def test_a_server_is_judged_here(some: Some, action: Any) -> None:
    """Its answer comes in events; nothing of it is given before it is judged, unless it is only flagged."""
    folder, safe, _, unsafe, threshold = some
    pieces = [event(unsafe[at : at + 9]) for at in range(0, len(unsafe), 9)]
    with Stub([events(*pieces, event(finish="stop"), DONE)]) as stub:
        config = replace(
            settings(folder, "glad", threshold, on_unsafe=action),
            model=ModelConfig(model="m"),
            endpoint=EndpointConfig(endpoint=stub.url),
        )
        given: list[str] = []
        error: TextgenError | None = None
        try:
            for chunk in run(config, safe, silent):
                given += [chunk.text] if chunk.text else []
        except SafetyError as caught:
            error = caught
    assert "".join(given) == {"flag": unsafe, "redact": "█" * len(unsafe), "drop": ""}[action]
    assert len(given) == {"flag": len(pieces), "redact": 1, "drop": 0}[action]
    assert (error is None) == (action != "drop")
    if error is not None:
        assert (error.name, error.exit_code) == ("E-UNSAFE", 6) and "glad (0." in error.fact


def test_lists_and_a_classifier_judge_together(some: Some, tmp_path: Path) -> None:
    _, safe, _, unsafe, _ = some
    (tmp_path / "words").write_text(unsafe.split()[-1].rstrip(".") + "\n")
    engine = guarded(some, "flag", {safe: [unsafe]}, continues=False)
    engine = replace(engine, rules=read_rules([tmp_path / "words"]))
    ((_, end),) = answered(engine, safe)
    by_list, by_model = end.extra["safety"]["matches"]
    assert by_list["list"] == "words" and by_model["label"] == "glad"
    assert isinstance(engine.classifier, Classifier)
