"""The rows of a benchmark: what was measured of one collective, size, backend and placement. Table and JSON are made of them.

Bandwidths are GB/s (10⁹). algbw is bytes / time. busbw is algbw times nccl-tests' factor for the collective, so that 100 %
means the same link speed for all of them. interbw is what has to leave (or reach) the busiest host, per NIC, / time. The bound
is that of bandwidth and reduction (see plans/bounds.py); α is a model's parameter and not a limit, so it is left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ncclx_py.bench.timing import Times
from ncclx_py.plans.bounds import demand, lower_bound
from ncclx_py.plans.plan import Problem
from ncclx_py.plans.topology import Topology
from ncclx_py.units import format_size, format_time

_COLUMNS = (
    "collective",
    "hosts",
    "place",
    "size",
    "backend",
    "time",
    "p95",
    "×bound",
    "%bound",
    "algbw",
    "busbw",
    "interbw",
    "ok",
    "algorithm",
    "(reason)",
)

RAW = "tcp"  # the "backend" of raw transfers


@dataclass(frozen=True)
class Row:
    """Times in seconds, `bytes` as `Case` counts them, `pct_of_bound` 100 where the lower bound is met.

    `ranks_per_host` is one number, or a list where hosts differ. The backend `RAW` is not a collective: it is a raw transfer,
    from one host to another, of the bytes that the busiest host has to send. `correct` is None where it was not checked.
    """

    collective: str
    bytes: int
    backend: str
    placement: str
    hosts: int
    ranks_per_host: int | list[int]
    rails: int
    algorithm: str
    reason: str
    median_s: float
    p95_s: float
    algbw_GBps: float
    busbw_GBps: float
    interbw_GBps: float
    bound_s: float
    pct_of_bound: float
    correct: bool | None


@dataclass(frozen=True)
class Subject:
    """What is measured, whoever carries it: makes the rows of all backends."""

    collective: str
    bytes: int
    problem: Problem
    topology: Topology
    itemsize: int

    def row(self, backend: str, times: Times, correct: bool | None, algorithm: str = "", reason: str = "") -> Row:
        topology, took = self.topology, times.median
        counts = [len(ranks) for ranks in topology.hosts]
        algbw = self.bytes / took / 1e9
        parts = lower_bound(self.problem, topology, self.itemsize).parts
        bound = max((seconds for part, seconds in parts.items() if part != "latency"), default=0.0)
        nics = min(topology.rails, max(counts))
        return Row(
            self.collective,
            self.bytes,
            backend,
            placement_of(topology.host_of),
            len(counts),
            counts[0] if len(set(counts)) == 1 else counts,
            topology.rails,
            algorithm,
            reason,
            took,
            times.p95,
            algbw,
            algbw * busbw_factor(self.collective, topology.size),
            crossing_bytes(self.problem, topology, self.itemsize) / nics / took / 1e9,
            bound,
            100 * bound / took,
            correct,
        )


def busbw_factor(collective: str, size: int) -> float:
    """busbw / algbw, as nccl-tests' PERFORMANCE.md defines it."""
    if collective == "all_reduce":
        return 2 * (size - 1) / size
    return 1.0 if collective in ("broadcast", "reduce") else (size - 1) / size


def crossing_bytes(problem: Problem, topology: Topology, itemsize: int) -> float:
    """Bytes that the busiest host has to send or receive, whatever the algorithm: 0 for one host."""
    needed = demand(problem, topology)
    return itemsize * max(needed.crossings / len(topology.hosts), *needed.host_out, *needed.host_in)


def placement_of(host_of: Sequence[int]) -> str:
    """ "block" (each host holds consecutive ranks; also one host), "cyclic" (dealt out in turn) or "mixed"."""
    hosts = max(host_of) + 1
    if list(host_of) == sorted(host_of):
        return "block"
    counts = [list(host_of).count(host) for host in range(hosts)]
    dealt = [host for turn in range(max(counts)) for host in range(hosts) if turn < counts[host]]
    return "cyclic" if list(host_of) == dealt else "mixed"


def write_json(rows: Sequence[Row], path: Path) -> None:
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def read_json(path: Path) -> list[Row]:
    """Rows that `write_json` wrote. Raises ValueError naming the file when it is something else."""
    names = {field.name for field in fields(Row)}
    entries = json.loads(path.read_text())
    if not isinstance(entries, list) or any(not isinstance(entry, dict) or set(entry) != names for entry in entries):
        raise ValueError(f"{path} is not a list of benchmark rows.")
    return [Row(**entry) for entry in entries]


def ordered(rows: Sequence[Row]) -> list[Row]:
    """`rows` with those of one collective, cluster, placement and size together, in the order in which each came first."""
    where = {key: at for at, key in enumerate(dict.fromkeys((row.collective, *panel(row)) for row in rows))}
    return sorted(rows, key=lambda row: (where[row.collective, *panel(row)], row.bytes))


def panel(row: Row) -> tuple[str, str]:
    """What a row may be compared within, besides its collective and size: the cluster and the placement."""
    return cluster_name(row), row.placement


def as_table(rows: Sequence[Row]) -> str:
    """All rows for people, in columns; "×bound" is time / bound."""
    lines = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS) - 2)]
    text = []
    for line in lines:
        cells = [
            cell.ljust(width) if at in (0, 1, 2, 4) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths))
        ]
        text.append("  ".join([*cells, " ".join(line[len(widths) :])]).rstrip())
    return "\n".join(text)


def progress(rows: Sequence[Row]) -> str:
    """What was just measured, in one line."""
    first = rows[0]
    times = ", ".join(
        f"{row.backend} {format_time(row.median_s)}{' WRONG' if row.correct is False else ''}" for row in rows
    )
    bound = f", bound {format_time(first.bound_s)}" if first.bound_s else ""
    return f"{first.collective} {format_size(first.bytes)} on {cluster_name(first)} {first.placement}: {times}{bound}"


def _cells(row: Row) -> list[str]:
    over = f"{row.median_s / row.bound_s:.2f}" if row.bound_s else "-"
    return [
        row.collective,
        cluster_name(row),
        row.placement,
        format_size(row.bytes),
        row.backend,
        format_time(row.median_s),
        format_time(row.p95_s),
        over,
        f"{row.pct_of_bound:.0f}",
        f"{row.algbw_GBps:.4f}",
        f"{row.busbw_GBps:.4f}",
        f"{row.interbw_GBps:.4f}" if row.hosts > 1 else "-",
        "-" if row.correct is None else "yes" if row.correct else "NO",
        row.algorithm,
        f"({row.reason})" if row.reason else "",
    ]


def cluster_name(row: Row) -> str:
    """Hosts, ranks and rails, as in "2x4" or "4+2 2 rails"."""
    ranks = row.ranks_per_host
    text = f"{row.hosts}x{ranks}" if isinstance(ranks, int) else "+".join(map(str, ranks))
    return f"{text} {row.rails} rails" if row.rails > 1 else text
