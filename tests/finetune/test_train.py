"""A training gives what the library's own script gives; the best is kept; the folder tells and holds what it should."""

import getpass
import json
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parts.models import CHAT_TEMPLATE
from parts.training import EXAMPLES, configured, prepared
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from textgen_cli.config import ModelConfig
from textgen_cli.config.finetune import TrainingConfig
from textgen_cli.errors import TextgenError, UsageError
from textgen_cli.events import Event, Measured, Progress, silent
from textgen_cli.finetune.plan import batch_rows
from textgen_cli.finetune.run import fit
from textgen_cli.model.load import load

pytestmark = pytest.mark.slow

ARCHITECTURES = {
    "clm": "llama", "chat": "llama", "mlm": "bert", "seq2seq": "t5", "text-classification": "bert",
    "token-classification": "bert", "question-answering": "bert",
}  # fmt: skip
AUTO = {
    "clm": "AutoModelForCausalLM", "chat": "AutoModelForCausalLM", "mlm": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM", "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}  # fmt: skip
Small = Callable[..., Path]


def measured(events: list[Event], name: str) -> list[float]:
    return [e.values[name] for e in events if isinstance(e, Measured) and name in e.values]


def test_the_loss_curve_is_that_of_a_plain_script(small_model: Small, tmp_path: Path) -> None:
    model, length = small_model("gpt2"), 32
    data = prepared("clm", 60)
    events: list[Event] = []
    settings = {"epochs": 1, "learning_rate": 1e-3, "seed": 11, "accumulate": 2}
    config = configured(
        model, tmp_path / "out", training=settings, data={"max_length": length, "pack": False}
    )
    fit(config, [], _of_one_length(data, length), events.append)

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    blocks = []
    for text in _of_one_length(data, length).train["text"]:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        blocks += [ids[at : at + length] for at in range(0, len(ids), length)]
    rows = [{"input_ids": b, "attention_mask": [1] * len(b), "labels": b} for b in blocks if len(b) == length]
    assert len(rows) == len(blocks) > 20
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "plain"), per_device_train_batch_size=4, gradient_accumulation_steps=2,
        num_train_epochs=1, learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=0.03, seed=11,
        logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    transformers.set_seed(11)
    net = transformers.AutoModelForCausalLM.from_pretrained(model)
    plain = Trainer(net, arguments, train_dataset=rows)
    plain.train()
    theirs = [line["loss"] for line in plain.state.log_history if "loss" in line]
    ours = measured(events, "loss")
    assert len(ours) == len(theirs) > 5
    assert ours == pytest.approx(theirs, abs=1e-6)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in net.state_dict().items():
        if name in weights:
            torch.testing.assert_close(weights[name], value, atol=1e-6, rtol=0)


def _of_one_length(data: Any, length: int) -> Any:
    """The same examples, each of exactly so many tokens with its end."""
    import dataclasses

    import datasets

    rows = [{"text": chr(97 + number % 26) * (length - 1)} for number in range(60)]
    return dataclasses.replace(data, train=datasets.Dataset.from_list(_alike(rows, length)), valid=None)


def _alike(rows: list[dict[str, str]], length: int) -> list[dict[str, str]]:
    """Digits and capitals stand in no word of the tokenizer's texts: each is a token of its own."""
    signs = "QWRYUXZ#$%"
    return [
        {"text": "".join(signs[(n * 7 + i * i) % len(signs)] for i in range(length - 1))}
        for n in range(len(rows))
    ]


