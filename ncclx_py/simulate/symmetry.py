"""One plan for thousands of ranks: where ranks do the same but for their peers, a few plans stand for all of them.

    symmetry = find_symmetry(problem, topology, "pipelined", {"chunks": 4})      # None where there is none
    schedule = symmetry.schedule(itemsize=4)

Most algorithms treat all ranks alike: rank r does what rank 0 does, with peers moved. Several ways to move are tried: around
the ring of all ranks; and, for equal hosts in block placement, hosts and local ranks each in a ring or by exclusive or. Rings
give neighbours different plans now and then, so that up to two may alternate from host to host, and each local rank may have
its own. A way is believed when the plans of the ranks in a sample, built in full, are what it says and their messages meet as
it says, up to pieces of a vector that differ in length by rounding, and up to lanes: those of pairs of ranks depend on who is
the greater, and all ranks are played with the lanes of the first. Nothing else is assumed about an algorithm.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ncclx_py.plans.algorithms.layout import ALIGNMENT
from ncclx_py.plans.algorithms.registry import build_rank
from ncclx_py.plans.plan import Problem, RankPlan, Step
from ncclx_py.plans.topology import Topology
from ncclx_py.simulate.schedule import LOCAL, SEND, Ints, Schedule, Shape, shape_of_steps

_SAMPLE = 6  # ranks whose plans are built and compared, besides those that stand for others


@dataclass(frozen=True)
class Motion:
    """How peers move from rank to rank: `hosts` and `locals_` are "ring" or "xor"; `width` local ranks per host, or 1 where all
    ranks lie on one ring. Hosts are of one kind or of two in turn (`kinds`); local ranks of one kind or each of its own."""

    hosts: str
    locals_: str
    count: int
    width: int
    kinds: tuple[int, int] = (1, 1)

    def apart(self, rank: int, peer: int) -> tuple[int, int]:
        """The move that takes `rank` to `peer`."""
        host, local = divmod(rank, self.width)
        other, beside = divmod(peer, self.width)
        return _apart(self.hosts, host, other, self.count), _apart(self.locals_, local, beside, self.width)

    def peers(self, ranks: Ints, moves: np.ndarray) -> Ints:
        """For each of `ranks` (rows) where each of `moves` (columns, n × 2) leads."""
        hosts, locals_ = np.divmod(ranks[:, None], self.width)
        there = _moved(self.hosts, hosts, moves[None, :, 0], self.count)
        return there * self.width + _moved(self.locals_, locals_, moves[None, :, 1], self.width)

    def class_of(self, rank: int) -> int:
        host, local = divmod(rank, self.width)
        return host % self.kinds[0] * self.kinds[1] + local % self.kinds[1]

    def firsts(self) -> list[int]:
        """The first rank of each class."""
        return [host * self.width + local for host in range(self.kinds[0]) for local in range(self.kinds[1])]


@dataclass(frozen=True)
class Symmetry:
    """`plans[c]` is that of the first rank of class c, and `motion` takes it to the others of its class.

    `by_lane`: messages meet lane by lane; if not, in their order between two ranks, as lanes depend on who is the greater.
    """

    topology: Topology
    motion: Motion
    plans: tuple[RankPlan, ...]
    by_lane: bool

    @property
    def steps(self) -> int:
        """Of all ranks."""
        return sum(len(plan.steps) for plan in self.plans) * self.topology.size // len(self.plans)

    def schedule(self, itemsize: int) -> Schedule:
        """All ranks' steps, of `itemsize` bytes per element. Raises ValueError when messages do not meet."""
        ranks = self.topology.size
        shapes = tuple(shape_of_steps(plan.steps, itemsize) for plan in self.plans)
        shape_of = np.array([self.motion.class_of(rank) for rank in range(ranks)])
        sizes = np.array([shape.steps for shape in shapes])[shape_of]
        base = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        peer, match, next_send = (np.full(int(sizes.sum()), -1, np.int64) for _ in range(3))
        meets = meetings(self)
        for index, (plan, shape) in enumerate(zip(self.plans, shapes)):
            members = np.flatnonzero(shape_of == index)
            own = np.flatnonzero(shape.kind != LOCAL)
            moves = np.array([self.motion.apart(plan.rank, plan.steps[step].peer or 0) for step in own], np.int64)
            places = base[members][:, None] + own[None, :]
            peers = self.motion.peers(members, moves.reshape(-1, 2))
            peer[places] = peers
            match[places] = base[peers] + np.array([meets[index][step] for step in own], np.int64)[None, :]
            following = following_sends(plan, shape)
            sends = np.array(sorted(following), np.int64)
            if len(sends):
                after = np.array([following[step] for step in sends], np.int64)
                next_send[base[members][:, None] + sends] = base[members][:, None] + after
        return Schedule(shapes, shape_of, base, peer, match, next_send)


