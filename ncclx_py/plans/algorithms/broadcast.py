"""Broadcast of the root's `data`."""

from __future__ import annotations

from typing import NamedTuple

from ncclx_py.plans.algorithms.layout import split
from ncclx_py.plans.algorithms.script import Script
from ncclx_py.plans.algorithms.trees import binomial
from ncclx_py.plans.plan import Problem, RankPlan, Span
from ncclx_py.plans.topology import Topology

BETWEEN, INSIDE = 0, 1  # lanes


def tree(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """A binomial tree: ⌈lg P⌉ messages of the whole tensor."""
    members = from_root(topology, problem.root)
    node = binomial(len(members), members.index(rank))
    script = Script(topology, rank)
    data = Span("data", 0, problem.count)
    if node.parent is not None:
        script.recv(data, members[node.parent])
    for child in node.children:
        script.send(data, members[child])
    return script.finish()


def chain(problem: Problem, topology: Topology, rank: int, chunks: int) -> RankPlan:
    """From each rank to the next, host by host, chunk by chunk: each link carries the tensor once."""
    members = from_root(topology, problem.root)
    me = members.index(rank)
    script = Script(topology, rank)
    for chunk, piece in enumerate(split(Span("data", 0, problem.count), chunks)):
        if me:
            script.recv(piece, members[me - 1], 0, chunk)
        if me + 1 < len(members):
            script.send(piece, members[me + 1], 0, chunk)
    return script.finish()


def hierarchical(problem: Problem, topology: Topology, rank: int, chunks: int) -> RankPlan:
    """One copy to each host, by a binomial tree of hosts; inside, from the rank that got it to the others."""
    leader, parent, children, locals_ = leaders(topology, problem.root, rank)
    script = Script(topology, rank)
    for chunk, piece in enumerate(split(Span("data", 0, problem.count), chunks)):
        if rank != leader:
            script.recv(piece, leader, INSIDE, chunk)
            continue
        if parent is not None:
            script.recv(piece, parent, BETWEEN, chunk)
        for child in children:
            script.send(piece, child, BETWEEN, chunk)
        for peer in locals_:
            script.send(piece, peer, INSIDE, chunk)
    return script.finish()


def from_root(topology: Topology, root: int) -> tuple[int, ...]:
    """All ranks, host by host, those of the root's host first and the root before all."""
    home = topology.host_of[root]
    hosts = topology.hosts[home + 1 :] + topology.hosts[:home]
    others = tuple(rank for rank in topology.hosts[home] if rank != root)
    return (root, *others, *(rank for ranks in hosts for rank in ranks))


class Leaders(NamedTuple):
    """One rank per host, joined in a binomial tree of hosts: the root, and the first rank of each other host.

    `leader` is that of this rank's host; `parent` and `children` are its neighbours in the tree, `locals` the other
    ranks of the host.
    """

    leader: int
    parent: int | None
    children: tuple[int, ...]
    locals: tuple[int, ...]


def leaders(topology: Topology, root: int, rank: int) -> Leaders:
    home, host, number = topology.host_of[root], topology.host_of[rank], len(topology.hosts)

    def leader_of(position: int) -> int:
        return topology.hosts[(home + position) % number][0] if position else root

    position = (host - home) % number
    node = binomial(number, position)
    leader = leader_of(position)
    return Leaders(
        leader,
        None if node.parent is None else leader_of(node.parent),
        tuple(leader_of(child) for child in node.children),
        tuple(local for local in topology.hosts[host] if local != leader),
    )
