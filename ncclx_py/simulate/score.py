"""How far predictions are from measurements: errors, and how often the predicted winner of a contest was the fastest.

A contest is one collective of one size on one cluster, between the algorithms that were timed there. The predicted winner is
counted three times: as the fastest by the median; as at most 5 % slower than that; and as not told apart from it, when its
samples are not slower at a level of 95 % (one-sided Mann–Whitney test, Ann. Math. Stat. 18, 1947, exact).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from ncclx_py.units import format_size, format_time

_LEVEL = 0.05
_REGIMES: tuple[tuple[str, Callable[[int], bool]], ...] = (
    ("up to 64 KiB", lambda size: size <= 64 << 10),
    ("between", lambda size: 64 << 10 < size < 1 << 20),
    ("1 MiB and more", lambda size: size >= 1 << 20),
)


@dataclass(frozen=True)
class Point:
    """One algorithm at one size on one cluster; `samples` and times in seconds, `predicted_s` 0 before it is predicted."""

    cluster: str
    collective: str
    bytes: int
    algorithm: str
    parameters: dict[str, int]
    samples: tuple[float, ...]
    predicted_s: float = 0.0

    @property
    def measured_s(self) -> float:
        return statistics.median(self.samples)

    @property
    def error(self) -> float:
        """Share of the measured time by which the prediction is off."""
        return abs(self.predicted_s - self.measured_s) / self.measured_s


@dataclass(frozen=True)
class Summary:
    """Errors over all points; in how many contests the predicted winner was the fastest (`winners`), within `near` of it
    (`near_winners`), or not told apart from it by its samples (`not_told_apart`)."""

    points: int
    median_error: float
    p90_error: float
    contests: int
    winners: int
    near_winners: int
    not_told_apart: int
    near: float = 0.05


def summarise(points: Sequence[Point], near: float = 0.05) -> Summary:
    """Errors of all points; winners among those of the same cluster, collective and size, where there are two or more."""
    errors = sorted(point.error for point in points)
    contests: dict[tuple[str, str, int], list[Point]] = defaultdict(list)
    for point in points:
        contests[point.cluster, point.collective, point.bytes].append(point)
    rivals = [group for group in contests.values() if len(group) > 1]
    pairs = [(_predicted_winner(group), min(group, key=lambda point: point.measured_s)) for group in rivals]
    return Summary(
        len(points),
        statistics.median(errors),
        errors[min(len(errors) - 1, int(0.9 * len(errors)))],
        len(rivals),
        sum(chosen is best for chosen, best in pairs),
        sum(chosen.measured_s <= (1 + near) * best.measured_s for chosen, best in pairs),
        sum(not is_slower(chosen.samples, best.samples) for chosen, best in pairs),
        near,
    )


def _predicted_winner(group: Sequence[Point]) -> Point:
    return min(group, key=lambda point: point.predicted_s)


def is_slower(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether the samples `one` are larger than `other` at a level of 95 %; ties count half."""
    above = sum((a > b) + 0.5 * (a == b) for a in one for b in other)
    most = len(one) * len(other)
    ways = [_arrangements(len(one), len(other), count) for count in range(most + 1)]
    as_extreme = sum(ways[count] for count in range(most + 1) if count >= above)
    return as_extreme / sum(ways) < _LEVEL


@cache
def _arrangements(one: int, other: int, above: int) -> int:
    """In how many orders of `one` + `other` samples exactly `above` pairs have the first one's larger."""
    if above < 0:
        return 0
    if not one or not other:
        return int(above == 0)
    return _arrangements(one - 1, other, above - other) + _arrangements(one, other - 1, above)


def as_text(points: Sequence[Point], summary: Summary) -> str:
    """All points as a table, and the summaries of all and of small, medium and large sizes."""
    lines = [
        f"{'cluster':<16} {'collective':<12} {'size':>8}  {'algorithm':<22} {'measured':>10} {'predicted':>10}  error"
    ]
    for point in points:
        values = "".join(f" {name}={value}" for name, value in point.parameters.items() if name != "window")
        off = (point.predicted_s - point.measured_s) / point.measured_s
        lines.append(
            f"{point.cluster:<16} {point.collective:<12} {format_size(point.bytes):>8}  {point.algorithm + values:<22} "
            f"{format_time(point.measured_s):>10} {format_time(point.predicted_s):>10}  {100 * off:+4.0f} %"
        )
    lines.append(_told("all", summary))
    for name, belongs in _REGIMES:
        part = [point for point in points if belongs(point.bytes)]
        if part:
            lines.append(_told(name, summarise(part, summary.near)))
    return "\n".join(lines)


def _told(what: str, summary: Summary) -> str:
    return (
        f"{what + ':':<16} {summary.points:>3} points, median error {100 * summary.median_error:.0f} %, "
        f"90th percentile {100 * summary.p90_error:.0f} %; of {summary.contests} contests the predicted winner was the fastest in "
        f"{summary.winners}, within {100 * summary.near:.0f} % of it in {summary.near_winners}, not told apart from it in "
        f"{summary.not_told_apart}"
    )
