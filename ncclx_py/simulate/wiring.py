"""Which pipes a message or a copy goes through on a cluster, and its α: the links side of the event engine.

`Links` is what the engine asks, step by step. `Wiring` answers for a cluster whose ranks are all played; representative.py for one
rank of each class. Pipes are numbered: the out and in ports of every rank, the memory of every host, the NICs of every
host in both directions, the uplinks of every unit of every tier in both directions, and last one without limit that fills
empty places.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.schedule import Floats, Ints, Schedule


class Links(Protocol):
    """`capacity` in bytes per second by pipe, the last one without limit; `width` pipes at most for a flow. All take arrays of
    steps."""

    capacity: Floats
    width: int

    def is_local(self, steps: Ints) -> NDArray[np.bool_]:
        """Whether the message of a send or receive stays inside its host."""

    def alpha(self, steps: Ints) -> Floats:
        """Seconds per message, of sends or receives."""

    def copying(self, steps: Ints) -> Pipes:
        """The pipes of local copies and reductions."""

    def inside(self, receives: Ints) -> Pipes:
        """The pipes of messages that are read from a neighbour."""

    def between(self, sends: Ints) -> Pipes:
        """The pipes of messages to other hosts: both NICs of the sender's rail, and the uplinks between."""

    def name(self, pipe: int) -> str:
        """What a person calls a pipe."""


class Pipes(NamedTuple):
    """The pipes of some flows, one row each, and how much of a flow goes through each (None: all of it)."""

    rows: Ints
    share: Floats | None = None


class Wiring:
    """The pipes of `cluster`, for the steps of `schedule`."""

    def __init__(self, cluster: Cluster, schedule: Schedule) -> None:
        topology = cluster.topology
        self.cluster = cluster
        self._rank_of, self._peer = schedule.rank_of, schedule.peer
        ranks, hosts, rails = topology.size, len(topology.hosts), topology.rails
        self.ranks = ranks
        self.host_of = np.array(topology.host_of, np.int64)
        rail_of = np.array([cluster.nic_in_use(topology.host_of[rank], topology.rail(rank)) for rank in range(ranks)])
        self._rail_of = rail_of if cluster.nic_share else np.array(topology.local_rank, np.int64) % rails
        self._rails = rails
        self._nics_in = self._nic_table()
        self._memory, self._out = 2 * ranks, 2 * ranks + hosts
        self._in = self._out + hosts * rails
        capacity = [np.full(2 * ranks, topology.intra.bandwidth), np.full(hosts, topology.memory or np.inf)]
        nic = np.array([topology.nic(host, rail) for host in range(hosts) for rail in range(rails)])
        for (host, rail), share in cluster.nic_share.items():
            nic[host * rails + rail] *= share
        capacity += [nic, nic]
        self._tiers: list[tuple[Ints, int, int, float]] = []  # unit of each host, first pipe, units, α
        first = self._in + hosts * rails
        for tier in cluster.tiers:
            unit_of = np.arange(hosts) // tier.hosts
            units = int(unit_of[-1]) + 1
            uplinks = np.array([cluster.uplink(tier, unit) for unit in range(units)])
            capacity += [uplinks, uplinks]
            self._tiers.append((unit_of, first, units, tier.alpha))
            first += 2 * units
        self.unlimited = first
        self.capacity: Floats = np.concatenate([*capacity, [np.inf]])
        self.width = max(3, 2 + 2 * len(self._tiers))

    def _nic_table(self) -> Ints:
        """The NIC in use for each rail of each host, hosts × rails."""
        table = np.tile(np.arange(self._rails), (len(self.cluster.topology.hosts), 1))
        for host, rail in self.cluster.nic_share:
            table[host, rail] = self.cluster.nic_in_use(host, rail)
        return table

    def is_local(self, steps: Ints) -> NDArray[np.bool_]:
        return self.host_of[self._rank_of[steps]] == self.host_of[self._peer[steps]]

    def alpha(self, steps: Ints) -> Floats:
        topology = self.cluster.topology
        near, far = self.host_of[self._rank_of[steps]], self.host_of[self._peer[steps]]
        found = np.where(near == far, topology.intra.alpha, topology.inter.alpha)
        for unit_of, _, _, alpha in self._tiers:
            found = np.where(unit_of[near] != unit_of[far], alpha, found)
        return found

    def copying(self, steps: Ints) -> Pipes:
        ranks = self._rank_of[steps]
        rows = np.full((len(steps), self.width), self.unlimited)
        rows[:, 0] = self.ranks + ranks
        rows[:, 1] = self._memory + self.host_of[ranks]
        return Pipes(rows)

    def inside(self, receives: Ints) -> Pipes:
        source, target = self._peer[receives], self._rank_of[receives]
        rows = np.full((len(receives), self.width), self.unlimited)
        rows[:, 0], rows[:, 1] = source, self.ranks + target
        rows[:, 2] = self._memory + self.host_of[source]
        return Pipes(rows)

    def between(self, sends: Ints) -> Pipes:
        source = self._rank_of[sends]
        rows = np.full((len(sends), self.width), self.unlimited)
        near, far, rail = self.host_of[source], self.host_of[self._peer[sends]], self._rail_of[source]
        rows[:, 0] = self._out + near * self._rails + rail
        rows[:, 1] = self._in + far * self._rails + self._nics_in[far, rail]
        for index, (unit_of, first, units, _) in enumerate(self._tiers):
            crosses = unit_of[near] != unit_of[far]
            rows[crosses, 2 + 2 * index] = first + unit_of[near[crosses]]
            rows[crosses, 3 + 2 * index] = first + units + unit_of[far[crosses]]
        return Pipes(rows)

    def name(self, pipe: int) -> str:
        hosts, rails = len(self.cluster.topology.hosts), self._rails
        if pipe < self.ranks:
            return f"rank {pipe} out"
        if pipe < 2 * self.ranks:
            return f"rank {pipe - self.ranks} in"
        if pipe < self._out:
            return f"host {pipe - self._memory} memory"
        if pipe < self._in + hosts * rails:
            way, number = ("out", pipe - self._out) if pipe < self._in else ("in", pipe - self._in)
            return f"host {number // rails} NIC {number % rails} {way}"
        for tier, (_, first, units, _) in zip(self.cluster.tiers, self._tiers):
            if first <= pipe < first + 2 * units:
                return f"{tier.name} {(pipe - first) % units} {'up' if pipe < first + units else 'down'}"
        raise ValueError(f"There is no pipe {pipe}.")
