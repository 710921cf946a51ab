"""What an all-to-all costs by each algorithm, whatever its matrix; see cost.py for the notation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ncclx_py.plans.algorithms.layout import owner
from ncclx_py.plans.flows import Flows
from ncclx_py.plans.plan import Problem
from ncclx_py.plans.topology import Topology
from ncclx_py.plans.wires import Wires

Parameters = Mapping[str, int]
Load = dict[tuple[str, int, int], int]
_PIECE = 4096  # bytes: about what `balanced` thinks too short to cut


class Traffic(NamedTuple):
    """Figures of a matrix in bytes, each for the rank, NIC or host that has most of it.

    `direct` and `proxied` are seconds that the busiest NIC needs when blocks leave from their own rank, or from the rank of
    their host that shares the rail of their destination; `level` when each host spreads its bytes over its NICs.
    """

    own: float  # what a rank sends to itself
    inside: float  # what it sends to or gets from its host
    crossing: float  # what it sends to or gets from other hosts
    messages_inside: int
    messages_between: int
    direct: float
    proxied: float
    level: float

    @classmethod
    def of(cls, problem: Problem, topology: Topology, itemsize: int) -> Traffic:
        flows, host_of, hosts = Flows(problem, topology), topology.host_of, range(len(topology.hosts))
        out = [sum(line) for line in flows.to_host]
        into = [sum(column) for column in zip(*flows.from_host)]
        inside_out = [line[host] for line, host in zip(flows.to_host, host_of)]
        inside_in = [flows.from_host[host][rank] for rank, host in enumerate(host_of)]
        messages = [len(row) - row.count(0) - bool(own) for row, own in zip(problem.matrix, flows.own)]
        inside_most = max(len(members) for members in topology.hosts) - 1
        level = max(
            max(flows.leaving(host) / topology.egress(host), flows.reaching(host) / topology.ingress(host))
            for host in hosts
        )
        return cls(
            itemsize * max(flows.own),
            itemsize * max(*inside_out, *inside_in),
            itemsize * max(whole - part for whole, part in zip([*out, *into], [*inside_out, *inside_in])),
            min(max(messages), inside_most),
            max(0, max(messages) - inside_most),
            itemsize * _busiest(topology, _direct(flows, topology)),
            itemsize * _busiest(topology, _proxied(flows, topology)),
            itemsize * level,
        )

    @classmethod
    def even(cls, block: float, topology: Topology) -> Traffic:
        """Of blocks of `block` bytes between all ranks of a uniform topology."""
        width, hosts = topology.widest, len(topology.hosts)
        away = (topology.size - width) * block
        busiest = -(-width // topology.rails) * away / topology.nic(0, 0)
        level = width * away / topology.egress(0)
        inside = (width - 1) * block
        return cls(block, inside, away, width - 1, (hosts - 1) * width, busiest, busiest, level)


def _direct(flows: Flows, topology: Topology) -> Load:
    """The bytes of each NIC and direction when blocks travel from their own rank."""
    load: Load = {}
    for source, (line, host) in enumerate(zip(flows.to_host, topology.host_of)):
        rail = topology.rail(source)
        for there, count in enumerate(line):
            if there != host:
                load["out", host, rail] = load.get(("out", host, rail), 0) + count
                load["in", there, rail] = load.get(("in", there, rail), 0) + count
    return load


def _proxied(flows: Flows, topology: Topology) -> Load:
    """The same when they travel from the rank of their host that shares the rail of their destination."""
    load: Load = {}
    for host, line in enumerate(flows.from_host):
        for target, count in enumerate(line):
            there = topology.host_of[target]
            if there != host:
                rail = topology.rail(owner(topology, host, topology.local_rank[target]))
                load["out", host, rail] = load.get(("out", host, rail), 0) + count
                load["in", there, rail] = load.get(("in", there, rail), 0) + count
    return load


def _busiest(topology: Topology, load: Load) -> float:
    """Seconds that the NIC with most to do takes, for elements of one byte."""
    return max((count / topology.nic(host, rail) for (_, host, rail), count in load.items()), default=0.0)


def pairwise(net: Wires, traffic: Traffic, parameters: Parameters) -> float:
    inside = (traffic.inside + traffic.own) * net.beta1
    return net.burst(traffic.messages_inside, traffic.messages_between) + max(traffic.direct, inside)


def bruck(net: Wires, traffic: Traffic, parameters: Parameters) -> float:
    """⌈lg P⌉ rounds of up to half the tensor; what does not lie together is packed first, and all is put in place last."""
    block, time = traffic.own, net.size * traffic.own * net.beta1
    for bit, exchange in enumerate(net.shifts):
        moved = sum(1 for index in range(net.size) if index >> bit & 1) * block
        time += exchange.alpha + moved * (exchange.beta + net.beta1)
    return time


def two_level(net: Wires, traffic: Traffic, parameters: Parameters) -> float:
    hosts, peers = net.hosts - 1, net.largest - 1
    local = (traffic.inside + traffic.own) * net.beta1 + net.burst(peers, 0)
    if not hosts:
        return local
    gather = traffic.crossing * net.beta1 + hosts * net.inside(0.0, peers)
    unpack = traffic.crossing * net.beta1
    first = gather / hosts
    busy = gather + local + unpack
    return net.burst(0, hosts) + max(busy, first + traffic.proxied + unpack / hosts)


def balanced(net: Wires, traffic: Traffic, parameters: Parameters) -> float:
    """The busiest rank gives most of what it has to its neighbours, and on the other side as much is handed on."""
    hosts, peers = net.hosts - 1, net.largest - 1
    local = (traffic.inside + traffic.own) * net.beta1 + net.burst(peers, 0)
    if not hosts:
        return local
    # A stream is cut only where its pieces stay long; its ends differ from host to host, hence a message more.
    pieces = 1 + min(parameters["chunks"], int(traffic.crossing / hosts / _PIECE))
    moved = peers / net.largest * traffic.crossing * net.beta1
    busy = local + 2 * moved + 2 * net.burst(peers * pieces, 0) + traffic.crossing * net.beta1
    return net.burst(0, hosts * pieces) + net.burst(peers, 0) + max(busy, moved / hosts / pieces + traffic.level)


MODELS: dict[str, Callable[[Wires, Traffic, Parameters], float]] = {
    "pairwise": pairwise,
    "bruck": bruck,
    "two_level": two_level,
    "balanced": balanced,
}
