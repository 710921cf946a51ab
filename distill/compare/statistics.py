"""Mean and 95 % confidence interval over seeds, by Student's t (Gosset 1908), without a statistics library.

    spread([0.91, 0.93, 0.95])    # Spread(mean=0.93, half_width=0.0497, count=3)

The t distribution with an integer number of degrees of freedom has a closed form (Abramowitz & Stegun 26.7.3 and 26.7.4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Spread:
    """``mean ± half_width``; the half-width is None for a single value, from which no interval follows."""

    mean: float
    half_width: float | None
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Of independent values, one per seed (at least one)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Spread(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Spread(mean, t_quantile(count - 1) * math.sqrt(variance / count), count)


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = ``confidence`` at ``freedom`` >= 1 degrees of freedom."""
    low, high = 0.0, 1.0
    while central_probability(high, freedom) < confidence:
        low, high = high, 2.0 * high
    for _ in range(80):
        middle = (low + high) / 2.0
        low, high = (middle, high) if central_probability(middle, freedom) < confidence else (low, middle)
    return high


def central_probability(t: float, freedom: int) -> float:
    """P(|T| <= t) for t >= 0."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    # Series in cos(angle): cos + (2/3) cos^3 + … for odd, 1 + (1/2) cos^2 + … for even degrees of freedom.
    term = cosine if odd else 1.0
    total, power = 0.0, 1 if odd else 0
    while power <= freedom - 2:
        total += term
        term *= (power + 1) / (power + 2) * cosine**2
        power += 2
    return 2.0 / math.pi * (angle + sine * total) if odd else sine * total
