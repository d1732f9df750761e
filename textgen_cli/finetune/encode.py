"""Checked examples become rows that a network takes: token ids and labels.

One function and one entry in ENCODERS for each task. It knows no trainer and loads nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from textgen_cli.config.finetune import DataConfig
from textgen_cli.errors import InputError, OutputError
from textgen_cli.finetune.collate import IGNORED, Collator, Example, Masker, Row
from textgen_cli.finetune.prepared import Prepared
from textgen_cli.finetune.turns import turns
from textgen_cli.model.tokenizer import Tokenizer

DEFAULT_LENGTH = 1024  # tokens of an example at most, where neither the user nor the model says less
WINDOW_SHARE = 4  # windows over a long context share a quarter of their tokens

Encoder = Callable[[Example, "Setting"], list[Row]]


@dataclass(frozen=True)
class Setting:
    """What the encoding of an example depends on besides it."""

    tokenizer: Tokenizer
    length: int  # tokens at most
    truncate: bool
    labels: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def backend(self) -> PreTrainedTokenizerBase:
        return self.tokenizer.backend

    def fit(self, ids: list[int], what: str) -> list[int]:
        """The ids, cut where that was asked for. InputError E-CONTEXT where they are too many."""
        if len(ids) > self.length and not self.truncate:
            fact = f"{len(ids):,} tokens, {self.length:,} are the most"
            raise InputError("E-CONTEXT", what, fact, hint="use --truncate, or a larger --max-length")
        return ids[: self.length]


@dataclass(frozen=True)
class Encoded:
    """Rows for a network, with the column `length` besides, and what makes a batch of some."""

    train: datasets.Dataset
    valid: datasets.Dataset | None
    collate: Collator

    @property
    def lengths(self) -> list[int]:
        return list(self.train["length"])


def encode(
    prepared: Prepared, tokenizer: Tokenizer, config: DataConfig, length: int, folder: Path, seed: int
) -> Encoded:
    """Encode all examples into files of `folder`.

    Raises InputError E-CONTEXT for an example that is too long, ModelError for a tokenizer that does not suit the
    task, OutputError where the files cannot be written.
    """
    setting = Setting(tokenizer, length, config.truncate, prepared.labels, prepared.problem)
    make = ENCODERS[prepared.task]
    masker = Masker(tokenizer, config, seed) if prepared.task == "mlm" else None
    collate = Collator(tokenizer, masker)
    train = _each(prepared.train, lambda example: make(example, setting), folder / "train.arrow")
    valid = None
    if prepared.valid is not None and len(prepared.valid):
        valid = _each(prepared.valid, lambda example: make(example, setting), folder / "valid.arrow")
        if masker is not None:
            valid = _each(valid, lambda row: [collate.hidden(row)], folder / "hidden.arrow")
    if not len(train):
        raise InputError("E-EMPTY", "data", "no example is left to train on")
    return Encoded(train, valid, collate)


def _each(source: datasets.Dataset, make: Callable[[Example], list[Row]], path: Path) -> datasets.Dataset:
    return mapped(source, lambda examples: [row for example in examples for row in make(example)], path)


def mapped(
    source: datasets.Dataset, make: Callable[[list[Row]], list[Row]], path: Path, at_once: int = 100
) -> datasets.Dataset:
    """The rows that `make` gives for some at a time, in a file of their own, with their `length`."""

    def batch(examples: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        names = list(examples)
        rows = make(
            [dict(zip(names, values, strict=True)) for values in zip(*examples.values(), strict=True)]
        )
        keys = rows[0].keys() if rows else ["input_ids"]
        columns = {key: [row[key] for row in rows] for key in keys}
        return columns | {"length": [len(ids) for ids in columns["input_ids"]]}

    datasets.disable_progress_bars()
    try:
        return source.map(
            batch,
            batched=True,
            batch_size=at_once,
            remove_columns=source.column_names,
            cache_file_name=str(path),
            load_from_cache_file=False,
            new_fingerprint=path.stem,  # hashing the function would read all that it refers to
        )
    except OSError as error:
        raise OutputError("E-WRITE", str(path), (error.strerror or str(error)).lower()) from error


# --- one task each


def _text(example: Example, setting: Setting) -> list[Row]:
    """A text in windows, its end marked: none of its tokens is lost, and none is learnt twice."""
    ids = setting.tokenizer.encode(example["text"])
    end = setting.backend.eos_token_id
    if isinstance(end, int) and ids[-1:] != [end]:
        ids.append(end)
    windows = [ids[at : at + setting.length] for at in range(0, len(ids), setting.length)]
    # The first token of a window is not predicted, so one alone teaches nothing.
    return [_causal(window, window) for window in windows if len(window) > 1]


def _causal(ids: list[int], labels: list[int]) -> Row:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _hidden_text(example: Example, setting: Setting) -> list[Row]:
    """A text in windows, each framed as this model's inputs are; which tokens are hidden the Masker says."""
    found = setting.backend(
        example["text"],
        truncation=True,
        max_length=setting.length,
        return_overflowing_tokens=True,
        return_special_tokens_mask=True,
        return_offsets_mapping=True,
    )
    keys = ("input_ids", "attention_mask", "special_tokens_mask", "offset_mapping")
    rows = zip(*(found[key] for key in keys), strict=True)
    return [dict(zip(keys, row, strict=True)) for row in rows if 0 in row[2]]


