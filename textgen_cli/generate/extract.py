"""The engine of extractive models: the span of a context that answers a question.

Contexts longer than the model takes are read in overlapping windows, and the best span of all of them counts.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from textgen_cli.errors import InputError, ModelError, TextgenError, UsageError
from textgen_cli.generate.request import Chunk, Completion, Request
from textgen_cli.model.load import Model
from textgen_cli.text.spans import Answer, answered, best_spans, null_score

STRIDE = 128  # tokens that two windows of a long context share
WINDOW = 384  # tokens of a window, as such models are trained on
ROWS = 16  # windows computed together


@dataclass(frozen=True)
class ExtractEngine:
    """A question-answering model; `top` answers are reported for each question."""

    model: Model
    top: int = 1
    batch_rows: int | None = None

    def stream(self, requests: Sequence[Request], done: Collection[int] = ()) -> Iterator[Chunk]:
        """Answer every request: text, and answer_start, answer_end (characters), score and null_score.

        An empty text with finish_reason `no_answer` where the model holds the context for silent.
        """
        for request in requests:
            if request.index in done:
                continue
            try:
                yield self._answer(request)
            except TextgenError as error:
                yield Chunk(request.index, request.sequence, "", Completion("error", None, None, error=error))

    @torch.inference_mode()
    def _answer(self, request: Request) -> Chunk:
        if request.pair is None:
            raise UsageError(
                "E-FAMILY",
                self.model.name,
                "marks answers in a context",
                hint="use --task qa --question TEXT",
            )
        question, context = request.pair
        encoded = self._windows(question, context)
        spans_of: dict[tuple[int, int], Answer] = {}  # two windows may hold the same span
        null = float("inf")
        rows = self.batch_rows or ROWS
        for start in range(0, len(encoded["input_ids"]), rows):
            for spans, silent in self._judge(encoded, slice(start, start + rows)):
                for span in spans:
                    known = spans_of.setdefault((span.start, span.end), span)
                    if span.score > known.score:
                        spans_of[span.start, span.end] = span
                null = min(null, silent)
        found = sorted(spans_of.values(), key=lambda answer: -answer.score)
        best = found[0] if found else None
        tokens = sum(len(ids) for ids in encoded["input_ids"])
        if best is None or not answered(best, null):
            extra: dict[str, Any] = dict.fromkeys(("answer_start", "answer_end", "score")) | {
                "null_score": null
            }
            return Chunk(request.index, request.sequence, "", Completion("no_answer", tokens, 0, extra=extra))
        extra = self._fields(best) | {"null_score": null}
        if self.top > 1:
            several = found[: self.top]
            extra["answers"] = [{"text": context[a.start : a.end], **self._fields(a)} for a in several]
        text = context[best.start : best.end]
        return Chunk(request.index, request.sequence, text, Completion("stop", tokens, 0, extra=extra))

    @staticmethod
    def _fields(answer: Answer) -> dict[str, Any]:
        return {"answer_start": answer.start, "answer_end": answer.end, "score": answer.score}

    def _windows(self, question: str, context: str) -> Any:
        backend = self.model.tokenizer.backend
        longest = min(WINDOW, self.model.context or WINDOW)
        room = longest - len(backend(question)["input_ids"])
        if room < 8:
            raise InputError("E-CONTEXT", "question", f"leaves no room for the context in {longest} tokens")
        return backend(
            question,
            context,
            truncation="only_second",
            max_length=longest,
            stride=min(STRIDE, room // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding="longest",
        )

    def _judge(self, encoded: Any, rows: slice) -> Iterator[tuple[list[Answer], float]]:
        """(best spans, score of "no answer") of each window."""
        names = [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in encoded]
        inputs = {n: torch.tensor(encoded[n][rows], device=self.model.placement.device) for n in names}
        out = self.model.net(**inputs)
        if not (out.start_logits.isfinite().all() and out.end_logits.isfinite().all()):
            raise ModelError("E-NAN", self.model.name, "logits are not finite")
        starts, ends = out.start_logits.float().tolist(), out.end_logits.float().tolist()  # (rows, T)
        for row, (start, end) in enumerate(zip(starts, ends, strict=True), rows.start):
            in_context = [part == 1 for part in encoded.sequence_ids(row)]
            offsets = encoded["offset_mapping"][row]
            yield best_spans(start, end, offsets, in_context, count=self.top), null_score(start, end)
