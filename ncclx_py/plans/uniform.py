"""Large clusters of equal hosts: the figures of ``wires.py`` without a loop over ranks.

Where ranks are placed in equal blocks and all NICs are alike, every host is like every other, so that one stands for all. Used
from `LARGE` ranks on; below, the general figures cost little, and the tests compare the two there. Approximate are: a double
tree's busiest NIC (looked for on a sample of hosts), and halving among a number of ranks that is no power of two.
"""

from __future__ import annotations

import random
from functools import cached_property, lru_cache

from ncclx_py.plans.algorithms.trees import double_binary_trees
from ncclx_py.plans.topology import Topology
from ncclx_py.plans.wires import Exchange, Wires

LARGE = 2048
_SAMPLE = 64  # hosts


def is_uniform(topology: Topology) -> bool:
    """Whether all hosts are alike: equal numbers of ranks, in blocks, and equal NICs."""
    width = len(topology.hosts[0])
    if any(len(members) != width or members[0] != width * host for host, members in enumerate(topology.hosts)):
        return False
    return len({speed for row in topology.nics for speed in row}) <= 1


class UniformWires(Wires):
    """Derived figures of a uniform topology."""

    def __init__(self, topology: Topology) -> None:
        super().__init__(topology)
        self.nic = topology.nic(0, 0)
        self.per_nic = -(-self.largest // topology.rails)  # ranks that share the fullest NIC

    @cached_property
    def cut(self) -> float:
        return self.per_nic / self.largest / self.nic

    @cached_property
    def columns(self) -> tuple[float, int, float]:
        return 1 / self.largest, 1, self.cut

    @cached_property
    def halving(self) -> tuple[list[Exchange], bool]:
        rounds = self.size.bit_length() - 1
        return [self._at_distance(1 << bit) for bit in range(rounds)], self.size & (self.size - 1) != 0

    @cached_property
    def partners(self) -> list[Exchange]:
        return [self._at_distance(1 << bit) for bit in range((self.size - 1).bit_length())]

    @cached_property
    def shifts(self) -> list[Exchange]:
        """By so many ranks: those within the shift from the end of their host leave it."""
        found = []
        for bit in range((self.size - 1).bit_length()):
            leaving = min(1 << bit, self.largest)
            found.append(self._crossing(-(-leaving // self.topology.rails)))
        return found

    def _at_distance(self, distance: int) -> Exchange:
        if distance < self.largest or self.hosts == 1:
            return Exchange(self.alpha1, self.beta1)
        return self._crossing(self.per_nic)

    def _crossing(self, per_nic: int) -> Exchange:
        if self.hosts == 1:
            return Exchange(self.alpha1, self.beta1)
        return Exchange(self.alpha2, max(per_nic / self.nic, self.beta1))

    @cached_property
    def trees(self) -> tuple[int, int, float]:
        sample = {
            0,
            self.hosts - 1,
            self.hosts // 2,
            *random.Random(0).sample(range(self.hosts), min(_SAMPLE, self.hosts)),
        }
        deepest, load = (0, 0), 0
        for host in sample:
            nics: dict[int, int] = {}
            for position in range(host * self.largest, (host + 1) * self.largest):
                for which, node in enumerate(double_binary_trees(self.size, position)):
                    neighbours = [*node.children, *([] if node.parent is None else [node.parent])]
                    far = sum(neighbour // self.largest != host for neighbour in neighbours)
                    rail = position % self.largest % self.topology.rails
                    nics[rail] = nics.get(rail, 0) + far
                    deepest = max(deepest, self._climb(which, position))
            load = max(load, *nics.values())
        return deepest[0], deepest[1], load / self.nic

    def _climb(self, which: int, position: int) -> tuple[int, int]:
        """(messages between hosts, messages inside) from a position to the root."""
        crossed, inside = 0, 0
        while True:
            parent = double_binary_trees(self.size, position)[which].parent
            if parent is None:
                return crossed, inside
            local = parent // self.largest == position // self.largest
            crossed, inside = crossed + (not local), inside + local
            position = parent


@lru_cache(maxsize=256)
def wires(topology: Topology) -> Wires:
    """The figures of `topology`; equal topologies share them."""
    return UniformWires(topology) if topology.size >= LARGE and is_uniform(topology) else Wires(topology)
