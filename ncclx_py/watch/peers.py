"""What became of ranks that left no dump, or whose process ended: crashed, stopped, left or silent; and who says so.

A rank knows others by their connections and, on its own host, by their processes. Several say it in their dumps: in the
`peers` of the header, and in the errors of calls that a lost peer ended.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ncclx_py.watch.model import FAILED, Job, Open, RankTrace, plural

_GONE = re.compile(r"\brank (\d{1,7}) is gone\b")
_ECHO = re.compile(
    r"aborted by rank|is gone|A peer exited|no end after|[Tt]imed out|not done after|was not run|Connection closed"
)
_FATES = {"stopped": "stopped", "gone": "crashed"}


@dataclass(slots=True)
class Fate:
    """`what` is crashed, stopped or silent; `why` is the evidence."""

    rank: int
    what: str
    why: str


def crashed(job: Job) -> list[Fate]:
    """Ranks whose process ended while others needed it, the cause apart from those that it took along."""
    said = _gone_by_rank(job)
    killed = [
        Fate(rank, "crashed", f"it is gone, say {plural(said[rank])}, and it left no dump, as an exception would have")
        for rank in sorted(said)
        if rank not in job.ranks
    ]
    raised = [
        Fate(rank, "crashed", f"it ended with an error of its own: {trace.detail or 'see its log'}")
        for rank, trace in job.ranks.items()
        if trace.reason == "error" and not _taken_along(trace)
    ]
    return killed + raised


def fate(job: Job, rank: int) -> Fate:
    """What is known of a rank without a dump."""
    if job.seen.get(rank) in _FATES:
        return Fate(rank, _FATES[job.seen[rank]], f"its process on this host is {job.seen[rank]}")
    states = {trace.rank: trace.peers[rank] for trace in job.ranks.values() if rank in trace.peers}
    for state, what in _FATES.items():
        seers = [seer for seer, seen in states.items() if seen == state]
        if seers:
            return Fate(rank, what, f"its process is {state}, as seen by {plural(seers)}")
    if rank in _gone_by_rank(job):
        return Fate(rank, "crashed", f"its connection closed, as seen by {plural(_gone_by_rank(job)[rank])}")
    seers = [seer for seer, seen in states.items() if seen == "alive"]
    if seers:
        why = f"its process is alive, as seen by {plural(seers)}, but it wrote no dump when all others did"
        return Fate(rank, "silent", why)
    waiting = [
        trace.rank
        for trace in job.ranks.values()
        for call in trace.open
        if call.waiting_for and rank in call.waiting_for
    ]
    if waiting:
        return Fate(
            rank,
            "silent",
            f"no dump of it; {plural(waiting)} wait{'s' * (len(waiting) == 1)} for it, and no connection to it has closed",
        )
    return Fate(rank, "silent", "no dump of it, and nobody saw its process end")


def common_cause(fates: list[Fate]) -> str:
    """One cause for several ranks, the best known: crashed, stopped or silent."""
    whats = {one.what for one in fates}
    if "crashed" in whats:
        return "crashed"
    if "stopped" in whats:
        return "stopped"
    return "silent"


def left(trace: RankTrace) -> bool:
    """Whether a process ended in good order: it made its calls, none of which failed, and went."""
    return trace.reason == "exit" and not any(call.state == FAILED for call in trace.open)


def _taken_along(trace: RankTrace) -> bool:
    """Whether the error that ended a rank is only the echo of a failed collective."""
    return any(call.state == FAILED for call in trace.open) or bool(_ECHO.search(trace.detail))


def _gone_by_rank(job: Job) -> dict[int, set[int]]:
    """Global ranks that the errors and `peers` of others call gone, each with those who say so."""
    said: dict[int, set[int]] = {}
    for trace in job.ranks.values():
        for rank, state in trace.peers.items():
            if state == "gone":
                said.setdefault(rank, set()).add(trace.rank)
        for call in _failed(trace.open):
            for found in _GONE.findall(call.error):
                if int(found) < len(call.group.ranks):
                    said.setdefault(call.group.ranks[int(found)], set()).add(trace.rank)
    return {rank: seers for rank, seers in said.items() if rank < job.world_size}


def _failed(calls: Iterable[Open]) -> list[Open]:
    return [call for call in calls if call.state == FAILED]
