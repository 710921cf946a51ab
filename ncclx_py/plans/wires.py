"""What a topology's links make of a message, a round or a ring step: the vocabulary in which cost.py writes its formulas.

Sizes are bytes, times seconds. Messages cost as in replay.py: α on their own, and OVERHEAD·α at either end for each further one
that the same rank handles in the same round. All ranks of a host are taken to be busy at once, and to share its NICs.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

from ncclx_py.plans.algorithms.layout import by_host, column_weights, columns, owner
from ncclx_py.plans.algorithms.trees import double_binary_trees
from ncclx_py.plans.topology import OVERHEAD, Topology


class Exchange(NamedTuple):
    """A round in which every rank sends one message and takes one: latency, and seconds per byte of a message."""

    alpha: float
    beta: float


class Wires:
    """Derived figures of one topology; get it from ``uniform.wires``, which keeps them."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.size = topology.size
        self.sizes = [len(members) for members in topology.hosts]
        self.hosts = len(self.sizes)
        self.largest, self.smallest = max(self.sizes), min(self.sizes)
        self.alpha1, self.alpha2 = topology.intra.alpha, topology.inter.alpha
        self.port = 1 / topology.intra.bandwidth
        self.beta1 = max(self.port, self.largest / topology.memory if topology.memory else 0.0)
        self.gamma = topology.gamma

    @property
    def alpha(self) -> float:
        """Of the slowest message that a round among all ranks has."""
        return self.alpha2 if self.hosts > 1 else self.alpha1

    def inside(self, size: float, messages: int = 1) -> float:
        """A round in which each rank sends and takes `messages` messages in its host, `size` bytes in all each way."""
        return self.burst(messages, 0) + size * self.beta1

    def burst(self, inside: int, between: int) -> float:
        """Latency of a round in which each rank first sends so many messages of each level, then takes as many."""
        busy = 2 * OVERHEAD * (inside * self.alpha1 + between * self.alpha2)
        travel = self.alpha2 if between else self.alpha1 if inside else 0.0
        return busy + (1 - 2 * OVERHEAD) * travel

    @cached_property
    def cut(self) -> float:
        """Seconds per byte that every host sends or receives, spread over its NICs as its ranks are."""
        return max(
            sum(1 for rank in members if self.topology.rail(rank) == rail)
            / len(members)
            / self.topology.nic(host, rail)
            for host, members in enumerate(self.topology.hosts)
            for rail in range(min(self.topology.rails, len(members)))
        )

    def ring_step(self, size: float) -> float:
        """One of many steps around a ring in host order: the mean of its edges, or the slowest pipe."""
        local_edges = self.size - self.hosts if self.hosts > 1 else self.size
        around = local_edges * (self.alpha1 + size * self.beta1)
        pace = (size * self.beta1 + 2 * OVERHEAD * self.alpha1) if local_edges else 0.0
        for nic in self._ring_nics:
            around += self.alpha2 + size / nic
            pace = max(pace, size / nic)
        return max(around / self.size, pace)

    @cached_property
    def _ring_nics(self) -> list[float]:
        topology = self.topology
        if self.hosts == 1:
            return []
        return [topology.nic(host, topology.rail(members[-1])) for host, members in enumerate(topology.hosts)]

    @cached_property
    def halving(self) -> tuple[list[Exchange], bool]:
        """The rounds of recursive halving in host order, nearest first, and whether ranks beyond a power of two are folded."""
        members = by_host(self.topology)
        core = 1 << (len(members).bit_length() - 1)
        paired = 2 * (len(members) - core)
        stay = [*members[:paired:2], *members[paired:]]
        pairs = [
            [(rank, stay[index ^ distance]) for index, rank in enumerate(stay)]
            for distance in (1 << bit for bit in range(core.bit_length() - 1))
        ]
        return [self._exchange(each) for each in pairs], bool(paired)

    @cached_property
    def partners(self) -> list[Exchange]:
        """The rounds in which rank r exchanges with r XOR 1, 2, 4, …, for a power of two of ranks."""
        distances = (1 << bit for bit in range((self.size - 1).bit_length()))
        return [self._exchange([(rank, (rank ^ step) % self.size) for rank in range(self.size)]) for step in distances]

    @cached_property
    def shifts(self) -> list[Exchange]:
        """The rounds in which rank r sends to r + 1, 2, 4, …"""
        distances = (1 << bit for bit in range((self.size - 1).bit_length()))
        return [self._exchange([(rank, (rank + step) % self.size) for rank in range(self.size)]) for step in distances]

    def _exchange(self, pairs: list[tuple[int, int]]) -> Exchange:
        """The round in which each pair's first rank sends to its second."""
        topology = self.topology
        load: dict[tuple[str, int, int], int] = {}
        for source, target in pairs:
            if not topology.is_local(source, target):
                rail = topology.rail(source)
                for nic in (("out", topology.host_of[source], rail), ("in", topology.host_of[target], rail)):
                    load[nic] = load.get(nic, 0) + 1
        if not load:
            return Exchange(self.alpha1, self.beta1)
        slowest = max(count / topology.nic(host, rail) for (_, host, rail), count in load.items())
        return Exchange(self.alpha2, max(slowest, self.beta1))

    @cached_property
    def trees(self) -> tuple[int, int, float]:
        """The double tree: hosts and ranks on its longest way to a root, and seconds per byte of a chunk on the busiest NIC."""
        members, deepest = by_host(self.topology), (0, 0)
        load: dict[tuple[int, int], int] = {}
        for which in (0, 1):
            parents = [double_binary_trees(self.size, position)[which].parent for position in range(self.size)]
            for position, parent in enumerate(parents):
                if parent is not None and not self.topology.is_local(members[position], members[parent]):
                    for end in (members[position], members[parent]):
                        nic = (self.topology.host_of[end], self.topology.rail(end))
                        load[nic] = load.get(nic, 0) + 1
                deepest = max(deepest, self._way(parents, position, members))
        busiest = max((count / self.topology.nic(*nic) for nic, count in load.items()), default=0.0)
        return deepest[0], deepest[1], busiest

    def _way(self, parents: list[int | None], position: int, members: tuple[int, ...]) -> tuple[int, int]:
        crossed, inside = 0, 0
        parent = parents[position]
        while parent is not None:
            local = self.topology.is_local(members[position], members[parent])
            crossed, inside = crossed + (not local), inside + local
            position, parent = parent, parents[parent]
        return crossed, inside

    @cached_property
    def columns(self) -> tuple[float, int, float]:
        """The two-level cut of a vector (see layout.py).

        (the largest share of the vector that a rank looks after, the columns it has, seconds per byte of the vector for
        every host to send all of its columns once)
        """
        topology, number = self.topology, columns(self.topology)
        weights = column_weights(topology)
        total = sum(weights)
        share: dict[int, float] = {}
        load: dict[tuple[int, int], float] = {}
        for host in range(self.hosts):
            for column in range(number):
                rank = owner(topology, host, column)
                share[rank] = share.get(rank, 0.0) + weights[column] / total
                nic = (host, topology.rail(rank))
                load[nic] = load.get(nic, 0.0) + weights[column] / total
        each = -(-number // self.smallest)
        return max(share.values()), each, max(part / topology.nic(*nic) for nic, part in load.items())
