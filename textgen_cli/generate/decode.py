"""The decoding loop: one forward pass a step for a batch of rows, tokens out as they are chosen.

transformers prepares inputs, cache and logits processors (its `custom_generate` takes a decoding function);
the loop is ours so that tokens are yielded, each row draws from its own stream, and rows that have ended leave
the batch. Knows no text.
"""

import copy
import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import logits_process as library

from textgen_cli.generate import prefix
from textgen_cli.generate.prefix import Kept
from textgen_cli.generate.rows import Row, Step, draw
from textgen_cli.generate.sampling import Plan
from textgen_cli.model.past import CACHE

if TYPE_CHECKING:
    from textgen_cli.generate.constrain import Constrainer

# These hold data of each row, or run the model themselves: under them rows stay where they are.
_PER_ROW = (
    library.RepetitionPenaltyLogitsProcessor,
    library.EncoderRepetitionPenaltyLogitsProcessor,
    library.EncoderNoRepeatNGramLogitsProcessor,
    library.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    library.SynthIDTextWatermarkLogitsProcessor,
)


def steps(
    net: Any, rows: list[Row], plan: Plan, constrainer: "Constrainer | None" = None, kept: Kept | None = None
) -> Iterator[Step]:
    """Decode a batch step by step until every row is done.

    With `kept`, a single row goes on from what the conversation computed before.
    """
    prompts = [row.prompt for row in rows]
    length, cache = prefix.resumed(kept, prompts[0]) if kept else (0, None)
    if cache is None and not plan.counts_padding:
        length, cache = prefix.shared(net, prompts)
    ids, mask = padded(prompts, plan.pad, left=not net.config.is_encoder_decoder, shared=length)
    settings = copy.copy(plan.settings)
    settings.max_new_tokens = max(row.room for row in rows)
    settings.forced_eos_token_id, ending = None, settings.forced_eos_token_id
    settings.min_new_tokens, least = None, settings.min_new_tokens
    # A grammar comes last: where it allows nothing but what is banned, it wins.
    own: list[library.LogitsProcessor] = [_NoEnd(least, plan.eos)] if least and plan.eos else []
    own += [one for one in (plan.marker, plan.banned) if one is not None]
    own += [_Ending(rows, ending)] if ending else []
    own += [_Constraint(rows, constrainer)] if constrainer else []
    inputs = {CACHE: cache} if cache is not None else {}
    found: Iterator[Step] = net.generate(
        input_ids=ids.to(net.device),
        attention_mask=mask.to(net.device),
        generation_config=settings,
        logits_processor=own,
        custom_generate=functools.partial(_loop, rows, plan, kept),
        **inputs,
    )
    return found


def padded(
    prompts: list[list[int]], pad: int, *, left: bool, shared: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as (B, T) ids and mask; padding stands before each prompt's own part, after what all share."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, prompt in enumerate(prompts):
        start = longest - len(prompt) + shared if left else shared
        for where, part in (
            (slice(0, shared), prompt[:shared]),
            (slice(start, start + len(prompt) - shared), prompt[shared:]),
        ):
            ids[number, where] = torch.tensor(part, dtype=torch.long)
            mask[number, where] = 1
    return ids, mask


class _NoEnd(library.LogitsProcessor):
    """No end for the first `steps` tokens; the library would walk the vocabulary twice a step for it."""

    def __init__(self, steps: int, ends: Iterable[int]) -> None:
        self._left, self._ends = steps, list(ends)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._left > 0:
            scores[:, self._ends] = -torch.inf
            self._left -= 1
        return scores


class _Ending(library.LogitsProcessor):
    """The tokens that each row ends with; the library would look at the batch's longest row alone."""

    def __init__(self, rows: list[Row], ids: list[int] | int) -> None:
        self._rows, self._ids = rows, ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for number, row in enumerate(self._rows):
            if len(row.tokens) == row.room - 1:
                scores[number] = -torch.inf
                scores[number, self._ids] = 0.0
        return scores


class _Constraint(library.LogitsProcessor):
    """The grammar of each row, between the penalties and the samplers."""

    def __init__(self, rows: list[Row], constrainer: "Constrainer") -> None:
        self._rows = rows
        self._constrainer = constrainer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        states = [row.state for row in self._rows if row.state is not None]
        self._constrainer.apply(states, scores)
        return scores


@torch.inference_mode()
def _loop(
    rows: list[Row],
    plan: Plan,
    kept: Kept | None,
    net: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **kwargs: Any,
) -> Iterator[Step]:
    cache = kwargs.get(CACHE)
    seen = cache.get_seq_length() if cache is not None and not net.config.is_encoder_decoder else 0
    fresh = input_ids.shape[1] - seen if seen else None  # None: all of it
    movable = _movable(net, kwargs, logits_processor)
    first = True
    while True:
        inputs = net.prepare_inputs_for_generation(
            input_ids, next_sequence_length=fresh, is_first_iteration=first, **kwargs
        )
        outputs = net(**inputs, return_dict=True)
        kwargs = net._update_model_kwargs_for_generation(
            outputs, kwargs, is_encoder_decoder=net.config.is_encoder_decoder
        )
        # A copy, so that the whole (B, T, V) of the first pass is not kept alive.
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)  # (B, V)
        del outputs
        # The largest logit alone tells: NaN and +inf win any maximum, and a row of -inf has no largest.
        finite = logits.amax(dim=-1).isfinite().tolist()
        scores = logits_processor(input_ids, logits.clone())
        chosen = draw(scores, [row.stream for row in rows]) if plan.sample else scores.argmax(dim=-1)
        tokens = [_next(row, token, plan.pad) for row, token in zip(rows, chosen.tolist(), strict=True)]
        if kept is not None:  # before the step is out: whoever takes it may want no more
            kept.ids, kept.cache = input_ids[0].tolist(), kwargs.get(CACHE)
        yield Step(list(rows), tokens, finite, logits)
        if all(row.done for row in rows):
            return
        next_ids = torch.tensor(tokens, dtype=torch.long, device=input_ids.device)
        input_ids = torch.cat([input_ids, next_ids[:, None]], dim=-1)
        if movable:
            input_ids = _drop_ended(rows, input_ids, kwargs)
        first, fresh = False, 1


def _next(row: Row, token: int, pad: int) -> int:
    if row.done:
        return pad
    return row.first if row.first is not None and not row.tokens else token


def _movable(net: Any, kwargs: dict[str, Any], processors: Any) -> bool:
    """Whether rows may leave the batch: everything that is kept for each row can be selected."""
    known = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep"}
    plain = not net.config.is_encoder_decoder and {k for k, v in kwargs.items() if v is not None} <= known
    return plain and not any(isinstance(processor, _PER_ROW) for processor in processors)


def _drop_ended(rows: list[Row], input_ids: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Let ended rows go once they are half of the batch; fewer would not pay for moving the cache."""
    alive = [number for number, row in enumerate(rows) if not row.done]
    if len(alive) > len(rows) // 2:
        return input_ids
    index = torch.tensor(alive, device=input_ids.device)
    kwargs[CACHE].batch_select_indices(index)
    for name in ("attention_mask", "position_ids"):
        value = kwargs.get(name)
        if value is not None and value.shape[0] == len(rows):
            kwargs[name] = value[index]
    rows[:] = [rows[number] for number in alive]
    return input_ids[index]
