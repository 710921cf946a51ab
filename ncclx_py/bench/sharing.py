"""Measures what ranks share when all hosts are emulated on one machine: its cores. For ``python -m ncclx_py.simulate.accuracy``.

    ncclx launch emulate 2x4 --rate 200mbit -- -m ncclx_py.bench.sharing machine.json

None of the figures is from a collective that moves data. *Messages* of one element, from all ranks at once to the next: with more
ranks than cores the cores are what limits them, so a message costs time × cores / ranks. *Wakings*: what the same costs more in
a ring, where each message waits for the one before. *Calls*: an all-reduce of no elements, which goes all the way and sends
nothing, on all ranks at once. *Bytes between hosts*: processor time of streams on all NICs, per byte. *Copies*: streams of all
ranks inside their hosts; each byte is copied by its sender and by its receiver.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist

import ncclx_py  # noqa: F401  (registers the backend)
from ncclx_py.bench.probing import stream_plan
from ncclx_py.plans.plan import Program, RankPlan, Span
from ncclx_py.simulate.machine import Machine
from ncclx_py.transport.executor import Executor
from ncclx_py.transport.fabric import Fabric
from ncclx_py.transport.signature import Signature

_ROUNDS = 200  # messages of each rank in a ring
_CALLS = 200
_REPEATS = 7
_INSIDE, _BETWEEN = 8 << 20, 4 << 20  # bytes of a stream
_DEADLINE = timedelta(seconds=60)


def measure(cores: int) -> Machine:
    """Every rank of the job calls it, and gets the same. Raises ValueError where there is one host, or one rank on each."""
    dist.init_process_group("gloo", timeout=_DEADLINE)
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        store = dist.PrefixStore("sharing/", dist.distributed_c10d._get_default_store())
        fabric = Fabric.connect(store, rank, size, _DEADLINE)
        try:
            return _Sharing(fabric, cores).run()
        finally:
            fabric.close()
    finally:
        dist.destroy_process_group()


class _Sharing:
    def __init__(self, fabric: Fabric, cores: int) -> None:
        self._topology = fabric.topology
        self._rank, self._size = fabric.rank, fabric.size
        self._executor = Executor(fabric)
        self._busy = min(cores, fabric.size) / fabric.size
        self._cores = cores
        self._calls = 0
        hosts = self._topology.hosts
        if len(hosts) < 2 or min(map(len, hosts)) < 2:
            raise ValueError(f"{len(hosts)} hosts of {[len(host) for host in hosts]} ranks: give at least 2x2.")

    def run(self) -> Machine:
        hosts = self._topology.hosts
        inside = {rank: after for host in hosts for rank, after in pairwise((*host, host[0]))}
        between = {
            rank: hosts[(index + 1) % len(hosts)][place % len(hosts[(index + 1) % len(hosts)])]
            for index, host in enumerate(hosts)
            for place, rank in enumerate(host)
        }
        local, remote = (self._message(pairs, waits=False) for pairs in (inside, between))
        slept = [self._message(pairs, waits=True) - plain for pairs, plain in ((inside, local), (between, remote))]
        moved, _ = self._run(stream_plan(self._rank, inside, _INSIDE), _INSIDE)
        _, spent = self._run(stream_plan(self._rank, between, _BETWEEN), _BETWEEN)
        return Machine(
            cores=self._cores,
            local=local,
            remote=remote,
            wake=max(0.0, statistics.mean(slept)),
            call=self._call() * self._busy,
            copy=moved * self._busy / (2 * _INSIDE),
            wire=spent / (self._size * _BETWEEN),
        )

    def _message(self, pairs: Mapping[int, int], waits: bool) -> float:
        """Core seconds of a message, both ends together."""
        return self._run(message_plan(self._rank, pairs, waits), 1)[0] * self._busy / _ROUNDS

    def _run(self, plan: RankPlan, length: int) -> tuple[float, float]:
        """(Seconds of the slowest rank, processor seconds of all), medians of some runs after one that does not count."""
        buffers = {"data": torch.zeros(2 * length, dtype=torch.uint8)}
        schedule = self._executor.lower(plan, {"data": 2 * length})
        found = []
        for _ in range(_REPEATS + 1):
            self._calls += 1
            signature = Signature(self._calls, "sharing", torch.uint8, 2 * length)
            dist.barrier()
            began, work = time.perf_counter(), time.thread_time()
            self._executor.run(schedule, buffers, None, signature, time.monotonic() + _DEADLINE.total_seconds())
            found.append(self._everyone(time.perf_counter() - began, time.thread_time() - work))
        return statistics.median(one[0] for one in found[1:]), statistics.median(one[1] for one in found[1:])

    def _call(self) -> float:
        """Seconds of a call that sends nothing, while all ranks call."""
        group = dist.new_group(backend="ncclx", timeout=_DEADLINE)
        nothing = torch.empty(0)
        found = []
        try:
            for _ in range(_REPEATS + 1):
                dist.barrier()
                began = time.perf_counter()
                for _ in range(_CALLS):
                    dist.all_reduce(nothing, group=group)
                found.append(self._everyone((time.perf_counter() - began) / _CALLS, 0.0)[0])
        finally:
            dist.destroy_process_group(group)
        return statistics.median(found[1:])

    def _everyone(self, seconds: float, work: float) -> tuple[float, float]:
        slowest, total = torch.tensor([seconds], dtype=torch.float64), torch.tensor([work], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        dist.all_reduce(total)
        return slowest.item(), total.item()


def message_plan(rank: int, following: Mapping[int, int], waits: bool) -> RankPlan:
    """`_ROUNDS` messages of one element to the rank that follows, and as many from the one before: each sent once the one before
    has come, or all at once."""
    program = Program(rank)
    before = next(source for source, target in following.items() if target == rank)
    for _ in range(_ROUNDS):
        program.send(Span("data", 0, 1), following[rank])
        if waits:
            program.recv(Span("data", 0, 1), before)
    for _ in range(0 if waits else _ROUNDS):
        program.recv(Span("data", 1, 2), before)
    return program.finish()


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) != 1 or "RANK" not in os.environ:
        print("usage: ncclx launch emulate HxG -- -m ncclx_py.bench.sharing FILE", file=sys.stderr)
        return 2
    found = measure(os.cpu_count() or 1)
    if os.environ["RANK"] == "0":
        Path(words[0]).write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
