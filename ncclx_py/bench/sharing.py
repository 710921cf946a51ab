"""What a NIC carries in the long run, what it loses when many streams share it, and how unevenly they do. For
``python -m ncclx_py.simulate.accuracy``.

    ncclx launch emulate 2x4 --rate 200mbit -- -m ncclx_py.bench.sharing FILE

Streams between hosts, all NICs busy in both directions: first one stream per host, to the next; then one from every rank, to its
like on the next host; then from one rank of each host to one of every other; then from every rank to all ranks of other hosts.
Each with a short and a long one: the difference is the rate in the long run, without what a shaped link lets pass for free at
first. The second also tells how unevenly TCP shares a NIC: of short streams some end long before others. Streams are raw
messages, not a collective: every stream stands by itself, and no rank waits for another.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import ncclx_py  # noqa: F401  (registers the backend)
from ncclx_py.plans.plan import Program, RankPlan, Span
from ncclx_py.plans.topology import Topology
from ncclx_py.transport.executor import Executor
from ncclx_py.transport.fabric import Fabric
from ncclx_py.transport.signature import Signature
from ncclx_py.transport.window import LANES

Streams = tuple[tuple[int, int], ...]  # (sender, receiver)
_FIRST = 1 << 20  # bytes of a NIC in a trial that tells how long the measured ones should be
_SHORT, _LONG = 0.1, 0.4  # seconds that these take
_REPEATS = 5
_DEADLINE = timedelta(seconds=60)


@dataclass(frozen=True)
class Shared:
    """`carried`: (streams per NIC, bytes per second of a NIC), fewest streams first. `spread`: the standard deviation of the
    logarithm of what a stream gets of a NIC that it shares."""

    carried: tuple[tuple[int, float], ...]
    spread: float


def measure() -> Shared:
    """Every rank of the job calls it, and gets the same. Raises ValueError where there is one host."""
    dist.init_process_group("gloo", timeout=_DEADLINE)
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        store = dist.PrefixStore("sharing/", dist.distributed_c10d._get_default_store())
        fabric = Fabric.connect(store, rank, size, _DEADLINE)
        try:
            if len(fabric.topology.hosts) < 2:
                raise ValueError("There is one host, and so no NIC in use: give two or more.")
            probe = _Probe(fabric)
            carried = [probe.rate(streams) for streams in patterns(fabric.topology)]
            return Shared(tuple(carried), probe.spread(carried[0][1]))
        finally:
            fabric.close()
    finally:
        dist.destroy_process_group()


def patterns(topology: Topology) -> list[Streams]:
    """Sets of streams between hosts, from few to many per NIC, one of each number."""
    hosts = topology.hosts
    ring = tuple((host[0], hosts[(index + 1) % len(hosts)][0]) for index, host in enumerate(hosts))
    apart = [(one, other) for one in range(len(hosts)) for other in range(len(hosts)) if one != other]
    firsts = tuple((hosts[one][0], hosts[other][0]) for one, other in apart)
    everyone = tuple((source, target) for one, other in apart for source in hosts[one] for target in hosts[other])
    each = tuple(stream for streams in one_each(topology) for stream in streams)
    return [
        found for _, found in sorted({_per_nic(topology, one): one for one in (everyone, each, firsts, ring)}.items())
    ]


def one_each(topology: Topology) -> list[Streams]:
    """From every rank to its like on the next host (while that has one): the streams of each host."""
    hosts = topology.hosts
    return [tuple(zip(host, following)) for host, following in zip(hosts, (*hosts[1:], hosts[0]))]


def _per_nic(topology: Topology, streams: Streams) -> int:
    return max(Counter(topology.host_of[source] for source, _ in streams).values())


def weights(ends: Sequence[float]) -> list[float]:
    """What part of a pipe each of some equally long streams held on to, from when they ended (seconds, the first > 0).

    While all flow, stream i has the part wᵢ; when one is through, the others divide what it had in the same proportions. So
    stream i is through once Σₖ (tₖ − tₖ₋₁) wᵢ / (1 − w₁ − … − wₖ₋₁), over k ≤ i with streams in the order of their ends, has
    come to its length: the pipe's time over the number of streams.
    """
    share = max(ends) / len(ends)
    found = [0.0] * len(ends)
    left, before, passed = 1.0, 0.0, 0.0
    for place in sorted(range(len(ends)), key=ends.__getitem__):
        passed += (ends[place] - before) / max(left, 1e-9)
        found[place] = share / passed
        before, left = ends[place], left - found[place]
    return found


def stream_plan(rank: int, streams: Streams, length: int) -> RankPlan:
    """`length` elements in each stream, all at once; of `data`, the first `length` are sent."""
    program = Program(rank)
    mine = [target for source, target in streams if source == rank]
    theirs = [source for source, target in streams if target == rank]
    for target in sorted(mine, key=lambda target: (target < rank, target)):  # not all to the same rank first
        program.send(Span("data", 0, length), target, lane=(rank + target) % LANES)
    for place, source in enumerate(theirs, 1):
        program.recv(Span("data", place * length, (place + 1) * length), source, lane=(source + rank) % LANES)
    return program.finish()


class _Probe:
    def __init__(self, fabric: Fabric) -> None:
        self._fabric, self._executor = fabric, Executor(fabric)
        self._calls = 0

    def rate(self, streams: Streams) -> tuple[int, float]:
        per_nic = _per_nic(self._fabric.topology, streams)
        pace = _FIRST / self._seconds(streams, _FIRST // per_nic, 1)
        short, long = (max(1, int(pace * seconds) // per_nic) for seconds in (_SHORT, _LONG))
        took = [self._seconds(streams, length, _REPEATS) for length in (short, long)]
        return per_nic, per_nic * (long - short) / max(took[1] - took[0], 1e-9)

    def spread(self, rate: float) -> float:
        """See `Shared`; `rate` is of a NIC, in bytes per second. Of short streams: in the long run TCP is fairer."""
        groups = one_each(self._fabric.topology)
        length = max(1, int(rate * _SHORT) // max(map(len, groups)))
        streams = tuple(stream for group in groups for stream in group)
        off = [
            math.log(part * len(group))
            for ends in self._ends(streams, length, _REPEATS)
            for group in groups
            for part in weights([ends[target] for _, target in group])
        ]
        return statistics.pstdev(off)

    def _seconds(self, streams: Streams, length: int, repeats: int) -> float:
        """Of the slowest rank; the median of some runs."""
        return statistics.median(max(ends) for ends in self._ends(streams, length, repeats))

    def _ends(self, streams: Streams, length: int, repeats: int) -> list[list[float]]:
        """How long each rank took, in each of some runs after one that does not count."""
        whole = length * (1 + max(Counter(target for _, target in streams).values()))
        buffers = {"data": torch.zeros(whole, dtype=torch.uint8)}
        schedule = self._executor.lower(stream_plan(self._fabric.rank, streams, length), {"data": whole})
        found = []
        for _ in range(repeats + 1):
            self._calls += 1
            signature = Signature(self._calls, "sharing", torch.uint8, whole)
            dist.barrier()
            began = time.perf_counter()
            self._executor.run(schedule, buffers, None, signature, time.monotonic() + _DEADLINE.total_seconds())
            took = torch.zeros(self._fabric.size, dtype=torch.float64)
            took[self._fabric.rank] = time.perf_counter() - began
            dist.all_reduce(took)
            found.append(took.tolist())
        return found[1:]


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) != 1 or "RANK" not in os.environ:
        print("usage: ncclx launch emulate HxG -- -m ncclx_py.bench.sharing FILE", file=sys.stderr)
        return 2
    found = measure()
    if os.environ["RANK"] == "0":
        Path(words[0]).write_text(json.dumps(asdict(found)) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
