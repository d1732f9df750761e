"""Several short examples in one row, which do not see each other: positions begin anew with each of them.

Owns the packing and the proof that a network keeps packed examples apart; some do not, and say nothing of it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from textgen_cli.errors import ModelError, UsageError
from textgen_cli.finetune.collate import IGNORED, Row
from textgen_cli.finetune.encode import Encoded, mapped

TASKS = ("clm", "chat")
AT_ONCE = 1000  # rows among which partners are looked for
NEAR = 1e-3  # nats by which the loss of packed examples may differ


def packed(encoded: Encoded, task: str, length: int, folder: Path) -> Encoded:
    """The same examples in fewer rows of at most `length` tokens. UsageError E-CONFLICT for other tasks."""
    if task not in TASKS:
        raise UsageError("E-CONFLICT", "--pack", f"is for {' and '.join(TASKS)}, not for {task}")

    def pack(rows: list[Row]) -> list[Row]:
        return [_joined([rows[number] for number in numbers]) for numbers in bins(rows, length)]

    return Encoded(
        mapped(encoded.train, pack, folder / "packed.arrow", AT_ONCE), encoded.valid, encoded.collate
    )


def bins(rows: list[Row], length: int) -> list[list[int]]:
    """The numbers of rows that go together, the longest first into the fullest bin that has room for it."""
    order = sorted(range(len(rows)), key=lambda number: (-len(rows[number]["input_ids"]), number))
    found: list[list[int]] = []
    room: list[int] = []
    for number in order:
        size = len(rows[number]["input_ids"])
        fitting = [at for at, left in enumerate(room) if left >= size]
        at = min(fitting, key=lambda one: room[one], default=None)
        if at is None:
            found.append([])
            room.append(length)
            at = len(found) - 1
        found[at].append(number)
        room[at] -= size
    return found


def _joined(rows: list[Row]) -> Row:
    """One row of several. There is no attention mask: with one the library does not look for where examples begin."""
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "position_ids": [at for row in rows for at in range(len(row["input_ids"]))],
        # The first token of an example is not to be told from the last one of another.
        "labels": [label for row in rows for label in (IGNORED, *row["labels"][1:])],
    }


def prove(net: Any, name: str, plain: Encoded, device: torch.device) -> None:
    """ModelError E-PACK where packed examples give another loss than the same ones by themselves."""
    collate = plain.collate
    rows = [dict(plain.train[number]) for number in range(min(2, len(plain.train)))]
    rows = [{key: row[key][:64] for key in ("input_ids", "labels")} for row in rows]
    alone = [_nats(net, collate([_joined([row])]), device) for row in rows]
    together = _nats(net, collate([_joined(rows)]), device)
    apart = abs(sum(alone) - together) / max(1, sum(len(row["input_ids"]) for row in rows))
    if not apart <= NEAR:
        fact = f"lets packed examples see each other (the loss differs by {apart:.2g})"
        raise ModelError("E-PACK", name, fact, hint="leave --pack out")


@torch.no_grad()
def _nats(net: Any, batch: Mapping[str, torch.Tensor], device: torch.device) -> float:
    was_training = net.training
    net.eval()
    inputs = {key: value.to(device) for key, value in batch.items()}
    logits = net(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False).logits
    net.train(was_training)
    labels = inputs["labels"][:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="sum"
    )
    return float(loss)
