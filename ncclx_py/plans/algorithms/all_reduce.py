"""All-reduce algorithms that know one level of links, and `leader` for small tensors. The two-level ones: levels.py."""

from __future__ import annotations

from ncclx_py.plans.algorithms.exchanges import doubling, halving, ring_all_gather, ring_reduce_scatter
from ncclx_py.plans.algorithms.layout import by_host, split
from ncclx_py.plans.algorithms.script import Script
from ncclx_py.plans.algorithms.trees import double_binary_trees
from ncclx_py.plans.plan import Problem, RankPlan, Span
from ncclx_py.plans.topology import Topology


def ring(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """Reduce-scatter, then all-gather, around a ring that enters and leaves every host once: 2(P − 1) messages."""
    members = by_host(topology)
    me = members.index(rank)
    script = Script(topology, rank)
    parts = split(Span("data", 0, problem.count), len(members))
    ring_reduce_scatter(script, members, me, parts)
    ring_all_gather(script, members, me, parts)
    return script.finish()


def halving_doubling(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """Rabenseifner: recursive halving, then doubling: 2⌈lg P⌉ messages.

    The ranks beyond a power of two first give their tensor to a neighbour and at the end get the result from it.
    """
    script = Script(topology, rank)
    data = Span("data", 0, problem.count)
    members, partner, inside = _fold(by_host(topology), rank)
    if not inside:
        script.send(data, partner)
        script.recv(data, partner)
        return script.finish()
    if partner >= 0:
        script.reduce(data, partner)
    me = members.index(rank)
    halving(script, members, me, data)
    doubling(script, members, me, data)
    if partner >= 0:
        script.send(data, partner)
    return script.finish()


def _fold(members: tuple[int, ...], rank: int) -> tuple[list[int], int, bool]:
    """(the power of two of members that stay, the rank that `rank` is paired with or −1, whether `rank` stays)."""
    core = 1 << (len(members).bit_length() - 1)
    paired = 2 * (len(members) - core)
    stay = [*members[:paired:2], *members[paired:]]
    position = members.index(rank)
    partner = members[position ^ 1] if position < paired else -1
    return stay, partner, position >= paired or position % 2 == 0


def leader(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """For small tensors: one rank per host combines its host's, leaders exchange, leaders hand out.

    Leaders use recursive doubling (⌈lg N⌉ messages of the whole tensor); a sum of two is the same in either order, so
    all leaders end with the same bits.
    """
    script = Script(topology, rank)
    data = Span("data", 0, problem.count)
    locals_ = topology.hosts[topology.host_of[rank]]
    if rank != locals_[0]:
        script.send(data, locals_[0])
        script.recv(data, locals_[0])
        return script.finish()
    for peer in locals_[1:]:
        script.reduce(data, peer)
    _exchange(script, tuple(ranks[0] for ranks in topology.hosts), rank, data)
    for peer in locals_[1:]:
        script.send(data, peer)
    return script.finish()


def _exchange(script: Script, leaders: tuple[int, ...], rank: int, data: Span) -> None:
    """All-reduce of `data` among the leaders by recursive doubling."""
    members, partner, inside = _fold(leaders, rank)
    if not inside:
        script.send(data, partner)
        script.recv(data, partner)
        return
    if partner >= 0:
        script.reduce(data, partner)
    me, distance = members.index(rank), 1
    while distance < len(members):
        # The other one reads `data` while its own arrives, so it must arrive elsewhere.
        arrived = script.scratch(data.length)
        other = members[me ^ distance]
        script.send(data, other)
        script.recv(arrived, other)
        script.combine(arrived, data)
        distance *= 2
    if partner >= 0:
        script.send(data, partner)


def double_tree(problem: Problem, topology: Topology, rank: int, chunks: int) -> RankPlan:
    """Two binary trees for half of the vector each, chunk by chunk: up to the root, down again.

    Sanders, Speck, Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan" (2009): a rank that is
    inner node of one tree is a leaf of the other (or has one child there), so both directions of its link are in use.
    """
    members = by_host(topology)
    script = Script(topology, rank)
    trees = double_binary_trees(len(members), members.index(rank))
    halves = [split(half, chunks) for half in split(Span("data", 0, problem.count), 2)]
    for chunk in range(chunks):
        for lane, (pieces, (parent, children)) in enumerate(zip(halves, trees)):
            for child in children:
                script.reduce(pieces[chunk], members[child], lane, chunk)
            if parent is not None:
                script.send(pieces[chunk], members[parent], lane, chunk)
                script.recv(pieces[chunk], members[parent], lane + 2, chunk)
            for child in children:
                script.send(pieces[chunk], members[child], lane + 2, chunk)
    return script.finish()


def ordered(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """Each element is ((x₀ + x₁) + x₂) + …, in the order of ranks, whatever the topology: the same bits every time.

    Each rank does so for a share of the vector, and hands the result to all.
    """
    size = topology.size
    script = Script(topology, rank)
    parts = split(Span("data", 0, problem.count), size)
    mine = parts[rank]
    for shift in range(1, size):
        peer = (rank + shift) % size
        script.send(parts[peer], peer)
    total = script.scratch(mine.length) if rank else mine  # rank 0 comes first, so it can add to its own
    in_order(script, mine, size, total)
    if rank:
        script.copy(total, mine)
    for shift in range(1, size):
        script.send(mine, (rank + shift) % size, 1)
    for shift in range(1, size):
        peer = (rank - shift) % size
        script.recv(parts[peer], peer, 1)
    return script.finish()


def in_order(script: Script, own: Span, size: int, total: Span) -> None:
    """Combines in `total` the messages of all ranks, in the order of ranks, with `own` in its place."""
    for source in range(size):
        if source == script.rank == 0:
            if own != total:
                script.copy(own, total)
        elif source == script.rank:
            script.combine(own, total)
        elif source == 0:
            script.recv(total, source)
        else:
            script.reduce(total, source)
