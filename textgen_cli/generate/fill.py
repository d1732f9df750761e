"""The engine of masked models: every gap of a text is filled with the most probable tokens.

A gap is the model's own mask token or `___`. Gaps of one text are judged at once, each as if the others stayed
open. Knows no decoding.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from textgen_cli.errors import InputError, ModelError, TextgenError, UsageError
from textgen_cli.generate.request import Chunk, Completion, Request
from textgen_cli.model.load import Model
from textgen_cli.text.windows import batches

BATCH_TOKENS = 8_192
BATCH_ROWS = 64
GAP = re.compile(r"_{3,}")


@dataclass(frozen=True)
class FillEngine:
    """A masked model; `top` fillings are reported for each gap."""

    model: Model
    top: int = 5
    batch_rows: int | None = None

    def stream(self, requests: Sequence[Request], done: Collection[int] = ()) -> Iterator[Chunk]:
        """Fill every request's gaps; `fillings` in the completion holds a list for each gap.

        A list has `top` entries {token, probability, text}, best first; `text` is the whole text so filled,
        the other gaps taking their own best.
        """
        encoded: list[tuple[Request, list[int]]] = []
        for request in requests:
            try:
                encoded.append((request, self._encode(request)))
            except TextgenError as error:
                yield Chunk(request.index, request.sequence, "", Completion("error", None, None, error=error))
        sizes = [len(ids) for _, ids in encoded]
        for batch in batches(sizes, BATCH_TOKENS, self.batch_rows or BATCH_ROWS):
            members = [encoded[number] for number in batch]
            if any(request.index not in done for request, _ in members):
                yield from self._fill(members)

    def _encode(self, request: Request) -> list[int]:
        backend = self.model.tokenizer.backend
        if backend.mask_token is None:
            raise ModelError("E-TOKENIZER", self.model.name, "has no mask token")
        if request.prompt is None:
            raise UsageError("E-FAMILY", self.model.name, "fills gaps in a text and holds no conversation")
        ids = self.model.tokenizer.encode(GAP.sub(lambda _: str(backend.mask_token), request.prompt))
        if backend.mask_token_id not in ids:
            raise InputError("E-NO-GAP", "prompt", f"has no gap: neither {backend.mask_token} nor ___")
        if self.model.context is not None and len(ids) > self.model.context:
            raise InputError(
                "E-CONTEXT", "prompt", f"{len(ids):,} tokens, the model takes {self.model.context:,}"
            )
        return ids

    @torch.inference_mode()
    def _fill(self, members: list[tuple[Request, list[int]]]) -> Iterator[Chunk]:
        device = self.model.placement.device
        longest = max(len(ids) for _, ids in members)
        pad = self.model.tokenizer.backend.pad_token_id or 0
        ids = torch.full((len(members), longest), pad)  # (B, T)
        for row, (_, own) in enumerate(members):
            ids[row, : len(own)] = torch.tensor(own)
        lengths = torch.tensor([len(own) for _, own in members])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        logits = self.model.net(input_ids=ids.to(device), attention_mask=mask.to(device)).logits  # (B, T, V)
        for row, (request, own) in enumerate(members):
            yield self._answer(request, own, logits[row])

    def _answer(self, request: Request, ids: list[int], logits: torch.Tensor) -> Chunk:
        gap_id = self.model.tokenizer.backend.mask_token_id
        gaps = [place for place, token in enumerate(ids) if token == gap_id]
        scores = logits[gaps].float()  # (gaps, V)
        if not scores.amax(dim=-1).isfinite().all():
            error = ModelError("E-NAN", self.model.name, "logits are not finite")
            return Chunk(request.index, request.sequence, "", Completion("error", len(ids), 0, error=error))
        probabilities = torch.softmax(scores, dim=-1)
        best = probabilities.topk(min(self.top, probabilities.shape[-1]), dim=-1)
        chosen = best.indices[:, 0].tolist()
        fillings = [
            [self._filling(ids, gaps, chosen, gap, token, p) for token, p in zip(tokens, ps, strict=True)]
            for gap, (tokens, ps) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        ]
        text = fillings[0][0]["text"]
        final = Completion("stop", len(ids), len(gaps), extra={"fillings": fillings}, tokens=(ids, chosen))
        return Chunk(request.index, request.sequence, text, final)

    def _filling(
        self, ids: list[int], gaps: list[int], chosen: list[int], gap: int, token: int, probability: float
    ) -> dict[str, Any]:
        filled = list(ids)
        for place, best in zip(gaps, chosen, strict=True):
            filled[place] = best
        filled[gaps[gap]] = token
        tokenizer = self.model.tokenizer
        return {"token": tokenizer.spell(token), "probability": probability, "text": tokenizer.decode(filled)}
