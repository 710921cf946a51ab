"""Ranks that meet in a collective and ask for different things, or have lost count of their calls.

The `k`-th collectives of a group belong together. Where they differ, the most common one is taken for the right one. A
rank that calls what the others call *next* has skipped a call, or calls in another order; one that calls again what all
have just called has one call too many. What is next is read from the others' calls after that, or from the last time that
they made the same two calls in a row: programs repeat themselves.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ncclx_py.watch.grid import ABSENT, Grid
from ncclx_py.watch.model import COMPLETED, Asked, Job, Place
from ncclx_py.watch.order import majority_line, shift_of

NAMES = {"op": "op", "dtype": "dtype", "elements": "size", "reduce_op": "reduce_op", "root": "root"}


@dataclass(slots=True)
class Mismatch:
    """`cause` is op, dtype, size, reduce_op, root or splits; or skipped, extra or order. `odd` are the ranks that are not
    with the majority, all of them where there is none (`tie`)."""

    place: Place
    cause: str
    odd: list[int]
    tie: bool
    asked: dict[int, Asked]  # of each rank that called
    sites: dict[int, str]
    since: int  # ns


def find_mismatch(job: Job, grids: list[Grid]) -> Mismatch | None:
    """The first mismatch in time, of those that kept somebody from going on."""
    found = [one for grid in grids for one in [_contradiction(job, grid) or _uneven(job, grid)] if one is not None]
    return min(found, key=lambda one: one.since, default=None)


def find_slip(job: Job, grid: Grid, behind: list[int]) -> Mismatch | None:
    """Where ranks that are one call behind left a call out, though all that they asked for fits: by their call sites."""
    lines = [line for line, rank in enumerate(grid.ranks) if rank in behind]
    others = [line for line in range(len(grid.ranks)) if line not in lines]
    if not lines or not others:
        return None
    sites = np.where(grid.site == ABSENT, ABSENT, job.site_kinds()[grid.site])
    right = majority_line(sites[others])
    starts = []
    for line in lines:
        mine = sites[line]
        away = np.flatnonzero((mine != right) & (mine != ABSENT) & (right != ABSENT))
        if not len(away) or not _shifted(mine[away[0] :], right[away[0] + 1 :]):
            return None
        starts.append(int(away[0]))
    return _describe(job, grid, min(starts), "skipped", lines, False)


def _contradiction(job: Job, grid: Grid) -> Mismatch | None:
    there = grid.agreed != ABSENT
    highest = np.where(there, grid.agreed, -1).max(axis=0)
    lowest = np.where(there, grid.agreed, np.iinfo(np.int32).max).min(axis=0)
    open_ = (there & (grid.state != COMPLETED)).any(axis=0)
    columns = np.flatnonzero((highest != lowest) & there.any(axis=0) & open_)
    if not len(columns):
        return None
    column = int(columns[0])
    calls = {line: int(grid.agreed[line, column]) for line in np.flatnonzero(there[:, column]).tolist()}
    counts = Counter(calls.values()).most_common()
    tie = counts[0][1] == counts[1][1]
    usual = counts[0][0]
    odd = list(calls) if tie else [line for line, asked in calls.items() if asked != usual]
    if tie:
        other = next(asked for asked in calls.values() if asked != usual)
    else:
        other = calls[odd[0]]
    differs = job.asked[other].differences(job.asked[usual]) or ["op"]
    cause = NAMES[differs[0]]
    if not tie and differs[0] in ("op", "elements", "dtype"):
        shifts = {shift_of(grid.agreed, line, column, usual) for line in odd}
        if len(shifts) == 1 and (shift := shifts.pop()):
            cause = shift
    return _describe(job, grid, column, cause, odd, tie)


def _shifted(mine: np.ndarray, right: np.ndarray) -> bool:
    """Whether a rank's calls are those of the others from one later on, to its end."""
    mine = mine[mine != ABSENT]
    return 0 < len(mine) <= len(right) and bool((mine == right[: len(mine)]).all())


def _uneven(job: Job, grid: Grid) -> Mismatch | None:
    """An all-to-all in which what one rank sends is not what another expects."""
    open_ = np.flatnonzero((grid.state != COMPLETED).any(axis=0) & (grid.agreed != ABSENT).any(axis=0))
    for column in open_.tolist()[:8]:
        calls = {grid.ranks[line]: job.asked[at] for line, at in enumerate(grid.asked[:, column].tolist()) if at >= 0}
        pairs = _unequal_pairs(grid.group.ranks, calls)
        if pairs:
            counts = Counter(rank for pair in pairs for rank in pair)
            most = counts.most_common(2)
            tie = len(most) > 1 and most[0][1] == most[1][1]
            odd = sorted(counts) if tie else [most[0][0]]
            return _describe(job, grid, column, "splits", [grid.ranks.index(rank) for rank in odd], tie)
    return None


def _unequal_pairs(ranks: tuple[int, ...], calls: dict[int, Asked]) -> list[tuple[int, int]]:
    size = len(ranks)
    full = {rank: one.splits for rank, one in calls.items() if len(one.splits) == 2}
    full = {rank: splits for rank, splits in full.items() if len(splits[0]) == size == len(splits[1])}
    if len(full) < 2:
        return []
    present = [place for place, rank in enumerate(ranks) if rank in full]
    sent = np.array([full[ranks[place]][0] for place in present])[:, present]
    expected = np.array([full[ranks[place]][1] for place in present])[:, present].T
    return [(ranks[present[a]], ranks[present[b]]) for a, b in zip(*np.nonzero(sent != expected))]


def _describe(job: Job, grid: Grid, column: int, cause: str, odd: list[int], tie: bool) -> Mismatch:
    lines = np.flatnonzero(grid.asked[:, column] >= 0).tolist()
    times = grid.scheduled[lines, column]
    return Mismatch(
        place=Place(grid.group, grid.first + column),
        cause=cause,
        odd=sorted(grid.ranks[line] for line in odd),
        tie=tie,
        asked={grid.ranks[line]: job.asked[int(grid.asked[line, column])] for line in lines},
        sites={grid.ranks[line]: job.sites[int(grid.site[line, column])] for line in lines},
        since=int(times.min()) if len(times) else 0,
    )
