"""A recorded job at another scale: every kind of collective in its traces, predicted on a cluster that is not there.

    rows, left_out = replay(read_job(Path("outputs/run/trace")), cluster)

A group of all ranks becomes one of all ranks. A group inside a host stays as it is (at most a host). A group over several hosts
keeps its ranks per host and grows by as many times as the job has more hosts. Sizes stay what they were: the bytes of
the whole vector, or of all blocks of one rank. Calls are taken from the lowest recorded rank of each group. Each is predicted
alone: what overlaps with computation, or with another call, is not known here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch

from ncclx_py.plans.algorithms.registry import ALGORITHMS
from ncclx_py.plans.plan import Collective
from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.predict import predict
from ncclx_py.units import format_size, format_time
from ncclx_py.watch.model import COMPLETED, Asked, Group, Job

_ENDINGS = ("_single", "_coalesced")
_CARRIED_BY = {"barrier": "all_reduce"}
_UNKNOWN_HOST = ""


class Replayed(NamedTuple):
    """Calls of one kind. `recorded_s` is the sum over those that ended, on the rank they were read from; `predicted_s` over all."""

    op: str
    bytes: int
    calls: int
    recorded_ranks: int
    ranks: int
    recorded_s: float
    predicted_s: float
    algorithm: str


class _Kind(NamedTuple):
    op: str
    collective: Collective
    bytes: int
    itemsize: int
    recorded_ranks: int
    place: int  # of the ranks of the cluster that it becomes, in a list


def replay(
    job: Job, cluster: Cluster, progress: Callable[[str], None] | None = None
) -> tuple[list[Replayed], dict[str, int]]:
    """The kinds of calls, the most predicted seconds first, and how often each op that cannot be predicted was called.

    Raises ValueError where the cluster is not healthy, or nothing in the job can be predicted.
    """
    if not cluster.is_healthy:
        raise ValueError("A workload is replayed on a healthy cluster: leave out --fail and --straggler.")
    calls: Counter[_Kind] = Counter()
    seconds: defaultdict[_Kind, float] = defaultdict(float)
    left_out: Counter[str] = Counter()
    known: dict[tuple[int, ...], int] = {}
    places = {group: known.setdefault(members_at(job, group, cluster), len(known)) for group in job.groups}
    members = list(known)
    for group, asked, ended_s in _calls(job):
        collective = _collective(asked.op)
        if collective is None or asked.bytes == 0 or len(group.ranks) == 1:
            left_out[asked.op] += 1
            continue
        size, itemsize = _size(asked, collective, len(group.ranks))
        kind = _Kind(asked.op, collective, size, itemsize, len(group.ranks), places[group])
        calls[kind] += 1
        seconds[kind] += ended_s
    if not calls:
        raise ValueError(f"The traces hold no collective that can be predicted: {', '.join(ALGORITHMS)}.")
    rows = []
    for kind, count in calls.items():
        ranks = members[kind.place]
        if progress is not None:
            progress(f"{kind.op} of {format_size(kind.bytes)} among {len(ranks)} ranks")
        predicted, algorithm = _predicted(kind, ranks, cluster)
        rows.append(
            Replayed(
                kind.op,
                kind.bytes,
                count,
                kind.recorded_ranks,
                len(ranks),
                seconds[kind],
                count * predicted,
                algorithm,
            )
        )
    return sorted(rows, key=lambda row: -row.predicted_s), dict(left_out)


def members_at(job: Job, group: Group, cluster: Cluster) -> tuple[int, ...]:
    """The ranks of the cluster that a recorded group becomes."""
    hosts = cluster.topology.hosts
    if len(group.ranks) == job.world_size:
        return tuple(range(cluster.topology.size))
    names = Counter(job.host(rank) for rank in group.ranks if job.host(rank) != _UNKNOWN_HOST)
    per_host = max(names.values(), default=len(group.ranks))
    wide = min(per_host, cluster.topology.widest)
    if len(names) <= 1:
        return tuple(hosts[0][:wide])
    recorded = len({job.host(rank) for rank in job.ranks})
    count = max(1, min(len(hosts), round(len(names) * len(hosts) / recorded)))
    return tuple(rank for host in hosts[:count] for rank in host[:wide])


def workload_text(rows: list[Replayed], left_out: dict[str, int]) -> str:
    lines = [
        f"{'collective':<22} {'size':>10} {'calls':>6} {'ranks':>14} {'recorded':>11} {'predicted':>11}  algorithm"
    ]
    for row in rows:
        lines.append(
            f"{row.op:<22} {format_size(row.bytes):>10} {row.calls:>6} {f'{row.recorded_ranks} to {row.ranks}':>14} "
            f"{format_time(row.recorded_s):>11} {format_time(row.predicted_s):>11}  {row.algorithm}"
        )
    total = sum(row.recorded_s for row in rows), sum(row.predicted_s for row in rows)
    lines.append(f"{'all':<22} {'':>10} {sum(row.calls for row in rows):>6} {'':>14} {_two(*total)}")
    if left_out:
        lines.append("not predicted: " + ", ".join(f"{count} {op}" for op, count in sorted(left_out.items())))
    return "\n".join(lines)


def _two(recorded: float, predicted: float) -> str:
    return f"{format_time(recorded):>11} {format_time(predicted):>11}"


def _calls(job: Job) -> Iterator[tuple[Group, Asked, float]]:
    """The group, what was asked for, and how long it ran (0 where it did not end), from one rank of each group."""
    teller: dict[Group, int] = {}
    for rank, trace in job.ranks.items():
        for group in trace.groups:
            teller.setdefault(group, rank)
    for rank, trace in job.ranks.items():
        columns = [trace.table[name].tolist() for name in ("group", "asked", "state", "started", "finished")]
        for number, asked, state, started, finished in zip(*columns):
            group = job.groups[number]
            if teller.get(group) == rank:
                ended = state == COMPLETED and 0 < started <= finished
                yield group, job.asked[asked], (finished - started) / 1e9 if ended else 0.0


def _collective(op: str) -> Collective | None:
    for ending in _ENDINGS:
        op = op.removesuffix(ending)
    op = _CARRIED_BY.get(op, op)
    return cast(Collective, op) if op in ALGORITHMS else None


def _size(asked: Asked, collective: Collective, ranks: int) -> tuple[int, int]:
    """Bytes as `predict` counts them, and of an element. A trace has them so where a plan carried the call; where a library did,
    an all-gather has those of one rank's part."""
    dtype: Any = getattr(torch, asked.dtype, None)
    itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else 1
    planned = asked.algorithm in ALGORITHMS[collective]
    return asked.bytes * (ranks if collective == "all_gather" and not planned else 1), itemsize


def _predicted(kind: _Kind, ranks: tuple[int, ...], cluster: Cluster) -> tuple[float, str]:
    if len(ranks) == 1:
        return 0.0, "nothing to send"
    part = replace(cluster, topology=cluster.topology.subset(ranks))
    found = predict(kind.collective, part, kind.bytes, kind.itemsize)
    return found.seconds, found.algorithm
