"""Attribution: how much each token of the input did to a score, as one weight a place.

gradient x input (Shrikumar et al. 2017), integrated gradients (Sundararajan et al. 2017) and occlusion (Li et al.
2016). A part is a sum of rows with signs; a contrast is one of two rows (Yin and Neubig 2022). Knows no text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from textgen_cli.errors import ModelError
from textgen_cli.events import Notice, Progress, Report
from textgen_cli.explain.case import Measure, Row
from textgen_cli.explain.network import BACKWARD, Network

# Integrated gradients: weights are made from a straight path whose pieces are halved where the gradient along them
# does not add up to what the score really does there. Such places are many and sharp in deep networks.
TOLERANCE = 0.02  # of the whole difference: what all pieces may be off together
MOST = 1000  # points on the path; then what there is must do
EDGES = tuple(eighth / 8 for eighth in range(9))


@dataclass(frozen=True)
class Attributed:
    """What a part got: a weight for each place (those that are left out: 0), its score, and figures of the method."""

    weights: torch.Tensor  # (S,) float64
    score: float
    figures: dict[str, float | int] = field(default_factory=dict)


Part = Sequence[Row]
Units = Sequence[Sequence[int]]
Attribute = Callable[[Network, Sequence[Part], Measure, Units, Report], list[Attributed]]


def gradient(
    network: Network, parts: Sequence[Part], measure: Measure, units: Units, report: Report
) -> list[Attributed]:
    """Gradient x input: the derivative of the score by a token's embedding, times that embedding, summed."""
    rows = [row for part in parts for row in part]
    weights: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    scores = [0.0] * len(rows)
    for numbers in network.parts(rows, BACKWARD):
        members = [rows[number] for number in numbers]
        inputs = torch.stack([network.embed(row) for row in members])
        told, slopes = _slopes(network, members, measure, inputs)
        for at, number in enumerate(numbers):
            weights[number] = (slopes[at] * inputs[at]).sum(-1).double().cpu()
            scores[number] = told[at]
        report(Progress("explain", network.model.name))
    return _summed(parts, weights, scores, units)


def _slopes(
    network: Network, rows: Sequence[Row], measure: Measure, inputs: torch.Tensor
) -> tuple[list[float], torch.Tensor]:
    """(scores of rows of one shape, their derivatives (B, S, D)) at these embeddings. ModelError E-NAN."""
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        scores = network.scores(rows, measure, inputs).sum(-1)
        (found,) = torch.autograd.grad(scores.sum(), inputs)
    if not found.isfinite().all():
        raise ModelError("E-NAN", network.model.name, "gradients are not finite")
    return scores.tolist(), found


def _summed(
    parts: Sequence[Part], weights: Sequence[torch.Tensor], scores: Sequence[float], units: Units
) -> list[Attributed]:
    """Rows put together to their parts; places that are in no unit have no weight."""
    kept = [place for unit in units for place in unit]
    size = 1 + max(kept, default=0)
    found, at = [], 0
    for part in parts:
        total, score = torch.zeros(size, dtype=torch.float64), 0.0
        for row in part:
            own = [place for place in kept if place not in row.hidden]
            total[own] += row.sign * weights[at][own]
            score += row.sign * scores[at]
            at += 1
        found.append(Attributed(total, score))
    return found


def integrated_gradients(
    network: Network, parts: Sequence[Part], measure: Measure, units: Units, report: Report
) -> list[Attributed]:
    """The gradient averaged over the straight way from a text of neutral tokens to this one, times the way.

    Tokens outside the units stay as they are all the way. `figures` has the score at its beginning, the points that
    were computed, and how far the weights are from adding up to the difference.
    """
    return [_integrated(network, part, measure, units, report) for part in parts]


