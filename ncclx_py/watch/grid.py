"""The calls of one group side by side: a row per rank, a column per sequence number.

    grid = Grid.of(job, group)
    grid.agreed[i, j]      # number of what rank grid.ranks[i] asked for as call grid.first + j; −1: not in its dump

Only the latest `WINDOW` calls are laid out, whatever numbers a damaged dump may hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ncclx_py.watch.model import CONNECTING, PEER_OPS, Asked, Group, Job

WINDOW = 20_000
ABSENT = -1


@dataclass(slots=True)
class Grid:
    """`ranks` are those of the group that have a dump. `asked`, `site` and `state` are −1 where there is no call;
    `agreed` is `asked` without what may differ from rank to rank. Times are ns, 0 where there is no call."""

    group: Group
    ranks: list[int]
    first: int
    agreed: np.ndarray
    asked: np.ndarray
    site: np.ndarray
    state: np.ndarray
    scheduled: np.ndarray
    started: np.ndarray
    finished: np.ndarray

    @classmethod
    def of(cls, job: Job, group: Group, window: int = WINDOW) -> Grid | None:
        """None when no dump has a collective of the group."""
        number = job.group_number(group)
        ranks = [rank for rank in group.ranks if rank in job.ranks]
        counted = np.array([is_counted(one) for one in job.asked] or [False])
        chosen = {rank: _rows(job.ranks[rank].table, number, counted) for rank in ranks}
        ends = [int(job.ranks[rank].table["seq"][rows].max()) for rank, rows in chosen.items() if len(rows)]
        if not ends:
            return None
        starts = [int(job.ranks[rank].table["seq"][rows].min()) for rank, rows in chosen.items() if len(rows)]
        first = max(min(starts), max(ends) - window + 1)
        shape = (len(ranks), max(ends) - first + 1)
        columns = {name: np.full(shape, ABSENT, dtype=np.int32) for name in ("asked", "site", "state")}
        columns |= {name: np.zeros(shape, dtype=np.int64) for name in ("scheduled", "started", "finished")}
        for line, rank in enumerate(ranks):
            table, rows = job.ranks[rank].table, chosen[rank]
            places = table["seq"][rows] - first
            rows, places = rows[places >= 0], places[places >= 0]
            for name, column in columns.items():
                column[line, places] = table[name][rows]
        same = _same(job.asked)
        agreed = np.where(columns["asked"] >= 0, same[columns["asked"]], ABSENT)
        return cls(group, ranks, first, agreed, **columns)


def is_counted(asked: Asked) -> bool:
    """Whether a call has a number among the collectives of its group."""
    return asked.op not in PEER_OPS and asked.op != CONNECTING


def _rows(table: dict[str, np.ndarray], group: int, counted: np.ndarray) -> np.ndarray:
    return (
        np.flatnonzero((table["group"] == group) & counted[table["asked"]]) if len(table["seq"]) else np.array([], int)
    )


def _same(asked: list[Asked]) -> np.ndarray:
    """For each call the number of one that says the same about all that ranks must agree on."""
    known: dict[tuple[object, ...], int] = {}
    return np.array(
        [
            known.setdefault(
                (one.op, one.dtype if one.elements >= 0 else "", one.elements, one.root, one.reduce_op), place
            )
            for place, one in enumerate(asked)
        ]
        or [0],
        dtype=np.int32,
    )
