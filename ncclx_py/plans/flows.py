"""The matrix of an all-to-all summed over hosts, which is what its costs and bounds are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter

from ncclx_py.plans.plan import Problem
from ncclx_py.plans.topology import Topology

Row = Sequence[int]


class Flows:
    """Elements, blocks of a rank for itself left out.

    `to_host[s][h]` go from rank s to host h, `from_host[h][t]` from host h to rank t, `between[a][b]` from host a to host b.
    """

    def __init__(self, problem: Problem, topology: Topology) -> None:
        self.own = [row[rank] for rank, row in enumerate(problem.matrix)]
        picks = _picks(topology)
        self.to_host = [[sum(pick(row)) for pick in picks] for row in problem.matrix]
        self.from_host = [list(map(sum, zip(*pick(problem.matrix)))) for pick in picks]
        for rank, host in enumerate(topology.host_of):
            self.to_host[rank][host] -= self.own[rank]
            self.from_host[host][rank] -= self.own[rank]
        self.between = [[sum(pick(line)) for pick in picks] for line in self.from_host]

    def leaving(self, host: int) -> int:
        """To all other hosts."""
        return sum(self.between[host]) - self.between[host][host]

    def reaching(self, host: int) -> int:
        """From all other hosts."""
        return sum(line[host] for line in self.between) - self.between[host][host]


@lru_cache(maxsize=256)
def _picks(topology: Topology) -> list[Callable[[Sequence], tuple]]:
    """For each host, what picks the entries of its ranks from a sequence by rank."""
    return [_pick(members) for members in topology.hosts]


def _pick(members: Sequence[int]) -> Callable[[Sequence], tuple]:
    if len(members) == 1:
        only = members[0]
        return lambda row: (row[only],)
    return itemgetter(*members)
