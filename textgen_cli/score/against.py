"""Two models on the same texts where their tokens differ: bits per byte are comparable all the same."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from textgen_cli.errors import TextgenError
from textgen_cli.score.figures import difference
from textgen_cli.score.request import Asked, Figures, Scorer


@dataclass(frozen=True)
class AgainstScorer:
    """The figures of one scorer, with those of another beside them."""

    scorer: Scorer
    other: Scorer

    def score(
        self, asked: Sequence[Asked], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Figures | TextgenError]]:
        """Figures of every text under both; a text that either cannot score fails."""
        found = dict(self.scorer.score(asked, done))
        for index, other in self.other.score(asked, done):
            own = found.get(index)
            if own is None:
                continue  # done already, and in no batch of the first that was computed
            if isinstance(own, TextgenError) or isinstance(other, TextgenError):
                yield index, own if isinstance(own, TextgenError) else other
            else:
                yield index, own | difference(own, other)