class _Path:
    """The straight way of a part's embeddings; scores and weights at its points, each computed once."""

    def __init__(self, network: Network, part: Part, measure: Measure, units: Units, report: Report) -> None:
        self.network, self.part, self.measure, self.report = network, part, measure, report
        self.places = [place for unit in units for place in unit]
        self.whole = [network.embed(row) for row in part]
        self.blank = network.neutral()
        self.ways = [whole - self.blank for whole in self.whole]
        self.moved = [[place for place in self.places if place not in row.hidden] for row in part]
        self.index = {place: at for at, place in enumerate(self.places)}
        self.scores: dict[float, float] = {}
        self.weights: dict[float, torch.Tensor] = {}  # derivative by each place along the way, (places,)

    def compute(self, points: Sequence[float]) -> None:
        """Add points to what is known."""
        new = [point for point in dict.fromkeys(points) if point not in self.scores]
        for point in new:
            self.scores[point] = 0.0
            self.weights[point] = torch.zeros(len(self.places), dtype=torch.float64)
        jobs = [(point, number) for number in range(len(self.part)) for point in new]
        rows = [self.part[number] for _, number in jobs]
        for chosen in self.network.parts(rows, BACKWARD):
            inputs = torch.stack([self._at(*jobs[job]) for job in chosen])
            told, slopes = _slopes(self.network, [rows[job] for job in chosen], self.measure, inputs)
            for at, job in enumerate(chosen):
                point, number = jobs[job]
                moved = self.moved[number]
                along = (slopes[at] * self.ways[number])[moved].sum(-1).double().cpu()
                self.scores[point] += rows[job].sign * told[at]
                self.weights[point][[self.index[place] for place in moved]] += rows[job].sign * along
            self.report(Progress("explain", self.network.model.name, float(len(self.scores)), unit="points"))

    def _at(self, point: float, number: int) -> torch.Tensor:
        found = self.whole[number].clone()
        moved = self.moved[number]
        found[moved] = self.blank + point * self.ways[number][moved]
        return found

    def piece(self, start: float, end: float) -> tuple[torch.Tensor, float]:
        """The weights from one point to another by Simpson's rule, and how far they are from what the score did."""
        middle = (start + end) / 2
        ends = self.weights[start] + 4 * self.weights[middle] + self.weights[end]
        weights = ends * ((end - start) / 6)
        return weights, weights.sum().item() - (self.scores[end] - self.scores[start])


def _integrated(network: Network, part: Part, measure: Measure, units: Units, report: Report) -> Attributed:
    path = _Path(network, part, measure, units, report)
    fresh = list(pairwise(EDGES))
    done: list[tuple[float, float, torch.Tensor, float]] = []
    while True:
        path.compute([point for start, end in fresh for point in (start, (start + end) / 2, end)])
        done += [(start, end, *path.piece(start, end)) for start, end in fresh]
        done.sort(key=lambda piece: -abs(piece[3]))
        difference = path.scores[1.0] - path.scores[0.0]
        allowed = TOLERANCE * abs(difference) + 1e-5
        off = sum(abs(piece[3]) for piece in done)
        if off <= allowed or len(path.scores) >= MOST:
            break
        split = 0
        while split < len(done) and off > allowed / 2:
            off -= abs(done[split][3])
            split += 1
        fresh = [half for s, e, *_ in done[:split] for half in ((s, (s + e) / 2), ((s + e) / 2, e))]
        done = done[split:]
    weights = torch.zeros(1 + max(path.places, default=0), dtype=torch.float64)
    weights[path.places] = sum(
        (piece[2] for piece in done), torch.zeros(len(path.places), dtype=torch.float64)
    )
    delta = weights.sum().item() - difference
    if abs(delta) > allowed:
        share = abs(delta / difference) if difference else 1.0
        report(Notice(f"the weights are {share:.0%} off what they should add up to", name="W-CONVERGENCE"))
    figures = {"baseline_score": path.scores[0.0], "convergence_delta": delta, "points": len(path.scores)}
    return Attributed(weights, path.scores[1.0], figures)


@torch.no_grad()
def occlusion(
    network: Network, parts: Sequence[Part], measure: Measure, units: Units, report: Report
) -> list[Attributed]:
    """How much lower the score is where a unit is left out of the input, on the targets that are not in it."""
    rows = [row for part in parts for row in part]
    full = _targets(network, rows, measure, report)
    left: list[Row] = []
    owners: list[tuple[int, int]] = []  # (row, unit)
    for number, row in enumerate(rows):
        for unit, places in enumerate(units):
            shorter = row.without(places)
            if shorter.targets and shorter.ids:
                left.append(shorter)
                owners.append((number, unit))
    weights = [
        torch.zeros(1 + max((p for u in units for p in u), default=0), dtype=torch.float64) for _ in rows
    ]
    for (number, unit), told in zip(owners, _targets(network, left, measure, report), strict=True):
        kept = [at for at, target in enumerate(rows[number].targets) if target.own not in units[unit]]
        change = full[number][kept].sum() - told.sum()
        for place in units[unit]:
            weights[number][place] = change / len(units[unit])
    return _summed(parts, weights, [scores.sum().item() for scores in full], units)


def _targets(network: Network, rows: Sequence[Row], measure: Measure, report: Report) -> list[torch.Tensor]:
    """What each target of each row gets, (targets,) in float64."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    done = 0
    for numbers in network.parts(rows):
        scores = network.scores([rows[number] for number in numbers], measure).double().cpu()
        found = _placed(found, numbers, scores)
        done += len(numbers)
        report(Progress("explain", network.model.name, float(done), float(len(rows)), "rows"))
    return found


def _placed(found: list[torch.Tensor], numbers: Sequence[int], values: torch.Tensor) -> list[torch.Tensor]:
    for number, value in zip(numbers, values, strict=True):
        found[number] = value
    return found
