"""Figures against transformers' own loss, scikit-learn, seqeval and sacrebleu; answers of small models."""

import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import sacrebleu
import seqeval.metrics
import sklearn.metrics
import torch
from parts.models import CHAT_TEMPLATE, MOODS, TAGS, TEXT
from scipy import stats
from transformers import AutoModelForQuestionAnswering, EvalPrediction

from textgen_cli.config import GenerateConfig, ModelConfig, PromptConfig
from textgen_cli.events import silent
from textgen_cli.finetune import answers
from textgen_cli.finetune.answers import Answerer, final, samples
from textgen_cli.finetune.collate import IGNORED
from textgen_cli.finetune.evaluate import MEASURES, Evaluation, evaluation
from textgen_cli.finetune.prepared import Prepared
from textgen_cli.generate.run import run as generate
from textgen_cli.model.load import Model, load
from textgen_cli.text import metrics

Small = Callable[..., Path]
close = pytest.approx


def prepared(task: str, rows: list[dict[str, Any]], *labels: str, problem: str | None = None) -> Prepared:
    data = datasets.Dataset.from_list(rows)
    return Prepared(task, data, data, labels, problem, "0" * 64, {})


def judged(task: str, predictions: Any, right: Any, *labels: str, problem: str | None = None) -> Evaluation:
    found = evaluation(prepared(task, [{"text": ""}], *labels, problem=problem))
    found.tables = {
        "figures": found(EvalPrediction(np.asarray(predictions), np.asarray(right))),
        **found.tables,
    }
    return found


def opened(folder: Path) -> Model:
    return load(ModelConfig(model=str(folder)), "finetune", silent)


def answerer(model: Model) -> Answerer:
    return Answerer(model.net, model.tokenizer, model.context, model.generation)


# --- perplexity


@pytest.mark.parametrize(("architecture", "task"), [("llama", "clm"), ("bert", "mlm"), ("t5", "seq2seq")])
def test_perplexity_is_that_of_the_models_own_loss(small_model: Small, architecture: str, task: str) -> None:
    model = opened(small_model(architecture))
    encoded = [model.tokenizer.encode(text) for text in TEXT]
    longest = max(map(len, encoded))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in encoded])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in encoded])
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[0, :5] = IGNORED  # a prompt, of which nothing is learnt
    with torch.inference_mode():
        out = model.net(input_ids=ids, attention_mask=mask, labels=labels)
    measure = evaluation(prepared(task, [{"text": ""}]))
    # In two batches of other sizes the figure is the same: every token counts alike.
    kept = [measure.keep((out.logits[rows], out.logits), labels[rows]) for rows in (slice(0, 1), slice(1, 4))]
    found = measure(EvalPrediction(torch.cat(kept).numpy(), labels.numpy()))
    assert found == {"perplexity": close(math.exp(out.loss.item()), rel=1e-4)}


def test_logits_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(2, 9, 7), torch.randint(0, 7, (2, 9))
    whole = MEASURES["clm"].keep(logits, labels)
    monkeypatch.setattr("textgen_cli.finetune.evaluate.CHUNK", 14)
    assert MEASURES["clm"].keep(logits, labels).tolist() == [close(row) for row in whole.tolist()]


@pytest.mark.parametrize("sums", [[[0.0, 0.0]], [[1e9, 10.0]], [[math.nan, 3.0]]])
def test_a_perplexity_that_is_no_number_is_not_told(sums: list[list[float]]) -> None:
    assert judged("clm", sums, sums).tables["figures"] == {}


# --- classifiers


def test_a_single_label_equals_scikit_learn() -> None:
    draw = np.random.default_rng(1)
    logits, right = draw.normal(size=(60, 3)), draw.integers(0, 3, 60)
    found = judged("text-classification", logits, right, "a", "b", "c", problem="single_label_classification")
    made = logits.argmax(-1)
    assert found.tables["figures"] == {
        "accuracy": close(sklearn.metrics.accuracy_score(right, made)),
        "macro_f1": close(sklearn.metrics.f1_score(right, made, average="macro")),
        "micro_f1": close(sklearn.metrics.f1_score(right, made, average="micro")),
        "matthews": close(sklearn.metrics.matthews_corrcoef(right, made)),
    }
    counts = sklearn.metrics.confusion_matrix(right, made).tolist()
    assert [list(row.values()) for row in found.tables["confusion"].values()] == counts
    assert found.tables["classes"]["b"]["support"] == int((right == 1).sum())


