"""Reduce-scatter: rank r ends with the combination of everyone's block r. `input` is only read."""

from __future__ import annotations

from ncclx_py.plans.algorithms.all_reduce import in_order
from ncclx_py.plans.algorithms.exchanges import ring_lane
from ncclx_py.plans.algorithms.layout import (
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
    """Everyone sends block r to rank r."""
    script = Script(topology, rank)
    pieces = blocks("input", problem.counts)
    output = Span("output", 0, problem.counts[rank])
    script.copy(pieces[rank], output)
    for shift in range(1, problem.size):
        peer = (rank + shift) % problem.size
        script.send(pieces[peer], peer)
    for shift in range(1, problem.size):
        script.reduce(output, (rank - shift) % problem.size)
    return script.finish()


def ring(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """Partial results go around a ring that enters and leaves every host once; each rank adds its own block."""
    members = by_host(topology)
    size, me = len(members), members.index(rank)
    script = Script(topology, rank)
    pieces = [blocks("input", problem.counts)[member] for member in members]
    slots = [script.scratch(max(problem.counts, default=0)) for _ in range(min(2, max(size - 2, 0)))]
    outgoing = pieces[me - 1]
    output = Span("output", 0, problem.counts[rank])
    if size == 1:
        script.copy(pieces[me], output)
    for step in range(size - 1):
        # Odd and even members send on different lanes: waiting for a message does not hold back the next send.
        script.send(outgoing, members[(me + 1) % size], ring_lane(me, size))
        own = pieces[(me - 2 - step) % size]
        partial = (
            output if step == size - 2 else Span("scratch", slots[step % 2].start, slots[step % 2].start + own.length)
        )
        script.copy(own, partial, ring_lane((me - 1) % size, size))
        script.reduce(partial, members[me - 1], ring_lane((me - 1) % size, size))
        outgoing = partial
    return script.finish()


def ordered(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """As `direct`, each element in the order of ranks, ((x₀ + x₁) + x₂) + …, whatever the topology."""
    script = Script(topology, rank)
    pieces = blocks("input", problem.counts)
    for shift in range(1, problem.size):
        peer = (rank + shift) % problem.size
        script.send(pieces[peer], peer)
    in_order(script, pieces[rank], problem.size, Span("output", 0, problem.counts[rank]))
    return script.finish()


def halving(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """Recursive halving for a power of two of ranks: lg P messages, the furthest rank first."""
    script = Script(topology, rank)
    points = offsets(problem.counts)
    low, high = 0, problem.size  # the ranks whose blocks are still combined here
    output = Span("output", 0, problem.counts[rank])
    if problem.size == 1:
        script.copy(Span("input", 0, problem.counts[0]), output)
    held = Span("input", 0, points[-1])
    while high - low > 1:
        middle = (low + high) // 2
        upper = rank >= middle
        other = rank - (middle - low) if upper else rank + (middle - low)
        cut_at = held.start + points[middle] - points[low]
        pieces = Span(held.buffer, held.start, cut_at), Span(held.buffer, cut_at, held.stop)
        keep, give = pieces[upper], pieces[not upper]
        script.send(give, other)
        low, high = (middle, high) if upper else (low, middle)
        total = output if high - low == 1 else script.scratch(keep.length) if keep.buffer == "input" else keep
        if total != keep:
            script.copy(keep, total)
        script.reduce(total, other)
        held = total
    return script.finish()


def hierarchical(problem: Problem, topology: Topology, rank: int, chunks: int) -> RankPlan:
    """Each block is combined inside every host first, on the local rank that shares its rail; then sent to its rank.

    So a host sends one partial block per block of other hosts, (N − 1)/N of the tensor, which is the least possible.
    """
    script = Script(topology, rank)
    host, hosts = topology.host_of[rank], topology.hosts
    me, locals_ = topology.local_rank[rank], hosts[host]
    neighbours = [locals_[(me + shift) % len(locals_)] for shift in range(1, len(locals_))]
    slices = [split(block, chunks) for block in blocks("input", problem.counts)]  # by rank and chunk
    results = split(Span("output", 0, problem.counts[rank]), chunks)
    for chunk in range(chunks):
        for turn in range(1, len(hosts) + 1):
            there = (host + turn) % len(hosts)
            for block in hosts[there]:
                combiner = owner(topology, host, topology.local_rank[block])
                if combiner != rank:
                    script.send(slices[block][chunk], combiner, INSIDE, chunk)
            for block in hosts[there]:
                if owner(topology, host, topology.local_rank[block]) != rank:
                    continue
                own = slices[block][chunk]
                total = results[chunk] if block == rank else script.scratch(own.length)
                script.copy(own, total, INSIDE, chunk)
                for peer in neighbours:
                    script.reduce(total, peer, INSIDE, chunk)
                if block != rank:
                    script.send(total, block, round_lane(turn), chunk)
        for turn in range(1, len(hosts)):
            there = (host - turn) % len(hosts)
            script.reduce(results[chunk], owner(topology, there, me), round_lane(turn), chunk)
    return script.finish()
