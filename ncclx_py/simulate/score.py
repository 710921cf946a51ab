"""How far predictions are from measurements: errors, and how often the predicted winner of a contest was the fastest.

A contest is one collective of one size on one cluster, between the algorithms that were timed there. A winner is counted three
times: as the fastest by the median; as at most 5 % slower than that; and as not told apart from it, when its samples are not
slower at a level of 95 % (one-sided Mann–Whitney test, Ann. Math. Stat. 18, 1947, exact). Where everything was measured several
times, the fastest of one run is judged by another run in the same way: what a prediction that is reality itself would reach.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from ncclx_py.units import format_size, format_time

_LEVEL = 0.05
_REGIMES: tuple[tuple[str, Callable[[int], bool]], ...] = (
    ("up to 64 KiB", lambda size: size <= 64 << 10),
    ("between", lambda size: 64 << 10 < size < 1 << 20),
    ("1 MiB and more", lambda size: size >= 1 << 20),
)

Samples = tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """One algorithm at one size on one cluster; `runs` has the samples of each measurement, oldest first. Times in seconds,
    `predicted_s` 0 before it is predicted."""

    cluster: str
    collective: str
    bytes: int
    algorithm: str
    parameters: dict[str, int]
    runs: tuple[Samples, ...]
    predicted_s: float = 0.0

    @property
    def key(self) -> tuple[object, ...]:
        """What was timed."""
        parameters = tuple(sorted(self.parameters.items()))
        return self.cluster, self.collective, self.bytes, self.algorithm, parameters

    @property
    def samples(self) -> Samples:
        return tuple(itertools.chain(*self.runs))

    @property
    def measured_s(self) -> float:
        return statistics.median(self.samples)

    @property
    def error(self) -> float:
        """Share of the measured time by which the prediction is off."""
        return abs(self.predicted_s - self.measured_s) / self.measured_s


@dataclass(frozen=True)
class Winners:
    """Of so many contests: chosen algorithms that were the fastest (`fastest`), `near` it, or `not_told_apart` from it."""

    contests: int
    fastest: int
    near: int
    not_told_apart: int


@dataclass(frozen=True)
class Summary:
    """Errors over all points; predicted winners judged by all samples (`predicted`), and by those of each run (`of_a_run`);
    winners of a run judged by each other run (`ceiling`, with no contests where there is one run)."""

    points: int
    median_error: float
    p90_error: float
    predicted: Winners
    of_a_run: Winners
    ceiling: Winners
    near: float = 0.05


def summarise(points: Sequence[Point], near: float = 0.05) -> Summary:
    """Errors of all points; winners among those of the same cluster, collective and size, where there are two or more."""
    errors = sorted(point.error for point in points)
    contests: dict[tuple[str, str, int], list[Point]] = defaultdict(list)
    for point in points:
        contests[point.cluster, point.collective, point.bytes].append(point)
    rivals = [group for group in contests.values() if len(group) > 1]
    predicted, of_a_run, ceiling = [], [], []
    for group in rivals:
        best = _least([point.predicted_s for point in group])
        alike = len({len(point.runs) for point in group}) == 1  # else nobody knows which run is which
        runs = list(zip(*(point.runs for point in group))) if alike else []
        predicted.append((best, [point.samples for point in group]))
        of_a_run += [(best, judge) for judge in runs]
        ceiling += [(_fastest(one), judge) for one, judge in itertools.permutations(runs, 2)]
    return Summary(
        len(points),
        statistics.median(errors),
        errors[min(len(errors) - 1, int(0.9 * len(errors)))],
        _judged(predicted, near),
        _judged(of_a_run, near),
        _judged(ceiling, near),
        near,
    )


def _judged(choices: Sequence[tuple[int, Sequence[Samples]]], near: float) -> Winners:
    """`choices` has the place of the chosen algorithm in each contest, and the samples of all that take part."""
    sure = close = alike = 0
    for chosen, samples in choices:
        best = _fastest(samples)
        sure += chosen == best
        close += statistics.median(samples[chosen]) <= (1 + near) * statistics.median(samples[best])
        alike += not is_slower(samples[chosen], samples[best])
    return Winners(len(choices), sure, close, alike)


def _fastest(samples: Iterable[Samples]) -> int:
    return _least([statistics.median(one) for one in samples])


def _least(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)


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
    text = (
        f"{what + ':':<16} {summary.points:>3} points, median error {100 * summary.median_error:.0f} %, "
        f"90th percentile {100 * summary.p90_error:.1f} %; predicted winners: {_counts(summary.predicted, summary.near)}"
    )
    if summary.ceiling.contests:
        text += (
            f"\n{'':<16} judged by one run: {_counts(summary.of_a_run, summary.near)}"
            f"\n{'':<16} winners of another run, judged by one run: {_counts(summary.ceiling, summary.near)}"
        )
    return text


def _counts(found: Winners, near: float) -> str:
    return (
        f"of {found.contests} contests the fastest in {found.fastest}, within {100 * near:.0f} % of it in {found.near}, "
        f"not told apart from it in {found.not_told_apart}"
    )
