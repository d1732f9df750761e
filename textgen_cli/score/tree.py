"""Choices under a causal model: the context they share is computed once, then what each adds to it.

Gives the log-likelihood of every choice; what is made of them stands in choices.py.
"""

import inspect
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from textgen_cli.config import ScoringConfig
from textgen_cli.errors import InputError, ModelError, TextgenError
from textgen_cli.events import Report
from textgen_cli.model.load import Model
from textgen_cli.model.past import CACHE, is_plain
from textgen_cli.model.rows import batched
from textgen_cli.score.causal import convention, encode
from textgen_cli.score.measures import Wanted
from textgen_cli.score.network import Network, width
from textgen_cli.score.passes import Row, measure, padded
from textgen_cli.score.request import Asked, Figures

BATCH_TOKENS = 4096  # tokens whose keys and values are held at once
BATCH_ROWS = 64


@dataclass(frozen=True)
class Tree:
    """A context, its beginning token included, and the tokens of each choice behind it."""

    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Tokens held at most: each choice keeps a copy of the context."""
        longest = max(map(len, self.choices))
        return len(self.choices) * (len(self.context) + longest)


class TreeScorer:
    """Log-likelihoods of choices behind a context."""

    def __init__(self, config: ScoringConfig, model: Model, rows: int | None, report: Report) -> None:
        self.config, self.model, self.rows, self.report = config, model, rows, report
        self.network = Network(model.net)
        self.shares = self.network.splits and _shares(model.net)

    def score(
        self, asked: Sequence[Asked], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Figures | TextgenError]]:
        """`choices`: text, log_likelihood (nats), tokens and bytes of each; and the convention."""
        found: list[tuple[Asked, Tree, Figures]] = []
        for one in asked:
            try:
                found.append((one, *self.encode(one)))
            except InputError as error:
                yield one.index, error
        trees = [tree for _, tree, _ in found]

        def compute(batch: list[int]) -> list[list[float] | TextgenError]:
            members = [trees[number] for number in batch]
            logs = self._shared(members) if self.shares else self._apart(members)
            return [own if all(map(math.isfinite, own)) else self._bad() for own in logs]

        results = batched(
            [tree.size for tree in trees],
            compute,
            lambda number: found[number][0].index not in done,
            self.model,
            self.report,
            tokens=BATCH_TOKENS,
            rows=self.rows or BATCH_ROWS,
        )
        for number, logs in results:
            one, tree, rule = found[number]
            if isinstance(logs, TextgenError):
                yield one.index, logs
            else:
                yield one.index, {"choices": list(_told(one, tree, logs)), **rule}

    def _bad(self) -> ModelError:
        return ModelError("E-NAN", self.model.name, "logits are not finite")

    def encode(self, asked: Asked) -> tuple[Tree, Figures]:
        context, choices = asked.context or "", asked.choices or ()
        delimiter = self.config.delimiter
        if delimiter is None:
            delimiter = " "
        rule = convention(self.config, self.model, alone=not context.strip())
        start = () if rule.start is None else (rule.start,)
        both = [encode(self.model.tokenizer, context, self._joined(context, delimiter, c)) for c in choices]
        before = (*start, *both[0].ids[: both[0].first])
        behind = tuple(tuple(one.ids[one.first :]) for one in both)
        for choice, tokens in zip(choices, behind, strict=True):
            if not tokens:
                raise InputError(
                    "E-EMPTY", f"choice {choice!r}", "has no token of its own behind the context"
                )
        if not before:
            raise InputError("E-EMPTY", "context", "is empty", hint="--bos always puts a token there")
        longest = max(map(len, behind))
        over = len(before) + longest - 1 - rule.window
        if over > 0 and (self.config.truncate != "left" or over >= len(before) - len(start)):
            fact = f"{len(before) + longest:,} tokens with the context, the window takes {rule.window:,}"
            raise InputError("E-CONTEXT", "choices", fact, hint="--truncate left cuts the context")
        told: Figures = {"bos": rule.start is not None}
        if over > 0:
            before = (*start, *before[len(start) + over :])
            told["truncated"] = True
        return Tree(before, behind), told

    @staticmethod
    def _joined(context: str, delimiter: str, choice: str) -> str:
        """The choice as it stands behind the context."""
        blank = context[-1:].isspace() or choice[:1].isspace()
        return choice if blank and delimiter.isspace() else delimiter + choice

    @torch.inference_mode()
    def _shared(self, trees: Sequence[Tree]) -> list[list[float]]:
        """Contexts first, which tell the first token of every choice; then the rest of the longer choices."""
        deeper = [
            (owner, number)
            for owner, tree in enumerate(trees)
            for number, choice in enumerate(tree.choices)
            if len(choice) > 1
        ]
        where_to = self.model.net.device
        ids, _, where = (part.to(where_to) for part in padded([Row(tree.context, [0]) for tree in trees]))
        cache = DynamicCache(config=self.model.net.config) if deeper else None
        sums: list[list[list[float]]] = [[[] for _ in tree.choices] for tree in trees]
        columns = width(len(trees), self.network.vocabulary)
        kept = {} if cache is None else {CACHE: cache, "use_cache": True}
        for at, logits in self.network.logits(ids, where, columns, **kept):
            logs = logits.float().log_softmax(-1)
            for row, owner in enumerate(at[:, 0].tolist()):
                firsts = torch.tensor([choice[0] for choice in trees[owner].choices], device=where_to)
                for number, value in enumerate(logs[row, firsts].tolist()):
                    sums[owner][number].append(value)
        if cache is not None:
            for (owner, number), values in zip(deeper, self._behind(trees, deeper, cache), strict=True):
                sums[owner][number] += values
        return [[math.fsum(values) for values in own] for own in sums]

    def _behind(
        self, trees: Sequence[Tree], deeper: Sequence[tuple[int, int]], cache: Any
    ) -> Iterator[list[float]]:
        """Log-probabilities of the tokens behind the first of each choice in `deeper` (tree, choice)."""
        where_to = self.model.net.device
        rows = [Row(trees[o].choices[n][:-1], trees[o].choices[n][1:]) for o, n in deeper]
        ids, targets, where = (part.to(where_to) for part in padded(rows))
        owners = torch.tensor([owner for owner, _ in deeper], device=where_to)
        cache.batch_select_indices(owners)
        lengths = torch.tensor([len(tree.context) for tree in trees], device=where_to)[owners]  # (R,)
        past = max(len(tree.context) for tree in trees)
        seen = (
            torch.arange(past, device=where_to)[None] < lengths[:, None]
        )  # padding behind a context is unseen
        mask = torch.cat([seen, torch.ones_like(ids, dtype=torch.bool)], dim=1).long()
        places = lengths[:, None] + torch.arange(ids.shape[1], device=where_to)[None]
        columns = width(len(rows), self.network.vocabulary)
        parts = self.network.logits(
            ids,
            where,
            columns,
            attention_mask=mask,
            position_ids=places,
            use_cache=True,
            **{CACHE: cache},
        )
        found: dict[int, list[float]] = defaultdict(list)
        for at, logits in parts:
            own = targets[at[:, 0], at[:, 1]]
            chosen = logits.float().log_softmax(-1).gather(1, own[:, None])[:, 0]
            for owner, value in zip(at[:, 0].tolist(), chosen.tolist(), strict=True):
                found[owner].append(value)
        return (found[number] for number in range(len(rows)))

    def _apart(self, trees: Sequence[Tree]) -> list[list[float]]:
        """Every choice with its whole context, for networks whose past cannot be shared out."""
        rows = [Row([*tree.context, *choice[:-1]], choice) for tree in trees for choice in tree.choices]
        found: dict[int, float] = {}
        for number, measured in measure(
            [self.network],
            rows,
            Wanted(),
            model=self.model,
            max_rows=self.rows,
            needed=lambda _: True,
            report=self.report,
        ):
            if isinstance(measured, TextgenError):
                found[number] = math.nan
            else:
                found[number] = math.fsum(measured.log_probability)
        numbers = iter(range(len(rows)))
        return [[found[next(numbers)] for _ in tree.choices] for tree in trees]


def _told(asked: Asked, tree: Tree, logs: Sequence[float]) -> Iterator[Figures]:
    for choice, tokens, value in zip(asked.choices or (), tree.choices, logs, strict=True):
        size = len(choice.encode("utf-8", "replace"))
        yield {"text": choice, "log_likelihood": value, "tokens": len(tokens), "bytes": size}


def _shares(net: Any) -> bool:
    """Whether rows behind a padded past can be computed: plain growing caches, and positions that are told."""
    takes = inspect.signature(net.base_model.forward).parameters
    plain = is_plain(DynamicCache(config=net.config))
    return plain and {"position_ids", CACHE, "attention_mask"} <= takes.keys()
