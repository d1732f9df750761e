"""Running sums of many records' numbers: ratios with their errors, and how near predictions are.

Knows no record and no unit; memory does not grow with what is added.
"""

import math


class Ratio:
    """Sum of one figure over the sum of another, with the standard error of that ratio."""

    def __init__(self) -> None:
        self.count = 0
        self.top = self.bottom = self.tops = self.bottoms = self.both = 0.0

    def add(self, top: float, bottom: float) -> None:
        """Count one record."""
        self.count += 1
        self.top += top
        self.bottom += bottom
        self.tops += top * top
        self.bottoms += bottom * bottom
        self.both += top * bottom

    def value(self) -> float | None:
        """The ratio; None before there is any."""
        return self.top / self.bottom if self.bottom else None

    def error(self) -> float | None:
        """Its standard error; None for fewer than two records."""
        ratio = self.value()
        if ratio is None or self.count < 2:
            return None
        # Rounding may leave a trace below zero where all records are alike.
        squares = max(0.0, self.tops - 2 * ratio * self.both + ratio * ratio * self.bottoms)
        return math.sqrt(squares * self.count / (self.count - 1)) / self.bottom


class Pairs:
    """Right and predicted numbers, as running means and sums of squares about them (Welford)."""

    def __init__(self) -> None:
        self.count = 0
        self.squared = self.absolute = 0.0  # sums of errors
        self.means = [0.0, 0.0]
        self.spread = [0.0, 0.0]
        self.shared = 0.0
        self.lowest, self.highest = [math.inf] * 2, [-math.inf] * 2

    def add(self, right: float, made: float) -> None:
        """Count one pair."""
        self.count += 1
        self.squared += (made - right) * (made - right)
        self.absolute += abs(made - right)
        before = [value - mean for value, mean in zip((right, made), self.means, strict=True)]
        self.means = [mean + b / self.count for mean, b in zip(self.means, before, strict=True)]
        after = [value - mean for value, mean in zip((right, made), self.means, strict=True)]
        self.spread = [s + b * a for s, b, a in zip(self.spread, before, after, strict=True)]
        self.shared += before[0] * after[1]
        self.lowest = list(map(min, self.lowest, (right, made)))
        self.highest = list(map(max, self.highest, (right, made)))

    def figures(self) -> dict[str, float | None]:
        """Errors and Pearson's correlation; None for what a number cannot hold, or no correlation is of."""
        found: dict[str, float | None] = {
            "mean_squared_error": self.squared / self.count,
            "mean_absolute_error": self.absolute / self.count,
            "pearson": None,
        }
        varied = all(low < high for low, high in zip(self.lowest, self.highest, strict=True))
        if varied and all(self.spread):
            found["pearson"] = self.shared / (math.sqrt(self.spread[0]) * math.sqrt(self.spread[1]))
        return {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in found.items()
        }
