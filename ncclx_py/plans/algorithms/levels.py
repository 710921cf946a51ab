"""All-reduce over two levels: inside each host, between hosts, inside again; in chunks, so that the levels overlap.

The vector is cut into columns (see layout). For each chunk of each column: (1) its owner in every host combines what its
host has; (2) the owners of the column combine among hosts, by a ring, or where the vector is short by recursive halving
and doubling for a power of two of hosts; (3) the owners hand the result to their host. Every NIC carries 2(N − 1)/N of
its columns in each direction, which is the least that is possible (node-cut bound, N hosts). The three phases are on
lanes of their own.
"""

from __future__ import annotations

from ncclx_py.plans.algorithms.exchanges import (
    LANES,
    doubling,
    halving,
    is_power_of_two,
    ring_all_gather,
    ring_reduce_scatter,
)
from ncclx_py.plans.algorithms.layout import column_weights, cut, owner, split
from ncclx_py.plans.algorithms.script import Script
from ncclx_py.plans.plan import Problem, RankPlan, Span
from ncclx_py.plans.topology import Topology

# Elements up to which halving and doubling saves latency. Beyond, its partners change from round to round and NICs idle while
# they wait for each other: 4 hosts x 2 ranks, 16 MiB at 200 Mbit/s, 8 chunks: 1.36 x the bound, against 1.06 with rings.
SHORT = 1 << 16

GATHER_IN, SCATTER, GATHER, HAND_OUT = 0, 1, 1 + LANES, 1 + 2 * LANES  # lanes of the phases


def hierarchical(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """One chunk: the levels work one after the other."""
    return pipelined(problem, topology, rank, chunks=1)


def pipelined(problem: Problem, topology: Topology, rank: int, chunks: int) -> RankPlan:
    """`chunks` slices of every column follow one another through the phases."""
    return _TwoLevels(problem, topology, topology, rank, chunks).plan()


def direct(problem: Problem, topology: Topology, rank: int, chunks: int) -> RankPlan:
    """Each rank combines a share of the vector from all others and hands the result to all: the two-shot all-reduce.

    These are phases 1 and 3 among all ranks, as if they were on one host.
    """
    return _TwoLevels(problem, topology, Topology((0,) * topology.size), rank, chunks).plan()


class _TwoLevels:
    """Writes the steps. `groups` says which ranks count as a host; `topology`, which links the messages cross."""

    def __init__(self, problem: Problem, topology: Topology, groups: Topology, rank: int, chunks: int) -> None:
        self.script = Script(topology, rank)
        self.groups = groups
        self.rank = rank
        self.host = groups.host_of[rank]
        locals_ = groups.hosts[self.host]
        mine = groups.local_rank[rank]
        # Starting with the next rank spreads the readers over the host's memory.
        self.neighbours = [locals_[(mine + shift) % len(locals_)] for shift in range(1, len(locals_))]
        whole = cut(Span("data", 0, problem.count), column_weights(groups))
        self.slices = [split(column, chunks) for column in whole]  # by column and chunk
        self.chunks = chunks
        self.halves = chunks == 1 and problem.count <= SHORT
        self.owned = {peer: self._columns_of(groups.local_rank[peer], len(locals_)) for peer in locals_}

    def _columns_of(self, local: int, ranks: int) -> list[int]:
        return list(range(local, len(self.slices), ranks))

    def plan(self) -> RankPlan:
        self._offer(0)
        for chunk in range(self.chunks):
            if chunk + 1 < self.chunks:
                self._offer(chunk + 1)  # ahead of combining the chunk before: no neighbour waits for that
            self._combine(chunk)
            self._between(chunk)
            self._hand_out(chunk)
        return self.script.finish()

    def _offer(self, chunk: int) -> None:
        for peer in self.neighbours:
            for column in self.owned[peer]:
                self.script.send(self.slices[column][chunk], peer, GATHER_IN, chunk)

    def _combine(self, chunk: int) -> None:
        for peer in self.neighbours:
            for column in self.owned[self.rank]:
                self.script.reduce(self.slices[column][chunk], peer, GATHER_IN, chunk)

    def _between(self, chunk: int) -> None:
        hosts = len(self.groups.hosts)
        if hosts == 1:
            return
        for column in self.owned[self.rank]:
            members = [owner(self.groups, host, column) for host in range(hosts)]
            span = self.slices[column][chunk]
            if self.halves and hosts > 2 and is_power_of_two(hosts):
                halving(self.script, members, self.host, span, SCATTER, chunk)
                doubling(self.script, members, self.host, span, GATHER, chunk)
            else:
                parts = split(span, hosts)
                ring_reduce_scatter(self.script, members, self.host, parts, SCATTER, chunk)
                ring_all_gather(self.script, members, self.host, parts, GATHER, chunk)

    def _hand_out(self, chunk: int) -> None:
        for peer in self.neighbours:
            for column in self.owned[self.rank]:
                self.script.send(self.slices[column][chunk], peer, HAND_OUT, chunk)
        for peer in self.neighbours:
            for column in self.owned[peer]:
                self.script.recv(self.slices[column][chunk], peer, HAND_OUT, chunk)
