"""What a line of a study comes to beside its baseline: differences run by run, of the same seed, with their interval.

Pure: numbers in, numbers out. Runs of the same seed share data and draws, so their difference scatters less than
either; the interval is Student's over the seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A measure of some runs minus that of the baseline's runs with the same seeds."""

    mean: float
    half_width: float | None
    """Of the interval around it that holds 95 %; none of a single pair."""
    num_pairs: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def difference(pairs: Sequence[tuple[float, float]]) -> Difference | None:
    """The difference of (ours, baseline's) pairs; None of no pair."""
    if not pairs:
        return None
    gaps = [ours - baseline for ours, baseline in pairs]
    half_width = None
    if len(gaps) > 1:
        half_width = student_quantile(len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return Difference(mean=statistics.fmean(gaps), half_width=half_width, num_pairs=len(gaps))


def student_quantile(degrees: int) -> float:
    """The t that |T| stays below with a probability of 0.95, T being Student's with that many degrees of freedom.

    By bisection over the angle atan(t / sqrt(degrees)), where the probability is a finite sum (Abramowitz and Stegun,
    26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability_within(middle, degrees) < CONFIDENCE else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _probability_within(angle: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) * tan(angle))."""
    cosine, is_odd = math.cos(angle), degrees % 2
    term, total = (cosine if is_odd else 1.0), 0.0
    for k in range(1 if is_odd else 0, degrees - 1, 2):  # cos + 2/3 cos^3 + ..., or 1 + 1/2 cos^2 + ...
        total += term
        term *= (k + 1) / (k + 2) * cosine**2
    return 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total
