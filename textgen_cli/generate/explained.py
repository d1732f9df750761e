"""What is explained of an answer: its tokens given the prompt, or the fillings of gaps. An engine around an engine.

Each family has one function from what was read and answered to what an explainer takes. Knows no method.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from textgen_cli.errors import InputError, TextgenError, UsageError
from textgen_cli.explain.case import Case, Row, Target
from textgen_cli.explain.methods import Explainer
from textgen_cli.explain.texts import read
from textgen_cli.generate.request import Chunk, Completion, Engine, Request


@dataclass(frozen=True)
class ExplainedEngine:
    """Another engine whose completions have an `explanation`; `start`: the token a decoder begins with."""

    engine: Engine
    explainer: Explainer
    start: int | None = None

    def stream(self, requests: Sequence[Request], done: Collection[int] = ()) -> Iterator[Chunk]:
        """The chunks of the engine; behind the text of a sequence comes its explanation."""
        for chunk in self.engine.stream(requests, done):
            final = chunk.final
            if final is None or final.tokens is None or final.error is not None or chunk.index in done:
                yield chunk
                continue
            yield replace(chunk, final=None)
            yield replace(chunk, text="", final=self._explained(final, *final.tokens))

    def _explained(self, final: Completion, read: Sequence[int], answer: Sequence[int]) -> Completion:
        try:
            case = CASES[self.explainer.model.family](self, read, answer)
            return replace(final, extra=final.extra | {"explanation": self.explainer(case)})
        except UsageError:
            raise
        except TextgenError as error:
            return replace(final, finish_reason="error", error=error)

    def text_of(self, answer: Sequence[int]) -> list[int]:
        """An answer without its end tokens; the first of them where it is nothing else."""
        ends = {self.explainer.model.tokenizer.backend.eos_token_id}
        settings = self.explainer.model.generation.get("eos_token_id")
        ends |= set(settings) if isinstance(settings, list) else {settings}
        kept = list(answer)
        while kept and kept[-1] in ends:
            kept.pop()
        return kept or list(answer[:1])

    def other(self) -> list[int] | None:
        """The tokens of what the answer is compared with."""
        text = self.explainer.config.contrast
        if text is None:
            return None
        ids = self.explainer.model.tokenizer.encode_literal(text)
        if not ids:
            raise UsageError("E-EMPTY", "--contrast", "has no tokens")
        return ids


def _continued(engine: ExplainedEngine, prompt: Sequence[int], answer: Sequence[int]) -> Case:
    """The log-likelihood of an answer behind its prompt; its own tokens have weights for those behind them."""
    tokenizer = engine.explainer.model.tokenizer
    size = len(prompt)
    own = engine.text_of(answer)

    def row(behind: Sequence[int], sign: float) -> Row:
        ids = (*prompt, *behind)
        return Row(ids, tuple(Target(at - 1, ids[at], at) for at in range(size, len(ids))), sign=sign)

    text, spans = read(tokenizer, (*prompt, *own))
    case = Case(text, (*prompt, *own), tuple(spans), (row(own, 1.0),), str(tokenizer.decode(own)))
    other = engine.other()
    if other is None:
        return case
    fixed = frozenset(range(size, size + len(own)))
    return replace(
        case, rather=(row(other, -1.0),), rather_said=engine.explainer.config.contrast, fixed=fixed
    )


def _answered(engine: ExplainedEngine, source: Sequence[int], answer: Sequence[int]) -> Case:
    """The log-likelihood of an encoder-decoder's answer to its source; weights are the source's."""
    tokenizer = engine.explainer.model.tokenizer
    own, start = engine.text_of(answer), engine.start
    assert start is not None

    def row(said: Sequence[int], sign: float) -> Row:
        targets = tuple(Target(at, token) for at, token in enumerate(said))
        return Row(tuple(source), targets, (start, *said[:-1]), sign=sign)

    text, spans = read(tokenizer, source)
    case = Case(
        text, tuple(source), tuple(spans), (row(own, 1.0),), str(tokenizer.decode(own)), answer=tuple(own)
    )
    other = engine.other()
    if other is None:
        return case
    return replace(case, rather=(row(other, -1.0),), rather_said=engine.explainer.config.contrast)


def _filled(engine: ExplainedEngine, text: Sequence[int], answer: Sequence[int]) -> Case:
    """The log-probability of the best filling of every gap, each as if the others stayed open."""
    tokenizer = engine.explainer.model.tokenizer
    mask = tokenizer.backend.mask_token_id
    gaps = [at for at, token in enumerate(text) if token == mask]

    def row(tokens: Sequence[int], sign: float) -> Row:
        targets = tuple(Target(at, token, at) for at, token in zip(gaps, tokens, strict=True))
        return Row(tuple(text), targets, hidden=tuple(gaps), sign=sign)

    shown, spans = read(tokenizer, text)
    case = Case(shown, tuple(text), tuple(spans), (row(answer, 1.0),), " ".join(map(tokenizer.spell, answer)))
    other = engine.other()
    if other is None:
        return case
    if len(other) != 1 or len(gaps) != 1:
        raise InputError("E-CONTRAST", "contrast", "must be one token, for a text with one gap")
    return replace(case, rather=(row(other, -1.0),), rather_said=engine.explainer.config.contrast)


CASES: dict[str, Callable[[ExplainedEngine, Sequence[int], Sequence[int]], Case]] = {
    "causal": _continued,
    "seq2seq": _answered,
    "masked": _filled,
}
