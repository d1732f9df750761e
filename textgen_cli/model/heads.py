"""Networks that judge instead of speaking: rows of ids in, the logits of their labels out.

Owns padding, and which rows may share a batch. Knows nothing of texts, and not what the labels mean.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from textgen_cli.errors import ModelError, TextgenError
from textgen_cli.events import Report
from textgen_cli.model.load import Model
from textgen_cli.model.rows import batched

BATCH_TOKENS = 2048  # larger ones leave the processor's caches
BATCH_ROWS = 64


@dataclass(frozen=True)
class Row:
    """One pass; `types` says of which of two texts each token is, None where the tokenizer does not tell."""

    ids: Sequence[int]
    types: Sequence[int] | None = None


def judged(
    model: Model,
    rows: Sequence[Row],
    max_rows: int | None,
    needed: Callable[[int], bool],
    report: Report,
) -> Iterator[tuple[int, torch.Tensor | TextgenError]]:
    """(number, logits or why there are none) of each row in a batch where one is `needed`, in no order.

    Logits are float32, on the CPU: (L,) of a sequence classifier, (T, L) of a token classifier.
    """

    def compute(batch: list[int]) -> list[torch.Tensor | TextgenError]:
        found: dict[int, torch.Tensor] = {}
        for part in _alike(model, rows, batch):
            found |= zip(part, _logits(model, [rows[number] for number in part]), strict=True)
        return [_proved(model, found[number]) for number in batch]

    sizes = [len(row.ids) for row in rows]
    most = 1 if _alone(model) else max_rows or BATCH_ROWS
    return batched(sizes, compute, needed, model, report, tokens=BATCH_TOKENS, rows=most)


def _proved(model: Model, logits: torch.Tensor) -> torch.Tensor | TextgenError:
    finite = bool(logits.isfinite().all())
    return logits if finite else ModelError("E-NAN", model.name, "logits are not finite")


def _alone(model: Model) -> bool:
    """Whether the head reads a row's last place, which padding would move."""
    config = model.net.config
    if model.family != "sequence-classification":
        return False
    no_padding = getattr(config.get_text_config(), "pad_token_id", None) is None
    return no_padding or getattr(config, "summary_type", None) == "last"


def _alike(model: Model, rows: Sequence[Row], batch: Sequence[int]) -> list[list[int]]:
    """Parts of a batch that may go together: encoder-decoders read the last end, and want as many in each row."""
    if not (model.net.config.is_encoder_decoder and model.family == "sequence-classification"):
        return [list(batch)]
    end = model.net.config.eos_token_id

    def ends(number: int) -> int:
        return list(rows[number].ids).count(end)

    if not all(map(ends, batch)):
        raise ModelError("E-TOKENIZER", model.name, "ends no text with the token by which the model judges")
    return [list(part) for _, part in groupby(sorted(batch, key=ends), key=ends)]


@torch.inference_mode()
def _logits(model: Model, rows: Sequence[Row]) -> list[torch.Tensor]:
    out = model.net(**_inputs(model, rows)).logits.float().cpu()  # (B, L) or (B, T, L)
    if out.dim() == 2:
        return list(out)
    return [logits[: len(row.ids)] for logits, row in zip(out, rows, strict=True)]


def _inputs(model: Model, rows: Sequence[Row]) -> dict[str, Any]:
    """Padded on the right, (B, T) each."""
    takes = inspect.signature(model.net.forward).parameters
    pad = getattr(model.net.config.get_text_config(), "pad_token_id", None)
    backend = model.tokenizer.backend
    pad = pad if pad is not None else backend.pad_token_id or 0
    inputs = {
        "input_ids": _padded([row.ids for row in rows], pad),
        "attention_mask": _padded([[1] * len(row.ids) for row in rows], 0),
    }
    if "token_type_ids" in takes and all(row.types is not None for row in rows):
        types = [row.types or () for row in rows]
        inputs["token_type_ids"] = _padded(types, backend.pad_token_type_id)
    placed: dict[str, Any] = {name: value.to(model.placement.device) for name, value in inputs.items()}
    return placed | ({"use_cache": False} if "use_cache" in takes else {})


def _padded(rows: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
