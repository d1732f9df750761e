"""Rows become batches: padded to the longest of them, with words hidden where those are to be told.

It knows no task but by the columns of its rows.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling

from textgen_cli.config.finetune import DataConfig
from textgen_cli.errors import ModelError
from textgen_cli.model.tokenizer import Tokenizer

IGNORED = -100  # a label that is none: the loss passes over it
STATIC = -1  # the epoch of held-out data, whose hidden tokens are the same at every evaluation

Row = dict[str, Any]
Example = Mapping[str, Any]


class Masker:
    """Hides tokens, other ones in every epoch; which ones depends on the seed, the epoch and the rows alone."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, seed: int) -> None:
        if tokenizer.backend.mask_token is None:
            raise ModelError("E-TOKENIZER", tokenizer.name, "has no token that hides others (mask_token)")
        self.seed = seed
        self._mask, self._whole = tokenizer.backend.mask_token_id, config.whole_words
        self._hide = DataCollatorForLanguageModeling(
            tokenizer.backend,
            whole_word_mask=config.whole_words,
            mlm_probability=config.mlm_probability,
            mask_replace_prob=1.0 if config.whole_words else 0.8,
            random_replace_prob=0.0 if config.whole_words else 0.1,
        )

    def __call__(self, batch: dict[str, Any], epoch: int) -> None:
        """Hide tokens of a padded batch and add its labels."""
        ids: torch.Tensor = batch["input_ids"]
        number = zlib.crc32(ids.numpy().tobytes(), (self.seed + 1) * 1_000_003 + epoch & 0xFFFFFFFF)
        self._hide.generator = torch.Generator().manual_seed(number)
        specials, offsets = batch.pop("special_tokens_mask"), batch.pop("offset_mapping")
        plain = ids.clone()
        batch["input_ids"], batch["labels"] = self._hide.torch_mask_tokens(
            ids, special_tokens_mask=specials, offset_mapping=offsets
        )
        for row in (batch["labels"] == IGNORED).all(1).nonzero().flatten().tolist():
            chosen = self._one_word((specials[row] == 0).nonzero().flatten(), offsets[row])
            batch["labels"][row, chosen] = plain[row, chosen]
            batch["input_ids"][row, chosen] = self._mask

    def _one_word(self, places: torch.Tensor, offsets: torch.Tensor) -> list[int]:
        """One place of a row in which chance hid none, where whole words are hidden with all of its word: without a
        token to tell, the loss of a batch is no number."""
        first = last = int(places[torch.randint(len(places), (), generator=self._hide.generator)])
        while self._whole and first - 1 in places and offsets[first - 1][1] == offsets[first][0]:
            first -= 1
        while self._whole and last + 1 in places and offsets[last][1] == offsets[last + 1][0]:
            last += 1
        return list(range(first, last + 1))


@dataclass
class Collator:
    """Makes a batch of rows, no longer than its longest one."""

    tokenizer: Tokenizer
    masker: Masker | None = None
    epoch: int = field(default=0)  # set by the trainer

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        names = [name for name in rows[0] if name != "length"]
        batch = {name: self._padded(name, [row[name] for row in rows]) for name in names}
        if self.masker is not None and "labels" not in batch:
            self.masker(batch, self.epoch)
        return batch

    def hidden(self, row: Example) -> Row:
        """A held-out row with its tokens hidden once and for all."""
        batch = self._one(row)
        assert self.masker is not None
        self.masker(batch, STATIC)
        return {name: value[0].tolist() for name, value in batch.items()}

    def _one(self, row: Example) -> dict[str, Any]:
        return {name: self._padded(name, [row[name]]) for name in row if name != "length"}

    def _padded(self, name: str, values: list[Any]) -> torch.Tensor:
        if not isinstance(values[0], list) or (name not in FILLERS and not isinstance(values[0][0], list)):
            return torch.tensor(values)
        if name == "labels" and isinstance(values[0][0], float):
            return torch.tensor(values)  # one number for each label
        filler = self._filler(name)
        width = max(map(len, values))
        return torch.tensor([[*value, *[filler] * (width - len(value))] for value in values])

    def _filler(self, name: str) -> Any:
        if name != "input_ids":
            return FILLERS[name]
        backend = self.tokenizer.backend
        found = backend.pad_token_id if backend.pad_token_id is not None else backend.eos_token_id
        return found if isinstance(found, int) else 0


FILLERS: dict[str, Any] = {
    "input_ids": 0,
    "attention_mask": 0,
    "labels": IGNORED,
    "token_type_ids": 0,
    "position_ids": 0,
    "special_tokens_mask": 1,
    "offset_mapping": [0, 0],
}
