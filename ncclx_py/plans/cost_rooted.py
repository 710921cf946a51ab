"""What broadcast and reduce of n bytes cost by each algorithm; see cost.py for the notation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ncclx_py.plans.algorithms.broadcast import from_root
from ncclx_py.plans.algorithms.trees import binomial
from ncclx_py.plans.topology import OVERHEAD
from ncclx_py.plans.wires import Wires

Parameters = Mapping[str, int]


def broadcast_tree(net: Wires, n: float, parameters: Parameters) -> float:
    """All messages of a rank leave at once and share its port or its NIC, so the deepest subtree waits for the rest."""
    topology = net.topology
    members = from_root(topology, 0)
    arrival = [0.0] * net.size
    for position, rank in enumerate(members):
        children = binomial(net.size, position).children
        near = [child for child in children if topology.is_local(rank, members[child])]
        far = [child for child in children if child not in near]
        nic = topology.nic(topology.host_of[rank], topology.rail(rank))
        for child in near:
            arrival[child] = arrival[position] + net.burst(1, 0) + n * max(net.beta1, len(near) * net.port)
        for child in far:
            arrival[child] = arrival[position] + net.alpha2 + len(far) * n / nic
    return max(arrival)


def chain(net: Wires, n: float, parameters: Parameters) -> float:
    chunks = parameters["chunks"]
    part = n / chunks
    slowest = min(net.topology.nic(host, rail) for host in range(net.hosts) for rail in range(net.topology.rails))
    inside, between = net.alpha1 + part * net.beta1, net.alpha2 + part / slowest
    time = (net.size - net.hosts) * inside + (net.hosts - 1) * between
    pace = 2 * OVERHEAD * net.alpha1 + part * net.beta1 if net.largest > 1 else 0.0
    if net.hosts > 1:
        pace = max(pace, part / slowest, 2 * OVERHEAD * net.alpha2)
    return time + (chunks - 1) * pace


def broadcast_hierarchical(net: Wires, n: float, parameters: Parameters) -> float:
    chunks = parameters["chunks"]
    time, pace = _down(net, n / chunks)
    return time + (chunks - 1) * pace


def reduce_tree(net: Wires, n: float, parameters: Parameters) -> float:
    """⌈lg P⌉ rounds, those inside hosts first; each inner rank first copies its own part."""
    rounds = (net.size - 1).bit_length()
    inside = min(rounds, (net.largest - 1).bit_length())
    nic = min(net.topology.nic(host, 0) for host in range(net.hosts))
    time = n * net.beta1 if rounds else 0.0
    time += inside * (net.alpha1 + n * net.beta1) + (rounds - inside) * (net.alpha2 + n / nic)
    return time + rounds * n * net.gamma


def reduce_hierarchical(net: Wires, n: float, parameters: Parameters) -> float:
    chunks = parameters["chunks"]
    part = n / chunks
    peers, hops = net.largest - 1, (net.hosts - 1).bit_length()
    nic = min(net.topology.nic(host, 0) for host in range(net.hosts))
    combine = net.alpha1 * (1 + (peers - 1) * OVERHEAD) + peers * part * net.port if peers else 0.0
    combine += part * net.port + peers * part * net.gamma
    hop = net.alpha2 + part / nic + part * net.gamma
    busy = combine + hops * (part * net.gamma + OVERHEAD * net.alpha2)
    return combine + hops * hop + (chunks - 1) * max(busy, hops * part / nic)


def _down(net: Wires, part: float) -> tuple[float, float]:
    """A chunk from the root to all, by a tree of hosts and then inside: the time for one, and for each further one."""
    peers, hops = net.largest - 1, (net.hosts - 1).bit_length()
    nic = min(net.topology.nic(host, 0) for host in range(net.hosts))
    handing = net.alpha1 * (1 + (peers - 1) * OVERHEAD) + peers * part * net.port if peers else 0.0
    # The root sends to ⌈lg N⌉ hosts at once; the first of them, which has most to pass on, gets its share last.
    down = sum(net.alpha2 + copies * part / nic for copies in range(hops, 0, -1))
    pace = max(hops * part / nic, peers * part * net.port, OVERHEAD * (hops * net.alpha2 + peers * net.alpha1))
    return down + handing, pace


MODELS: dict[str, dict[str, Callable[[Wires, float, Parameters], float]]] = {
    "broadcast": {"tree": broadcast_tree, "chain": chain, "hierarchical": broadcast_hierarchical},
    "reduce": {"tree": reduce_tree, "hierarchical": reduce_hierarchical},
}
