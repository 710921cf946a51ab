"""The critical path of what was played: the chain of steps of which each waited for the one before, up to the last to end."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ncclx_py.simulate.events import Outcome
from ncclx_py.simulate.schedule import RECEIVE, SEND

_MOST = 100_000


class Hop(NamedTuple):
    """A step on the path: whose, what it does, when, and its bytes."""

    rank: int
    what: str
    start_s: float
    end_s: float
    bytes: int


def critical_path(outcome: Outcome) -> list[Hop]:
    """From the start to the end; at most `_MOST` hops, the last ones."""
    player = outcome.player
    if not len(outcome.ended):
        return []
    chain = _Chain(outcome)
    step = int(np.argmax(outcome.ended))
    found: list[Hop] = []
    seen: set[int] = set()
    while step >= 0 and step not in seen and len(found) < _MOST:
        seen.add(step)
        row = int(player.row[step])
        kind, peer = int(player.kind[row]), int(player.schedule.peer[step])
        reduces = bool(player.reduces[row])
        if kind == SEND:
            what = f"send to {peer}"
        elif kind == RECEIVE:
            what = f"{'reduce' if reduces else 'receive'} from {peer}"
        else:
            what = "reduce" if reduces else "copy"
        times = float(outcome.started[step]), float(outcome.ended[step])
        found.append(Hop(int(player.rank_of[step]), what, *times, int(player.size[row])))
        step = chain.before(step, seen)
    return found[::-1]


class _Chain:
    """What each step waited for longest; worked out rank by rank, as the path comes along."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome, self._player = outcome, outcome.player
        self._waited: dict[int, list[tuple[float, int]]] = {}
        self._ranks: set[int] = set()

    def before(self, step: int, seen: set[int]) -> int:
        """The other end of a message that came there later, else what held the step back on its own rank; -1: nothing."""
        started, other = self._outcome.started, int(self._player.schedule.match[step])
        if other >= 0 and other not in seen and started[other] > started[step]:
            return other
        rank = int(self._player.rank_of[step])
        if rank not in self._ranks:
            self._ranks.add(rank)
            self._look_at(rank)
        return max(self._waited.get(step, [(0.0, -1)]))[1]

    def _look_at(self, rank: int) -> None:
        player, base = self._player, int(self._player.schedule.base[rank])
        steps = np.flatnonzero(player.rank_of == rank)
        for (pointers, indexes), times in (
            (player.at_end, self._outcome.ended),
            (player.at_start, self._outcome.started),
        ):
            for step in steps:
                row = int(player.row[step])
                for index in indexes[pointers[row] : pointers[row + 1]]:
                    self._waited.setdefault(base + int(index), []).append((float(times[step]), int(step)))
