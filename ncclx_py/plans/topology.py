"""Where the ranks are and what connects them: hosts, ranks per host, rails, and α and bandwidth of each level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ncclx_py.plans.plan import INTER, INTRA


@dataclass(frozen=True, slots=True)
class Link:
    """`alpha` seconds per message and `bandwidth` bytes per second and direction (inter-host: per rail)."""

    alpha: float
    bandwidth: float


# The part of α for which a message keeps its sender, and its receiver, busy; the rest is travel (LogP's o and L). Messages
# of one rank therefore start a quarter of α apart, and m of them that travel at once take α + (m − 1)·OVERHEAD·α.
OVERHEAD = 0.25


@dataclass(frozen=True, slots=True)
class Tier:
    """Switches above hosts: units of `hosts` hosts that follow one another (a rack, a zone) behind one uplink.

    `alpha` seconds for a message that leaves its unit; `oversubscription` is what the NICs of a unit can send over what its
    uplink carries (1: it carries all).
    """

    name: str
    hosts: int
    alpha: float
    oversubscription: float = 1.0


DEFAULT_INTRA = Link(alpha=5e-6, bandwidth=8e9)
DEFAULT_INTER = Link(alpha=50e-6, bandwidth=1.25e9)


@dataclass(frozen=True)
class Topology:
    """`host_of[r]` is the host of rank r; hosts are numbered 0 to N − 1 in the order of their first rank.

    `rails` is the number of NICs of each host; local rank g uses rail g mod `rails`. `nics`, where it is not empty,
    holds the bandwidth in bytes per second of every rail of every host (hosts × rails) and overrides `inter.bandwidth`.
    Placement may be block, cyclic or arbitrary, and hosts may hold unequal numbers of ranks. `memory`, where it is not
    zero, is what all ranks of one host together can move inside it, in bytes per second. `gamma` is what reducing a byte
    costs in seconds, beyond moving it.
    """

    host_of: tuple[int, ...]
    rails: int = 1
    intra: Link = DEFAULT_INTRA
    inter: Link = DEFAULT_INTER
    nics: tuple[tuple[float, ...], ...] = ()
    memory: float = 0.0
    gamma: float = 0.0

    @property
    def size(self) -> int:
        return len(self.host_of)

    @cached_property
    def hosts(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each host, ascending."""
        found: dict[int, list[int]] = {}
        for rank, host in enumerate(self.host_of):
            found.setdefault(host, []).append(rank)
        return tuple(tuple(found[host]) for host in sorted(found))

    @cached_property
    def widest(self) -> int:
        """The ranks of the largest host."""
        return max(map(len, self.hosts))

    @cached_property
    def local_rank(self) -> tuple[int, ...]:
        """The position of each rank among those of its host."""
        position = [0] * self.size
        for ranks in self.hosts:
            for index, rank in enumerate(ranks):
                position[rank] = index
        return tuple(position)

    def rail(self, rank: int) -> int:
        return self.local_rank[rank] % self.rails

    def nic(self, host: int, rail: int) -> float:
        """Bytes per second and direction of one NIC."""
        return self.nics[host][rail] if self.nics else self.inter.bandwidth

    def egress(self, host: int) -> float:
        """Bytes per second that leave a host: the NICs of the rails that its ranks use."""
        return sum(self.nic(host, rail) for rail in range(min(self.rails, len(self.hosts[host]))))

    def ingress(self, host: int) -> float:
        """Bytes per second that reach a host: a message arrives on its sender's rail."""
        return sum(self.nic(host, rail) for rail in range(min(self.rails, self.widest)))

    def is_local(self, a: int, b: int) -> bool:
        return self.host_of[a] == self.host_of[b]

    def level(self, a: int, b: int) -> str:
        return INTRA if self.is_local(a, b) else INTER

    def subset(self, ranks: Sequence[int]) -> Topology:
        """The topology of a sub-group: its rank i is this topology's rank ``ranks[i]``."""
        hosts = [self.host_of[rank] for rank in ranks]
        seen = list(dict.fromkeys(hosts))
        nics = tuple(self.nics[host] for host in seen) if self.nics else ()
        return replace(self, host_of=tuple(seen.index(host) for host in hosts), nics=nics)
