"""A symmetric plan on a healthy cluster, played for one rank of each class: seconds for any number of ranks.

Where all ranks do the same at the same time, what a rank waits for is what it does itself, for another. So one rank per class is
played, whose messages reach the rank of their target's class; what it does counts on memory, NICs and uplinks as often as its
class does it. Where some ranks' messages leave their rack and others' stay, a step takes their mean α, as a ring does all in
all, and the uplink carries the share that crosses it, spread evenly over the racks.

    outcome = play_classes(symmetry, cluster, itemsize=4)
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.events import Outcome, Player
from ncclx_py.simulate.schedule import Floats, Ints, Schedule, shape_of_steps
from ncclx_py.simulate.symmetry import Symmetry, following_sends, meetings
from ncclx_py.simulate.wiring import Pipes


def applies(symmetry: Symmetry, cluster: Cluster) -> bool:
    """Whether one rank can stand for its class: nothing is wrong with any, and all of it send alike inside and between hosts."""
    width = cluster.topology.widest
    return cluster.is_healthy and symmetry.motion.width == width and not cluster.topology.nics


def play_classes(symmetry: Symmetry, cluster: Cluster, itemsize: int) -> Outcome:
    """As `events.play`; `finished` and the steps are those of the ranks that stand for the others.

    Raises ValueError where `applies` is False.
    """
    if not applies(symmetry, cluster):
        raise ValueError("The ranks of this cluster are not alike: play them all.")
    shapes = tuple(shape_of_steps(plan.steps, itemsize) for plan in symmetry.plans)
    sizes = np.array([shape.steps for shape in shapes], np.int64)
    base = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    peer, match, next_send = (np.full(int(sizes.sum()), -1, np.int64) for _ in range(3))
    moves = np.zeros(len(peer), np.int64)
    meets = meetings(symmetry)
    for index, (plan, shape) in enumerate(zip(symmetry.plans, shapes)):
        first = int(base[index])
        for number, step in enumerate(plan.steps):
            if step.peer is not None:
                other = symmetry.motion.class_of(step.peer)
                peer[first + number] = other
                match[first + number] = base[other] + meets[index][number]
                moves[first + number] = symmetry.motion.apart(plan.rank, step.peer)[0]
        for send, after in following_sends(plan, shape).items():
            next_send[first + send] = first + after
    schedule = Schedule(shapes, np.arange(len(shapes)), base, peer, match, next_send)
    return Player(schedule, _ClassLinks(symmetry, cluster, schedule, moves), cluster.topology.gamma).run()


class _ClassLinks:
    """One host of each kind (symmetry.Motion): a port for each class, the host's memory and NICs, and its part of each uplink.

    A flow stands for `_alike` ranks of its host.
    """

    def __init__(self, symmetry: Symmetry, cluster: Cluster, schedule: Schedule, moves: Ints) -> None:
        topology, (kinds, locals_) = cluster.topology, symmetry.motion.kinds
        self._symmetry, self._cluster = symmetry, cluster
        self._rank_of, self._peer, self._moves = schedule.rank_of, schedule.peer, moves
        self._locals = locals_
        self._alike = topology.widest // locals_
        self._rails = min(topology.rails, locals_)
        per_nic = -(-topology.widest // topology.rails) if locals_ == 1 else 1
        classes, nics = len(symmetry.plans), kinds * self._rails
        parts: list[tuple[str, int, float]] = [
            ("out", classes, topology.intra.bandwidth),
            ("in", classes, topology.intra.bandwidth),
            ("memory", kinds, topology.memory / self._alike if topology.memory else np.inf),
            ("NIC out", nics, topology.nic(0, 0) / per_nic),
            ("NIC in", nics, topology.nic(0, 0) / per_nic),
        ]
        for tier in cluster.tiers:
            part = cluster.uplink(tier, 0) / tier.hosts * kinds / self._alike
            parts += [(f"{tier.name} up", 1, part), (f"{tier.name} down", 1, part)]
        self._first = np.concatenate([[0], np.cumsum([count for _, count, _ in parts])]).tolist()
        self._names = [name for name, _, _ in parts]
        self.capacity: Floats = np.array([value for _, count, value in parts for _ in range(count)] + [np.inf])
        self.width = max(3, 2 + 2 * len(cluster.tiers))
        self._unlimited = len(self.capacity) - 1
        self._crossing = lru_cache(maxsize=None)(self._part_that_crosses)

    def is_local(self, steps: Ints) -> NDArray[np.bool_]:
        return self._moves[steps] == 0

    def alpha(self, steps: Ints) -> Floats:
        topology, moves = self._cluster.topology, self._moves[steps]
        found = np.where(moves == 0, topology.intra.alpha, topology.inter.alpha)
        for index, tier in enumerate(self._cluster.tiers):
            part = self._parts(moves, index)
            found = found + part * (tier.alpha - found)
        return found

    def copying(self, steps: Ints) -> Pipes:
        own = self._rank_of[steps]
        return Pipes(self._rows(len(steps), {0: self._first[1] + own, 1: self._first[2] + own // self._locals}))

    def inside(self, receives: Ints) -> Pipes:
        source, target = self._peer[receives], self._rank_of[receives]
        memory = self._first[2] + source // self._locals
        return Pipes(self._rows(len(receives), {0: source, 1: self._first[1] + target, 2: memory}))

    def between(self, sends: Ints) -> Pipes:
        source, target = self._rank_of[sends], self._peer[sends]
        rail = source % self._locals % self._rails
        places = {
            0: self._first[3] + source // self._locals * self._rails + rail,
            1: self._first[4] + target // self._locals * self._rails + rail,
        }
        share = np.ones((len(sends), self.width))
        for index in range(len(self._cluster.tiers)):
            part = self._parts(self._moves[sends], index)
            for place, pipe in (
                (2 + 2 * index, self._first[5 + 2 * index]),
                (3 + 2 * index, self._first[6 + 2 * index]),
            ):
                places[place] = np.where(part > 0, pipe, self._unlimited)
                share[:, place] = part
        return Pipes(self._rows(len(sends), places), share)

    def name(self, pipe: int) -> str:
        kind = bisect_right(self._first, pipe) - 1
        return f"{self._names[kind]} {pipe - self._first[kind]}"

    def _rows(self, count: int, places: dict[int, Ints]) -> Ints:
        rows = np.full((count, self.width), self._unlimited)
        for place, pipes in places.items():
            rows[:, place] = pipes
        return rows

    def _parts(self, moves: Ints, tier: int) -> Floats:
        kinds, where = np.unique(moves, return_inverse=True)
        return np.array([self._crossing(int(move), tier) for move in kinds])[where]

    def _part_that_crosses(self, move: int, tier: int) -> float:
        """Of all hosts, those whose host at the end of `move` is in another unit of a tier."""
        width, units = self._cluster.topology.widest, self._cluster.tiers[tier].hosts
        hosts = np.arange(len(self._cluster.topology.hosts))
        there = self._symmetry.motion.peers(hosts * width, np.array([[move, 0]]))[:, 0] // width
        return float((hosts // units != there // units).mean())
