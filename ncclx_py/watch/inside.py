"""A collective that all ranks have called and that does not end: between whom does nothing move?

Each rank says for whom it waits and how far its plan is. What a rank waits for may itself wait; the edge that blocks is the
one at the rank that got least far, or the one towards a rank that waits for nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ncclx_py.watch.graph import Inside
from ncclx_py.watch.model import Job


@dataclass(slots=True)
class Blockage:
    """`edges`: who waits, and for whom. `cause` is link (one pair of hosts), host (one host and several others), partition
    (several hosts on both sides), rank (within a host: one rank does not move) or inside (not known)."""

    cause: str
    edges: list[tuple[int, int]]
    hosts: list[str]
    finished: list[int]  # ranks for which the collective has ended


def locate(job: Job, found: Inside, joined: list[int]) -> Blockage:
    """`joined` are the ranks with a dump that called the collective."""
    edges = {
        rank: [peer for peer in call.waiting_for if peer != rank]
        for rank, call in found.calls.items()
        if call.waiting_for is not None
    }
    finished = sorted(rank for rank in joined if rank not in found.calls)
    blocking = _blocking(edges, {rank: call.progress for rank, call in found.calls.items()})
    if not blocking:
        return Blockage("inside", [], [], finished)
    crossing = [(one, other) for one, other in blocking if job.host(one) != job.host(other) and job.host(other)]
    if len(crossing) < len(blocking):
        within = [edge for edge in blocking if edge not in crossing]
        return Blockage("rank", within, sorted({job.host(one) for one, _ in within}), finished)
    return Blockage(*_between(job, crossing), finished)


def _blocking(edges: Mapping[int, list[int]], progress: Mapping[int, tuple[int, int] | None]) -> list[tuple[int, int]]:
    """The edges that block the others: at the ranks that got least far, and those towards ranks that wait for nobody."""
    idle = [(one, other) for one, others in edges.items() for other in others if not edges.get(other)]
    if idle:
        return idle
    steps = {one: done[0] / max(1, done[1]) for one, done in progress.items() if done is not None and edges.get(one)}
    if not steps:
        return [(one, other) for one, others in edges.items() for other in others]
    least = min(steps.values())
    return [(one, other) for one, done in steps.items() if done == least for other in edges[one]]


def _between(job: Job, edges: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]], list[str]]:
    """Whether one link, one host or the network between two sets of hosts explains edges that all cross hosts."""
    pairs = {frozenset((job.host(one), job.host(other))) for one, other in edges}
    if len(pairs) == 1:
        return "link", edges, sorted(next(iter(pairs)))
    common = frozenset.intersection(*pairs)
    if common:
        return "host", edges, sorted(common)
    return "partition", edges, sorted(frozenset.union(*pairs))
