"""The cluster a plan is played on: a topology, the switches above its hosts, and what is wrong with it.

    cluster = Cluster(topology, tiers=(Tier("rack", hosts=16, alpha=7e-6, oversubscription=1.0),), delays={5: 1e-3})

A message between two units of a tier passes both their uplinks, which all messages of a unit share, each direction apart, and
has the α of the highest tier that it crosses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ncclx_py.plans.topology import Tier, Topology


@dataclass(frozen=True)
class Cluster:
    """`nic_share[(host, rail)]` is what is left of a NIC's bandwidth (0: it has failed, and its ranks use the host's next
    working NIC); `delays[rank]` seconds before a rank begins; `slowness[rank]` times what a rank's own work costs.

    Raises ValueError for a tier, host, rail or rank that cannot be.
    """

    topology: Topology
    tiers: tuple[Tier, ...] = ()
    nic_share: Mapping[tuple[int, int], float] = field(default_factory=dict)
    delays: Mapping[int, float] = field(default_factory=dict)
    slowness: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        smaller = 1
        for tier in self.tiers:
            if (tier.hosts <= smaller and tier is not self.tiers[0]) or tier.hosts < 1:
                raise ValueError(
                    f"Tier {tier.name!r} has units of {tier.hosts} hosts: tiers grow from one to the next."
                )
            if tier.oversubscription <= 0 or tier.alpha < 0:
                raise ValueError(f"Tier {tier.name!r}: oversubscription must be above 0 and alpha at least 0.")
            smaller = tier.hosts
        hosts, rails = len(self.topology.hosts), self.topology.rails
        for host, rail in self.nic_share:
            if not (0 <= host < hosts and 0 <= rail < rails):
                raise ValueError(
                    f"There is no NIC {rail} of host {host}: hosts 0 to {hosts - 1}, rails 0 to {rails - 1}."
                )
        for rank in (*self.delays, *self.slowness):
            if not 0 <= rank < self.topology.size:
                raise ValueError(f"There is no rank {rank}: ranks 0 to {self.topology.size - 1}.")
        for host in {host for host, _ in self.nic_share}:
            if not any(self.nic_share.get((host, rail), 1.0) > 0 for rail in range(rails)):
                raise ValueError(f"All NICs of host {host} have failed: it is cut off, and nothing would end.")

    @property
    def is_healthy(self) -> bool:
        return not (self.nic_share or self.delays or self.slowness)

    def uplink(self, tier: Tier, unit: int) -> float:
        """Bytes per second and direction of the uplink of a unit."""
        first = unit * tier.hosts
        last = min(first + tier.hosts, len(self.topology.hosts))
        return sum(self.topology.egress(host) for host in range(first, last)) / tier.oversubscription

    def nic_in_use(self, host: int, rail: int) -> int:
        """The NIC that carries a rail of a host: the rail's own, or the next one that works."""
        for step in range(self.topology.rails):
            candidate = (rail + step) % self.topology.rails
            if self.nic_share.get((host, candidate), 1.0) > 0:
                return candidate
        raise AssertionError("checked when the cluster was made")
