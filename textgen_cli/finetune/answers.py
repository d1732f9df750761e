"""What a network answers to held-out examples: figures that need whole answers, and samples for people to read.

One function and one entry in a dict for each task. Everything is greedy, so the same network answers the same. It
knows no trainer; the best span of a context is found by text/spans.py, as generate does.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from transformers import GenerationConfig

from textgen_cli.events import Progress, Report, silent
from textgen_cli.finetune.collate import IGNORED, Row
from textgen_cli.finetune.encode import DEFAULT_LENGTH, ENCODERS, Setting
from textgen_cli.finetune.prepared import Prepared
from textgen_cli.finetune.turns import turns
from textgen_cli.model.tokenizer import Tokenizer
from textgen_cli.text import metrics
from textgen_cli.text.spans import Answer, answered, best_spans, null_score
from textgen_cli.text.windows import batches

EXAMPLES = 1000  # answered at most; the first ones of the held-out data
BATCH_TOKENS, BATCH_ROWS = 4096, 32
WINDOW, STRIDE = 384, 128  # tokens of a window over a long context, and those that two share
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
CONTINUED = 32  # tokens of a text that a sample shows, and as many that continue it
ANSWER = 96  # tokens of a chat's answer in a sample
SPARE = 8  # tokens that a translation may be longer than the longest right one

Example = Mapping[str, Any]
Sample = dict[str, str]  # input, expected, answer


@dataclass(frozen=True)
class Answerer:
    """A network with what its answers need besides."""

    net: Any
    tokenizer: Tokenizer
    longest: int | None  # tokens of an input at most
    generation: Mapping[str, Any] = field(
        default_factory=dict
    )  # the model's own settings, as load keeps them

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.net.parameters()).device
        return device


def final(prepared: Prepared, by: Answerer, report: Report = silent) -> dict[str, float]:
    """Figures of whole answers to the first EXAMPLES held-out examples; none for tasks that need no answers.

    seq2seq: exact_match, chrf, bleu (both from 0 to 100, by sacrebleu). question-answering: exact_match and f1 by
    SQuAD's rules, and by themselves those of questions with and without an answer where there are both.
    """
    measure = FINAL.get(prepared.task)
    if measure is None or not prepared.valid:
        return {}
    count = min(EXAMPLES, len(prepared.valid))
    with _at_rest(by.net):
        return measure(list(prepared.valid.select(range(count))), by, report)


def samples(prepared: Prepared, by: Answerer, count: int = 5) -> list[Sample]:
    """The network's answers to the first held-out examples, beside the right ones: texts for people."""
    data = prepared.valid or prepared.train
    chosen = data.select(range(min(count, len(data))))
    with _at_rest(by.net):
        return [SAMPLES[prepared.task](example, by, prepared) for example in chosen]


@contextmanager
def _at_rest(net: Any) -> Iterator[None]:
    """The network without dropout and gradients, and afterwards as it was."""
    was_training = net.training
    net.eval()
    try:
        # Not inference_mode: what it leaves of gathered weights could not learn any more.
        with torch.no_grad():
            yield
    finally:
        net.train(was_training)


# --- texts that are written


def _greedy(by: Answerer, prompts: Sequence[Sequence[int]], room: int) -> list[str]:
    """The likeliest text of at most `room` tokens for each prompt, in batches of like lengths."""
    found = [""] * len(prompts)
    settings = _settings(by, room)
    left = not by.net.config.is_encoder_decoder
    for batch in batches([len(prompt) + room for prompt in prompts], BATCH_TOKENS, BATCH_ROWS):
        ids, mask = _padded([prompts[number] for number in batch], int(settings.pad_token_id), left=left)
        out = by.net.generate(
            input_ids=ids.to(by.device), attention_mask=mask.to(by.device), generation_config=settings
        )
        start = ids.shape[1] if left else 1
        for number, row in zip(batch, out[:, start:].tolist(), strict=True):
            found[number] = by.tokenizer.decode(row)
    return found


def _settings(by: Answerer, room: int) -> Any:
    """Greedy decoding with the model's own control tokens."""
    config, own = by.net.config, by.net.generation_config
    names = ("decoder_start_token_id", "forced_bos_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {}
    for name in names:
        places = (by.generation.get(name), getattr(own, name, None), getattr(config, name, None))
        tokens[name] = next((value for value in places if value is not None), None)
    backend = by.tokenizer.backend
    if tokens["eos_token_id"] is None:
        tokens["eos_token_id"] = backend.eos_token_id
    if tokens["pad_token_id"] is None:
        tokens["pad_token_id"] = backend.pad_token_id or 0
    return GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=room, use_cache=True, **tokens)


