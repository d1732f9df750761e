"""Whether texts bear a watermark: a tokenizer and a key tell, no weights are loaded."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from textgen_cli.errors import InputError, TextgenError
from textgen_cli.model.tokenizer import Tokenizer
from textgen_cli.model.watermark import THRESHOLD, evidence
from textgen_cli.score.request import Asked, Figures


@dataclass(frozen=True)
class WatermarkScorer:
    """The verdict on each text, with the figures it rests on."""

    key: str
    tokenizer: Tokenizer
    vocabulary: int

    def score(
        self, asked: Sequence[Asked], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Figures | TextgenError]]:
        """`watermarked`, `green_fraction`, `z`, `p_value` and `tokens`; one token alone is an InputError."""
        for one in asked:
            if one.index not in done:
                yield one.index, self._figures(one.text)

    def _figures(self, text: str) -> Figures | TextgenError:
        found = evidence(self.tokenizer.encode_literal(text), self.key, self.vocabulary)
        if found is None:
            return InputError("E-EMPTY", "text", "has no two tokens, which a watermark needs")
        return {
            "watermarked": found.p_value < THRESHOLD,
            "green_fraction": found.green / found.tokens,
            "z": found.z,
            "p_value": found.p_value,
            "tokens": found.tokens,
        }
