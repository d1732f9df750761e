"""What the parts of finetune hand each other: examples that were read, checked and split. Plain values.

Knows nothing of files, tokenizers or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Prepared:
    """The examples of one training: all of them are good.

    Columns by task: clm, mlm {"text"}; chat {"messages": [{"role", "content"}]}; seq2seq {"source", "target"};
    text-classification {"text", "pair" (or ""), "label": str | list[str] | float by `problem`};
    token-classification {"words": [...], "tags": [...]};
    question-answering {"question", "context", "answers": [{"text", "start"}]}, where no answer means: it has none.
    """

    task: str  # a key of tasks.TASKS
    train: datasets.Dataset  # Arrow, memory-mapped in a working folder
    valid: datasets.Dataset | None  # None: no data is held out
    labels: tuple[str, ...]  # text- and token-classification: their names, sorted; () elsewhere
    problem: str | None  # text-classification: a value of `problem_type` in a model's config
    sha256: str  # over all examples in order, those of `train` first
    facts: dict[str, Any]  # what --check tells, JSON values
