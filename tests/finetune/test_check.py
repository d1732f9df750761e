"""`prepare`: every row is read before a weight is, what is bad is told, what is good is split and measured."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from parts.models import CHAT_TEMPLATE

from textgen_cli.config import ModelConfig
from textgen_cli.config.finetune import DataConfig, FinetuneConfig, TrainingConfig, WayConfig
from textgen_cli.errors import InputError, OutputError, UsageError
from textgen_cli.events import Event, Notice, silent
from textgen_cli.finetune.check import checked, refusal
from textgen_cli.finetune.prepared import Prepared
from textgen_cli.finetune.spool import working_folder
from textgen_cli.model.anatomy import context_of

SmallModel = Callable[..., Path]
Prepare = Callable[..., Prepared]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def prepare(small_model: SmallModel, folder: Path) -> Iterator[Prepare]:
    """prepare(*files, model="bert", told=[], **settings of data) -> Prepared, whose files live as long as the test."""
    stack = ExitStack()

    def get(*files: Path, model: str = "bert", told: list[Event] | None = None, **settings: Any) -> Prepared:
        training = TrainingConfig(
            **{k: settings.pop(k) for k in ("seed", "batch_size", "epochs") if k in settings}
        )
        where = ModelConfig(model=str(small_model(model, CHAT_TEMPLATE)), cache_dir=folder, device="cpu")
        config = FinetuneConfig(model=where, data=DataConfig(**settings), training=training)
        report = silent if told is None else told.append
        return stack.enter_context(checked(config, files, report))

    with stack:
        yield get


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reviews(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"text": f"text {n}", "label": "bad" if n % 4 == 0 else "good"} for n in range(start, start + count)
    ]


def notices(told: list[Event], name: str) -> list[str]:
    return [event.text for event in told if isinstance(event, Notice) and event.name == name]


# ---- what comes out


def test_examples_keep_their_order_and_labels_their_shares(tmp_path: Path, prepare: Prepare) -> None:
    rows = reviews(200)
    told: list[Event] = []
    found = prepare(write(tmp_path / "a.jsonl", rows), told=told, valid_share=0.1)
    assert (found.task, found.problem) == ("text-classification", "single_label_classification")
    assert found.labels == ("bad", "good")
    assert found.valid is not None
    assert Counter(found.valid["label"]) == {"good": 15, "bad": 5}
    kept = [row | {"pair": ""} for row in rows]
    assert [row for row in kept if row in list(found.train)] == list(found.train)
    assert sorted(map(str, [*found.train, *found.valid])) == sorted(
        str({"text": r["text"], "pair": "", "label": r["label"]}) for r in rows
    )
    assert notices(told, "hint") == [
        "task: text-classification from text, label",
        "labels: 2 names: bad, good",
    ]


def test_the_order_of_files_does_not_change_what_is_held_out(tmp_path: Path, prepare: Prepare) -> None:
    one, two = write(tmp_path / "1.jsonl", reviews(90)), write(tmp_path / "2.jsonl", reviews(70, 90))
    forth, back, other = prepare(one, two), prepare(two, one), prepare(one, two, seed=5)
    assert forth.valid is not None and back.valid is not None and other.valid is not None
    assert sorted(forth.valid["text"]) == sorted(back.valid["text"]) != sorted(other.valid["text"])
    assert forth.sha256 != back.sha256  # the order of training is another
    assert forth.sha256 == prepare(one, two).sha256
    assert forth.sha256 != prepare(one, two, valid_share=0.2).sha256


def test_one_changed_letter_is_other_data(tmp_path: Path, prepare: Prepare) -> None:
    rows = reviews(5)
    before = prepare(write(tmp_path / "a.jsonl", rows)).sha256
    assert prepare(write(tmp_path / "b.jsonl", rows)).sha256 == before  # the file's name is no part of it
    rows[3]["text"] += "."
    assert prepare(write(tmp_path / "a.jsonl", rows)).sha256 != before


def test_files_of_held_out_data_replace_the_split(tmp_path: Path, prepare: Prepare) -> None:
    told: list[Event] = []
    valid = write(tmp_path / "valid.jsonl", [*reviews(2, 500), {"text": "text 1", "label": "odd"}])
    found = prepare(write(tmp_path / "a.jsonl", reviews(40)), valid=(valid,), told=told)
    assert len(found.train) == 40
    assert found.valid is not None and len(found.valid) == 3
    assert found.labels == ("bad", "good", "odd")
    assert notices(told, "W-LEAK") == ["1 of 3 held-out examples are among those learnt"]
    assert notices(told, "W-LABELS") == ["labels of held-out examples alone, which cannot be learnt: odd"]


@pytest.mark.parametrize(
    ("labels", "problem", "expected"),
    [
        ([["a"], ["b", "a"], [], ["b"]], "multi_label_classification", ["a"]),
        ([n / 7 for n in range(1, 30)], "regression", 1 / 7),
        (list(range(30)), "single_label_classification", "0"),
    ],
)
def test_labels_have_the_type_of_their_problem(
    tmp_path: Path, prepare: Prepare, labels: list[Any], problem: str, expected: Any
) -> None:
    rows = [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]
    found = prepare(write(tmp_path / "a.jsonl", rows), valid_share=0)
    assert (found.problem, found.train[0]["label"], found.valid) == (problem, expected, None)
    assert found.labels == (
        () if problem == "regression" else tuple(sorted({str(x) for y in labels for x in _each(y)}))
    )


def _each(label: Any) -> list[Any]:
    return label if isinstance(label, list) else [label]


def test_text_alone_is_for_the_kind_of_model(tmp_path: Path, prepare: Prepare) -> None:
    (tmp_path / "a.txt").write_text("one two\n\nthree\n")
    assert prepare(tmp_path / "a.txt").task == "mlm"
    assert prepare(tmp_path / "a.txt", model="llama").task == "clm"
    assert prepare(tmp_path / "a.txt", task="clm").task == "clm"


def test_a_context_is_on_one_side_only(tmp_path: Path, prepare: Prepare) -> None:
    rows = [
        {
            "question": f"q {n}?",
            "context": f"Ada {n % 10}",
            "answers": [{"text": "Ada", "start": 0}] if n % 2 else [],
        }
        for n in range(100)
    ]
    found = prepare(write(tmp_path / "a.jsonl", rows), valid_share=0.2)
    assert found.valid is not None and len(found.valid) == 20
    assert not set(found.train["context"]) & set(found.valid["context"])
    assert found.facts["unanswerable"] == 50


def test_standard_input_is_data(tmp_path: Path, prepare: Prepare) -> None:
    receiver, sender = os.pipe()
    rows = "".join(json.dumps(row) + "\n" for row in reviews(3000)).encode()  # more than a pipe holds

    def feed() -> None:
        with open(sender, "wb") as pipe:  # noqa: PTH123 - a descriptor has no path
            pipe.write(rows)

    thread = threading.Thread(target=feed)
    saved = os.dup(0)
    os.dup2(receiver, 0)
    thread.start()
    try:
        found = prepare(Path("-"))
    finally:
        thread.join()
        os.dup2(saved, 0)
        for descriptor in (saved, receiver):
            os.close(descriptor)
    assert len(found.train) + len(found.valid or ()) == 3000
    assert found.facts["files"] == {"stdin": {"rows": 3000, "bad": 0}}
    assert found.sha256 == prepare(write(tmp_path / "a.jsonl", reviews(3000))).sha256
    with pytest.raises(UsageError, match="read once"):
        prepare(Path("-"), valid=(Path("-"),))


# ---- what is bad


def test_bad_rows_stop_it_and_are_told(tmp_path: Path, prepare: Prepare) -> None:
    rows = reviews(100) + [{"text": "", "label": "good"}] * 30
    path = write(tmp_path / "a.jsonl", rows)
    told: list[Event] = []
    with pytest.raises(InputError) as caught:
        prepare(path, told=told, skip_bad=29)
    error = caught.value
    assert (error.name, error.exit_code) == ("E-DATA", 4)
    assert error.fact == "30 of 130 are bad, the first at line 101: text is empty"
    assert error.hint == "mend them, or leave them out with --skip-bad 30"
    assert notices(told, "W-ROW") == [
        *(f"{path}: line {number}: text is empty" for number in range(101, 121)),
        "10 more rows are bad",
    ]


def test_skipped_rows_are_left_out_and_told(tmp_path: Path, prepare: Prepare) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"text": "a", "label": "x"}) + "\n{broken\n" + json.dumps({"text": "b", "label": "y"})
    )
    told: list[Event] = []
    found = prepare(path, told=told, skip_bad=1)
    assert found.train["text"][:] == ["a", "b"]
    assert notices(told, "W-SKIPPED") == ["1 of 3 rows are bad and left out"]
    assert found.facts["bad_rows"] == 1
    (bad,) = found.facts["bad"]
    assert (bad["file"], bad["place"]) == ("a.jsonl", "line 2")


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "no rows"), ("\n\n", "no rows"), ("{broken\n[]\n", "no row is usable: all 2 are bad")],
)
def test_nothing_usable(tmp_path: Path, prepare: Prepare, content: str, says: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=says) as caught:
        prepare(tmp_path / "a.jsonl", skip_bad=100)
    assert (caught.value.name, caught.value.subject) == ("E-EMPTY", "a.jsonl")


def test_nothing_usable_among_the_fields_or_the_held_out_files(tmp_path: Path, prepare: Prepare) -> None:
    bad = write(tmp_path / "bad.jsonl", [{"text": "", "label": "x"}])
    with pytest.raises(InputError, match="all 1 are bad"):
        prepare(bad, skip_bad=1)
    with pytest.raises(InputError, match="all 1 are bad") as caught:
        prepare(write(tmp_path / "good.jsonl", reviews(9)), valid=(bad,), skip_bad=1)
    assert caught.value.subject == "bad.jsonl"


def test_an_empty_file_among_others_is_told(tmp_path: Path, prepare: Prepare) -> None:
    told: list[Event] = []
    prepare(write(tmp_path / "none.jsonl", []), write(tmp_path / "a.jsonl", reviews(9)), told=told)
    assert notices(told, "W-EMPTY") == ["none.jsonl holds no rows"]
    told.clear()
    with pytest.raises(InputError, match="no rows") as caught:
        prepare(tmp_path / "none.jsonl", valid=(tmp_path / "a.jsonl",), told=told)
    assert (caught.value.subject, notices(told, "W-EMPTY")) == ("none.jsonl", [])


def test_one_row_is_enough(tmp_path: Path, prepare: Prepare) -> None:
    told: list[Event] = []
    found = prepare(write(tmp_path / "a.jsonl", reviews(1)), told=told)
    assert (len(found.train), found.valid) == (1, None)
    assert len(notices(told, "W-VALID")) == len(notices(told, "W-LABELS")) == 1


def test_an_example_that_is_too_long(tmp_path: Path, prepare: Prepare) -> None:
    path = write(tmp_path / "a.jsonl", [*reviews(20), {"text": "word " * 300, "label": "good"}])
    with pytest.raises(InputError) as caught:
        prepare(path, valid_share=0)
    assert caught.value.name == "E-CONTEXT"
    assert caught.value.fact.startswith("1 examples have more than 128 tokens, the longest ")
    assert caught.value.fact.endswith("(a.jsonl, line 21)")
    assert prepare(path, truncate=True).facts["tokens"]["over"] == 1
    with pytest.raises(UsageError, match="--max-length"):
        prepare(path, max_length=129)


def test_text_is_cut_into_windows_and_never_too_long(tmp_path: Path, prepare: Prepare) -> None:
    found = prepare(write(tmp_path / "a.jsonl", [{"text": "word " * 1000}]), model="llama")
    size = found.facts["tokens"]["max"]
    assert size > 128
    assert found.facts["steps"]["rows"] == -(-size // 128)
    assert found.facts["tokens"]["epoch"] == size


def test_a_check_tells_the_facts_and_why_no_training_may_begin(tmp_path: Path, prepare: Prepare) -> None:
    path = write(tmp_path / "a.jsonl", [*reviews(50), {"text": 7, "label": "x"}])
    found = prepare(path, check=True)
    error = refusal(found.facts, DataConfig())
    assert error is not None and error.name == "E-DATA"
    assert refusal(found.facts, DataConfig(skip_bad=1)) is None
    assert json.loads(json.dumps(found.facts, allow_nan=False)) == found.facts
    assert found.facts["rows"] == 51
    assert found.facts["labels"] == {"good": 37, "bad": 13}
    assert list(found.facts["labels"]) == ["good", "bad"]
    assert str(tmp_path) not in json.dumps(found.facts)


def test_two_files_of_one_name_are_told_apart(tmp_path: Path, prepare: Prepare) -> None:
    (tmp_path / "b").mkdir()
    found = prepare(write(tmp_path / "a.jsonl", reviews(3)), write(tmp_path / "b/a.jsonl", reviews(4, 3)))
    assert found.facts["files"] == {
        "a.jsonl (1)": {"rows": 3, "bad": 0},
        "a.jsonl (2)": {"rows": 4, "bad": 0},
    }


# ---- figures


def test_lengths_are_those_of_the_models_own_tokenizer(
    tmp_path: Path, prepare: Prepare, small_model: SmallModel
) -> None:
    rows = [{"text": "fox " * (n % 17 + 1), "label": n % 2} for n in range(150)]
    found = prepare(write(tmp_path / "a.jsonl", rows), valid_share=0, batch_size="8", epochs=2)
    own = transformers.AutoTokenizer.from_pretrained(small_model("bert", CHAT_TEMPLATE))
    sizes = [len(ids) for ids in own([row["text"] for row in rows])["input_ids"]]
    tokens = found.facts["tokens"]
    for p in (50, 90, 99):
        assert tokens[f"p{p}"] == np.percentile(sizes, p, method="inverted_cdf")
    assert (tokens["max"], tokens["epoch"], tokens["over"]) == (max(sizes), sum(sizes), 0)
    assert found.facts["steps"] == {"batch": 8, "rows": 150, "an_epoch": 19, "all": 38}


def test_weights_in_the_estimate_are_those_of_the_network(
    tmp_path: Path, prepare: Prepare, small_model: SmallModel
) -> None:
    memory = prepare(write(tmp_path / "a.jsonl", reviews(9)), model="llama").facts["memory_bytes"]
    net = transformers.AutoModelForCausalLM.from_pretrained(small_model("llama", CHAT_TEMPLATE))
    weights = sum(parameter.numel() for parameter in net.parameters())
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (
        4 * weights,
        4 * weights,
        8 * weights,
    )
    # Gradients come while activations go: at the peak one of them is there in full, and a little of the other.
    moving = memory["peak"] - sum(memory[name] for name in ("libraries", "weights", "optimizer"))
    least = max(memory["activations"] + memory["logits"], memory["gradients"])
    assert least <= moving <= 1.2 * (memory["activations"] + memory["logits"] + memory["gradients"])


def test_an_adapter_takes_what_its_matrices_take(
    tmp_path: Path, small_model: SmallModel, folder: Path
) -> None:
    import peft

    net = transformers.AutoModelForCausalLM.from_pretrained(small_model("llama"))
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    learning, _ = peft.get_peft_model(net, adapter).get_nb_trainable_parameters()
    where = ModelConfig(model=str(small_model("llama")), cache_dir=folder)
    config = FinetuneConfig(model=where, data=DataConfig(task="clm"), way=WayConfig(lora=4))
    with checked(config, [write(tmp_path / "a.jsonl", reviews(9))], silent) as found:
        assert found.facts["memory_bytes"]["gradients"] == 4 * learning


def test_a_tokenizer_still_to_be_made_measures_nothing(tmp_path: Path, folder: Path) -> None:
    config = FinetuneConfig(model=ModelConfig(cache_dir=folder), way=WayConfig(from_scratch="tiny"))
    path = write(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(40)])
    with checked(config, [path], silent) as found:
        assert found.task == "clm"
        assert "tokens" not in found.facts


@pytest.mark.parametrize(
    ("kind", "settings"), [("Roberta", {"max_position_embeddings": 130, "pad_token_id": 1}),
                           ("Roberta", {"max_position_embeddings": 130, "pad_token_id": 0}),
                           ("GPT2", {"n_positions": 77}), ("T5", {"d_ff": 64})]
)  # fmt: skip
def test_the_context_is_what_the_network_has_positions_for(kind: str, settings: dict[str, Any]) -> None:
    small = {"vocab_size": 50, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = getattr(transformers, f"{kind}Config")(**(small if kind == "Roberta" else {}), **settings)
    expected = None if kind == "T5" else settings.get("n_positions")
    if kind == "Roberta":
        table = transformers.RobertaModel(config).embeddings.position_embeddings
        assert table.padding_idx is not None
        expected = table.num_embeddings - table.padding_idx - 1
    assert context_of(json.loads(config.to_json_string(use_diff=False))) == expected


# ---- files of ours


def test_the_working_folder_is_gone_afterwards(tmp_path: Path, small_model: SmallModel, folder: Path) -> None:
    config = FinetuneConfig(model=ModelConfig(model=str(small_model("bert")), cache_dir=folder))
    path = write(tmp_path / "a.jsonl", reviews(20))
    with checked(config, [path], silent) as found:
        (work,) = [entry for entry in (folder / "finetune").iterdir() if entry.is_dir()]
        assert sorted(entry.name for entry in work.iterdir()) == ["train.arrow", "valid.arrow"]
        assert found.train.cache_files[0]["filename"] == str(work / "train.arrow")
    strict = replace(config, data=DataConfig(task="chat"))
    with pytest.raises(InputError), checked(strict, [path], silent):
        pass
    assert [entry.name for entry in (folder / "finetune").iterdir()] == ["all"]


def test_what_a_killed_run_left_is_swept_and_what_lives_is_not(folder: Path) -> None:
    code = (
        "import os, signal, pathlib, sys\n"
        "from textgen_cli.finetune.spool import working_folder\n"
        "with working_folder(pathlib.Path(sys.argv[1])) as work:\n"
        "    (work / 'data').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    assert done.returncode == -signal.SIGKILL
    home = folder / "finetune"
    assert len([entry for entry in home.iterdir() if entry.is_dir()]) == 1
    with working_folder(folder) as one, working_folder(folder) as two:
        assert {entry for entry in home.iterdir() if entry.is_dir()} == {one, two}
    assert [entry.name for entry in home.iterdir()] == ["all"]


def test_a_disk_without_room_is_told(tmp_path: Path, small_model: SmallModel, folder: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "x" * 1000, "label": "a"}] * 300)
    config = FinetuneConfig(model=ModelConfig(model=str(small_model("bert")), cache_dir=folder))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OutputError) as caught, checked(config, [path], silent):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.name, caught.value.exit_code) == ("E-WRITE", 8)


def test_bad_rows_are_found_without_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "x", "label": "a"}, {"text": "", "label": "a"}])
    code = (
        "import pathlib, sys\n"
        "from textgen_cli.config.finetune import FinetuneConfig\n"
        "from textgen_cli.config import ModelConfig\n"
        "from textgen_cli.errors import InputError\n"
        "from textgen_cli.events import silent\n"
        "from textgen_cli.finetune.check import checked\n"
        "config = FinetuneConfig(model=ModelConfig(cache_dir=pathlib.Path(sys.argv[2])))\n"
        "try:\n"
        "    with checked(config, [pathlib.Path(sys.argv[1])], silent):\n"
        "        pass\n"
        "except InputError as error:\n"
        "    heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "    print(error.name, sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("E-DATA []\n", "")
