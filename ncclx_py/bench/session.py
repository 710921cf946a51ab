"""Runs a benchmark inside a job that a launcher started: every rank calls `run`, rank 0 gets the rows.

    rows = run(settings, report=print)        # under torchrun, or on an emulated cluster

Each measured backend has a process group of its own, made here and destroyed at the end. As a program
(``python -m ncclx_py.bench.session SETTINGS FILE``) it is what runs on every rank of an emulated cluster.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import ncclx_py
from ncclx_py.bench.cases import Case, Tensors
from ncclx_py.bench.rawtcp import RawTransfer
from ncclx_py.bench.rows import RAW, Row, Subject, crossing_bytes, progress, write_json
from ncclx_py.bench.settings import Settings
from ncclx_py.bench.timing import measure, synchronize
from ncclx_py.plans.problems import payload
from ncclx_py.plans.spec import topology_for
from ncclx_py.plans.topology import Topology
from ncclx_py.small_messages import gather_json
from ncclx_py.transport.identity import addresses, host_id, rail_names

_TCP_REPEATS = 3


@dataclass(frozen=True)
class _World:
    """The topology, what every rank is called by the others, and the group that talks about measurements."""

    control: dist.ProcessGroup
    rank: int
    topology: Topology
    addresses: list[tuple[str, ...]]


def run(settings: Settings, report: Callable[[str], None]) -> list[Row]:
    """Measures every collective and size of `settings`; `report` gets a line on rank 0 after each. Rows on all ranks.

    Raises ValueError when no launcher started this process, or for what `Settings` and the topology file get wrong.
    """
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        raise ValueError(
            "No launcher started this process: run it under torchrun, or on emulated hosts with --emulate 2x4 (needs root)."
        )
    # The newer names of these functions do not exist in all versions of torch that are supported.
    warnings.filterwarnings("ignore", r".*`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if settings.device != "cpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(seconds=settings.timeout)
    dist.init_process_group("gloo", timeout=timeout)
    try:
        world = _meet()
        groups = {name: dist.new_group(backend=name, timeout=timeout) for name in settings.group_backends}
        return _measure_all(settings, world, groups, report if world.rank == 0 else _silent)
    finally:
        dist.destroy_process_group()


def _silent(_: str) -> None:
    """Ranks other than the first say nothing."""


def _meet() -> _World:
    control = dist.group.WORLD
    assert control is not None
    mine = (host_id(os.environ), len(rail_names(os.environ)), addresses(os.environ))
    everyone = gather_json(mine)
    names = list(dict.fromkeys(host for host, _, _ in everyone))
    host_of = [names.index(host) for host, _, _ in everyone]
    topology = topology_for(host_of, mine[1], os.environ)
    return _World(control, dist.get_rank(), topology, [known for _, _, known in everyone])


def _measure_all(
    settings: Settings, world: _World, groups: dict[str, dist.ProcessGroup], report: Callable[[str], None]
) -> list[Row]:
    hosts = world.topology.hosts
    wire = None
    if settings.tcp and len(hosts) > 1:
        wire = RawTransfer(
            world.control, hosts[0][0], hosts[1][0], [seen[: world.topology.rails] for seen in world.addresses]
        )
    rows: list[Row] = []
    try:
        for collective in settings.collectives:
            for size in settings.sizes:
                case = Case(collective, world.topology.size, world.rank, world.topology, size, settings)
                found = _measure(case, settings, world, groups)
                if wire is not None and found:
                    found.append(_raw(case, world, wire))
                rows += found
                if found:
                    report(progress(found))
    finally:
        if wire is not None:
            wire.close()
    return rows


def _measure(case: Case, settings: Settings, world: _World, groups: dict[str, dist.ProcessGroup]) -> list[Row]:
    """One row per backend, measured in turns; results are checked before and after."""
    tensors = {name: case.allocate(_allocator(name, group, settings)) for name, group in groups.items()}
    wrong = [_wrong(case, tensors[name], group, settings) for name, group in groups.items()]
    calls = [partial(case.call, tensors[name], group) for name, group in groups.items()]
    times = measure(calls, world.control, settings.iters, settings.warmup, settings.device)
    wrong = [old + _wrong(case, tensors[name], group, settings) for old, (name, group) in zip(wrong, groups.items())]
    total = torch.tensor(wrong)
    dist.all_reduce(total, group=world.control)
    subject = _subject(case, world.topology)
    return [
        subject.row(name, took, not bad if settings.check else None, *_explain(name, group, case))
        for (name, group), took, bad in zip(groups.items(), times, total.tolist())
    ]


def _wrong(case: Case, tensors: Tensors, group: dist.ProcessGroup, settings: Settings) -> int:
    """Runs the case once and counts its wrong elements on this rank; 0 where nothing is to be checked."""
    if not settings.check:
        return 0
    case.fill(tensors)
    case.call(tensors, group)
    synchronize(settings.device)
    return case.wrong(tensors)


def _subject(case: Case, topology: Topology) -> Subject:
    return Subject(case.collective, case.bytes, case.problem, topology, case.dtype.itemsize)


def _raw(case: Case, world: _World, wire: RawTransfer) -> Row:
    """The raw transfer of what the busiest host has to send, split over the rails as their speeds are."""
    topology = world.topology
    needed = crossing_bytes(case.problem, topology, case.dtype.itemsize)
    speeds = [topology.nic(0, rail) for rail in range(topology.rails)]
    used = speeds[: min(map(len, topology.hosts))]  # a rank uses one rail
    shares = [round(needed * speed / sum(used)) for speed in used] + [0] * (len(speeds) - len(used))
    times = wire.times(shares, _TCP_REPEATS)
    return _subject(case, topology).row(RAW, times, None, "stream", "host 0 to host 1, what has to cross")


def _allocator(backend: str, group: dist.ProcessGroup, settings: Settings) -> Callable[..., torch.Tensor]:
    if settings.window and backend == "ncclx":
        return lambda elements, dtype, device: ncclx_py.empty(elements, dtype, group)
    return torch.empty


def _explain(backend: str, group: dist.ProcessGroup, case: Case) -> tuple[str, str]:
    """The algorithm that carried most calls of `case`, and why it was chosen; nothing is known of other libraries."""
    if backend != "ncclx":
        return "", ""
    wanted = (case.problem.collective, payload(case.problem, case.dtype.itemsize))
    decisions = [made for made in ncclx_py.explain(group) if (made.collective, made.bytes) == wanted]
    if not decisions:
        return "", ""
    chosen = max(decisions, key=lambda decision: decision.calls)
    parameters = "".join(f" {name}={value}" for name, value in chosen.parameters.items())
    return f"{chosen.algorithm}{parameters}", chosen.reason


def main() -> None:
    settings, file = Settings.from_json(sys.argv[1]), Path(sys.argv[2])
    rows = run(settings, partial(print, flush=True))
    if os.environ["RANK"] == "0":
        write_json(rows, file)


if __name__ == "__main__":
    main()
