"""All-to-all algorithms that know one level of links; any matrix of counts unless said otherwise."""

from __future__ import annotations

from ncclx_py.plans.algorithms.layout import INSIDE, blocks, columns, merged, round_lane
from ncclx_py.plans.algorithms.script import Script
from ncclx_py.plans.plan import Problem, RankPlan, Span
from ncclx_py.plans.topology import Topology

Rounds = list[tuple[int | None, int | None]]


def pairwise(problem: Problem, topology: Topology, rank: int, window: int) -> RankPlan:
    """Each block goes straight to its rank, in rounds in which everyone sends to one rank and receives from one.

    Rounds inside the host are on a lane of their own, and so overlap with those between hosts. Of the latter, at most
    `window` are under way: a receiver is not flooded by all senders at once.
    """
    script = Script(topology, rank)
    mine = blocks("input", problem.matrix[rank])
    theirs = blocks("output", [row[rank] for row in problem.matrix])
    locals_ = topology.hosts[topology.host_of[rank]]
    me = topology.local_rank[rank]
    rounds = between_rounds(topology, rank)
    for turn in range(min(window, len(rounds))):
        _send_round(script, rounds, turn, window, mine)
    for shift in range(1, len(locals_)):
        peer = locals_[(me + shift) % len(locals_)]
        script.send(mine[peer], peer, INSIDE)
    script.copy(mine[rank], theirs[rank], INSIDE)
    for shift in range(1, len(locals_)):
        peer = locals_[me - shift]
        script.recv(theirs[peer], peer, INSIDE)
    for turn, (_, source) in enumerate(rounds):
        if source is not None:
            script.recv(theirs[source], source, round_lane(turn, window))
        if turn + window < len(rounds):
            _send_round(script, rounds, turn + window, window, mine)
    return script.finish()


def _send_round(script: Script, rounds: Rounds, turn: int, window: int, mine: list[Span]) -> None:
    to = rounds[turn][0]
    if to is not None:
        script.send(mine[to], to, round_lane(turn, window))


def between_rounds(topology: Topology, rank: int) -> Rounds:
    """(whom to send to, whom to receive from) in each round between hosts; None where hosts are uneven.

    In round (t, u) local rank g of host h sends to local rank g + u of host h + t: a permutation of hosts and of rails.
    """
    hosts, width = topology.hosts, columns(topology)
    host, me = topology.host_of[rank], topology.local_rank[rank]
    rounds: Rounds = []
    for turn in range(1, len(hosts)):
        ahead, behind = hosts[(host + turn) % len(hosts)], hosts[host - turn]
        for shift in range(width):
            to, source = (me + shift) % width, (me - shift) % width
            pair = (ahead[to] if to < len(ahead) else None, behind[source] if source < len(behind) else None)
            rounds.append(pair)
    return rounds


def bruck(problem: Problem, topology: Topology, rank: int) -> RankPlan:
    """Bruck, for small blocks of one size: ⌈lg P⌉ messages of up to half the tensor each.

    Block j is the one for rank r + j. In the round of bit b, all blocks whose j has the bit move on by b ranks; those
    that do not lie next to each other are packed first.
    """
    size = problem.size
    script = Script(topology, rank)
    length = problem.matrix[0][0]
    inputs = blocks("input", problem.matrix[rank])
    outputs = blocks("output", [length] * size)
    place = [inputs[(rank + block) % size] for block in range(size)]
    bit = 1
    while bit < size:
        moving = [block for block in range(size) if block & bit]
        script.send(_packed(script, [place[block] for block in moving]), (rank + bit) % size)
        arrived = script.scratch(length * len(moving))
        script.recv(arrived, (rank - bit) % size)
        for index, block in enumerate(moving):
            place[block] = Span("scratch", arrived.start + index * length, arrived.start + (index + 1) * length)
        bit *= 2
    for block in range(size):
        script.copy(place[block], outputs[(rank - block) % size])
    return script.finish()


def not_uniform(problem: Problem, topology: Topology) -> str:
    if len({count for row in problem.matrix for count in row}) > 1:
        return "the counts differ between pairs of ranks, and its messages hold blocks of one size"
    return ""


def _packed(script: Script, spans: list[Span]) -> Span:
    """One span with the contents of all `spans` in order."""
    pieces = merged(spans)
    if len(pieces) == 1:
        return pieces[0]
    packed = script.scratch(sum(piece.length for piece in pieces))
    position = packed.start
    for piece in pieces:
        script.copy(piece, Span("scratch", position, position + piece.length))
        position += piece.length
    return packed
