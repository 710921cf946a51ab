"""Measures the links of a job: α and bandwidth inside the hosts and between them, per rail. Every rank calls `probe`.

    found = probe(report=print)                       # in a job that a launcher started, before any process group exists
    found.topology(), found.measurements

The messages are those of plans: hand-made plans of two ranks' pings, or of one stream per rank, run by the same executor as
any collective. α is half a round trip of one element between two ranks while the others rest. Bandwidth is that of streams
that all ranks send at once, each to the next rank of its host, or to the rank of the next host that shares its rail: the model
takes all ranks to be busy. A NIC is credited with the better of what it sent and what it received, since a stream is as
slow as the slower of its two ends.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise

import torch
import torch.distributed as dist

from ncclx_py.plans.algorithms.layout import owner
from ncclx_py.plans.plan import Program, RankPlan, Span
from ncclx_py.plans.topology import DEFAULT_INTER, DEFAULT_INTRA, Link, Topology
from ncclx_py.small_messages import gather_json
from ncclx_py.transport.executor import Executor
from ncclx_py.transport.fabric import Fabric
from ncclx_py.transport.signature import Signature

Pairs = Mapping[int, int]  # the receiver of each sender
_PINGS = 50  # round trips in a plan
_FIRST = 1 << 18  # bytes of a first stream, which tells how long the measured ones should be
_LONGEST = 1 << 25
_SECONDS = 0.1  # that a measured stream should take
_MESSAGES = 8  # in a stream
_SAME = 0.1  # NICs within this share of each other count as equal


@dataclass(frozen=True)
class Measurement:
    """One figure: seconds or bytes per second, the median of some repeats, with the least and the greatest."""

    what: str
    median: float
    least: float
    greatest: float


@dataclass(frozen=True)
class Probed:
    """What was found; on every rank the same. `nics[h][r]` is the median of rail r of host h, in bytes per second."""

    host_of: tuple[int, ...]
    rails: int
    intra: Link | None
    inter: Link | None
    nics: tuple[tuple[float, ...], ...] = ()
    measurements: tuple[Measurement, ...] = field(default=())

    def topology(self) -> Topology:
        """The topology that the figures describe; what there is none of (one host, one rank each) has its default."""
        values = [value for row in self.nics for value in row]
        uneven = bool(values) and max(values) > (1 + _SAME) * min(values)
        nics = self.nics if uneven else ()
        return Topology(self.host_of, self.rails, self.intra or DEFAULT_INTRA, self.inter or DEFAULT_INTER, nics)


def probe(repeats: int, timeout: float, report: Callable[[str], None]) -> Probed:
    """Measures everything `repeats` times; `report` gets a line before each part, on rank 0.

    `timeout` is the deadline of one measurement in seconds. Raises ValueError when no launcher started this process, and
    CollectiveError when a rank does not come or does not answer.
    """
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        raise ValueError("No launcher started this process: run it under torchrun, or with ncclx launch emulate.")
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        if size == 1:
            raise ValueError("There is one rank, and so no link to measure: start several.")
        store = dist.PrefixStore("probe/", dist.distributed_c10d._get_default_store())
        fabric = Fabric.connect(store, rank, size, timedelta(seconds=timeout))
        try:
            return _Probe(fabric, repeats, timeout, report if rank == 0 else lambda _: None).run()
        finally:
            fabric.close()
    finally:
        dist.destroy_process_group()


class _Probe:
    def __init__(self, fabric: Fabric, repeats: int, timeout: float, report: Callable[[str], None]) -> None:
        self._topology = fabric.topology
        self._rank = fabric.rank
        self._executor = Executor(fabric)
        self._repeats, self._timeout, self._report = repeats, timeout, report
        self._calls = 0
        self._found: list[Measurement] = []

    def run(self) -> Probed:
        hosts = self._topology.hosts
        intra = self._inside() if max(map(len, hosts)) > 1 else None
        inter, nics = self._between() if len(hosts) > 1 else (None, ())
        return Probed(self._topology.host_of, self._topology.rails, intra, inter, nics, tuple(self._found))

    def _inside(self) -> Link:
        hosts = [members for members in self._topology.hosts if len(members) > 1]
        self._report("inside hosts: round trips")
        first, second = hosts[0][:2]
        alpha = self._note("α inside a host", self._ping(first, second))
        self._report("inside hosts: streams of all ranks")
        pairs = {rank: members[(at + 1) % len(members)] for members in hosts for at, rank in enumerate(members)}
        streams = self._stream(pairs)
        slowest = [min(rates.values()) for rates in streams]
        return Link(alpha, self._note("bandwidth inside a host, per rank", slowest))

    def _between(self) -> tuple[Link, tuple[tuple[float, ...], ...]]:
        topology = self._topology
        count = len(topology.hosts)
        alphas = []
        for rail in range(topology.rails):
            self._report(f"between hosts, rail {rail}: round trips")
            ends = [self._on_rail(host, rail) for host in (0, 1)]
            if ends[0] is not None and ends[1] is not None:
                alphas.append(self._note(f"α between hosts, rail {rail}", self._ping(ends[0], ends[1])))
        self._report("between hosts: streams on all rails")
        pairs: dict[int, int] = {}
        for host in range(count):
            for rail in range(topology.rails):
                sender = self._on_rail(host, rail)
                if sender is not None:
                    pairs[sender] = owner(topology, (host + 1) % count, topology.local_rank[sender])
        streams = self._stream(pairs)
        nics = tuple(tuple(self._nic(host, rail, streams) for rail in range(topology.rails)) for host in range(count))
        used = [value for row in nics for value in row]
        return Link(statistics.median(alphas), statistics.median(used)), nics

    def _nic(self, host: int, rail: int, streams: list[dict[int, float]]) -> float:
        before = (host - 1) % len(self._topology.hosts)
        ends = [self._on_rail(one, rail) for one in (host, before)]
        known = [[rates[end] for rates in streams] for end in ends if end is not None]
        if not known:  # no rank of these hosts is on the rail
            return DEFAULT_INTER.bandwidth
        return self._note(f"bandwidth of host {host}, NIC {rail}", max(known, key=statistics.median))

    def _on_rail(self, host: int, rail: int) -> int | None:
        """The first rank of the host that uses the rail."""
        return next((rank for rank in self._topology.hosts[host] if self._topology.rail(rank) == rail), None)

    def _note(self, what: str, values: list[float]) -> float:
        median = statistics.median(values)
        self._found.append(Measurement(what, median, min(values), max(values)))
        return median

    def _ping(self, one: int, other: int) -> list[float]:
        """Seconds per message, in each repeat, when two ranks take turns."""
        plan = ping_plan(self._rank, one, other)
        return [max(taken) / (2 * _PINGS) for taken in self._repeat(plan, 2)]

    def _stream(self, pairs: Pairs) -> list[dict[int, float]]:
        """Bytes per second of each sender's stream, in each repeat, when all pairs send at once."""
        length = _FIRST
        trial = self._repeat(stream_plan(self._rank, pairs, length), length)
        slowest = max(trial[-1])
        length = max(_FIRST, min(_LONGEST, int(length * _SECONDS / slowest)))
        taken = self._repeat(stream_plan(self._rank, pairs, length), length)
        return [
            {source: length / max(times[source], times[target]) for source, target in pairs.items()} for times in taken
        ]

    def _repeat(self, plan: RankPlan, length: int) -> list[list[float]]:
        """The seconds that each rank took, in each repeat, after a first one that does not count."""
        buffers = {"data": torch.zeros(2 * length, dtype=torch.uint8)}
        schedule = self._executor.lower(plan, {"data": 2 * length})
        everyone: list[list[float]] = []
        for _ in range(self._repeats + 1):
            self._calls += 1
            signature = Signature(self._calls, "probe", torch.uint8, 2 * length)
            dist.barrier()
            start = time.perf_counter()
            self._executor.run(schedule, buffers, None, signature, time.monotonic() + self._timeout)
            everyone.append(gather_json(time.perf_counter() - start))
        return everyone[1:]


def ping_plan(rank: int, one: int, other: int) -> RankPlan:
    """`_PINGS` round trips of one element between two ranks; nothing for the others."""
    program = Program(rank)
    for _ in range(_PINGS):
        if rank == one:
            program.send(Span("data", 0, 1), other)
            program.recv(Span("data", 1, 2), other)
        elif rank == other:
            program.recv(Span("data", 0, 1), one)
            program.send(Span("data", 0, 1), one)
    return program.finish()


def stream_plan(rank: int, pairs: Pairs, length: int) -> RankPlan:
    """`length` elements from each sender to its receiver, in a few messages; of `data`, the first half is sent."""
    program = Program(rank)
    points = [length * piece // _MESSAGES for piece in range(_MESSAGES + 1)]
    sources = [source for source, target in pairs.items() if target == rank]
    for start, stop in pairwise(points):
        # A lane per sender: neither direction of a rank waits for the other.
        if rank in pairs:
            program.send(Span("data", start, stop), pairs[rank], lane=rank)
        for source in sources:
            program.recv(Span("data", length + start, length + stop), source, lane=source)
    return program.finish()