def test_several_labels_equal_scikit_learn() -> None:
    draw = np.random.default_rng(2)
    logits, right = draw.normal(size=(40, 4)), draw.integers(0, 2, (40, 4)).astype(float)
    found = judged("text-classification", logits, right, *"abcd", problem="multi_label_classification")
    made = (1 / (1 + np.exp(-logits)) >= 0.5).astype(int)
    assert found.tables["figures"] == {
        "accuracy": close(sklearn.metrics.accuracy_score(right, made)),
        "macro_f1": close(sklearn.metrics.f1_score(right, made, average="macro")),
        "micro_f1": close(sklearn.metrics.f1_score(right, made, average="micro")),
    }


def test_a_regression_equals_scipy() -> None:
    draw = np.random.default_rng(3)
    right = draw.normal(size=30)
    made = right + draw.normal(size=30)
    found = judged("text-classification", made[:, None], right[:, None], problem="regression").tables[
        "figures"
    ]
    assert found == {
        "mean_squared_error": close(sklearn.metrics.mean_squared_error(right, made)),
        "mean_absolute_error": close(sklearn.metrics.mean_absolute_error(right, made)),
        "pearson": close(stats.pearsonr(right, made).statistic),
        "spearman": close(stats.spearmanr(right, made).statistic),
    }
    alike = judged("text-classification", [[1.0], [1.0]], [[1.0], [2.0]], problem="regression").tables[
        "figures"
    ]
    assert alike.keys() == {"mean_squared_error", "mean_absolute_error"}


# --- tags


def tagged(seed: int) -> tuple[Any, Any, list[list[str]], list[list[str]]]:
    """Predicted and right label numbers of padded rows, and the tags of their words, first tokens alone."""
    draw = random.Random(seed)
    made, right = [], []
    for _ in range(25):
        first = [draw.random() < 0.6 for _ in range(12)]
        right.append([draw.randrange(5) if is_first else IGNORED for is_first in first])
        made.append([draw.randrange(5) for _ in first])
    pairs = list(zip(made, right, strict=True))
    told = [[TAGS[r] for r in row if r != IGNORED] for row in right]
    guessed = [[TAGS[m] for m, r in zip(*pair, strict=True) if r != IGNORED] for pair in pairs]
    return made, right, guessed, told


def test_entities_equal_seqeval() -> None:
    made, right, guessed, told = tagged(4)
    found = judged("token-classification", made, right, *TAGS)
    assert found.tables["figures"] == {
        "accuracy": close(seqeval.metrics.accuracy_score(told, guessed)),
        "precision": close(seqeval.metrics.precision_score(told, guessed)),
        "recall": close(seqeval.metrics.recall_score(told, guessed)),
        "f1": close(seqeval.metrics.f1_score(told, guessed)),
    }
    assert set(found.tables["classes"]) == {"PER", "LOC"}
    logits = torch.randn(2, 3, 5)
    assert found.keep(logits, None).tolist() == logits.argmax(-1).tolist()


def test_parts_of_speech_are_no_entities() -> None:
    names = ("ADJ", "DET", "NOUN", "VERB", "X")
    made, right, _, _ = tagged(5)
    figures = judged("token-classification", made, right, *names).tables["figures"]
    kept = [
        (r, m)
        for row, guess in zip(right, made, strict=True)
        for r, m in zip(row, guess, strict=True)
        if r >= 0
    ]
    told, guessed = zip(*kept, strict=True)
    assert figures == {
        "accuracy": close(sklearn.metrics.accuracy_score(told, guessed)),
        "macro_f1": close(sklearn.metrics.f1_score(told, guessed, average="macro")),
    }


@pytest.mark.parametrize(
    ("task", "problem", "labels"),
    [
        ("clm", None, ()), ("mlm", None, ()), ("chat", None, ()), ("seq2seq", None, ()),
        ("text-classification", "single_label_classification", ("a", "b")),
        ("text-classification", "multi_label_classification", ("a", "b")),
        ("text-classification", "regression", ()),
        ("token-classification", None, tuple(TAGS)), ("token-classification", None, ("NN", "VB")),
        ("question-answering", None, ()),
    ],
)  # fmt: skip
def test_every_task_has_a_figure_to_choose_by(
    task: str, problem: str | None, labels: tuple[str, ...]
) -> None:
    measure = evaluation(prepared(task, [{"text": ""}], *labels, problem=problem)).measure
    numbers = np.zeros((2, 2), dtype=int)
    predictions: Any = {
        "text-classification": np.zeros((2, max(len(labels), 1))), "token-classification": numbers,
    }.get(task, np.ones((2, 2)))  # fmt: skip
    right: Any = numbers
    if task == "question-answering":
        right = (numbers[:, 0], numbers[:, 0])
    elif task == "text-classification" and problem != "multi_label_classification":
        right = numbers[:, :1]
    assert measure.best in measure.figures(EvalPrediction(predictions, right), labels)[0]


