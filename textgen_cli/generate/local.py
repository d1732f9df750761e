"""The engine on a loaded model: requests in, chunks of text out.

Turns prompts into rows, forms batches, drives the decoding, turns tokens into text as they come and says how each
sequence ended. Batches depend on the requests alone.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from textgen_cli.errors import InputError, ModelError, OutOfMemory, TextgenError, UsageError
from textgen_cli.events import Notice, Report, silent
from textgen_cli.generate.request import Chunk, Completion, Request
from textgen_cli.generate.rows import Row, Step
from textgen_cli.generate.sampling import Plan
from textgen_cli.model import device
from textgen_cli.model.tokenizer import TextStream
from textgen_cli.text.stops import StopFinder
from textgen_cli.text.windows import batches

if TYPE_CHECKING:
    from textgen_cli.generate.constrain import Constrainer
    from textgen_cli.generate.prefix import Kept
    from textgen_cli.model.loaded import Model

    # The network, rows that are decoded together, the plan, a grammar, what was computed before -> steps.
    Steps = Callable[[Any, list[Row], Plan, Constrainer | None, Kept | None], Iterator[Step]]

BATCH_TOKENS = 16_384  # tokens of prompt, text and padding that one batch may come to
BATCH_ROWS = 64


@dataclass
class _Sequence:
    """A request on its way: its row in the batch and its text so far."""

    request: Request
    row: Row
    text: TextStream
    stop: StopFinder
    logprobs: list[dict[str, Any]] | None
    extra: dict[str, Any]
    held: str | None = None  # text that waits for the end; None where chunks go out at once

    def chunk(self, text: str, final: Completion | None = None) -> Chunk | None:
        """The chunk to give out now; None while text is held or there is none."""
        if self.held is not None:
            self.held += text
            text = self.held if final else ""
        if not text and final is None:
            return None
        return Chunk(self.request.index, self.request.sequence, text, final)

    def completion(self, finish_reason: str, error: TextgenError | None = None) -> Completion:
        counts = len(self.row.prompt), len(self.row.tokens)
        tokens = self.row.prompt, self.row.tokens
        return Completion(finish_reason, *counts, self.logprobs, error, self.extra, tokens)


@dataclass(frozen=True)
class LocalEngine:
    """A model of this machine behind the engine's door."""

    model: "Model"
    plan: Plan
    constrainer: "Constrainer | None" = None
    draft: Any = None  # a smaller network that guesses tokens
    batch_rows: int | None = None
    truncate: str | None = None  # left or right: the end at which a prompt that is too long is cut
    report: Report = silent
    kept: "Kept | None" = None  # what the conversation under way has computed
    steps: "Steps | None" = None  # another loop than the one on transformers' networks

    def stream(self, requests: Sequence[Request], done: Collection[int] = ()) -> Iterator[Chunk]:
        """Generate for every request; one that fails ends with an error of its own and the others go on.

        A batch whose records are all `done` is not computed again.

        The sequences of a single record come as they grow, those of several records each when it is whole.
        """
        live = len({request.index for request in requests}) == 1
        sequences = []
        for request in requests:
            try:
                sequences.append(self._open(request, live))
            except TextgenError as error:
                failed = Completion("error", None, None, error=error)
                yield Chunk(request.index, request.sequence, "", failed)
        if self._needs_whole():
            yield from self._whole(sequences, done)
        else:
            yield from self._batches(sequences, done)

    def measure(self, messages: Sequence[dict[str, Any]]) -> tuple[int, int | None]:
        """How many tokens a conversation has, and how many the model takes."""
        return len(self.model.tokenizer.encode_chat(messages)), self.model.context

    def _open(self, request: Request, live: bool) -> _Sequence:
        seq2seq = self.model.family == "seq2seq"
        prompt = self._encode(request)
        whole = len(prompt)
        if request.messages is None and self.truncate is not None:
            prompt = self._cut(prompt)
        if seq2seq:
            self.plan.check_source(len(prompt))
        # A decoder of its own begins with one token, whatever the prompt's length.
        row = Row(prompt, self.plan.room(1 if seq2seq else len(prompt)), random.Random(request.seed))
        row.state = self.constrainer.start() if self.constrainer else None
        row.first = self._language(request.target_code)
        text = self.model.tokenizer.stream([] if seq2seq else prompt)
        # A form ends by itself, and a stop string of a task may be part of it.
        stops = () if self.constrainer else (*self.plan.stops, *request.stop)
        stop = StopFinder(stops, trim=request.trim)
        logprobs: list[dict[str, Any]] | None = None if self.plan.logprobs is None else []
        extra = {"truncated": True} if len(prompt) < whole else {}
        return _Sequence(request, row, text, stop, logprobs, extra, None if live else "")

    def _cut(self, prompt: list[int]) -> list[int]:
        """The part of a raw prompt that leaves the room asked for, or half of the context where that is less."""
        context = self.model.context
        if context is None:
            return prompt
        room = 0 if self.model.family == "seq2seq" else min(self.plan.max_new_tokens or 1, context // 2)
        keep = context - room
        if len(prompt) <= keep:
            return prompt
        special = self.model.tokenizer.backend.all_special_ids
        head = prompt[: prompt[0] in special]  # what the tokenizer puts around every text stays
        tail = prompt[len(prompt) - (prompt[-1] in special) :]
        keep -= len(head) + len(tail)
        inner = prompt[len(head) : len(prompt) - len(tail)]
        return [*head, *(inner[-keep:] if self.truncate == "left" else inner[:keep]), *tail]

    def _encode(self, request: Request) -> list[int]:
        tokenizer = self.model.tokenizer
        if request.messages is not None:
            return tokenizer.encode_chat(request.messages)
        if request.prompt is None:
            raise UsageError("E-FAMILY", self.model.name, "generates text and marks no answers in a context")
        return tokenizer.encode(request.prompt, language=request.source_code) or self._empty_prompt()

    def _language(self, code: str | None) -> int | None:
        if code is None:
            return None
        backend = self.model.tokenizer.backend
        # M2M100 spells its tokens with bars; there the bare code may be a word.
        for token in (f"__{code}__", code):
            found = backend.convert_tokens_to_ids(token)
            if isinstance(found, int) and found != backend.unk_token_id:
                return found
        raise ModelError("E-LANGUAGE", self.model.name, f"has no language token {code}")

    def _empty_prompt(self) -> list[int]:
        bos = self.model.tokenizer.backend.bos_token_id if self.plan.bos is None else self.plan.bos
        if bos is None:
            raise InputError(
                "E-EMPTY", "prompt", f"is empty, and {self.model.name} has no token that begins a text"
            )
        return [int(bos)]

    def _needs_whole(self) -> bool:
        if self.steps is not None:  # a loop of its own, that guesses by itself
            return False
        return (self.plan.settings.num_beams or 1) > 1 or self.plan.speculates or self.draft is not None

    # --- step by step

    def _batches(self, sequences: list[_Sequence], done: Collection[int]) -> Iterator[Chunk]:
        for alike in self._alike(sequences):
            sizes = [len(sequence.row.prompt) + sequence.row.room for sequence in alike]
            # What is less than two batches is one: a pass through all layers has its price however few the rows.
            rows = BATCH_ROWS if len(sizes) >= 2 * BATCH_ROWS else len(sizes)
            for batch in batches(sizes, BATCH_TOKENS, self.batch_rows or rows):
                members = [alike[number] for number in batch]
                if any(sequence.request.index not in done for sequence in members):
                    yield from self._decode(members)

    def _alike(self, sequences: list[_Sequence]) -> list[list[_Sequence]]:
        """Sequences that may be decoded together: where padding would be read, those of one length."""
        if not self.plan.reads_prompts:
            return [sequences]
        groups: dict[int, list[_Sequence]] = defaultdict(list)
        for sequence in sequences:
            groups[len(sequence.row.prompt)].append(sequence)
        return list(groups.values())

    def _decode(self, batch: list[_Sequence]) -> Iterator[Chunk]:
        """One batch; where memory runs out, its unfinished half, then the other."""
        try:
            yield from self._steps(batch)
        except (RuntimeError, MemoryError) as error:
            left = [sequence for sequence in batch if not sequence.row.done]
            if not device.out_of_memory(error) or not left:
                raise
            device.release(self.model.placement.device)
            if len(left) == 1 or any(s.held is None and s.row.tokens for s in left):
                failed = OutOfMemory("E-MEMORY", self.model.name, f"{len(left)} sequences do not fit")
                for sequence in left:
                    sequence.row.done = True
                    if chunk := sequence.chunk("", sequence.completion("error", failed)):
                        yield chunk
                return
        else:
            return
        self.report(Notice(f"out of memory with {len(batch)} sequences, going on with half"))
        again = [self._open(sequence.request, sequence.held is None) for sequence in left]
        middle = (len(again) + 1) // 2
        yield from self._decode(again[:middle])
        yield from self._decode(again[middle:])

    def _steps(self, batch: list[_Sequence]) -> Iterator[Chunk]:
        owner = {id(sequence.row): sequence for sequence in batch}
        kept = self.kept if len(batch) == 1 else None
        rows = [sequence.row for sequence in batch]
        steps = self.steps or _steps_of_library()
        for step in steps(self.model.net, rows, self.plan, self.constrainer, kept):
            for number, row in enumerate(step.rows):
                if not row.done and (chunk := self._advance(owner[id(row)], step, number)):
                    yield chunk

    def _advance(self, sequence: _Sequence, step: Step, number: int) -> Chunk | None:
        row, token = sequence.row, step.tokens[number]
        if not step.finite[number]:
            row.done = True
            error = ModelError("E-NAN", self.model.name, f"logits are not finite at step {len(row.tokens)}")
            return sequence.chunk("", sequence.completion("error", error))
        is_language = row.first is not None and not row.tokens  # no part of the text, so none of its form
        if row.state is not None and self.constrainer is not None and not is_language:
            self.constrainer.advance([row.state], [token])
            if row.state.failure:
                row.done = True
                return sequence.chunk("", sequence.completion("error", row.state.failure))
        if sequence.logprobs is not None:
            sequence.logprobs.append(self._logprob(step.logits[number], token))
        return self._take(sequence, token)

    def _take(self, sequence: _Sequence, token: int) -> Chunk | None:
        """Add a token to its sequence: text, stop strings, the end."""
        row = sequence.row
        row.tokens.append(token)
        is_end = token in self.plan.eos
        # Once a grammar allows nothing but the end, there is no need to wait for it.
        ended = is_end or (row.state is not None and row.state.finished)
        full = len(row.tokens) >= row.room
        text = "" if is_end else sequence.text.feed(token)
        text = sequence.stop.feed(text + sequence.text.end() if ended or full else text)
        if not (ended or full or sequence.stop.found):
            return sequence.chunk(text)
        row.done = True
        reason = "stop" if ended or sequence.stop.found else "length"
        if reason == "length" and self.constrainer is not None:
            fact = "the text was cut before its form was complete; raise --max-new-tokens"
            if self.constrainer.indivisible:
                error = InputError("E-CUT", f"record {sequence.request.index}", fact)
                return sequence.chunk("", sequence.completion("error", error))
            self.report(Notice(f"record {sequence.request.index}: {fact}", name="W-CUT"))
        return sequence.chunk(text + sequence.stop.end(), sequence.completion(reason))

    def _logprob(self, logits: torch.Tensor, token: int) -> dict[str, Any]:
        """Log-probability (nats) of a token and the most likely ones, before any penalty or sampler; logits (V,)."""
        logs = torch.log_softmax(logits, dim=-1)
        best = torch.topk(logs, self.plan.logprobs or 0)
        spell = self.model.tokenizer.spell
        top = [
            {"token": spell(other), "logprob": value}
            for other, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        return {"token": spell(token), "logprob": logs[token].item(), "top": top}

    # --- whole sequences

    def _whole(self, sequences: list[_Sequence], done: Collection[int]) -> Iterator[Chunk]:
        """One row a record; the library gives all its sequences at once."""
        by_record: dict[int, list[_Sequence]] = defaultdict(list)
        for sequence in sequences:
            by_record[sequence.request.index].append(sequence)
        members = list(by_record.values())
        from textgen_cli.generate import whole

        found = whole.sequences(
            self.model.net,
            [group[0].row for group in members],
            self.plan,
            [group[0].request.seed for group in members],
            lambda number: members[number][0].request.index not in done,
            draft=self.draft,
            max_tokens=BATCH_TOKENS,
            max_rows=self.batch_rows or BATCH_ROWS,
        )
        for number, tokens in found:
            for place, sequence in enumerate(members[number]):
                if isinstance(tokens, TextgenError):
                    failed = sequence.completion("error", tokens)
                    yield Chunk(sequence.request.index, sequence.request.sequence, "", failed)
                else:
                    yield from self._spelled(sequence, tokens[place])

    def _spelled(self, sequence: _Sequence, tokens: list[int]) -> Iterator[Chunk]:
        sequence.held = sequence.held or ""
        for token in tokens:
            if not sequence.row.done and (chunk := self._take(sequence, token)):
                yield chunk


def _steps_of_library() -> "Steps":
    """The loop on transformers' networks, which an engine with a loop of its own must not import."""
    from textgen_cli.generate import decode

    return decode.steps
