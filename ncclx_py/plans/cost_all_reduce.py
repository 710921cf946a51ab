"""What an all-reduce of n bytes costs by each algorithm; see cost.py for the notation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ncclx_py.plans.algorithms.levels import SHORT
from ncclx_py.plans.topology import OVERHEAD
from ncclx_py.plans.wires import Wires

Parameters = Mapping[str, int]
Model = Callable[[Wires, float, Parameters], float]


def ring(net: Wires, n: float, parameters: Parameters) -> float:
    return 2 * (net.size - 1) * net.ring_step(n / net.size) + (net.size - 1) / net.size * n * net.gamma


def halving_doubling(net: Wires, n: float, parameters: Parameters) -> float:
    rounds, folded = net.halving
    part, time = n, 0.0
    for exchange in rounds:
        part /= 2
        time += 2 * (exchange.alpha + part * exchange.beta) + part * net.gamma
    if folded:
        # The rank that takes in another's tensor is also awaited by the first exchange: they contend for its NIC.
        time += 2 * net.inside(n) if net.largest > 1 else 2 * net.alpha2 + 3 * n * net.cut
        time += n * net.gamma
    return time


def double_tree(net: Wires, n: float, parameters: Parameters) -> float:
    chunks = parameters["chunks"]
    part = n / 2 / chunks
    crossed, inside, busiest = net.trees
    hop2 = net.alpha2 + part * net.cut * net.largest if crossed else 0.0
    fill = 2 * (crossed * hop2 + inside * (net.alpha1 + part * net.beta1))
    messages = OVERHEAD * ((8 * net.alpha1 if inside else 0.0) + (4 * net.alpha2 if crossed else 0.0))
    busy = (4 * part * net.beta1 if inside else 0.0) + messages
    return fill + (chunks - 1) * max(busy, part * busiest) + n * net.gamma


def direct(net: Wires, n: float, parameters: Parameters) -> float:
    return 2 * direct_half(net, n) + (net.size - 1) / net.size * n * net.gamma


def direct_half(net: Wires, n: float) -> float:
    """Everyone gets a P-th of the vector from everyone."""
    shares = [size * (net.size - size) / net.size * n for size in net.sizes]
    between = max(share / net.topology.egress(host) for host, share in enumerate(shares))
    inside = (net.largest - 1) / net.size * n * net.beta1
    return net.burst(net.smallest - 1, net.size - net.smallest) + max(between, inside)


def ordered(net: Wires, n: float, parameters: Parameters) -> float:
    """As direct; but all read from rank 0 first, then from rank 1, …, and so wait at one port after the other."""
    queue = 0.8 * (net.largest - 1) * net.largest / net.size * n * net.port
    first = max(direct_half(net, n), net.burst(net.smallest - 1, net.size - net.smallest) + queue)
    return first + direct_half(net, n) + 2 * n / net.size * net.beta1 + (net.size - 1) / net.size * n * net.gamma


def leader(net: Wires, n: float, parameters: Parameters) -> float:
    peers = net.largest - 1
    port = n * max(net.port, 1 / net.topology.memory if net.topology.memory else 0.0)
    time = 0.0
    if peers:
        time += 2 * (net.alpha1 * (1 + (peers - 1) * OVERHEAD) + peers * port) + peers * n * net.gamma
    if net.hosts > 1:
        nics = [net.topology.nic(host, net.topology.rail(ranks[0])) for host, ranks in enumerate(net.topology.hosts)]
        message = net.alpha2 + n / min(nics)
        core = net.hosts.bit_length() - 1
        time += core * (message + port + n * net.gamma)
        time += 2 * message + n * (net.gamma + 1 / min(nics)) if 1 << core != net.hosts else 0.0
    return time


def hierarchical(net: Wires, n: float, parameters: Parameters) -> float:
    return pipelined(net, n, {"chunks": 1})


def pipelined(net: Wires, n: float, parameters: Parameters) -> float:
    chunks = parameters["chunks"]
    part = n / chunks
    share, each, cut = net.columns
    messages = max((size - 1) * -(-net.largest // size) for size in net.sizes)
    local = max((size - 1) * -(-net.largest // size) / net.largest for size in net.sizes) * part
    combine = net.inside(local, messages) + local * net.gamma
    hand_out = net.inside(local, messages)
    rounds = net.hosts - 1
    if chunks == 1 and n <= 4 * SHORT and net.hosts > 2 and net.hosts & rounds == 0:
        rounds = net.hosts.bit_length() - 1  # halving and doubling, for elements of four bytes; else a ring
    once = (net.hosts - 1) / net.hosts * part * cut  # half of what the NICs carry
    half = rounds * each * net.alpha2 + once
    # A rank with several columns takes them in turn, and the others wait: about a third more, were it not for chunks.
    bubbles = 2 * once / 3 if each > 1 else 0.0
    between = 2 * half + bubbles + (net.hosts - 1) / net.hosts * share * part * net.gamma
    # Of further chunks the slowest part counts: rounds between hosts (sends and receives are on lanes of their own, so only a
    # chunk's later rounds wait for the earlier ones), the NICs, the ports inside, or the rank's thread.
    lane = half - net.alpha2 if net.hosts > 1 else 0.0
    ports = 2 * local * net.beta1 + local * net.gamma
    thread = 4 * OVERHEAD * (messages * net.alpha1 + rounds * each * net.alpha2)
    pace = max(lane, 2 * once, ports, thread)
    return combine + between + hand_out + (chunks - 1) * pace


MODELS: dict[str, Model] = {
    "ring": ring,
    "halving_doubling": halving_doubling,
    "double_tree": double_tree,
    "direct": direct,
    "ordered": ordered,
    "leader": leader,
    "hierarchical": hierarchical,
    "pipelined": pipelined,
}