def test_a_window_is_right_with_both_its_ends() -> None:
    measure = MEASURES["question-answering"]
    start = torch.tensor([[0.0, 9.0, 1.0], [5.0, 0.0, 0.0], [0.0, 0.0, 7.0]])
    end = torch.tensor([[0.0, 1.0, 9.0], [5.0, 0.0, 0.0], [0.0, 7.0, 0.0]])
    kept = measure.keep((start, end), None).numpy()
    assert kept.tolist() == [[1, 2], [0, 0], [2, 1]]
    right: Any = (np.array([1, 0, 2]), np.array([2, 0, 2]))
    assert measure.figures(EvalPrediction(kept, right), ())[0] == {"window_accuracy": close(2 / 3)}


# --- whole answers


def test_translations_equal_sacrebleu_of_what_the_library_generates(small_model: Small) -> None:
    model = opened(small_model("t5"))
    ends = [0, *range(2, len(model.tokenizer.backend), 2)]  # so that a random network's texts end
    by = replace(answerer(model), generation={"eos_token_id": ends})

    def written(text: str, room: int) -> str:
        ids = torch.tensor([model.tokenizer.encode(text)])
        out = model.net.generate(
            ids,
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=ends,
            decoder_start_token_id=1,
            pad_token_id=0,
        )
        return model.tokenizer.decode(out[0, 1:].tolist())

    sources = [TEXT[0], TEXT[0][:20], TEXT[1], TEXT[2], TEXT[1][:9], TEXT[3]]
    right = [text[::-1][:40] for text in sources[:-1]] + [written(sources[-1], 50)]
    room = answers.SPARE + max(len(model.tokenizer.encode(text)) for text in right)
    made = [written(text, room) for text in sources]
    assert len(set(map(len, made))) > 1
    rows = [{"source": source, "target": target} for source, target in zip(sources, right, strict=True)]
    model.net.train()
    assert final(prepared("seq2seq", rows), by) == {
        "exact_match": close(1 / 6),
        "chrf": close(sacrebleu.corpus_chrf(made, [right]).score),
        "bleu": close(sacrebleu.corpus_bleu(made, [right]).score),
    }
    assert model.net.training
    found = samples(prepared("seq2seq", rows[::-1]), by, 1)
    assert found == [{"input": sources[-1], "expected": made[-1], "answer": made[-1]}]


ANSWERS: list[dict[str, Any]] = [
    {"question": "Who reads?", "context": TEXT[0] * 3, "answers": [{"text": "small model", "start": 31}]},
    {"question": "Who jumps?", "context": TEXT[1], "answers": []},
    {"question": "Which numbers?", "context": TEXT[2], "answers": [{"text": "1, 2, 3 and 42", "start": 16}]},
]


def test_answers_are_those_that_generate_gives(small_model: Small, tmp_path: Path) -> None:
    folder = shutil.copytree(small_model("bert"), tmp_path / "reader")
    torch.manual_seed(3)
    AutoModelForQuestionAnswering.from_pretrained(folder).save_pretrained(folder)
    model = opened(folder)
    given = [_asked(folder, row) for row in ANSWERS]
    made = [one["answer"] for one in samples(prepared("question-answering", ANSWERS), answerer(model))]
    assert made == given
    assert any(made)
    told = {"question": "Who?", "context": TEXT[3], "answers": [{"text": _asked(folder, {
        "question": "Who?", "context": TEXT[3]}), "start": 0}]}  # fmt: skip
    figures = final(prepared("question-answering", [*ANSWERS, told]), answerer(model))
    right = [[answer["text"] for answer in row["answers"]] for row in [*ANSWERS, told]]
    made.append(right[-1][0])
    exact = [metrics.exact_match(*pair) for pair in zip(right, made, strict=True)]
    assert figures["exact_match"] == close(sum(exact) / 4)
    assert figures["answerable_exact_match"] == close((exact[0] + exact[2] + exact[3]) / 3)
    assert figures["unanswerable_exact_match"] == exact[1]
    assert figures["exact_match"] <= figures["f1"]