def find_symmetry(
    problem: Problem, topology: Topology, algorithm: str, parameters: Mapping[str, int] | None = None
) -> Symmetry | None:
    """How the ranks' plans are alike; None where they are not, or their placement is not in equal blocks."""
    size, widths = topology.size, {len(members) for members in topology.hosts}
    if len(widths) > 1 or size < 4:
        return None
    width = widths.pop()
    if topology.host_of != tuple(rank // width for rank in range(size)):
        return None
    known: dict[int, RankPlan] = {}

    def plan_of(rank: int) -> RankPlan:
        if rank not in known:
            known[rank] = build_rank(problem, topology, algorithm, rank, parameters)
        return known[rank]

    sample = random.Random(0).sample(range(size), min(_SAMPLE, size))
    for motion in _motions(size, width):
        firsts = tuple(map(plan_of, motion.firsts()))
        if all(_agrees(plan_of(rank), firsts[motion.class_of(rank)], motion) for rank in sample):
            for by_lane in (True, False):
                symmetry = Symmetry(topology, motion, firsts, by_lane)
                if _meets(symmetry, sample, plan_of):
                    return symmetry
    return None


def _motions(size: int, width: int) -> Iterator[Motion]:
    """The ways to move that are tried, those with fewer classes first."""
    hosts = size // width
    for kinds in ((1, 1), (2, 1), (1, width), (2, width)):
        if hosts % kinds[0] == 0:
            for how in ("ring", "xor"):
                for inside in ("ring", "xor"):
                    yield Motion(how, inside, hosts, width, kinds)
        if kinds[1] == 1 and size % kinds[0] == 0:
            yield Motion("ring", "ring", size, 1, kinds)


def _agrees(plan: RankPlan, first: RankPlan, motion: Motion) -> bool:
    """Whether `plan` is `first` moved."""
    if len(plan.steps) != len(first.steps):
        return False
    return all(
        mine.op == theirs.op
        and mine.deps == theirs.deps
        and (mine.peer is None) == (theirs.peer is None)
        and _is_alike(_length(mine), _length(theirs))
        and (
            mine.peer is None
            or theirs.peer is None
            or motion.apart(plan.rank, mine.peer) == motion.apart(first.rank, theirs.peer)
        )
        for mine, theirs in zip(plan.steps, first.steps)
    )


def _is_alike(a: int, b: int) -> bool:
    return abs(a - b) <= max(2 * ALIGNMENT, 0.02 * max(a, b))


def _length(step: Step) -> int:
    span = step.dst if step.src is None else step.src
    return span.length if span else 0


def _meets(symmetry: Symmetry, sample: list[int], plan_of: Callable[[int], RankPlan]) -> bool:
    """Whether messages meet as they do in the plans of some ranks and of one peer of each, where lanes tell."""
    try:
        meets = meetings(symmetry)
    except ValueError:
        return False
    for rank in sample:
        plan = plan_of(rank)
        peers = [step.peer for step in plan.steps if step.op == "send" and step.peer is not None]
        for peer in {peers[0], peers[len(peers) // 2], peers[-1]} if peers else ():
            found = meets[symmetry.motion.class_of(rank)]
            for lane in {step.lane for step in plan.steps}:
                out = [number for number, step in enumerate(plan.steps) if _is_message(step, "send", peer, lane)]
                into = [n for n, step in enumerate(plan_of(peer).steps) if _is_message(step, "receive", rank, lane)]
                if [found.get(number) for number in out] != into:
                    return False
    return True


def _is_message(step: Step, way: str, peer: int, lane: int) -> bool:
    return step.peer == peer and step.lane == lane and (step.op == "send") == (way == "send")


def meetings(symmetry: Symmetry) -> list[dict[int, int]]:
    """For each class and step with a peer, the index of the step there that meets it.

    A message that reaches class c from the move m meets a receive of class c by the same move. Raises ValueError where they
    are not as many.
    """
    motion = symmetry.motion
    sends: dict[tuple[int, tuple[int, int], int], list[int]] = defaultdict(list)
    receives: dict[tuple[int, tuple[int, int], int], list[int]] = defaultdict(list)
    senders: dict[tuple[int, tuple[int, int], int], int] = {}
    for index, plan in enumerate(symmetry.plans):
        for number, step in enumerate(plan.steps):
            if step.peer is None:
                continue
            lane = step.lane if symmetry.by_lane else 0
            if step.op == "send":
                channel = (motion.class_of(step.peer), motion.apart(step.peer, plan.rank), lane)
                sends[channel].append(number)
                senders[channel] = index
            else:
                receives[index, motion.apart(plan.rank, step.peer), lane].append(number)
    if {key: len(out) for key, out in sends.items()} != {key: len(into) for key, into in receives.items()}:
        raise ValueError("Some messages have no other end.")
    found: list[dict[int, int]] = [{} for _ in symmetry.plans]
    for channel, out in sends.items():
        for there, here in zip(out, receives[channel]):
            found[senders[channel]][there] = here
            found[channel[0]][here] = there
    return found


def following_sends(plan: RankPlan, shape: Shape) -> dict[int, int]:
    """The next send on the same channel, of each send that has one."""
    last: dict[tuple[int | None, int], int] = {}
    found = {}
    for number, step in enumerate(plan.steps):
        if shape.kind[number] == SEND:
            channel = (step.peer, step.lane)
            if channel in last:
                found[last[channel]] = number
            last[channel] = number
    return found


def _apart(how: str, here: int, there: int, count: int) -> int:
    return (there - here) % count if how == "ring" else here ^ there


def _moved(how: str, here: np.ndarray, by: np.ndarray, count: int) -> np.ndarray:
    return (here + by) % count if how == "ring" else here ^ by
