"""Choices against lm-evaluation-harness; what is made of them by hand; the figures of a corpus against np."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from parts.models import TEXT, byte_tokenizer

from textgen_cli.config import ModelConfig, ScoringConfig
from textgen_cli.errors import InputError, ModelError, TextgenError, UsageError
from textgen_cli.events import silent
from textgen_cli.model.load import Model, load
from textgen_cli.score.asked import Questioner
from textgen_cli.score.choices import ChoiceScorer
from textgen_cli.score.request import Asked, Figures
from textgen_cli.score.summary import Corpus
from textgen_cli.score.tree import TreeScorer
from textgen_cli.text.records import Record

close = pytest.approx
RULES = ("raw", "token", "byte", "pmi")

# Choices of one token and of many, contexts of different lengths, blanks at their ends, none at all.
QUESTIONS = [
    ("Question: which is quick?\nAnswer:", ("fox", "the brown fox and the dog", "z", "你好")),
    ("Once upon a time there was a small model that read", ("a few lines", "a", "nothing at all, and more")),
    ("The answer is ", ("yes", "no")),
    ("", ("a model", "a dog")),
    ("A", ("b", "c")),
    (TEXT[0] + "\n\n" + TEXT[1][:30], ("over", "x y z")),
]
ASKED = [Asked(at, "", context, choices) for at, (context, choices) in enumerate(QUESTIONS)]


def opened(folder: Path) -> Model:
    return load(ModelConfig(model=str(folder), dtype="float32", device="cpu"), "score", silent)


def _bloom() -> Any:
    return transformers.BloomConfig(vocab_size=400, hidden_size=48, n_layer=2, n_head=4)


def _mistral() -> Any:
    return transformers.MistralConfig(
        vocab_size=400, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16, max_position_embeddings=128,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model_of(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}
    configs = {"bloom": _bloom, "mistral": _mistral}

    def get(name: str) -> Model:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) if name in configs else small_model(name)
            if name in configs:
                torch.manual_seed(5)
                transformers.AutoModelForCausalLM.from_config(configs[name]()).save_pretrained(folder)
                byte_tokenizer().save_pretrained(folder)
            made[name] = opened(folder)
        return made[name]

    return get


def tree(model: Model, rows: int | None = None, **options: Any) -> TreeScorer:
    return TreeScorer(ScoringConfig(choices="choices", **options), model, rows, silent)


def score(
    model: Model, asked: Sequence[Asked] = ASKED, rows: int | None = None, **options: Any
) -> list[Figures | TextgenError]:
    config = ScoringConfig(choices="choices", **options)
    found = dict(ChoiceScorer(config, TreeScorer(config, model, rows, silent)).score(asked))
    for one in found.values():
        assert isinstance(one, TextgenError) or json.dumps(one, allow_nan=False)
    return [found[one.index] for one in asked]


def figures(model: Model, asked: Sequence[Asked] = ASKED, **options: Any) -> list[Figures]:
    found = []
    for one in score(model, asked, **options):
        assert not isinstance(one, TextgenError), one
        found.append(one)
    return found


def values(found: Sequence[Figures], name: str = "log_likelihood") -> list[list[float]]:
    return [[choice[name] for choice in one["choices"]] for one in found]


def flat(nested: Sequence[Sequence[float]]) -> list[float]:
    return [value for own in nested for value in own]


# --- log-likelihoods


def _harness(folder: Path, arguments: Sequence[tuple[str, str]]) -> list[float]:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=one, idx=at)
        for at, one in enumerate(arguments)
    ]
    return [value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]


def _as_continuation(context: str, choice: str) -> str:
    return choice if context[-1:].isspace() else f" {choice}"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_equals_the_harness(model_of: Callable[[str], Model], name: str) -> None:
    model = model_of(name)
    pairs = [(context, _as_continuation(context, one)) for context, choices in QUESTIONS for one in choices]
    found = figures(model)
    assert flat(values(found)) == close(_harness(model.folder, pairs), rel=1e-5, abs=1e-4)
    alone = [("", f" {one}") for _, choices in QUESTIONS for one in choices]
    unconditional = flat(values(found, "unconditional_log_likelihood"))
    assert unconditional == close(_harness(model.folder, alone), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bloom"])
def test_a_shared_context_changes_nothing(model_of: Callable[[str], Model], name: str) -> None:
    model = model_of(name)
    scorer, apart = tree(model), tree(model)
    assert scorer.shares == (name in ("gpt2", "llama"))
    apart.shares = False
    shared_ones, others = (dict(each.score(ASKED)) for each in (scorer, apart))
    for at in range(len(ASKED)):
        one, other = shared_ones[at], others[at]
        assert isinstance(one, dict) and isinstance(other, dict)
        assert flat(values([one])) == close(flat(values([other])), rel=1e-5, abs=1e-5)


def test_batch_and_order_change_nothing(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    alone = values(figures(model, rows=1))
    for found in (
        values(figures(model, rows=3)),
        values(figures(model, rows=16)),
        values(figures(model, ASKED[::-1]))[::-1],
    ):
        assert flat(found) == close(flat(alone), abs=1e-4)


def test_what_is_done_changes_no_byte(model_of: Callable[[str], Model]) -> None:
    """A resumed run has figures of the same bytes, also of choices that earlier records had."""
    many = [replace(ASKED[at % len(ASKED)], index=at) for at in range(40)]
    config = ScoringConfig(choices="choices")

    def run(done: range, asked: list[Asked]) -> dict[int, Any]:
        scorer = ChoiceScorer(config, TreeScorer(config, model_of("llama"), None, silent))
        found: dict[int, Any] = {}
        for start in range(0, len(asked), 20):
            window = asked[start : start + 20]
            if not {one.index for one in window} <= set(done):
                found |= dict(scorer.score(window, done))
        return found

    whole, rest = run(range(0), many), run(range(27), many)
    for at in range(27, 40):
        assert json.dumps(rest[at]) == json.dumps(whole[at])


def test_delimiters(model_of: Callable[[str], Model]) -> None:
    model = model_of("gpt2")
    asked = [Asked(0, "", "Once", ("upon", "a")), Asked(1, "", "Once\n", ("upon", "a"))]
    found = figures(model, asked, delimiter="\n")
    assert values(found)[0] == close(values(found)[1], rel=1e-6)
    with pytest.raises(UsageError, match="E-CONFLICT"):
        ScoringConfig(delimiter=" ")


def test_contexts_that_are_too_long(model_of: Callable[[str], Model]) -> None:
    model = model_of("gpt2")
    long = Asked(0, "", " ".join(TEXT * 2), ("and", "or else"))
    (refused,) = score(model, [long])
    assert isinstance(refused, InputError) and refused.name == "E-CONTEXT"
    (found,) = figures(model, [long], truncate="left")
    assert found["truncated"] is True
    # The longest choice fits exactly, its last token not being shown.
    backend: Any = model.tokenizer.backend
    ids = backend(f"{long.context} or else")["input_ids"][-129:]
    own = backend(" or else")["input_ids"]
    with torch.no_grad():
        logs = model.net(input_ids=torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    want = sum(logs[at - len(own), token].item() for at, token in enumerate(own))
    assert values([found])[0][1] == close(want, rel=1e-5)


def test_weights_that_are_no_numbers(small_model: Any) -> None:
    model = opened(small_model("gpt2"))
    with torch.no_grad():
        model.net.transformer.wte.weight[0, 0] = math.nan
    for one in score(model):
        assert isinstance(one, ModelError) and one.name == "E-NAN"


def test_an_empty_choice_fails_its_record_alone(model_of: Callable[[str], Model]) -> None:
    asked = [Asked(0, "", "Once upon a ti", ("me there", "x y")), ASKED[1]]
    merged, fine = score(model_of("gpt2"), asked, delimiter="")
    assert isinstance(merged, InputError) and merged.name == "E-EMPTY"
    assert isinstance(fine, dict)


# --- what is made of them


def test_probabilities_and_picks_by_hand(model_of: Callable[[str], Model]) -> None:
    for (_, choices), found in zip(QUESTIONS, figures(model_of("llama")), strict=True):
        told = found["choices"]
        assert [choice["text"] for choice in told] == list(choices)
        logs = [choice["log_likelihood"] for choice in told]
        judged = {
            "raw": logs,
            "token": [value / choice["tokens"] for value, choice in zip(logs, told, strict=True)],
            "byte": [value / len(text.encode()) for value, text in zip(logs, choices, strict=True)],
            "pmi": [choice["log_likelihood"] - choice["unconditional_log_likelihood"] for choice in told],
        }
        assert list(found["predictions"]) == list(RULES)
        for name, by in judged.items():
            shares = np.exp(np.array(by) - max(by))
            want = (shares / shares.sum()).tolist()
            assert [choice["probability"][name] for choice in told] == close(want)
            assert found["predictions"][name] == choices[int(np.argmax(by))]
        assert found["prediction"] == found["predictions"]["raw"]


@pytest.mark.parametrize("rule", RULES)
def test_the_pick_goes_by_the_normalization(model_of: Callable[[str], Model], rule: Any) -> None:
    for found in figures(model_of("llama"), normalization=rule):
        assert (found["prediction"], found["normalization"]) == (found["predictions"][rule], rule)


def test_bits(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    nats, bits = figures(model), figures(model, bits=True)
    assert flat(values(bits)) == close([value / math.log(2) for value in flat(values(nats))])
    for one, other in zip(nats, bits, strict=True):
        assert [c["probability"] for c in one["choices"]] == [c["probability"] for c in other["choices"]]
        assert (one["unit"], other["unit"]) == ("nats", "bits")


class Fixed:
    """A scorer with given log-likelihoods: (in context, alone) of each choice."""

    def __init__(self, told: dict[str, tuple[float, float]]) -> None:
        self.told = told

    def score(self, asked: Sequence[Asked], done: Any = ()) -> Any:
        for one in asked:
            yield (
                one.index,
                {
                    "choices": [
                        {
                            "text": text,
                            "log_likelihood": self.told[text][not one.context],
                            "tokens": 1,
                            "bytes": len(text),
                        }
                        for text in one.choices or ()
                    ]
                },
            )


def judged(gold: Any, told: dict[str, tuple[float, float]] | None = None) -> Any:
    told = told or {"a": (-1.0, -1.0), "bb": (-2.0, -4.0), "c": (-1.0, -3.0)}
    config = ScoringConfig(choices="choices", gold="answer")
    return dict(ChoiceScorer(config, Fixed(told)).score([Asked(0, "", "context", tuple(told), gold)]))[0]


@pytest.mark.parametrize("gold", ["bb", 1, "1"])
def test_gold_as_text_and_as_number(gold: Any) -> None:
    found = judged(gold)
    # Ties go to the first.
    assert found["predictions"] == {"raw": "a", "token": "a", "byte": "a", "pmi": "bb"}
    assert found["correct"] == {"raw": False, "token": False, "byte": False, "pmi": True}
    p = np.exp([-1, -2, -1]) / np.exp([-1, -2, -1]).sum()
    assert found["brier"]["raw"] == close(float(((p - [0, 1, 0]) ** 2).sum()))


@pytest.mark.parametrize("gold", ["absent", 3, "3", -1, "-1", True, None, 1.0, ["bb"], {}])
def test_gold_that_is_no_choice(gold: Any) -> None:
    found = judged(gold)
    assert isinstance(found, InputError) and (found.name, found.subject) == ("E-FIELD", "answer")


def test_the_harness_judges_alike() -> None:
    """acc, acc_bytes and acc_mutual_info of its own task class, from the same log-likelihoods."""
    from lm_eval.api.task import ConfigurableTask

    draw = np.random.default_rng(3)
    for _ in range(30):
        texts = [f"choice {'x' * int(n)}{at}" for at, n in enumerate(draw.integers(0, 30, 4))]
        told = {
            text: (float(a), float(b))
            for text, (a, b) in zip(texts, draw.normal(-20, 8, (4, 2)), strict=True)
        }
        gold = int(draw.integers(0, 4))
        task: Any = object.__new__(ConfigurableTask)
        metrics = ("acc", "acc_bytes", "acc_mutual_info")
        task.OUTPUT_TYPE, task.multiple_input, task.multiple_target = "multiple_choice", 0, 0
        task._config = SimpleNamespace(process_results=None)
        task._metric_fn_list = dict.fromkeys(metrics)
        task.doc_to_choice = lambda doc, texts=texts: texts
        task.doc_to_text = lambda doc: "context"
        task.doc_to_target = lambda doc, gold=gold: gold
        results = [(a, False) for a, _ in told.values()] + [(b, False) for _, b in told.values()]
        want = task.process_results({}, results)
        correct = judged(gold, told)["correct"]
        assert {"acc": correct["raw"], "acc_bytes": correct["byte"], "acc_mutual_info": correct["pmi"]} == {
            name: bool(want[name]) for name in metrics
        }


# --- questions


def question(fields: dict[str, Any], *, plain: bool = False, **options: Any) -> Asked:
    return Questioner(ScoringConfig(**options), plain=plain)(Record(0, fields))


def test_what_is_asked() -> None:
    record = {"text": "T", "question": "Q", "options": ["a", "b"], "gold": 1}
    assert question(record) == Asked(0, "T")
    assert question(record, context="question") == Asked(0, "T", "Q")
    assert question(record, context="The context:") == Asked(0, "T", "The context:")
    assert question(record, context="question", plain=True) == Asked(0, "T", "question")
    assert question(record, template="{question}?") == Asked(0, "T", "Q?")
    assert question(record, context="question", delimiter="\n") == Asked(0, "T", "Q\n")
    assert question(record, choices="options", gold="gold") == Asked(0, "", "T", ("a", "b"), 1)
    assert question(record, choices="options", context="question") == Asked(0, "", "Q", ("a", "b"))
    assert question(record, labels="x, y", template="<{text}>") == Asked(0, "", "<T>", ("x", "y"))


@pytest.mark.parametrize("options", [["a"], [], "ab", ["a", 1], ["a", ""], ["a", "a"], None])
def test_choices_that_are_none(options: Any) -> None:
    with pytest.raises(InputError, match="E-FIELD"):
        question({"text": "T", "options": options}, choices="options")


@pytest.mark.parametrize(
    "options",
    [
        {"labels": "a,b", "choices": "c"},
        {"labels": "a"},
        {"labels": "a,b", "tokens": True},
        {"choices": "c", "words": True},
        {"choices": "c", "against": "gpt2"},
        {"context": "c", "template": "{t}"},
        {"normalization": "pmi"},
        {"top": 3},
    ],
)
def test_settings_that_contradict(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ScoringConfig(**options)


def test_labels_with_a_text_for_all_would_leave_out_the_record() -> None:
    with pytest.raises(UsageError, match="E-CONFLICT"):
        Questioner(ScoringConfig(labels="a,b", context="Review:"), plain=True)


# --- the corpus


def corpus(lines: Sequence[dict[str, Any]], **options: Any) -> dict[str, Any]:
    whole = Corpus(ScoringConfig(**options))
    for line in lines:
        whole.add(json.loads(json.dumps(line)))
    found = whole.figures()
    json.dumps(found, allow_nan=False)
    return found


def test_accuracy_and_brier_with_errors() -> None:
    draw = np.random.default_rng(1)
    right, brier = draw.integers(0, 2, 40), draw.random(40)
    lines = [
        {"prediction": "a", "choices": [], "correct": {"raw": bool(r)}, "brier": {"raw": float(b)}}
        for r, b in zip(right, brier, strict=True)
    ]
    found = corpus(lines, choices="c", gold="g")
    assert found["accuracy"]["raw"] == close(right.mean())
    assert found["accuracy"]["raw_stderr"] == close(right.std(ddof=1) / math.sqrt(40))
    assert found["brier"]["raw"] == close(brier.mean())
    assert found["brier"]["raw_stderr"] == close(brier.std(ddof=1) / math.sqrt(40))


def test_perplexity_with_errors() -> None:
    draw = np.random.default_rng(2)
    tokens, nats = draw.integers(1, 40, 60).astype(float), draw.random(60) * 90
    lines = [
        {"log_likelihood": -float(n), "tokens": int(t), "bytes": int(4 * t), "characters": int(3 * t)}
        for n, t in zip(nats, tokens, strict=True)
    ]
    found = corpus(lines)
    mean = nats.sum() / tokens.sum()
    error = math.sqrt(((nats - mean * tokens) ** 2).sum() / 59 * 60) / tokens.sum()
    assert found["perplexity"] == close(math.exp(mean))
    assert found["perplexity_stderr"] == close(math.exp(mean) * error)
    assert found["bits_per_byte"] == close(nats.sum() / math.log(2) / (4 * tokens).sum())
    assert (found["tokens"], found["records"], found["failed"]) == (int(tokens.sum()), 60, 0)
    bits = [line | {"log_likelihood": line["log_likelihood"] / math.log(2)} for line in lines]
    assert corpus(bits, bits=True)["perplexity"] == close(math.exp(mean))


def test_labels_against_scikit_learn() -> None:
    from sklearn import metrics as theirs

    draw = np.random.default_rng(4)
    names = ["sad", "glad", "neither"]
    gold, made = (draw.choice(names, 80).tolist() for _ in range(2))
    shares = draw.dirichlet([1, 1, 1], 80)
    lines = [
        {
            "gold": g if at % 2 else names.index(g),
            "prediction": m,
            "labels": dict(zip(names, p.tolist(), strict=True)),
        }
        for at, (g, m, p) in enumerate(zip(gold, made, shares, strict=True))
    ]
    lines[1]["gold"] = str(names.index(gold[1]))  # from CSV
    # What the classifier cannot say is told of, and neither a class nor a miss.
    unusable: list[Any] = [["sad"], {}, True, 9, "9", 1.5, None, "Sad", ""]
    found = corpus([*lines, *({**lines[0], "gold": bad} for bad in unusable)], gold="gold")
    assert found["accuracy"] == close(theirs.accuracy_score(gold, made))
    assert found["macro_f1"] == close(theirs.f1_score(gold, made, average="macro"))
    assert found["matthews"] == close(theirs.matthews_corrcoef(gold, made))
    wanted = np.array([[g == name for name in names] for g in gold])
    assert found["brier"] == close(float(((shares - wanted) ** 2).sum(1).mean()))
    assert (found["gold_unusable"], list(found["classes"])) == (len(unusable), sorted(names))


def test_several_labels() -> None:
    from sklearn import metrics as theirs

    draw = np.random.default_rng(5)
    gold, made = (draw.integers(0, 2, (50, 3)) for _ in range(2))

    def named(row: Any) -> list[str]:
        return [f"l{at}" for at in range(3) if row[at]]

    shares = {f"l{at}": 0.5 for at in range(3)}
    lines = [
        {"labels": named(g), "prediction": named(m)} | {"input_labels": named(g), "labels": shares}
        for g, m in zip(gold, made, strict=True)
    ]
    ordered = [
        {"input_labels": one["input_labels"], "prediction": one["prediction"], "labels": shares}
        for one in lines
    ]
    found = corpus(ordered, gold="labels")  # the input's field of that name
    assert found["accuracy"] == close(theirs.accuracy_score(gold, made))
    assert found["micro_f1"] == close(theirs.f1_score(gold, made, average="micro"))
    assert found["macro_f1"] == close(theirs.f1_score(gold, made, average="macro"))
    for bad in ([["l1"]], ["l1", "l3"], "l3", None, "[l1]"):
        assert corpus([{**ordered[0], "input_labels": bad}], gold="labels")["gold_unusable"] == 1
    cells = [{**one, "input_labels": json.dumps(one["input_labels"])} for one in ordered]  # of CSV
    assert corpus(cells, gold="labels") == found


def test_numbers_against_numpy() -> None:
    draw = np.random.default_rng(6)
    gold, made = draw.normal(1000, 1, (2, 70))
    lines: list[Any] = [{"gold": float(g), "value": float(m)} for g, m in zip(gold, made, strict=True)]
    lines[3]["gold"] = str(lines[3]["gold"])  # from CSV
    unusable: list[Any] = [True, "x", [], "inf", 10**400]
    wrong = [{"gold": bad, "value": 1.0} for bad in unusable]
    found = corpus([*lines, *wrong], gold="gold")
    assert found["mean_squared_error"] == close(float(((gold - made) ** 2).mean()))
    assert found["mean_absolute_error"] == close(float(abs(gold - made).mean()))
    assert found["pearson"] == close(float(np.corrcoef(gold, made)[0, 1]))
    assert found["gold_unusable"] == 5
    alike = corpus([{"gold": 0.1, "value": float(m)} for m in made], gold="gold")
    assert alike["pearson"] is None
    assert corpus([{"gold": 1e308, "value": -1e308}] * 2, gold="gold")["mean_squared_error"] is None


def test_several_numbers() -> None:
    values = [{"form": 1.0, "content": 2.0}, {"form": 3.0, "content": 2.5}]
    lines: list[dict[str, Any]] = [
        {"gold": {"form": 2, "content": 2}, "values": values[0]},
        {"gold": [3, 3], "values": values[1]},
        {"gold": 3, "values": values[1]},
    ]
    found = corpus(lines, gold="gold")
    assert found["mean_absolute_error"] == {"form": 0.5, "content": 0.25}
    assert found["gold_unusable"] == 1


def test_entities() -> None:
    entity = {"text": "x", "type": "PER", "start": 0, "end": 1, "score": 1.0}
    golds: list[Any] = ['["B-PER", "O"]', ["O", "B-LOC"], ["O"], "O O", [1, 2], [["O"], "O"], {}, None]
    lines = [{"gold": gold, "entities": [entity], "tags": ["B-PER", "O"]} for gold in golds]
    found = corpus(lines, gold="gold")
    assert (found["accuracy"], found["precision"], found["recall"], found["f1"]) == (0.5, 0.5, 0.5, 0.5)
    assert (found["entities"], found["gold_unusable"]) == ({"PER": 8}, 6)
    assert found["exact_match"] == 0.5  # of texts: all of the first's tags are right, not all of the second's


def test_fields_of_the_input_are_no_figures() -> None:
    """Lines that were scored before, or bear names of figures by chance."""
    before = {
        "log_likelihood": -3.0,
        "tokens": 2,
        "bytes": 4,
        "characters": 4,
        "unit": "nats",
    }
    found = corpus([{"error": "mine", **before, "prediction": "a", "labels": {"a": 1.0}}])
    assert found == {"records": 1, "failed": 0, "predictions": {"a": 1}}
    other = {"error": "mine", "prediction": 7, "labels": ["x"], "value": "y", "entities": 3, **before}
    assert corpus([other])["perplexity"] == close(math.exp(1.5))
    assert corpus([{**before, "error": {"code": "E-X", "message": "x"}}]) == {"records": 1, "failed": 1}
