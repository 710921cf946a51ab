"""How a tensor is cut into pieces, and who owns which column of it.

A *column* is the part of a vector that one local rank of every host looks after while it travels between hosts: local
rank g of host A exchanges with local rank g of host B, over rail g. A host with fewer ranks than the largest one gives
several columns to each of its ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from ncclx_py.plans.plan import Span
from ncclx_py.plans.topology import Topology

ALIGNMENT = 16  # elements; whole cache lines for 4-byte types, and what NCCL wants of a shard (16 bytes) for all types


INSIDE = 0  # the lane of messages inside a host
HAND_ON = 1  # the lane of what came from another host and is handed on inside
ROUNDS = 8  # lanes that rounds between hosts share where the algorithm does not say how many are under way


def round_lane(turn: int, rounds: int = ROUNDS) -> int:
    """The lane of the messages of round `turn`, at either end; `rounds` of them may be under way at a time.

    Rounds that share a lane follow one another. Were there a lane for each direction instead, a rank's sends would share one with
    its receives, and wait for messages that they have nothing to do with.
    """
    return HAND_ON + 1 + turn % rounds


def cut(span: Span, weights: Sequence[float]) -> list[Span]:
    """`span` in consecutive pieces whose lengths are in proportion to `weights`.

    Cut points are multiples of `ALIGNMENT` from its start where the pieces are long enough for that not to matter. They
    depend on the length alone, so that spans of one length in different buffers are cut alike.
    """
    grain = ALIGNMENT if span.length >= 4 * ALIGNMENT * len(weights) else 1
    total = sum(weights)
    points = [0]
    for reached in accumulate(weights[:-1]):
        ideal = span.length * reached / total
        points.append(min(max(int(ideal / grain + 0.5) * grain, points[-1]), span.length))
    points.append(span.length)
    return [Span(span.buffer, span.start + start, span.start + stop) for start, stop in pairwise(points)]


def split(span: Span, parts: int) -> list[Span]:
    """`span` in `parts` consecutive pieces of nearly equal length."""
    return cut(span, [1] * parts)


def offsets(counts: Sequence[int]) -> list[int]:
    """Where each of consecutive blocks starts, and at the end where the last one stops."""
    return [0, *accumulate(counts)]


def blocks(buffer: str, counts: Sequence[int]) -> list[Span]:
    """Consecutive spans of the given lengths."""
    points = offsets(counts)
    return [Span(buffer, start, stop) for start, stop in pairwise(points)]


def by_host(topology: Topology) -> tuple[int, ...]:
    """All ranks, host by host: in this order a ring enters and leaves every host once, whatever the placement."""
    return tuple(rank for ranks in topology.hosts for rank in ranks)


def columns(topology: Topology) -> int:
    """The number of columns: the ranks of the largest host."""
    return max(len(ranks) for ranks in topology.hosts)


def owner(topology: Topology, host: int, column: int) -> int:
    """The rank of `host` that looks after `column`."""
    ranks = topology.hosts[host]
    return ranks[column % len(ranks)]


def column_weights(topology: Topology) -> list[float]:
    """How much of a vector each column should hold: in proportion to its share of the slowest NIC that carries it."""
    number = columns(topology)
    if not topology.nics or len(topology.hosts) == 1:
        return [1.0] * number
    weights = [float("inf")] * number
    for host in range(len(topology.hosts)):
        rails = [topology.rail(owner(topology, host, column)) for column in range(number)]
        for column, rail in enumerate(rails):
            weights[column] = min(weights[column], topology.nic(host, rail) / rails.count(rail))
    return weights


def rail_weights(topology: Topology, host: int) -> list[float]:
    """For each rank of `host`, its share of the bandwidth of the NIC that it uses."""
    rails = [topology.rail(rank) for rank in topology.hosts[host]]
    return [topology.nic(host, rail) / rails.count(rail) for rail in rails]


def merged(spans: Sequence[Span]) -> list[Span]:
    """The spans with those that follow directly on one another joined, and without empty ones."""
    result: list[Span] = []
    for span in spans:
        if result and result[-1].buffer == span.buffer and result[-1].stop == span.start:
            result[-1] = Span(span.buffer, result[-1].start, span.stop)
        elif span.length:
            result.append(span)
    return result