def _asked(folder: Path, row: dict[str, Any]) -> str:
    prompting = PromptConfig(task="qa", question=row["question"])
    model = ModelConfig(
        model=str(folder), dtype="float32"
    )  # as it is evaluated: bfloat16 would turn near ties
    config = GenerateConfig(model=model, prompting=prompting)
    return "".join(chunk.text for chunk in generate(config, row["context"], silent))


def test_only_tasks_with_answers_have_final_figures(small_model: Small) -> None:
    by = answerer(opened(small_model("llama")))
    assert final(prepared("clm", [{"text": TEXT[0]}]), by) == {}
    none = Prepared(
        "seq2seq", datasets.Dataset.from_list([{"source": "", "target": ""}]), None, (), None, "", {}
    )
    assert final(none, by) == {}


def test_a_sample_continues_a_text(small_model: Small) -> None:
    folder = small_model("llama")
    by = answerer(opened(folder))
    found = samples(prepared("clm", [{"text": text} for text in TEXT]), by, 2)
    assert [one["input"] + one["expected"] for one in found] == [
        text[: len(one["input"] + one["expected"])] for text, one in zip(TEXT, found, strict=False)
    ]
    decoding = replace(GenerateConfig().decoding, greedy=True, max_new_tokens=answers.CONTINUED)
    config = GenerateConfig(model=ModelConfig(model=str(folder)), decoding=decoding)
    written = "".join(chunk.text for chunk in generate(config, found[1]["input"], silent))
    assert found[1]["answer"] == written


def test_a_sample_answers_a_conversation(small_model: Small) -> None:
    folder = small_model("llama", CHAT_TEMPLATE)
    by = answerer(opened(folder))
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "How?"),
        ("assistant", "So."),
    ]
    talk = [{"role": role, "content": text} for role, text in turns]
    (found,) = samples(prepared("chat", [{"messages": talk}]), by)
    assert (found["input"], found["expected"]) == ("Be brief.\nHi\nHello\nHow?", "So.")
    ids = by.tokenizer.encode_chat(talk[:-1])
    out = by.net.generate(torch.tensor([ids]), max_new_tokens=answers.ANSWER, do_sample=False, eos_token_id=0)
    assert found["answer"] == by.tokenizer.decode(out[0, len(ids) :].tolist())


def test_samples_of_judges(small_model: Small) -> None:
    row = {"text": TEXT[0], "pair": "", "label": "glad"}
    by = answerer(opened(small_model("bert-classifier")))
    data = prepared("text-classification", [row], *MOODS.values(), problem="single_label_classification")
    (found,) = samples(data, by)
    logits = by.net(torch.tensor([by.tokenizer.encode(TEXT[0])])).logits[0]
    assert found == {"input": TEXT[0], "expected": "glad", "answer": MOODS[int(logits.argmax())]}
    by = answerer(opened(small_model("bert-multilabel")))
    several = prepared("text-classification", [{**row, "label": ["glad", "sad"]}], *MOODS.values(),
                       problem="multi_label_classification")  # fmt: skip
    logits = by.net(torch.tensor([by.tokenizer.encode(TEXT[0])])).logits[0]
    made = ", ".join(MOODS[at] for at, value in enumerate(logits.tolist()) if value >= 0)
    assert samples(several, by) == [{"input": TEXT[0], "expected": "glad, sad", "answer": made}]
    by = answerer(opened(small_model("bert-regression")))
    (found,) = samples(prepared("text-classification", [{**row, "label": 2.5}], problem="regression"), by)
    assert found["expected"] == "2.5"
    assert math.isfinite(float(found["answer"]))


def test_samples_of_tags_and_hidden_words(small_model: Small) -> None:
    by = answerer(opened(small_model("bert-tagger")))
    words, tags = ["Anna", "of", "Rome"], ["B-PER", "O", "B-LOC"]
    (found,) = samples(prepared("token-classification", [{"words": words, "tags": tags}], *TAGS), by)
    assert (found["input"], found["expected"]) == ("Anna of Rome", "Anna/B-PER of Rome/B-LOC")
    assert [part.split("/")[0] for part in found["answer"].split()] == words
    by = answerer(opened(small_model("bert")))
    (found,) = samples(prepared("mlm", [{"text": TEXT[1]}]), by)
    assert "[MASK]" in found["input"]
    assert found["expected"]
    ids = by.tokenizer.backend(found["input"])["input_ids"]
    logits = by.net(torch.tensor([ids])).logits[0, ids.index(by.tokenizer.backend.mask_token_id)]
    assert found["answer"] == by.tokenizer.spell(int(logits.argmax()))
