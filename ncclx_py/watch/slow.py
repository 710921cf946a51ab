"""Slow ranks and slow links, from a trace in which nothing is stuck.

A rank is slow when the others wait for it. The last to come to a collective waits the least in it, and each wait is
measured by the rank's own clock: clocks of different hosts are never compared, so their difference cannot fool this. How
late a rank is in a collective is how much less it waits than the rank that comes second to last.

A link is slow when it carries fewer bytes per busy second than the links that are like it, by what the kernel counted for
each connection; where dumps have no such figures, when the messages between two ranks, or the collectives of one group,
take longer than those of the same kind and size elsewhere.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ncclx_py.units import format_bandwidth, format_time
from ncclx_py.watch.grid import Grid
from ncclx_py.watch.model import COMPLETED, Job, RankTrace, plural

MIN_CALLS = 20  # collectives from which on "consistently" means something
LOST = 0.10  # share of the job's time that others wait for one rank
OFTEN = 0.7  # share of that loss which one rank must cause
SLOW = 0.6  # of the rate of links like it
_ENOUGH_BUSY = 50_000  # µs that a link must have been busy to be judged
_ENOUGH_BYTES = 1 << 20
_ENOUGH_MESSAGES = 8
_SMALL = 64 << 10  # bytes up to which latency, not the link, decides
_SYNCHRONISING = ("all_reduce", "barrier", "all_gather", "reduce_scatter", "all_to_all", "allreduce", "allgather")


@dataclass(slots=True)
class Slow:
    ranks: list[int]
    summary: str
    evidence: list[str]
    collective: str = ""
    site: str = ""


# Ranks


def find_slow_rank(job: Job, grids: list[Grid]) -> Slow | None:
    """The rank that the others wait for, if that costs at least `LOST` of the time that the trace spans."""
    found = [one for grid in grids if (one := _latecomer(job, grid)) is not None]
    return max(found, key=lambda one: one[0])[1] if found else None


def _latecomer(job: Job, grid: Grid) -> tuple[float, Slow] | None:
    names = [one.op.startswith(_SYNCHRONISING) for one in job.asked]
    if len(grid.ranks) < 2 or len(grid.ranks) != len(grid.group.ranks):
        return None
    complete = (grid.state == COMPLETED).all(axis=0) & (grid.finished > grid.scheduled).all(axis=0)
    columns = np.flatnonzero(complete)
    columns = columns[np.array(names)[grid.asked[0, columns]]] if len(columns) else columns
    if len(columns) < MIN_CALLS:
        return None
    waited = grid.finished[:, columns] - grid.scheduled[:, columns]
    last = waited.argmin(axis=0)
    two = np.partition(waited, 1, axis=0)[:2]
    lead = (two[1] - two[0]).astype(float)
    span = float(np.median(grid.finished[:, columns[-1]] - grid.scheduled[:, columns[0]]))
    lost = np.array([_usual_sum(lead[last == line]) for line in range(len(grid.ranks))])
    worst = int(lost.argmax())
    share = lost[worst] / span if span > 0 else 0.0
    times = int((last == worst).sum())
    if share < LOST or lost[worst] < OFTEN * lost.sum() or times < max(MIN_CALLS / 2, 0.2 * len(columns)):
        return None
    rank = grid.ranks[worst]
    where = columns[(last == worst) & (lead >= np.median(lead[last == worst]))]
    place = Counter((int(grid.asked[worst, at]), int(grid.site[worst, at])) for at in where.tolist()).most_common(1)[0][
        0
    ]
    host = f" (host {job.host(rank)})" if job.host(rank) else ""
    usual = float(np.median(lead[last == worst])) / 1e9
    slow = Slow(
        [rank],
        f"rank {rank}{host} is slow: the others wait for it {100 * share:.0f} % of the time in {grid.group}.",
        [
            f"it came last to {times} of {len(columns)} collectives, by {format_time(usual)} in the median",
            f"it waited {format_time(float(np.median(waited[worst])) / 1e9)} in the median, the others "
            f"{format_time(float(np.median(np.delete(waited, worst, axis=0))) / 1e9)}",
        ],
        str(job.asked[place[0]]),
        job.sites[place[1]],
    )
    return share, slow


def _usual_sum(leads: np.ndarray) -> float:
    """The sum without the largest tenth: what happens once or twice is no habit."""
    return float(np.sort(leads)[: len(leads) - max(1, len(leads) // 10)].sum()) if len(leads) else 0.0


# Links


def find_slow_links(job: Job, grids: list[Grid]) -> Slow | None:
    return _by_connections(job) or _by_messages(job) or _by_groups(job, grids)


def _by_connections(job: Job) -> Slow | None:
    """What the kernel counted for each connection, gathered by pair of hosts and direction."""
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    ranks: dict[tuple[str, str], set[int]] = defaultdict(set)
    for trace in job.ranks.values():
        for link in trace.links:
            busy = link["busy_us"] - link.get("limited_us", 0)
            pair = (trace.host, job.host(link["peer"]))
            if busy >= _ENOUGH_BUSY and link["bytes"] >= _ENOUGH_BYTES and pair[0] != pair[1] and pair[1]:
                rates[pair].append(link["bytes"] / busy * 1e6)
                ranks[pair] |= {trace.rank, link["peer"]}
    return _outliers({pair: float(np.median(found)) for pair, found in rates.items()}, ranks, "bytes per busy second")


def _by_messages(job: Job) -> Slow | None:
    """Receives that had come when they were asked for tell nothing; the fastest of each pair and size is compared."""
    best: dict[int, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    ranks: dict[tuple[str, str], set[int]] = defaultdict(set)
    for trace in job.ranks.values():
        for asked, peer, seconds in _messages(job, trace):
            size = job.asked[asked].bytes
            pair = (_named(job, peer), _named(job, trace.rank))
            best[size.bit_length()][pair].append(size / seconds)
            ranks[pair] |= {peer, trace.rank}
    for pairs in best.values():
        rates = {pair: max(found) for pair, found in pairs.items() if len(found) >= _ENOUGH_MESSAGES}
        slow = _outliers(rates, ranks, "fastest of its messages")
        if slow is not None:
            return slow
    return None


def _named(job: Job, rank: int) -> str:
    """Where a rank is, for the comparison of pairs: its host."""
    return job.host(rank) or f"rank {rank}"


def _messages(job: Job, trace: RankTrace) -> list[tuple[int, int, float]]:
    """(call, sender, seconds) of the large receives from other hosts."""
    table = trace.table
    wanted = np.array([one.op == "recv" and one.peer >= 0 and one.bytes > _SMALL for one in job.asked] or [False])
    rows = np.flatnonzero(
        wanted[table["asked"]] & (table["state"] == COMPLETED) & (table["finished"] > table["started"])
    )
    found = []
    for row in rows.tolist():
        asked, group = int(table["asked"][row]), job.groups[int(table["group"][row])]
        peer = job.asked[asked].peer
        if peer < len(group.ranks) and job.host(group.ranks[peer]) != trace.host:
            found.append((asked, group.ranks[peer], float(table["finished"][row] - table["started"][row]) / 1e9))
    return found


def _by_groups(job: Job, grids: list[Grid]) -> Slow | None:
    """Groups alike, of which one takes longer from its last arrival to the end of the same collectives."""
    kinds: dict[tuple[object, ...], dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    ranks: dict[tuple[str, str], set[int]] = {}
    for grid in grids:
        hosts = sorted({job.host(rank) for rank in grid.ranks})
        if len(hosts) < 2 or len(grid.ranks) != len(grid.group.ranks):
            continue
        complete = np.flatnonzero((grid.state == COMPLETED).all(axis=0))
        through = (grid.finished[:, complete] - grid.scheduled[:, complete]).min(axis=0)
        name = (grid.group.name, "-".join(hosts))
        ranks[name] = set(grid.ranks)
        for asked, nanoseconds in zip(grid.asked[0, complete].tolist(), through.tolist()):
            one = job.asked[asked]
            if one.bytes > _SMALL and nanoseconds > 0:
                kind = (one.op, one.bytes, len(grid.ranks), len(hosts))
                kinds[kind][name].append(one.bytes / nanoseconds * 1e9)
    for groups in kinds.values():
        rates = {name: float(np.median(found)) for name, found in groups.items() if len(found) >= MIN_CALLS}
        slow = _outliers(rates, ranks, "bytes of its collectives per second")
        if slow is not None:
            return slow
    return None


def _outliers(
    rates: Mapping[tuple[str, str], float], ranks: Mapping[tuple[str, str], set[int]], what: str
) -> Slow | None:
    """The pairs far below the rest, as one host where that explains them all. At least three are needed to compare."""
    if len(rates) < 3:
        return None
    ordered = sorted(rates.values())
    usual = float(np.median(ordered[len(ordered) * 2 // 3 :]))  # of the best third: one bad host spoils many pairs
    slow = [pair for pair, rate in rates.items() if rate < SLOW * usual]
    if not slow or len(slow) > len(rates) * 2 / 3:
        return None
    common = set.intersection(*(set(pair) for pair in slow))
    slow.sort(key=lambda pair: rates[pair])
    if len(slow) > 1 and len(common) == 1:
        where = f"The link of host {next(iter(common))} is slow"
        guilty = sorted(set.intersection(*(ranks[pair] for pair in slow)))
    else:
        where = f"The link {slow[0][0]} → {slow[0][1]} is slow"
        guilty = sorted(ranks[slow[0]])
    return Slow(
        guilty,
        f"{where}: {format_bandwidth(rates[slow[0]])}, others {format_bandwidth(usual)}.",
        [f"{one} → {other}: {format_bandwidth(rates[one, other])} ({what})" for one, other in slow[:6]]
        + [f"links like it: {format_bandwidth(usual)} in the median, {plural(guilty)} use the slow one"],
    )
