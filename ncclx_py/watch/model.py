"""What the dumps of a job say, in the shape in which it is judged.

A job has ranks; a rank has a table of calls, one row per collective or message, oldest first, and the few calls that had
not ended when the dump was written, in full. Two thousand calls of a thousand ranks are two million rows: they are numpy
columns, and what rows have in common (`Asked`, call sites, groups) is kept once and referred to by number.

Ranks are global ranks everywhere in here. Times are wall-clock nanoseconds of the rank's own host, 0 where unknown; the
clocks of two hosts are not compared before `slow.py` has allowed for their difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

SCHEDULED, STARTED, COMPLETED, FAILED = range(4)
STATES = {"scheduled": SCHEDULED, "started": STARTED, "completed": COMPLETED, "failed": FAILED}

COLUMNS = ("group", "seq", "asked", "site", "state", "scheduled", "started", "finished")

PEER_OPS = ("send", "recv", "recv_any_source")
CONNECTING = "connecting"  # the making of a group, where all its ranks meet for the first time


class Group(NamedTuple):
    """Ranks that make collectives together. Two groups of one name differ by their ranks."""

    name: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"group {self.name!r}"


class Asked(NamedTuple):
    """What was asked for: in a right program the same on all ranks of the group, but for `peer` and `splits`.

    `elements` is a count that must agree between ranks, −1 where none must (all-to-all, barrier).
    """

    op: str
    dtype: str = ""
    elements: int = -1
    root: int = -1  # group rank
    reduce_op: str = ""
    peer: int = -1  # group rank
    bytes: int = 0
    algorithm: str = ""
    splits: tuple[tuple[int, ...], ...] = ()

    def __str__(self) -> str:
        size = f" of {self.elements} x {self.dtype}" if self.elements >= 0 else ""
        details = [self.reduce_op] if self.reduce_op else []
        details += [f"root {self.root}"] if self.root >= 0 else []
        return f"{self.op}{size}{f' ({chr(44).join(details)})' if details else ''}".replace(",", ", ")

    def differences(self, other: Asked) -> list[str]:
        """The names of the properties in which two calls that meet contradict each other, the gravest first."""
        if self.op != other.op:
            return ["op"]
        return [
            name for name in ("dtype", "elements", "reduce_op", "root") if getattr(self, name) != getattr(other, name)
        ]


@dataclass(frozen=True, slots=True)
class Open:
    """A call that had not ended well when the dump was written: scheduled, started or failed."""

    rank: int
    group: Group
    seq: int
    asked: Asked
    site: str
    state: int
    since: int  # ns, when it was called
    ended: int  # ns, when it failed; 0 while it has not
    waiting_for: tuple[int, ...] | None  # global ranks; None: not known
    progress: tuple[int, int] | None  # steps of the plan that are done, of all
    error: str
    is_async: bool
    timeout_s: float
    reason: str = ""

    @property
    def place(self) -> Place:
        return Place(self.group, self.seq, self.ends)

    @property
    def ends(self) -> tuple[str, ...]:
        """Sender and receiver of a message, as text; empty for a collective."""
        if self.asked.op not in PEER_OPS:
            return ()
        me = f"rank {self.rank}"
        other = f"rank {self.group.ranks[self.asked.peer]}" if self.asked.peer >= 0 else "any rank"
        return (me, other) if self.asked.op == "send" else (other, me)


class Nan(NamedTuple):
    """A call whose input held a NaN; `failed` if that ended it."""

    place: Place
    asked: Asked
    site: str
    failed: bool


class Place(NamedTuple):
    """Where the ranks of a group meet: its `seq`-th collective; 0 is its making. Or, with `ends`, a message, whose `seq` is
    the count of the rank that waits in it."""

    group: Group
    seq: int
    ends: tuple[str, ...] = ()

    @property
    def is_start(self) -> bool:
        return not self.ends and self.seq == 0

    def __str__(self) -> str:
        if self.ends:
            return f"the message from {self.ends[0]} to {self.ends[1]} in {self.group}"
        return f"collective {self.seq} of {self.group}" if self.seq else f"the making of {self.group}"


@dataclass(slots=True)
class RankTrace:
    """The dump of one rank. `table` maps each of `COLUMNS` to an int64 array of one entry per row."""

    rank: int
    world_size: int
    host: str
    pid: int
    reason: str
    detail: str
    time_ns: int
    step: int | None
    complete: bool  # the dump has its last line
    groups: tuple[Group, ...]
    aborts: Mapping[str, str]
    threads: Mapping[str, tuple[str, ...]]
    peers: Mapping[int, str]  # what this rank knows of the processes of others: alive, stopped or gone
    links: tuple[Mapping[str, int], ...]  # what the kernel says of its connections, see transport/tcp_info.py
    path: str
    dropped: int = 0
    site: str = ""  # where the exception was raised that ended the process
    table: dict[str, np.ndarray] = field(default_factory=dict)
    open: list[Open] = field(default_factory=list)
    nans: list[Nan] = field(default_factory=list)  # calls in which the writer of the trace saw one

    @property
    def rows(self) -> int:
        return len(self.table["seq"]) if self.table else 0


@dataclass(slots=True)
class Job:
    """All dumps of a job. `asked`, `sites` and `groups` are what the numbers in the tables stand for."""

    ranks: dict[int, RankTrace]
    world_size: int
    asked: list[Asked]
    sites: list[str]
    groups: list[Group]
    complaints: list[str]  # files that could not be read, or not to their end, with the line
    seen: Mapping[int, str] = field(
        default_factory=dict
    )  # processes of silent ranks, as this host sees them: as `peers`

    @property
    def missing(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank not in self.ranks]

    def host(self, rank: int) -> str:
        """The host of a rank, "" where it is not known."""
        trace = self.ranks.get(rank)
        return trace.host if trace is not None else ""

    def site_kinds(self) -> np.ndarray:
        """A number for each site that is equal for equal places in a program: each rank may run a copy in a folder of its own."""
        known: dict[str, int] = {}
        return np.array([known.setdefault(site.rpartition("/")[2], len(known)) for site in self.sites] or [0])

    def group_number(self, group: Group) -> int:
        return self.groups.index(group)


def plural(ranks: Any) -> str:
    """rank 3; ranks 1, 2, 5; ranks 0-6 and 9; ranks 0-3, 8-11 and 40 more."""
    ordered = sorted(set(ranks))
    if not ordered:
        return "no rank"
    runs: list[list[int]] = []
    for rank in ordered:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = runs[:8]
    texts = [str(low) if low == high else f"{low}{', ' if high == low + 1 else '-'}{high}" for low, high in shown]
    hidden = sum(high - low + 1 for low, high in runs[8:])
    return f"rank{'s' if len(ordered) > 1 else ''} {', '.join(texts)}{f' and {hidden} more' if hidden else ''}"