@pytest.mark.parametrize("task", EXAMPLES)
def test_every_task_learns_and_loads_with_the_plain_library(
    task: str, small_model: Small, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = small_model(ARCHITECTURES[task], template=CHAT_TEMPLATE if task == "chat" else None)
    events: list[Event] = []
    capfd.readouterr()
    out = fit(
        configured(model, tmp_path / "out", training={"epochs": 6, "learning_rate": 3e-3}),
        [],
        prepared(task),
        events.append,
    )
    assert capfd.readouterr() == ("", "")
    losses = measured(events, "eval_loss")
    assert losses[-1] < losses[0]
    assert [e.done for e in events if isinstance(e, Progress) and e.stage == "train"][-1] == measured_steps(
        events
    )
    transformers.AutoTokenizer.from_pretrained(out)
    net, info = getattr(transformers, AUTO[task]).from_pretrained(out, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert net.config.architectures
    ours = load(ModelConfig(model=str(out)), "score", silent)
    assert ours.stamp is not None and ours.stamp.task == task


def test_an_encoder_decoder_from_scratch_loads_and_generates_with_the_plain_library(tmp_path: Path) -> None:
    way = {"from_scratch": "tiny", "vocab_size": 400}
    config = configured(tmp_path, tmp_path / "out", way=way, training={"epochs": 1})
    out = fit(config, [], prepared("seq2seq"), silent)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    net, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    source = tokenizer(EXAMPLES["seq2seq"](1)["source"], return_tensors="pt")
    found = net.generate(**source, max_new_tokens=8, do_sample=False)[0].tolist()
    assert found[0] == tokenizer.pad_token_id and len(found) > 1
    model = load(ModelConfig(model=str(out)), "generate", silent)
    assert (model.family, model.context) == ("seq2seq", 1024)


def test_a_base_without_settings_of_decoding_still_generates(small_model: Small, tmp_path: Path) -> None:
    """config.json alone says then which token the decoder begins with."""
    base = small_model("t5")
    assert not (base / "generation_config.json").exists()
    out = fit(configured(base, tmp_path / "out", training={"max_steps": 1}), [], prepared("seq2seq"), silent)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    net = transformers.AutoModelForSeq2SeqLM.from_pretrained(out)
    source = tokenizer("Once upon a time", return_tensors="pt")
    begin = net.config.decoder_start_token_id
    assert net.generate(**source, max_new_tokens=4, do_sample=False)[0, 0] == begin == 1
    own, kept = (
        load(ModelConfig(model=str(folder)), "generate", silent).generation for folder in (base, out)
    )
    assert {k: v for k, v in kept.items() if "token" in k} == {k: v for k, v in own.items() if "token" in k}


def measured_steps(events: list[Event]) -> int:
    return max(e.step for e in events if isinstance(e, Measured))


@pytest.mark.parametrize("way", [{}, {"lora": 2}, {"from_scratch": "tiny", "vocab_size": 400}])
def test_a_finished_folder_tells_nothing_of_the_machine(
    way: dict[str, Any], small_model: Small, tmp_path: Path
) -> None:
    out = fit(configured(small_model("llama"), tmp_path / "out", way=way), [], prepared("clm"), silent)
    content = b"".join(path.read_bytes() for path in sorted(out.rglob("*")) if path.name != "tokenizer.json")
    for secret in (str(tmp_path), str(Path.home()), str(Path.cwd()), "training_args"):
        assert secret.encode() not in content
    for secret in (socket.gethostname(), getpass.getuser()):
        assert len(secret) < 6 or secret.encode() not in content
    assert {path.suffix for path in out.iterdir()} <= {
        ".json",
        ".jsonl",
        ".safetensors",
        ".md",
        ".html",
        ".jinja",
    }
    assert list(tmp_path.iterdir()) == [out]


def test_the_best_is_kept_and_not_the_last(small_model: Small, tmp_path: Path) -> None:
    events: list[Event] = []
    wild = {  # the rate grows to the end, far beyond what can be learnt with
        "epochs": 10,
        "learning_rate": 1.0,
        "schedule": "constant_with_warmup",
        "warmup": 60.0,
        "eval_steps": 2,
        "keep": 1,
    }
    out = fit(
        configured(small_model("gpt2"), tmp_path / "out", training=wild), [], prepared("clm"), events.append
    )
    found = measured(events, "eval_loss")[1:]
    assert min(found) < found[-1] - 1
    net = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    nats, tokens = 0.0, 0
    for text in prepared("clm").valid["text"]:  # type: ignore[index]
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])[:, :128]
        with torch.no_grad():
            nats += float(net(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert math.exp(nats / tokens) == pytest.approx(min(measured(events, "eval_perplexity")[1:]), rel=0.05)


def test_of_equal_figures_the_lower_loss_is_the_best(small_model: Small, tmp_path: Path) -> None:
    """With few held-out examples the accuracy stands still for long, while the network still learns."""
    events: list[Event] = []
    slow = {"epochs": 2, "learning_rate": 2e-5, "eval_steps": 4, "schedule": "constant", "patience": 1}
    config = configured(small_model("bert"), tmp_path / "out", training=slow)
    out = fit(config, [], prepared("text-classification"), events.append)
    losses, right = measured(events, "eval_loss")[1:], measured(events, "eval_accuracy")[1:]
    assert len(losses) == 3, "a lower loss is a better evaluation, so patience does not end it"
    assert len(set(right)) == 1 and losses[-1] == min(losses)
    net = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    again = []
    for example in prepared("text-classification").valid:  # type: ignore[union-attr]
        label = torch.tensor([net.config.label2id[example["label"]]])
        with torch.no_grad():
            again.append(float(net(**tokenizer(example["text"], return_tensors="pt"), labels=label).loss))
    assert sum(again) / len(again) == pytest.approx(min(losses), rel=1e-3)


def test_it_stops_when_it_gets_no_better(small_model: Small, tmp_path: Path) -> None:
    events: list[Event] = []
    wild = {"epochs": 50, "learning_rate": 0.3, "schedule": "constant", "eval_steps": 1, "patience": 2}
    fit(configured(small_model("gpt2"), tmp_path / "out", training=wild), [], prepared("clm"), events.append)
    found = measured(events, "eval_loss")[1:]
    best = found.index(min(found))
    assert len(found) == best + 1 + 2


def test_it_goes_on_as_long_as_it_gets_better(small_model: Small, tmp_path: Path) -> None:
    events: list[Event] = []
    settings = {"epochs": 3, "learning_rate": 1e-3, "patience": 1}
    fit(
        configured(small_model("llama"), tmp_path / "out", training=settings),
        [],
        prepared("clm"),
        events.append,
    )
    assert len(measured(events, "eval_loss")) == 1 + 3


def test_it_stops_in_time(small_model: Small, tmp_path: Path) -> None:
    events: list[Event] = []
    settings = {"epochs": 100_000, "max_time": 1.0}
    out = fit(
        configured(small_model("tiny"), tmp_path / "out", training=settings),
        [],
        prepared("clm"),
        events.append,
    )
    assert 0 < measured_steps(events) < 5000 and (out / "model.safetensors").is_file()


def test_figures_stand_in_a_file_line_by_line(small_model: Small, tmp_path: Path) -> None:
    out = fit(configured(small_model("llama"), tmp_path / "out"), [], prepared("clm"), silent)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0 and "eval_loss" in lines[0]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch"} <= lines[1].keys()
    seen = [line["tokens"] for line in lines]
    assert seen[0] == 0 and seen == sorted(seen) and seen[-1] == 2 * seen[len(seen) // 2]


def test_accumulated_batches_weigh_as_much_as_one(small_model: Small, tmp_path: Path) -> None:
    """Of an encoder too, whose loss takes no number of tokens."""
    found = []
    for accumulate, batch in ((1, "8"), (4, "2")):
        events: list[Event] = []
        settings = {"max_steps": 1, "batch_size": batch, "accumulate": accumulate}
        config = configured(small_model("bert"), tmp_path / str(accumulate), training=settings)
        fit(config, [], prepared("text-classification", 8, 0), events.append)
        found.append(measured(events, "loss")[0])
    assert found[0] == pytest.approx(found[1], rel=0.1)


@pytest.mark.parametrize(
    ("asked", "lengths", "kind", "rows"),
    [
        ("7", [10], "cpu", 7),
        ("auto", [1024] * 10, "cpu", 2),
        ("auto", [1024] * 10, "cuda", 16),
        ("auto", [10] * 10, "cpu", 32),
        ("auto", [5000] * 10, "cpu", 1),
        ("auto", [300], "cpu", 4),
    ],
)
def test_batches_fit(asked: str, lengths: list[int], kind: str, rows: int) -> None:
    assert batch_rows(TrainingConfig(batch_size=asked), lengths, kind) == rows


def test_what_cannot_be_obeyed_is_said_first(small_model: Small, tmp_path: Path) -> None:
    for name, kind, settings in (
        ("E-RANGE", UsageError, {"data": {"max_length": 4096}}),
        ("E-TRACKER", UsageError, {"training": {"report_to": "nosuch"}}),
        ("E-DTYPE", UsageError, {"base": {"dtype": "float16"}}),
        ("E-PRESET", UsageError, {"way": {"from_scratch": "huge"}}),
        ("E-TARGETS", UsageError, {"way": {"lora": 2, "lora_targets": "q_proj,nonsense"}}),
        ("E-RANGE", UsageError, {"way": {"freeze": 9}}),
    ):
        with pytest.raises(TextgenError, match=name) as caught:
            fit(
                configured(small_model("llama"), tmp_path / "out", **settings),
                [],
                prepared("clm"),
                silent,
            )
        assert isinstance(caught.value, kind)
        assert not list(tmp_path.glob("out*")), "what hinders the next try"
