"""What reduce-scatter and all-gather cost by each algorithm; see cost.py for the notation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ncclx_py.plans.cost_all_reduce import direct_half
from ncclx_py.plans.plan import Problem
from ncclx_py.plans.wires import Wires

Parameters = Mapping[str, int]


class Blocks(NamedTuple):
    """Bytes: all blocks together, and the largest one, which sets the pace where blocks go in rounds."""

    total: float
    largest: float

    @classmethod
    def of(cls, problem: Problem, itemsize: int) -> Blocks:
        return cls(sum(problem.counts) * itemsize, max(problem.counts, default=0) * itemsize)


def scatter_direct(net: Wires, blocks: Blocks, parameters: Parameters) -> float:
    size = net.size * blocks.largest  # the owner of the largest block takes it from everyone
    return direct_half(net, size) + blocks.largest * net.beta1 + _reducing(net, blocks)


def scatter_ring(net: Wires, blocks: Blocks, parameters: Parameters) -> float:
    return (net.size - 1) * (net.ring_step(blocks.largest) + blocks.largest * net.beta1) + _reducing(net, blocks)


def scatter_halving(net: Wires, blocks: Blocks, parameters: Parameters) -> float:
    part, time = blocks.total, blocks.total / 2 * net.beta1
    for exchange in reversed(net.partners):
        part /= 2
        time += exchange.alpha + part * exchange.beta
    return time + _reducing(net, blocks)


def scatter_hierarchical(net: Wires, blocks: Blocks, parameters: Parameters) -> float:
    """A rank combines N blocks of its host, one for each host, while those before are under way."""
    chunks = parameters["chunks"]
    part, width = blocks.largest / chunks, -(-net.largest // net.smallest)
    combine = net.inside((net.largest - 1) * part * width, (net.largest - 1) * width) + part * width * net.beta1
    between = (net.hosts - 1) * chunks * part * net.largest * net.cut
    busy = net.hosts * chunks * combine
    if net.hosts == 1:
        return busy + _reducing(net, blocks)
    latency = net.burst(0, (net.hosts - 1) * width * chunks)
    return max(busy, combine + between) + latency + _reducing(net, blocks)


def gather_direct(net: Wires, blocks: Blocks, parameters: Parameters) -> float:
    return direct_half(net, net.size * blocks.largest) + blocks.largest * net.beta1


def gather_ring(net: Wires, blocks: Blocks, parameters: Parameters) -> float:
    return (net.size - 1) * net.ring_step(blocks.largest) + blocks.largest * net.beta1


def gather_bruck(net: Wires, blocks: Blocks, parameters: Parameters) -> float:
    held, time = 1, blocks.largest * net.beta1
    for exchange in net.shifts:
        moved = min(held, net.size - held)
        time += exchange.alpha + moved * blocks.largest * exchange.beta
        held += moved
    return time


def gather_doubling(net: Wires, blocks: Blocks, parameters: Parameters) -> float:
    part, time = blocks.largest, blocks.largest * net.beta1
    for exchange in net.partners:
        time += exchange.alpha + part * exchange.beta
        part *= 2
    return time


def gather_hierarchical(net: Wires, blocks: Blocks, parameters: Parameters) -> float:
    """Blocks cross to each host once and are handed on there as they come."""
    chunks = parameters["chunks"]
    part = blocks.largest / chunks
    peers = net.largest - 1
    inside = chunks * (net.hosts * (net.inside(peers * part, peers)) + part * net.beta1)
    if net.hosts == 1:
        return inside
    between = (net.hosts - 1) * blocks.largest * net.largest * net.cut
    latency = net.burst(0, (net.hosts - 1) * -(-net.largest // net.smallest) * chunks)
    last = net.inside(peers * part, peers) if peers else 0.0
    return max(between + last, inside) + latency


def _reducing(net: Wires, blocks: Blocks) -> float:
    return (net.size - 1) * blocks.largest * net.gamma


MODELS: dict[str, dict[str, Callable[[Wires, Blocks, Parameters], float]]] = {
    "reduce_scatter": {
        "direct": scatter_direct,
        "ring": scatter_ring,
        "halving": scatter_halving,
        "hierarchical": scatter_hierarchical,
        "ordered": scatter_direct,
    },
    "all_gather": {
        "direct": gather_direct,
        "ring": gather_ring,
        "bruck": gather_bruck,
        "doubling": gather_doubling,
        "hierarchical": gather_hierarchical,
    },
}
