"""What is explained of a score: the likelihood of a text or choice, hidden tokens, a label.

Each family has one function from a question and its figures to what an explainer takes. Knows no method.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from textgen_cli.errors import InputError, TextgenError, UsageError
from textgen_cli.explain.case import Case, Measure, Row, Target
from textgen_cli.explain.methods import Explainer
from textgen_cli.explain.texts import placed, read
from textgen_cli.score.causal import CausalScorer, encode
from textgen_cli.score.labels import EntityScorer, LabelScorer
from textgen_cli.score.masked import MaskedScorer
from textgen_cli.score.request import Asked, Figures, Scorer
from textgen_cli.score.seq2seq import Seq2SeqScorer
from textgen_cli.score.tree import TreeScorer


@dataclass(frozen=True)
class ExplainedScorer:
    """Another scorer whose figures have an `explanation`; `encoder`: what turned the questions into tokens."""

    scorer: Scorer
    encoder: Any
    explainer: Explainer

    def score(
        self, asked: Sequence[Asked], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Figures | TextgenError]]:
        """Figures of every text, explained one by one."""
        by_index = {one.index: one for one in asked}
        for index, found in self.scorer.score(asked, done):
            if isinstance(found, TextgenError) or index in done:
                yield index, found
                continue
            try:
                case = CASES[type(self.encoder)](self.encoder, by_index[index], found, self.explainer)
                yield index, found | {"explanation": self.explainer(case)}
            except UsageError:
                raise
            except TextgenError as error:
                yield index, error


# --- one function a scorer


def _text(scorer: CausalScorer, asked: Asked, found: Figures, explainer: Explainer) -> Case:
    """The log-likelihood of a text, behind its context if it has one."""
    encoded, rule = scorer.encode(asked)
    context = asked.context or ""
    start = () if rule.start is None else (rule.start,)
    if len(start) + len(encoded.ids) > rule.window + 1:
        fact = f"{len(encoded.ids):,} tokens; what is explained must fit the window of {rule.window:,}"
        raise InputError("E-CONTEXT", "text", fact)
    ids = (*start, *encoded.ids)
    first = len(start) + encoded.first
    if encoded.offsets:
        text, spans = context + asked.text, (*(None for _ in start), *encoded.offsets)
    else:
        own, places = read(scorer.model.tokenizer, ids)
        text, spans = own, tuple(places)
    case = Case(text, ids, spans, (_following(ids, first),), asked.text)
    other = explainer.config.contrast
    if other is None:
        return case
    if not context:
        raise UsageError("E-CONFLICT", "--contrast", "needs a context that both texts stand behind")
    behind = encode(scorer.model.tokenizer, context, other)
    if (*start, *behind.ids)[:first] != ids[:first]:
        raise InputError("E-CONTRAST", "contrast", "changes how the context before it is cut into tokens")
    rather = replace(_following((*start, *behind.ids), first), sign=-1.0)
    return replace(case, rather=(rather,), rather_said=other, fixed=frozenset(range(first, len(ids))))


def _following(ids: tuple[int, ...], first: int) -> Row:
    """Tokens from `first` on, each told at the place before it."""
    places = range(max(first, 1), len(ids))
    return Row(ids, tuple(Target(place - 1, ids[place], place) for place in places))


def _choice(scorer: TreeScorer, asked: Asked, found: Figures, explainer: Explainer) -> Case:
    """The log-likelihood of the choice that was picked, rather than the next best one."""
    picked, other = _pair(found, explainer)
    tree, _ = scorer.encode(replace(asked, choices=(picked, other)))
    size = len(tree.context)
    rows = [_following((*tree.context, *choice), size) for choice in tree.choices]
    ids = rows[0].ids
    text, spans = read(scorer.model.tokenizer, ids)
    return Case(
        text, ids, tuple(spans), (rows[0],), picked, rather=(replace(rows[1], sign=-1.0),), rather_said=other,
        fixed=frozenset(range(size, len(ids))),
    )  # fmt: skip


def _pair(found: Figures, explainer: Explainer) -> tuple[str, str]:
    """The choice that was picked, and what it is compared with: what was asked for, or the next best one."""
    picked, rule = found["prediction"], found["normalization"]
    others = [choice for choice in found["choices"] if choice["text"] != picked]
    best = max(others, key=lambda choice: choice["probability"][rule])
    return str(picked), explainer.config.contrast or str(best["text"])


def _hidden(scorer: MaskedScorer, asked: Asked, found: Figures, explainer: Explainer) -> Case:
    """The pseudo-log-likelihood of a text: every token, hidden in turn."""
    _refuse_contrast(explainer, "a text whose tokens are hidden in turn")
    encoded = scorer.encode(asked)
    if len(encoded.ids) > scorer.limit:
        fact = f"{len(encoded.ids):,} tokens; what is explained must fit the model's {scorer.limit:,}"
        raise InputError("E-CONTEXT", "text", fact)
    rows = []
    for place in encoded.places:
        ids, _ = scorer.copy(encoded, place)
        hidden = tuple(at for at, token in enumerate(ids) if token != encoded.ids[at])
        rows.append(Row(tuple(ids), (Target(place, encoded.ids[place], place),), hidden=hidden))
    text, spans = placed(scorer.model.tokenizer, encoded.ids, (asked.context or "") + asked.text)
    return Case(text, tuple(encoded.ids), spans, tuple(rows), asked.text)


def _target(scorer: Seq2SeqScorer, asked: Asked, found: Figures, explainer: Explainer) -> Case:
    """The log-likelihood of a target, or of the choice that was picked, given its source."""
    said, other = asked.text, explainer.config.contrast
    if asked.choices is not None:
        said, other = _pair(found, explainer)
    source = scorer.encode(asked).source

    def row(text: str, sign: float) -> Row:
        ids = scorer.target(text).ids
        decoder = scorer.shifted(torch.tensor([ids], device=scorer.model.net.device))[0].tolist()
        return Row(
            source, tuple(Target(at, token) for at, token in enumerate(ids)), tuple(decoder), sign=sign
        )

    own = row(said, 1.0)
    text, spans = placed(scorer.model.tokenizer, source, asked.context or "")
    rather = () if other is None else (row(other, -1.0),)
    answer = tuple(target.token for target in own.targets)
    return Case(text, source, spans, (own,), said, rather=rather, rather_said=other, answer=answer)


def _label(scorer: LabelScorer, asked: Asked, found: Figures, explainer: Explainer) -> Case:
    """The label that was given, or the number."""
    row, _ = scorer.encode(asked)
    ids, problem = tuple(row.ids), scorer.model.net.config.problem_type
    odds = found.get("labels") or found.get("values") or {scorer.names[0]: 0.0}
    label = max(odds, key=odds.__getitem__)
    measure: Measure = "value" if problem == "regression" else "log_odds"
    if problem == "multi_label_classification" or len(scorer.names) == 1 != (problem == "regression"):
        measure = "logit"
    texts = (asked.text,) if asked.context is None else (asked.context, asked.text)
    text, spans = placed(scorer.model.tokenizer, ids, *texts)

    def told(name: str, sign: float) -> Row:
        return Row(ids, (Target(0, scorer.names.index(name)),), types=tuple(row.types or ()), sign=sign)

    other = explainer.config.contrast
    if explainer.config.contrasts and len(scorer.names) < 2:
        _refuse_contrast(explainer, "a single number")
    if other is not None and other not in scorer.names:
        known = ", ".join(scorer.names[:8])
        raise UsageError("E-LABEL", f"--contrast {other}", "is no label of the model", hint=f"it has {known}")
    rather = () if other is None else (told(other, -1.0),)
    return Case(text, ids, spans, (told(label, 1.0),), label, measure, rather, other)


def _entities(scorer: EntityScorer, asked: Asked, found: Figures, explainer: Explainer) -> Case:
    """The labels of all tokens of the entities that were found."""
    _refuse_contrast(explainer, "entities")
    model = scorer.model
    ids = tuple(model.tokenizer.encode(asked.text))
    text, spans = placed(model.tokenizer, ids, asked.text)
    if model.context is not None and len(ids) > model.context:
        raise InputError("E-CONTEXT", "text", f"{len(ids):,} tokens, the model takes {model.context:,}")
    entities = [(entity["start"], entity["end"]) for entity in found["entities"]]
    places = [
        at
        for at, span in enumerate(spans)
        if span is not None and any(start < span[1] and span[0] < end for start, end in entities)
    ]
    if not places:
        raise InputError("E-EMPTY", "text", "has no entity that could be explained")
    empty = Row(ids, tuple(Target(place, 0) for place in places))
    labels = explainer.network.logits([empty])[0].argmax(-1).tolist()
    targets = tuple(Target(place, label, place) for place, label in zip(places, labels, strict=True))
    said = ", ".join(f"{entity['text']}/{entity['type']}" for entity in found["entities"])
    return Case(text, ids, spans, (replace(empty, targets=targets),), said, "log_odds")


def _refuse_contrast(explainer: Explainer, what: str) -> None:
    if explainer.config.contrast is not None:
        raise UsageError("E-FAMILY", "--contrast", f"cannot be compared with {what}")


CASES: dict[type, Callable[[Any, Asked, Figures, Explainer], Case]] = {
    CausalScorer: _text,
    TreeScorer: _choice,
    MaskedScorer: _hidden,
    Seq2SeqScorer: _target,
    LabelScorer: _label,
    EntityScorer: _entities,
}
