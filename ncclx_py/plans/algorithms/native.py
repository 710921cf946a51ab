"""Two-level plans made of a library's own collectives: NCCL inside each host, and NCCL along each rail between hosts.

The members of a *rail* are the ranks of equal local rank, one per host. Inside a host and along a rail the library is as
good as anything, so the steps are `native` (and messages in all_to_all); what the plan adds is the levels, and chunks
whose work inside and between hosts overlaps. Every host must hold the same number of ranks; placement is free.

Steps of one rank stand in the order in which they are to be issued, the same on all ranks. In all_to_all `chunk` is the
phase: the messages of one phase go out together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from ncclx_py.plans.algorithms.layout import ALIGNMENT, blocks
from ncclx_py.plans.algorithms.registry import Algorithm
from ncclx_py.plans.algorithms.script import Script
from ncclx_py.plans.errors import PlanError
from ncclx_py.plans.plan import INTER, Plan, Problem, Program, RankPlan, Span
from ncclx_py.plans.topology import Topology

SCATTER, ACROSS, GATHER = 0, 1, 2  # lanes


def unsuitable(problem: Problem, topology: Topology) -> str:
    """Why no two-level plan of library collectives applies; "" when one does."""
    held = sorted({len(ranks) for ranks in topology.hosts})
    if len(topology.hosts) == 1:
        return "one host"
    if held == [1]:
        return "one rank per host"
    if len(held) > 1:
        return f"hosts hold unequal numbers of ranks, {held[0]} to {held[-1]}"
    if len(set(problem.counts)) > 1:
        return "unequal counts"
    return ""


def hierarchical_all_reduce(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """Reduce-scatter inside, all-reduce across, all-gather inside."""
    return pipelined_all_reduce(problem, topology, rank, chunks=1)


def pipelined_all_reduce(problem: Problem, topology: Topology, rank: int, chunks: int) -> RankPlan:
    """The same for `chunks` parts of the vector: while one is on its way between hosts, its neighbours are inside.

    What is left of a vector that does not divide by the ranks of a host (fewer elements than ranks) is reduced by
    everyone, inside and then across.
    """
    inside, rail = _groups(topology, rank)
    program, width = Program(rank), len(inside)
    shards, rest = _shards(problem.count, width, chunks)
    mine = inside.index(rank)
    owned = [Span("data", part.start + mine * part.length // width, part.start + (mine + 1) * part.length // width)
             for part in shards]  # fmt: skip
    for turn in range(len(shards) + 2):
        if turn < len(shards):
            program.native("reduce_scatter", inside, shards[turn], owned[turn], lane=SCATTER, chunk=turn)
        if 0 <= (chunk := turn - 1) < len(shards):
            program.native("all_reduce", rail, owned[chunk], owned[chunk], lane=ACROSS, chunk=chunk, level=INTER)
        if 0 <= (chunk := turn - 2) < len(shards):
            program.native("all_gather", inside, owned[chunk], shards[chunk], lane=GATHER, chunk=chunk)
    if rest.length:
        program.native("all_reduce", inside, rest, rest, lane=SCATTER, chunk=len(shards))
        program.native("all_reduce", rail, rest, rest, lane=ACROSS, chunk=len(shards), level=INTER)
    return program.finish()


def hierarchical_reduce_scatter(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """Reduce-scatter inside, so that each rank has what its rail is to end with; then reduce-scatter across."""
    inside, rail = _groups(topology, rank)
    program, count, length = Program(rank), problem.counts[0], sum(problem.counts)
    order = _by_rail(topology)
    whole, used = Span("input", 0, length), 0
    if order != list(range(problem.size)):
        whole, used = Span("scratch", 0, length), length
        for source, piece in zip(order, blocks("scratch", problem.counts)):
            program.copy(Span("input", source * count, (source + 1) * count), piece)
    part = Span("scratch", used, used + len(rail) * count)
    program.native("reduce_scatter", inside, whole, part)
    program.native("reduce_scatter", rail, part, Span("output", 0, count), level=INTER)
    return program.finish(used + part.length)


def hierarchical_all_gather(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """All-gather across, so that each block enters each host once; then all-gather inside."""
    inside, rail = _groups(topology, rank)
    program, count, length = Program(rank), problem.counts[0], sum(problem.counts)
    order = _by_rail(topology)
    part = Span("scratch", 0, len(rail) * count)
    program.native("all_gather", rail, Span("input", 0, count), part, level=INTER)
    if order == list(range(problem.size)):
        program.native("all_gather", inside, part, Span("output", 0, length))
        return program.finish(part.length)
    whole = Span("scratch", part.stop, part.stop + length)
    program.native("all_gather", inside, part, whole)
    for index, target in enumerate(order):
        piece = Span("scratch", whole.start + index * count, whole.start + (index + 1) * count)
        program.copy(piece, Span("output", target * count, (target + 1) * count))
    return program.finish(whole.stop)


def two_level_all_to_all(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """Phase 0, inside: what goes to local rank g of any host is handed to local rank g of this host. Phase 1, along the
    rails: each rank passes on what its host has for its counterparts, in one message per run of consecutive ranks.

    Nothing is packed: pieces land where the next message, or the caller, wants them.
    """
    return _TwoLevels(problem, topology, rank).plan()


class _TwoLevels:
    """Writes the steps of `two_level_all_to_all`. `waiting[h]`: where pieces for host h wait, one per local source."""

    def __init__(self, problem: Problem, topology: Topology, rank: int) -> None:
        self.script = Script(topology, rank)
        self.matrix, self.topology, self.rank = problem.matrix, topology, rank
        self.hosts, self.host, self.local = topology.hosts, topology.host_of[rank], topology.local_rank[rank]
        self.inside = self.hosts[self.host]
        self.source = blocks("input", problem.matrix[rank])
        self.output = blocks("output", [row[rank] for row in problem.matrix])
        self.waiting = {
            host: [self.script.scratch(problem.matrix[peer][ranks[self.local]]) for peer in self.inside]
            for host, ranks in enumerate(self.hosts)
            if host != self.host
        }

    def plan(self) -> RankPlan:
        self._inside()
        for distance in range(1, len(self.hosts)):
            self._along_the_rail(distance)
        return self.script.finish()

    def _inside(self) -> None:
        for local, peer in enumerate(self.inside):
            for ranks in self.hosts:
                if peer != self.rank:
                    self.script.send(self.source[ranks[local]], peer)
        for local, peer in enumerate(self.inside):
            for host in range(len(self.hosts)):
                place = self.output[peer] if host == self.host else self.waiting[host][local]
                if peer == self.rank:
                    self.script.copy(self.source[self.hosts[host][self.local]], place)
                else:
                    self.script.recv(place, peer)

    def _along_the_rail(self, distance: int) -> None:
        to, source = (self.host + distance) % len(self.hosts), (self.host - distance) % len(self.hosts)
        for first, last in _runs(self.inside):
            pieces = self.waiting[to][first : last + 1]
            self.script.send(_merged(pieces), self.hosts[to][self.local], lane=1, chunk=1)
        for first, last in _runs(self.hosts[source]):
            pieces = [self.output[peer] for peer in self.hosts[source][first : last + 1]]
            self.script.recv(_merged(pieces), self.hosts[source][self.local], lane=1, chunk=1)


NATIVE: dict[str, dict[str, Algorithm]] = {
    "all_reduce": {
        "hierarchical": Algorithm("hierarchical", "all_reduce", hierarchical_all_reduce, refuses=unsuitable),
        "pipelined": Algorithm("pipelined", "all_reduce", pipelined_all_reduce, {"chunks": 8}, unsuitable),
    },
    "reduce_scatter": {
        "hierarchical": Algorithm("hierarchical", "reduce_scatter", hierarchical_reduce_scatter, refuses=unsuitable),
    },
    "all_gather": {
        "hierarchical": Algorithm("hierarchical", "all_gather", hierarchical_all_gather, refuses=unsuitable),
    },
    "all_to_all": {
        "two_level": Algorithm("two_level", "all_to_all", two_level_all_to_all, refuses=unsuitable),
    },
}


def build_native_rank(
    problem: Problem, topology: Topology, algorithm: str, rank: int, parameters: Mapping[str, int] | None = None
) -> RankPlan:
    """The steps of `rank`. Raises PlanError for an algorithm that is not in `NATIVE` or does not apply."""
    chosen = NATIVE.get(problem.collective, {}).get(algorithm)
    reason = chosen.refuses(problem, topology) if chosen else "there is no such plan of library collectives"
    if chosen is None or reason:
        raise PlanError(f"{problem.collective} by native {algorithm} does not apply: {reason}")
    return chosen.build(problem, topology, rank, **{**chosen.parameters, **(parameters or {})})


def build_native(
    problem: Problem, topology: Topology, algorithm: str, parameters: Mapping[str, int] | None = None
) -> Plan:
    """The plans of all ranks; raises as `build_native_rank`."""
    ranks = [build_native_rank(problem, topology, algorithm, rank, parameters) for rank in range(problem.size)]
    return Plan(problem, algorithm, tuple(ranks), dict(parameters or {}))


def _groups(topology: Topology, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ranks of this rank's host, and those of its rail."""
    local = topology.local_rank[rank]
    return topology.hosts[topology.host_of[rank]], tuple(ranks[local] for ranks in topology.hosts)


def _by_rail(topology: Topology) -> list[int]:
    """All ranks, rail by rail."""
    return [ranks[local] for local in range(len(topology.hosts[0])) for ranks in topology.hosts]


def _shards(count: int, width: int, chunks: int) -> tuple[list[Span], Span]:
    """Up to `chunks` parts of `data` that divide by `width`, long ones into aligned shards; and what is left."""
    units = count // width
    grain = ALIGNMENT if units >= 4 * ALIGNMENT * chunks else 1
    points = sorted({min(units, units * chunk // chunks // grain * grain) for chunk in range(chunks)} | {units})
    parts = [Span("data", start * width, stop * width) for start, stop in pairwise(points)]
    return parts, Span("data", units * width, count)


def _runs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) positions of consecutive ranks: the blocks of such ranks lie side by side."""
    runs: list[tuple[int, int]] = []
    for position, rank in enumerate(ranks):
        if runs and ranks[runs[-1][1]] == rank - 1:
            runs[-1] = (runs[-1][0], position)
        else:
            runs.append((position, position))
    return runs


def _merged(pieces: Sequence[Span]) -> Span:
    return Span(pieces[0].buffer, pieces[0].start, pieces[-1].stop)