def _conversation(example: Example, setting: Setting) -> list[Row]:
    """Messages as the model's template has them; only the assistant's words, and where they end, are learnt."""
    ids: list[int] = []
    labels: list[int] = []
    for piece, learnt in turns(setting.tokenizer, example["messages"]):
        ids += piece
        labels += piece if learnt else [IGNORED] * len(piece)
    ids = setting.fit(ids, "conversation")
    labels = labels[: len(ids)]
    return [_causal(ids, labels)] if any(label != IGNORED for label in labels[1:]) else []


def _pair(example: Example, setting: Setting) -> list[Row]:
    source = setting.fit(setting.tokenizer.encode(example["source"]), "source")
    target = setting.fit(list(setting.backend(text_target=example["target"])["input_ids"]), "target")
    end = setting.backend.eos_token_id
    if isinstance(end, int) and target[-1:] != [end]:
        target = [*target[: setting.length - 1], end]
    return [_causal(source, target)]


def _labelled(example: Example, setting: Setting) -> list[Row]:
    texts = [example["text"], *([example["pair"]] if example.get("pair") else [])]
    found = setting.backend(*texts)
    if len(found["input_ids"]) > setting.length:
        setting.fit(found["input_ids"], "text")
        found = setting.backend(*texts, truncation=True, max_length=setting.length)
    keys = ("input_ids", "attention_mask", "token_type_ids")
    row = {key: found[key] for key in keys if key in found}
    return [row | {"labels": _target(example["label"], setting)}]


def _target(label: Any, setting: Setting) -> Any:
    if setting.problem == "regression":
        return [float(label)]
    if setting.problem == "multi_label_classification":
        return [float(name in label) for name in setting.labels]
    return setting.labels.index(label)


def _tagged(example: Example, setting: Setting) -> list[Row]:
    """Words with blanks between them, as text has them; a word's tag is that of its first token."""
    words, tags = example["words"], example["tags"]
    starts: dict[int, int] = {}  # where a word begins -> its number
    at = 0
    for number, word in enumerate(words):
        starts[at] = number
        at += len(word) + 1
    text = " ".join(words)
    found = setting.backend(text, return_offsets_mapping=True)
    if len(found["input_ids"]) > setting.length:
        setting.fit(found["input_ids"], "sentence")
        found = setting.backend(text, return_offsets_mapping=True, truncation=True, max_length=setting.length)
    labels = []
    for begin, end in found["offset_mapping"]:
        blank = begin < end and text[begin] == " "  # a tokenizer may count a blank to the word behind it
        word = starts.pop(begin + blank, None) if end > begin + blank else None
        labels.append(IGNORED if word is None else setting.labels.index(tags[word]))
    return [_causal(found["input_ids"], labels)]


def _question(example: Example, setting: Setting) -> list[Row]:
    """Windows over the context, each with where its answer begins and ends; (0, 0) where it holds none."""
    question, context = example["question"], example["context"]
    if len(setting.backend(question)["input_ids"]) > setting.length // 2:
        raise InputError(
            "E-CONTEXT", "question", f"leaves no room for its context in {setting.length:,} tokens"
        )
    found = setting.backend(
        question,
        context,
        truncation="only_second",
        max_length=setting.length,
        stride=setting.length // WINDOW_SHARE,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    rows = []
    for number, offsets in enumerate(found["offset_mapping"]):
        sides = found.sequence_ids(number)
        first, last = _span(offsets, sides, example["answers"])
        keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in found]
        row = {key: found[key][number] for key in keys}
        rows.append(row | {"start_positions": first, "end_positions": last})
    return rows


def _span(
    offsets: Sequence[Any], sides: Sequence[int | None], answers: Sequence[Mapping[str, Any]]
) -> tuple[int, int]:
    """The first and the last token of the first answer, in a window that holds all of it."""
    if not answers:
        return 0, 0
    begin = int(answers[0]["start"])
    end = begin + len(answers[0]["text"])
    inside = [
        i for i, side in enumerate(sides) if side == 1 and offsets[i][1] > begin and offsets[i][0] < end
    ]
    if not inside or offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]


ENCODERS: dict[str, Encoder] = {
    "clm": _text,
    "mlm": _hidden_text,
    "chat": _conversation,
    "seq2seq": _pair,
    "text-classification": _labelled,
    "token-classification": _tagged,
    "question-answering": _question,
}
