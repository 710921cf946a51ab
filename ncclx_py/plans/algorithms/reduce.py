"""Reduce to the root. `input` is only read; ranks that combine on the way do so in scratch."""

from __future__ import annotations

from collections.abc import Sequence

from ncclx_py.plans.algorithms.broadcast import BETWEEN, INSIDE, from_root, leaders
from ncclx_py.plans.algorithms.layout import split
from ncclx_py.plans.algorithms.script import Script
from ncclx_py.plans.algorithms.trees import binomial
from ncclx_py.plans.plan import Problem, RankPlan, Span
from ncclx_py.plans.topology import Topology


def tree(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """A binomial tree: ⌈lg P⌉ messages of the whole tensor."""
    members = from_root(topology, problem.root)
    node = binomial(len(members), members.index(rank))
    script = Script(topology, rank)
    # The smallest subtree is done first.
    sources = [(members[child], BETWEEN) for child in reversed(node.children)]
    own = Span("input", 0, problem.count)
    total = _total(script, problem, own, sources, 0)
    if node.parent is not None:
        script.send(total, members[node.parent], BETWEEN)
    return script.finish()


def hierarchical(problem: Problem, topology: Topology, rank: int, chunks: int) -> RankPlan:
    """One rank per host combines its host's; their results go to the root by a binomial tree of hosts."""
    leader, parent, children, locals_ = leaders(topology, problem.root, rank)
    script = Script(topology, rank)
    sources = [(peer, INSIDE) for peer in locals_] + [(child, BETWEEN) for child in reversed(children)]
    for chunk, own in enumerate(split(Span("input", 0, problem.count), chunks)):
        if rank != leader:
            script.send(own, leader, INSIDE, chunk)
            continue
        total = _total(script, problem, own, sources, chunk)
        if parent is not None:
            script.send(total, parent, BETWEEN, chunk)
    return script.finish()


def _total(script: Script, problem: Problem, own: Span, sources: Sequence[tuple[int, int]], chunk: int) -> Span:
    """Combines `own` with the messages of `sources`, pairs of rank and lane; returns where the result is."""
    if script.rank == problem.root:
        total = Span("output", own.start, own.stop)
    elif sources:
        total = script.scratch(own.length)
    else:
        return own
    script.copy(own, total, INSIDE, chunk)
    for source, lane in sources:
        script.reduce(total, source, lane, chunk)
    return total
