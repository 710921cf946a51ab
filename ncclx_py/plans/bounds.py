"""Lower bounds: the time that no algorithm can beat on a topology, and what it is that binds.

    bound = lower_bound(problem, topology, itemsize=4)
    bound.seconds, bound.name          # 0.671, "node cut"

Each collective demands that some bytes leave and reach every rank and every host, and that a number of messages per
element is sent at all (reduction and copies in the network are not assumed):

- ``rank``: what one rank must send or receive, over all links that it has.
- ``ranks together``: all messages, over all links; the rank egress 2(P−1)/P · n / (B1 + B2) of an all-reduce.
- ``host``: what one host must send or receive, over its NICs; for an all-to-all the worst host decides.
- ``node cut``: all messages between hosts, over all NICs: 2(N−1) · n / Σ B2 for an all-reduce, which for equal hosts is
  2(N−1)/N · n / (G·B2).
- ``reduction``: (P−1)/P · n · γ.
- ``latency``: word from one host cannot reach the others sooner, however small it is; see `spread`.

The bound is the largest of these. Sources: the node cut and the rank egress are the usual ones for reductions without
in-network help (Patarasuk and Yuan 2009, with unequal NICs as in OptCC, arXiv 2606.01680); latency follows Karp et al.,
"Optimal broadcast and summation in the LogP model", 1993.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ncclx_py.plans.flows import Flows
from ncclx_py.plans.plan import Problem
from ncclx_py.plans.topology import OVERHEAD, Topology


@dataclass(frozen=True)
class Bound:
    """`seconds` is the largest of `parts`, and `name` says which ("nothing to move" where all are zero)."""

    seconds: float
    name: str
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Demand:
    """Elements that must move at the least, whatever the algorithm.

    `rank_out[r]`, `rank_in[r]`, `host_out[h]`, `host_in[h]`: leave and reach a rank or a host. `messages` and
    `crossings`: all that ranks send to ranks, and hosts to hosts. `reduced`: elements combined, over all ranks.
    `reach`: the number of hosts (or, with one host, ranks) that word from one of them must reach, itself included.
    """

    rank_out: Sequence[float]
    rank_in: Sequence[float]
    host_out: Sequence[float]
    host_in: Sequence[float]
    messages: float
    crossings: float
    reduced: float
    reach: int


def lower_bound(problem: Problem, topology: Topology, itemsize: int) -> Bound:
    """The least time in seconds for `problem` with elements of `itemsize` bytes.

    Raises ValueError when the problem is for another number of ranks than the topology.
    """
    if problem.size != topology.size:
        raise ValueError(f"The problem is for {problem.size} ranks, but the topology has {topology.size}.")
    return _bound(demand(problem, topology), topology, itemsize)


def even_all_to_all_bound(block: float, topology: Topology) -> Bound:
    """Of blocks of `block` bytes between all ranks of a topology whose hosts are alike: `lower_bound` without a matrix."""
    ranks, hosts, width = topology.size, len(topology.hosts), topology.widest
    rank, host = (ranks - 1) * block, width * (ranks - width) * block
    partners = hosts if hosts > 1 else ranks
    needed = Demand(
        [rank] * ranks, [rank] * ranks, [host] * hosts, [host] * hosts, ranks * rank, hosts * host, 0, partners
    )
    return _bound(needed, topology, 1)


def _bound(needed: Demand, topology: Topology, itemsize: int) -> Bound:
    if not needed.messages:
        return Bound(0.0, "nothing to move")
    parts = {
        "latency": _latency(needed, topology),
        "rank": itemsize * _worst_rank(needed, topology),
        "ranks together": itemsize * needed.messages / _capacity(topology),
        "reduction": itemsize * needed.reduced * topology.gamma / topology.size,
    }
    if needed.crossings:
        hosts = range(len(topology.hosts))
        parts["host"] = itemsize * max(
            max(needed.host_out[host] / topology.egress(host), needed.host_in[host] / topology.ingress(host))
            for host in hosts
        )
        parts["node cut"] = itemsize * needed.crossings / sum(topology.egress(host) for host in hosts)
    name = max(parts, key=lambda part: (parts[part], part == "node cut", part == "host"))
    return Bound(parts[name], name, parts)


def demand(problem: Problem, topology: Topology) -> Demand:
    """What `problem` demands of any algorithm."""
    return _DEMANDS[problem.collective](problem, topology)


def spread(count: int, ports: int) -> float:
    """The least time, in units of α, in which word from one of `count` hosts reaches them all.

    A message takes α and keeps its sender busy for OVERHEAD·α; a host sends up to `ports` of them at a time (one per
    rank). With one message at a time (OVERHEAD = 1, one port) this is the familiar ⌈lg count⌉.
    """
    if count < 2:
        return 0.0
    steps = round(1 / OVERHEAD)
    informed = [1] * steps
    while informed[-1] < count:
        informed.append(informed[-1] + ports * informed[-steps])
    return (len(informed) - 1) * OVERHEAD


def _all_reduce(problem: Problem, topology: Topology) -> Demand:
    n, ranks, hosts = problem.count, topology.size, len(topology.hosts)
    rank = [n if ranks > 1 else 0] * ranks
    host = [n if hosts > 1 else 0] * hosts
    return Demand(
        rank, rank, host, host, 2 * (ranks - 1) * n, 2 * (hosts - 1) * n, (ranks - 1) * n, _everyone(topology)
    )


def _reduce_scatter(problem: Problem, topology: Topology) -> Demand:
    gathered = _all_gather(problem, topology)
    return _mirrored(gathered, reduced=gathered.messages)


def _all_gather(problem: Problem, topology: Topology) -> Demand:
    total, ranks, hosts = sum(problem.counts), topology.size, len(topology.hosts)
    per_host = [sum(problem.counts[rank] for rank in members) for members in topology.hosts]
    return Demand(
        rank_out=list(problem.counts) if ranks > 1 else [0],
        rank_in=[total - mine for mine in problem.counts],
        host_out=per_host if hosts > 1 else [0],
        host_in=[total - held for held in per_host],
        messages=(ranks - 1) * total,
        crossings=(hosts - 1) * total,
        reduced=0,
        reach=_everyone(topology),
    )


def _broadcast(problem: Problem, topology: Topology) -> Demand:
    n, ranks, hosts = problem.count, topology.size, len(topology.hosts)
    home = topology.host_of[problem.root]
    return Demand(
        rank_out=[n if rank == problem.root and ranks > 1 else 0 for rank in range(ranks)],
        rank_in=[0 if rank == problem.root else n for rank in range(ranks)],
        host_out=[n if host == home and hosts > 1 else 0 for host in range(hosts)],
        host_in=[0 if host == home else n for host in range(hosts)],
        messages=(ranks - 1) * n,
        crossings=(hosts - 1) * n,
        reduced=0,
        reach=_everyone(topology),
    )


def _reduce(problem: Problem, topology: Topology) -> Demand:
    spread_out = _broadcast(problem, topology)
    return _mirrored(spread_out, reduced=spread_out.messages)


def _all_to_all(problem: Problem, topology: Topology) -> Demand:
    flows = Flows(problem, topology)
    hosts = range(len(topology.hosts))
    host_out = [flows.leaving(host) for host in hosts]
    rank_out = [sum(line) for line in flows.to_host]
    if sum(host_out):
        partners = max(sum(map(bool, line)) - bool(line[host]) for host, line in enumerate(flows.between))
    else:
        partners = max(len(row) - row.count(0) - bool(own) for row, own in zip(problem.matrix, flows.own))
    return Demand(
        rank_out,
        [sum(column) for column in zip(*flows.from_host)],
        host_out,
        [flows.reaching(host) for host in hosts],
        messages=sum(rank_out),
        crossings=sum(host_out),
        reduced=0,
        reach=partners + 1,
    )


_DEMANDS: dict[str, Callable[[Problem, Topology], Demand]] = {
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "reduce": _reduce,
}


def _mirrored(there: Demand, reduced: float) -> Demand:
    """The demand of the same traffic backwards."""
    return Demand(
        there.rank_in,
        there.rank_out,
        there.host_in,
        there.host_out,
        there.messages,
        there.crossings,
        reduced,
        there.reach,
    )


def _everyone(topology: Topology) -> int:
    return len(topology.hosts) if len(topology.hosts) > 1 else topology.size


def _latency(needed: Demand, topology: Topology) -> float:
    if needed.crossings:
        return topology.inter.alpha * spread(needed.reach, topology.widest)
    return topology.intra.alpha * spread(needed.reach, 1)


def _worst_rank(needed: Demand, topology: Topology) -> float:
    several = len(topology.hosts) > 1
    worst = 0.0
    for rank, host in enumerate(topology.host_of):
        inside = topology.intra.bandwidth if len(topology.hosts[host]) > 1 else 0.0
        out = inside + (topology.nic(host, topology.rail(rank)) if several else 0.0)
        into = inside + (topology.ingress(host) if several else 0.0)
        if needed.rank_out[rank]:
            worst = max(worst, needed.rank_out[rank] / out)
        if needed.rank_in[rank]:
            worst = max(worst, needed.rank_in[rank] / into)
    return worst


def _capacity(topology: Topology) -> float:
    """Bytes per second that all ranks together can send."""
    total = 0.0
    for host, members in enumerate(topology.hosts):
        inside = len(members) * topology.intra.bandwidth if len(members) > 1 else 0.0
        total += min(inside, topology.memory) if topology.memory else inside
        total += topology.egress(host) if len(topology.hosts) > 1 else 0.0
    return total
