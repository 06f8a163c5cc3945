"""Histograms of scores, filled value by value, with the limits and what lies beyond them."""

import math
from dataclasses import dataclass, field

import numpy as np

from mosaic.reports.charts import Bar, histogram_chart
from preprocess.construct.page.scores import Limit

BINS = 40
SKEWED = (
    4  # arithmetic over geometric mean from which on an axis is logarithmic; 1.4 for equal shares of a range, 1.8 for an exponential one
)


@dataclass
class Range:
    """What the values of a score lie between, and how."""

    low: float = math.inf
    high: float = -math.inf
    number: int = 0
    sum: float = 0.0
    sum_of_logarithms: float = 0.0

    def add(self, value: float) -> None:
        """Take a value in."""
        self.low, self.high = min(self.low, value), max(self.high, value)
        self.number += 1
        self.sum += value
        self.sum_of_logarithms += math.log(value) if value > 0 else -math.inf

    @property
    def is_skewed(self) -> bool:
        """Whether the values are positive and spread over orders of magnitude."""
        if self.low <= 0 or not self.number:
            return False
        return self.sum / self.number >= SKEWED * math.exp(self.sum_of_logarithms / self.number)


@dataclass
class Histogram:
    """Values of one score in `BINS` equal bins, those of candidates that passed the stage apart from those of the others.

    Attributes:
        range: Of the values, which must be known before any is counted.
        limit: What decides.
        counts: int64 [2, BINS]: of candidates that passed, of those that did not.
        below: Values under the limit's lower end.
        above: Values over its upper end.
    """

    range: Range
    limit: Limit = Limit()
    counts: np.ndarray = field(default_factory=lambda: np.zeros((2, BINS), np.int64))
    below: int = 0
    above: int = 0

    def __post_init__(self) -> None:
        ends = [self.range.low, self.range.high, *(end for end in self.limit if end is not None)]
        self.logarithmic = self.range.is_skewed and min(ends) > 0
        first, last = (math.log10(end) if self.logarithmic else end for end in (min(ends), max(ends)))
        if last - first <= 1e-9 * max(abs(first), abs(last)):
            first, last = first - 0.5, last + 0.5
        edges = np.linspace(first, last, BINS + 1)
        self.edges: np.ndarray = 10**edges if self.logarithmic else edges

    def add(self, value: float, passed: bool) -> None:
        """Count a value of a candidate."""
        place = int(np.searchsorted(self.edges[1:-1], value, side="right"))
        self.counts[0 if passed else 1, place] += 1
        self.below += self.limit.low is not None and value < self.limit.low
        self.above += self.limit.high is not None and value > self.limit.high

    @property
    def total(self) -> int:
        """Values counted."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """The value that about this share of all lies below, as exactly as the bins tell: the middle of one."""
        cumulated = self.counts.sum(axis=0).cumsum()
        place = int(np.searchsorted(cumulated, share * cumulated[-1]))
        return float(self.edges[place] + self.edges[place + 1]) / 2

    def words(self) -> str:
        """What the limit costs, and how the values are spread."""
        spread = ", ".join(f"{share:.0%} below {self.quantile(share):.3g}" for share in (0.05, 0.25, 0.5, 0.75, 0.95))
        beyond = [
            f"{count} ({count / self.total:.1%}) {word} {end:g}"
            for count, word, end in ((self.below, "under", self.limit.low), (self.above, "over", self.limit.high))
            if end is not None
        ]
        return f"{self.total} values; {'; '.join(beyond) or 'no limit'}. About {spread}."

    def chart(self, name: str) -> str:
        """The SVG."""
        bars = [
            Bar(float(low), float(high), tuple(int(count) for count in counts))
            for low, high, counts in zip(self.edges[:-1], self.edges[1:], self.counts.T, strict=True)
        ]
        marks = [(f"{word} {end:g}", end) for word, end in (("at least", self.limit.low), ("at most", self.limit.high)) if end is not None]
        return histogram_chart(
            bars, name, "values", ("passed the stage", "did not"), marks, self.logarithmic, f"Histogram of {name}: {self.words()}"
        )
