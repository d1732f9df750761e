"""Constrained decoding: at each step, which tokens may come next so that the text obeys its grammar.

It owns the bit masks of llguidance and their use on scores. It knows nothing of sampling, records or beams;
a step costs a few microseconds a row besides one addition to the scores. The grammars stand in grammar.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from textgen_cli.errors import ModelError, UsageError
from textgen_cli.generate.grammar import Constraint, check, fact
from textgen_cli.generate.token_bytes import token_table

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# A byte of the mask -> what is added to the scores of its eight tokens.
BIAS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf
).astype(np.float32)


@dataclass
class State:
    """One sequence under a constraint: what may come next, and whether anything may."""

    matcher: LLMatcher
    mask: NDArray[np.uint32]  # (ceil(V / 32),) bit i: token i is allowed
    finished: bool = False  # the text is complete (or failed): only the end may follow
    failure: ModelError | None = None  # the grammar could not be followed; the record has failed


class Constrainer:
    """A grammar on a vocabulary: states, masks, and the end of the text.

    `n_vocab` is the width V of the scores; ids that the tokenizer lacks are never allowed. `eos_ids` may be
    empty: the text then ends where nothing can follow. `text_start` says that the text begins its sequence,
    as an encoder-decoder's does: a SentencePiece tokenizer then writes the first word with a blank that
    decoding drops. Raises UsageError E-GRAMMAR for a grammar that this tokenizer cannot serve (an unknown
    special token) and ModelError E-CONSTRAINT for a tokenizer that cannot be constrained.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        n_vocab: int,
        eos_ids: Iterable[int],
        constraint: Constraint,
        *,
        text_start: bool = False,
    ) -> None:
        grammar = check(constraint)
        table = token_table(tokenizer, n_vocab, eos_ids)
        if text_start and table.blank_first:
            grammar = _with_leading_blank(grammar)
        self.n_vocab = n_vocab
        self._subject = constraint.subject
        self.indivisible = constraint.kind == "choices"  # a part of one is not one
        self._vocabulary = LLTokenizer(cast(TokenizerWrapper, table), eos_token=list(table.eos_ids) or None)
        self._text_bits = _text_bits(self._vocabulary.vocab_size, n_vocab, table.eos_ids)
        self._first = self._begin(grammar)

    def _begin(self, grammar: str) -> State:
        try:
            matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        except ValueError as error:
            raise UsageError("E-GRAMMAR", self._subject, fact(str(error), "grammar")) from error
        if matcher.is_error():
            raise UsageError("E-GRAMMAR", self._subject, fact(matcher.get_error(), "grammar"))
        state = State(matcher, np.zeros(len(self._text_bits), dtype=np.uint32))
        self._look(state)
        if state.failure:
            raise state.failure
        return state

    def start(self) -> State:
        """The state of a new sequence; cheap, one for each row."""
        first = self._first
        return State(first.matcher.deep_copy(), first.mask.copy(), first.finished)

    def mask(self, state: State) -> NDArray[np.bool_]:
        """Which tokens may come next, (V,); end tokens exactly where the text may end."""
        return np.unpackbits(state.mask.view(np.uint8), count=self.n_vocab, bitorder="little").view(np.bool_)

    def finished(self, state: State) -> bool:
        """Whether nothing but the end may follow; true also of a state with a `failure`."""
        return state.finished

    def advance(self, states: Sequence[State], tokens: Sequence[int]) -> None:
        """Each row takes its token; rows that are finished stay as they are.

        A row whose token is not allowed, or whose grammar grows beyond llguidance's limits, is finished with
        a `failure`, and no other row suffers.
        """
        for state, token in zip(states, tokens, strict=True):
            if not state.finished:
                state.matcher.consume_token(token)
                self._look(state)

    def _look(self, state: State) -> None:
        """Compute the mask of the state's next token."""
        if not state.matcher.is_error():
            state.matcher.unsafe_compute_mask_ptr(state.mask.ctypes.data, state.mask.nbytes)
        may_end = state.matcher.is_accepting()
        state.finished = not np.bitwise_and(state.mask, self._text_bits).any()
        if (
            state.finished
            and state.matcher.stop_reason() in ("NoExtension", "NoExtensionBias")
            and not may_end
        ):
            self._fail(state, "nothing that the tokenizer can write may come next")
        elif state.matcher.is_error():
            self._fail(state, state.matcher.get_error().partition("\n")[0])

    def _fail(self, state: State, reason: str) -> None:
        state.finished = True
        state.failure = ModelError("E-CONSTRAINT", self._subject, reason)

    def apply(self, states: Sequence[State], scores: torch.Tensor) -> None:
        """Set the scores (B, V) of tokens that may not come next to -inf, in place.

        Rows that are finished stay as they are: whatever is drawn there is not part of the text. Where all
        that may come next was banned before (a repeated n-gram, a bad word), the grammar wins over the ban.
        """
        rows = [row for row, state in enumerate(states) if not state.finished]
        if scores.device.type == "cpu":
            for row in rows:
                _add_bias(states[row].mask, scores[row])
        elif rows:
            _mask_on_device([states[row].mask for row in rows], rows, scores)


def _text_bits(width: int, n_vocab: int, eos_ids: Iterable[int]) -> NDArray[np.uint32]:
    """The bits of a mask that stand for text: below V, and no end token. `width` is llguidance's V."""
    bits = np.zeros((width + 31) // 32 * 32, dtype=np.uint8)
    bits[:n_vocab] = 1
    bits[list(eos_ids)] = 0
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _with_leading_blank(grammar: str) -> str:
    """The same grammar with one blank allowed before it."""
    body = json.loads(grammar)["grammars"][0] if grammar.startswith("{") else {"lark_grammar": grammar}
    return json.dumps({"grammars": [{"lark_grammar": 'start: " "? @body'}, {**body, "name": "body"}]})


def _add_bias(mask: NDArray[np.uint32], scores: torch.Tensor) -> None:
    """One row on the CPU: a lookup and an addition, several times faster than a masked fill."""
    bias = BIAS.take(mask.view(np.uint8), axis=0).reshape(-1)[: scores.shape[0]]
    scores.add_(torch.from_numpy(bias))
    if scores.amax() == -torch.inf:
        scores.copy_(torch.from_numpy(bias))


def _mask_on_device(masks: list[NDArray[np.uint32]], rows: list[int], scores: torch.Tensor) -> None:
    """Many rows elsewhere: the bits travel packed and are opened on the device."""
    words = torch.from_numpy(np.stack(masks).view(np.int32)).to(scores.device)  # (rows, V / 32)
    places = torch.arange(32, dtype=torch.int32, device=scores.device)
    closed = (words[:, :, None] >> places & 1).eq(0).flatten(1)[:, : scores.shape[1]]
    chosen = torch.tensor(rows, device=scores.device)
    opened = scores[chosen].masked_fill(closed, -torch.inf)
    banned = opened.amax(dim=-1, keepdim=True) == -torch.inf
    scores[chosen] = torch.where(banned, torch.zeros_like(opened).masked_fill(closed, -torch.inf), opened)
