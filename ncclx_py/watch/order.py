"""The order of calls: who left the one that the others keep, in one group or over all groups.

Ranks of one program make the same calls in the same order, each in groups of its own. So the calls of all groups of a rank
are one line of (operation, size, place in the program), and the lines of all ranks are alike, but for the one that skipped
a call or made two in another order. The lines are compared from the last call that all ranks made together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ncclx_py.watch.grid import ABSENT, is_counted
from ncclx_py.watch.model import Asked, Group, Job, RankTrace

_BEFORE, _AFTER = 2000, 500  # calls around the last common one that are compared


@dataclass(slots=True)
class Departure:
    """`ranks` left the common order, by a call that is skipped, extra or in another order."""

    ranks: list[int]
    cause: str


def find_departure(job: Job) -> Departure | None:
    """The ranks whose next call after the last common one is not that of the majority; None unless all others agree."""
    lines = _lines(job)
    if lines is None:
        return None
    calls, anchor = lines
    ranks = list(job.ranks)
    for column in range(anchor, calls.shape[1]):
        there = calls[:, column][calls[:, column] != ABSENT].tolist()
        counts = Counter(there).most_common(2)
        if len(counts) < 2:
            continue
        usual, votes = counts[0]
        if 2 * votes <= len(there):
            return None
        odd = np.flatnonzero((calls[:, column] != ABSENT) & (calls[:, column] != usual)).tolist()
        if _contradict(np.delete(calls, odd, axis=0)[:, anchor:]):
            return None
        causes = {shift_of(calls, line, column, usual) for line in odd}
        cause = causes.pop() if len(causes) == 1 else ""
        return Departure([ranks[line] for line in odd], cause) if cause else None
    return None


def _contradict(calls: np.ndarray) -> bool:
    """Whether any column holds two different calls."""
    highest = calls.max(axis=0)
    return bool(((calls != ABSENT) & (calls != highest)).any())


def _lines(job: Job) -> tuple[np.ndarray, int] | None:
    """The calls of each rank, one row each, laid out so that the last common call is in one column; and that column."""
    common = max(
        (group for group in job.groups if len(group.ranks) > 1), key=lambda group: len(group.ranks), default=None
    )
    if common is None or not set(job.ranks) <= set(common.ranks):
        return None
    number = job.group_number(common)
    counted = np.array([is_counted(one) for one in job.asked] or [False])
    sites = job.site_kinds()
    sequences, positions = [], []
    tokens: dict[tuple[object, ...], int] = {}
    last = min(_last(trace, number, counted) for trace in job.ranks.values())
    for trace in job.ranks.values():
        table = trace.table
        rows = np.flatnonzero(counted[table["asked"]]) if trace.rows else np.array([], dtype=int)
        at = np.flatnonzero((table["group"][rows] == number) & (table["seq"][rows] == last)) if len(rows) else rows
        if not len(at):
            return None
        low, high = max(0, int(at[0]) - _BEFORE), int(at[0]) + _AFTER
        sequences.append(_tokens(job, trace, rows[low:high], sites, tokens))
        positions.append(int(at[0]) - low)
    anchor = max(positions)
    width = max(anchor - place + len(sequence) for place, sequence in zip(positions, sequences))
    calls = np.full((len(sequences), width), ABSENT, dtype=np.int64)
    for line, (place, sequence) in enumerate(zip(positions, sequences)):
        calls[line, anchor - place : anchor - place + len(sequence)] = sequence
    return calls, anchor


def _last(trace: RankTrace, group: int, counted: np.ndarray) -> int:
    """The number of the last call of a group on a rank."""
    table = trace.table
    rows = (table["group"] == group) & counted[table["asked"]] if trace.rows else np.zeros(0, dtype=bool)
    return int(table["seq"][rows].max()) if rows.any() else ABSENT


def _tokens(
    job: Job, trace: RankTrace, rows: np.ndarray, sites: np.ndarray, known: dict[tuple[object, ...], int]
) -> list[int]:
    table, found = trace.table, []
    columns = (table["group"][rows], table["asked"][rows], sites[table["site"][rows]])
    for group, asked, site in zip(*(column.tolist() for column in columns)):
        found.append(known.setdefault((*_kind(job.asked[asked], job.groups[group]), site), len(known)))
    return found


def _kind(asked: Asked, group: Group) -> tuple[str, str, int]:
    """What a call is, whatever the size of its group."""
    per_rank = "gather" in asked.op or "scatter" in asked.op
    return asked.op, asked.dtype, asked.elements // len(group.ranks) if per_rank else asked.elements


def shift_of(calls: np.ndarray, line: int, column: int, usual: int) -> str:
    """How a rank left the order of the others: skipped, order, extra, or "" where its call at a column has no place near
    there. `calls` are numbers of calls, a row per rank; `usual` is what the others call at the column."""
    mine = calls[line]
    right = majority_line(calls[calls[:, column] == usual])
    after = right[column + 1] if column + 1 < len(right) and right[column + 1] != ABSENT else _successor(right, column)
    if mine[column] == after:
        swapped = column + 1 < len(mine) and mine[column + 1] == usual
        return "order" if swapped else "skipped"
    if column and mine[column] == right[column - 1]:
        return "extra"
    recent = right[:column][-64:]
    return "order" if column + 1 < len(mine) and mine[column + 1] == usual and mine[column] in recent else ""


def _successor(right: np.ndarray, column: int) -> int:
    """What followed the last time that the calls up to `column` were made, as many of them as it takes to be sure."""
    best, length = ABSENT, 0
    for place in np.flatnonzero(right[:column] == right[column])[::-1][:200].tolist():
        same = 0
        while same < 64 and same <= place and right[place - same] == right[column - same]:
            same += 1
        if same > length:
            best, length = int(right[place + 1]), same
    return best


def majority_line(rows: np.ndarray) -> np.ndarray:
    """The longest of the rows that most of the rows begin like: the row that agrees with most others in most places."""
    if len(rows) > 64:
        rows = rows[np.linspace(0, len(rows) - 1, 64).astype(int)]
    scores = [int(((rows == row) & (row != ABSENT)).sum()) for row in rows]
    best: np.ndarray = rows[int(np.argmax(scores))]
    return best