def _padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as (B, T) ids and mask."""
    longest = max(map(len, rows))
    blanks = [longest - len(row) for row in rows]

    def filled(row: Sequence[int], blank: Sequence[int]) -> list[int]:
        return [*blank, *row] if left else [*row, *blank]

    ids = [filled(row, [pad] * blank) for row, blank in zip(rows, blanks, strict=True)]
    mask = [filled([1] * len(row), [0] * blank) for row, blank in zip(rows, blanks, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def _source(by: Answerer, text: str) -> list[int]:
    return list(
        by.tokenizer.backend(text, truncation=by.longest is not None, max_length=by.longest)["input_ids"]
    )


def _translations(examples: Sequence[Example], by: Answerer, report: Report) -> dict[str, float]:
    right = [example["target"] for example in examples]
    room = SPARE + max(len(by.tokenizer.backend(text_target=text)["input_ids"]) for text in right)
    made: list[str] = []
    for start in range(0, len(examples), BATCH_ROWS):
        report(Progress("evaluate", "translations", start, len(examples), "examples"))
        part = examples[start : start + BATCH_ROWS]
        made += _greedy(by, [_source(by, example["source"]) for example in part], room)
    same = statistics.fmean(one.strip() == other.strip() for one, other in zip(made, right, strict=True))
    chrf, bleu = CHRF().corpus_score(made, [right]), BLEU().corpus_score(made, [right])
    return {"exact_match": same, "chrf": chrf.score, "bleu": bleu.score}


# --- answers in a context


def _found_answers(examples: Sequence[Example], by: Answerer, report: Report) -> dict[str, float]:
    exact: dict[bool, list[float]] = {True: [], False: []}
    overlap: dict[bool, list[float]] = {True: [], False: []}
    for number, example in enumerate(examples):
        report(Progress("evaluate", "answers", number, len(examples), "examples"))
        right = [answer["text"] for answer in example["answers"]]
        made = _answer(example, by)
        exact[bool(right)].append(metrics.exact_match(right, made))
        overlap[bool(right)].append(metrics.token_f1(right, made))
    figures = {
        "exact_match": statistics.fmean(exact[True] + exact[False]),
        "f1": statistics.fmean(overlap[True] + overlap[False]),
    }
    if exact[True] and exact[False]:
        figures |= {"answerable_exact_match": statistics.fmean(exact[True])}
        figures |= {"answerable_f1": statistics.fmean(overlap[True])}
        figures |= {"unanswerable_exact_match": statistics.fmean(exact[False])}
    return figures


def _answer(example: Example, by: Answerer) -> str:
    """The best span of all windows over the context; "" where the network holds it for silent."""
    encoded = _windows(example, by)
    names = [name for name in INPUTS if name in encoded]
    best: Answer | None = None
    null = float("inf")
    for begin in range(0, len(encoded["input_ids"]), BATCH_ROWS):
        rows = slice(begin, begin + BATCH_ROWS)
        out = by.net(**{name: torch.tensor(encoded[name][rows], device=by.device) for name in names})
        starts, ends = out.start_logits.float().tolist(), out.end_logits.float().tolist()  # (rows, T)
        for row, (start, end) in enumerate(zip(starts, ends, strict=True), begin):
            in_context = [part == 1 for part in encoded.sequence_ids(row)]
            null = min(null, null_score(start, end))
            for span in best_spans(start, end, encoded["offset_mapping"][row], in_context):
                best = span if best is None or span.score > best.score else best
    if best is None or not answered(best, null):
        return ""
    return str(example["context"][best.start : best.end])


def _windows(example: Example, by: Answerer) -> Any:
    backend = by.tokenizer.backend
    longest = min(WINDOW, by.longest or WINDOW)
    room = max(longest - len(backend(example["question"])["input_ids"]), 2)
    return backend(
        example["question"],
        example["context"],
        truncation="only_second",
        max_length=longest,
        stride=min(STRIDE, room // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="longest",
    )


FINAL: dict[str, Callable[[Sequence[Example], Answerer, Report], dict[str, float]]] = {
    "seq2seq": _translations,
    "question-answering": _found_answers,
}


# --- samples


def _continued(example: Example, by: Answerer, prepared: Prepared) -> Sample:
    """A text's beginning, how it goes on, and how the network goes on."""
    ids = by.tokenizer.encode_literal(example["text"])
    cut = min(CONTINUED, max(1, len(ids) // 2))
    begun = by.tokenizer.decode(ids[:cut])
    prompt = by.tokenizer.encode(begun)
    if prompt[-1:] == [by.tokenizer.backend.eos_token_id]:
        prompt.pop()
    answer = _greedy(by, [prompt or ids[:1]], CONTINUED)[0]
    return {"input": begun, "expected": by.tokenizer.decode(ids[cut : cut + CONTINUED]), "answer": answer}


def _filled(example: Example, by: Answerer, prepared: Prepared) -> Sample:
    """A text whose middle token is hidden, that token, and the network's guess."""
    ids = by.tokenizer.encode_literal(example["text"])[: 2 * CONTINUED]
    backend: Any = by.tokenizer.backend
    if not ids:
        return {"input": "", "expected": "", "answer": ""}
    middle = len(ids) // 2
    hidden = [*ids[:middle], backend.mask_token_id, *ids[middle + 1 :]]
    head = list(backend("")["input_ids"])
    before = head[:1] if head else []
    row = [*before, *hidden, *head[1:]]
    logits = by.net(input_ids=torch.tensor([row], device=by.device)).logits[0, len(before) + middle]  # (V,)
    return {
        "input": str(backend.decode(hidden)),
        "expected": by.tokenizer.spell(ids[middle]),
        "answer": by.tokenizer.spell(int(logits.argmax())),
    }


def _chatted(example: Example, by: Answerer, prepared: Prepared) -> Sample:
    """A conversation up to its last answer, that answer, and the network's."""
    pieces = list(turns(by.tokenizer, example["messages"]))
    last = max(number for number, (_, learnt) in enumerate(pieces) if learnt)
    prompt = [token for ids, _ in pieces[:last] for token in ids]
    place = max(n for n, message in enumerate(example["messages"]) if message["role"] == "assistant")
    return {
        "input": "\n".join(str(message["content"]) for message in example["messages"][:place]),
        "expected": str(example["messages"][place]["content"]),
        "answer": _greedy(by, [prompt], ANSWER)[0],
    }


def _translated(example: Example, by: Answerer, prepared: Prepared) -> Sample:
    room = SPARE + 2 * len(by.tokenizer.backend(text_target=example["target"])["input_ids"])
    answer = _greedy(by, [_source(by, example["source"])], room)[0]
    return {"input": example["source"], "expected": example["target"], "answer": answer}


def _labelled(example: Example, by: Answerer, prepared: Prepared) -> Sample:
    logits = _logits(_row(example, by, prepared), by)  # (L,)
    right = example["label"]
    if prepared.problem == "regression":
        expected, answer = f"{right:g}", f"{logits[0].item():.4g}"
    elif prepared.problem == "multi_label_classification":
        chosen = [name for name, logit in zip(prepared.labels, logits.tolist(), strict=True) if logit >= 0]
        expected, answer = ", ".join(right), ", ".join(chosen)
    else:
        expected, answer = str(right), prepared.labels[int(logits.argmax())]
    texts = filter(None, (example["text"], example["pair"]))
    return {"input": "\n".join(texts), "expected": expected, "answer": answer}


def _tagged(example: Example, by: Answerer, prepared: Prepared) -> Sample:
    row = _row(example, by, prepared)
    best = _logits(row, by).argmax(-1).tolist()  # T
    made = [prepared.labels[tag] for tag, label in zip(best, row["labels"], strict=True) if label != IGNORED]
    words = example["words"]
    made += ["O"] * (len(words) - len(made))  # what was cut
    return {
        "input": " ".join(words),
        "expected": _marked(words, example["tags"]),
        "answer": _marked(words, made),
    }


def _row(example: Example, by: Answerer, prepared: Prepared) -> Row:
    """An example as the training sees it, cut where it is too long."""
    setting = Setting(by.tokenizer, by.longest or DEFAULT_LENGTH, True, prepared.labels, prepared.problem)
    return ENCODERS[prepared.task](example, setting)[0]


def _logits(row: Row, by: Answerer) -> torch.Tensor:
    """The logits of one row in float32, on the CPU."""
    inputs = {name: torch.tensor([row[name]], device=by.device) for name in INPUTS if name in row}
    logits: torch.Tensor = by.net(**inputs).logits[0].float().cpu()
    return logits


def _marked(words: Sequence[str], tags: Sequence[str]) -> str:
    """`Anna/B-PER sings`: each word with its tag, without one where that is O."""
    return " ".join(word if tag == "O" else f"{word}/{tag}" for word, tag in zip(words, tags, strict=True))


def _answered(example: Example, by: Answerer, prepared: Prepared) -> Sample:
    right = list(dict.fromkeys(answer["text"] for answer in example["answers"]))
    asked = f"{example['question']}\n{example['context']}"
    return {"input": asked, "expected": " | ".join(right), "answer": _answer(example, by)}


SAMPLES: dict[str, Callable[[Example, Answerer, Prepared], Sample]] = {
    "clm": _continued,
    "mlm": _filled,
    "chat": _chatted,
    "seq2seq": _translated,
    "text-classification": _labelled,
    "token-classification": _tagged,
    "question-answering": _answered,
}
