"""Decoding that gives a sequence only when it is whole: beams and speculation, by transformers' own loops.

Prompt lookup and draft models check several guessed tokens in one pass; the text is what plain decoding gives.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessor

from textgen_cli.errors import ModelError, OutOfMemory, TextgenError
from textgen_cli.generate.decode import padded
from textgen_cli.generate.rows import Row
from textgen_cli.generate.sampling import Plan
from textgen_cli.model import device
from textgen_cli.text.windows import batches

Found = list[list[int]] | TextgenError  # a row's token lists, or why it has none


class _Finite(LogitsProcessor):
    """Refuses logits that are no numbers: every choice among them would look like an answer."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.amax(dim=-1).isfinite().all():
            raise ModelError("E-NAN", "model", "logits are not finite")
        return scores


def sequences(
    net: Any,
    rows: list[Row],
    plan: Plan,
    seeds: list[int],
    wanted: Callable[[int], bool],
    *,
    draft: Any = None,
    max_tokens: int,
    max_rows: int,
) -> Iterator[tuple[int, Found]]:
    """(row number, its `plan.num_return_sequences` token lists or its error), for rows of wanted groups.

    Rows are batched only with rows of the same length and room, so that none sees padding and each gives what it
    gives alone; sampled and speculative decoding takes them one by one, each with its own seed.
    """
    groups: dict[tuple[int | None, ...], list[int]] = defaultdict(list)
    alone = plan.sample or plan.speculates or draft is not None
    for number, row in enumerate(rows):
        groups[(number,) if alone else (len(row.prompt), row.room, row.first)].append(number)
    beams = plan.settings.num_beams or 1
    for group in groups.values():
        size = len(rows[group[0]].prompt) + rows[group[0]].room
        for part in batches([size * beams] * len(group), max_tokens, max_rows):
            numbers = [group[place] for place in part]
            if any(map(wanted, numbers)):
                torch.manual_seed(seeds[numbers[0]])
                yield from _group(net, rows, numbers, plan, draft)


def _group(
    net: Any, rows: list[Row], numbers: list[int], plan: Plan, draft: Any
) -> Iterator[tuple[int, Found]]:
    """One batch; where memory runs out its halves, where logits are no numbers each row alone."""
    try:
        found = _generate(net, [rows[number] for number in numbers], plan, draft)
    except (ModelError, RuntimeError, MemoryError) as error:
        if not isinstance(error, ModelError):
            if not device.out_of_memory(error):
                raise
            device.release(net.device)
        if len(numbers) > 1:
            middle = (len(numbers) + 1) // 2
            yield from _group(net, rows, numbers[:middle], plan, draft)
            yield from _group(net, rows, numbers[middle:], plan, draft)
            return
        full = OutOfMemory("E-MEMORY", "record", f"{plan.settings.num_beams or 1} beams do not fit")
        yield numbers[0], error if isinstance(error, ModelError) else full
        return
    count = plan.num_return_sequences
    for place, number in enumerate(numbers):
        yield number, [_trim(ids, plan) for ids in found[place * count : (place + 1) * count]]


def _generate(net: Any, rows: list[Row], plan: Plan, draft: Any) -> list[list[int]]:
    ids, mask = padded([row.prompt for row in rows], plan.pad, left=True)
    settings = plan.settings
    settings.max_new_tokens = rows[0].room
    settings.num_return_sequences = plan.num_return_sequences
    if rows[0].first is not None:
        settings.forced_bos_token_id = rows[0].first
    with torch.inference_mode(), _drafting(draft, settings):
        out = net.generate(
            input_ids=ids.to(net.device),
            attention_mask=mask.to(net.device),
            generation_config=settings,
            assistant_model=draft,
            logits_processor=[_Finite(), *([plan.banned] if plan.banned else [])],
        )
    start = 1 if net.config.is_encoder_decoder else ids.shape[1]
    tokens: list[list[int]] = out[:, start:].tolist()
    return tokens


@contextmanager
def _drafting(draft: Any, settings: Any) -> Iterator[None]:
    """How the draft model guesses, which the library reads from its own settings and changes as it goes on."""
    if draft is None:
        yield
        return
    own = draft.generation_config
    draft.generation_config = copy.copy(own)
    for name in ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"):
        if getattr(settings, name) is not None:
            setattr(draft.generation_config, name, getattr(settings, name))
    try:
        yield
    finally:
        draft.generation_config = own


def _trim(ids: list[int], plan: Plan) -> list[int]:
    """Up to and with the first end token; what follows is padding."""
    end = next((place for place, token in enumerate(ids) if token in plan.eos), None)
    return ids if end is None else ids[: end + 1]
