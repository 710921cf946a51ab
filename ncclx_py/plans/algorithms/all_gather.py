"""All-gather: everyone ends with all ranks' blocks, in the order of ranks."""

from __future__ import annotations

from ncclx_py.plans.algorithms.exchanges import ring_all_gather
from ncclx_py.plans.algorithms.layout import (
    HAND_ON,
    INSIDE,
    blocks,
    by_host,
    offsets,
    owner,
    round_lane,
    split,
)
from ncclx_py.plans.algorithms.script import Script
from ncclx_py.plans.plan import Problem, RankPlan, Span
from ncclx_py.plans.topology import Topology


def direct(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """Everyone sends its block to everyone."""
    script = Script(topology, rank)
    own = Span("input", 0, problem.counts[rank])
    pieces = blocks("output", problem.counts)
    for shift in range(1, problem.size):
        script.send(own, (rank + shift) % problem.size)
    script.copy(own, pieces[rank])
    for shift in range(1, problem.size):
        peer = (rank - shift) % problem.size
        script.recv(pieces[peer], peer)
    return script.finish()


def ring(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """Blocks go around a ring that enters and leaves every host once."""
    members = by_host(topology)
    script = Script(topology, rank)
    pieces = blocks("output", problem.counts)
    script.copy(Span("input", 0, problem.counts[rank]), pieces[rank])
    ring_all_gather(script, members, members.index(rank), [pieces[member] for member in members])
    return script.finish()


def bruck(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """Bruck: after k rounds a rank has the blocks of the 2ᵏ ranks from its own on; ⌈lg P⌉ rounds for any P.

    Blocks go straight to their place, so that a round whose blocks pass the last rank takes two messages.
    """
    size = problem.size
    script = Script(topology, rank)
    points = offsets(problem.counts)
    script.copy(Span("input", 0, problem.counts[rank]), Span("output", points[rank], points[rank + 1]))

    def around(first: int, number: int) -> list[Span]:
        """The places of `number` ranks' blocks from rank `first` on."""
        stop = first + number
        wrapped = [Span("output", points[first], points[min(stop, size)])]
        return [*wrapped, Span("output", 0, points[stop - size])] if stop > size else wrapped

    distance = 1
    while distance < size:
        number = min(distance, size - distance)
        for piece in around(rank, number):
            script.send(piece, (rank - distance) % size)
        source = (rank + distance) % size
        for piece in around(source, number):
            script.recv(piece, source)
        distance *= 2
    return script.finish()


def doubling(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """Recursive doubling for a power of two of ranks: lg P messages, the nearest rank first."""
    script = Script(topology, rank)
    points = offsets(problem.counts)
    script.copy(Span("input", 0, problem.counts[rank]), Span("output", points[rank], points[rank + 1]))
    distance = 1
    while distance < problem.size:
        other = rank ^ distance
        mine, theirs = (start // distance * distance for start in (rank, other))
        script.send(Span("output", points[mine], points[mine + distance]), other)
        script.recv(Span("output", points[theirs], points[theirs + distance]), other)
        distance *= 2
    return script.finish()


def hierarchical(problem: Problem, topology: Topology, rank: int, chunks: int) -> RankPlan:
    """Each block goes once to every other host, to the local rank that shares its rail, which hands it on inside."""
    script = Script(topology, rank)
    host, hosts = topology.host_of[rank], topology.hosts
    me, locals_ = topology.local_rank[rank], hosts[host]
    neighbours = [locals_[(me + shift) % len(locals_)] for shift in range(1, len(locals_))]
    mine = split(Span("input", 0, problem.counts[rank]), chunks)
    slices = [split(block, chunks) for block in blocks("output", problem.counts)]  # by rank and chunk
    for chunk in range(chunks):
        for turn in range(1, len(hosts)):
            there = (host + turn) % len(hosts)
            script.send(mine[chunk], owner(topology, there, me), round_lane(turn), chunk)
        for peer in neighbours:
            script.send(mine[chunk], peer, INSIDE, chunk)
        script.copy(mine[chunk], slices[rank][chunk], INSIDE, chunk)
        for peer in neighbours:
            script.recv(slices[peer][chunk], peer, INSIDE, chunk)
    for chunk in range(chunks):
        for turn in range(1, len(hosts)):
            there = (host - turn) % len(hosts)
            for block in hosts[there]:
                if owner(topology, host, topology.local_rank[block]) == rank:
                    script.recv(slices[block][chunk], block, round_lane(turn), chunk)
                    for peer in neighbours:
                        script.send(slices[block][chunk], peer, HAND_ON, chunk)
            for block in hosts[there]:
                holder = owner(topology, host, topology.local_rank[block])
                if holder != rank:
                    script.recv(slices[block][chunk], holder, HAND_ON, chunk)
    return script.finish()
