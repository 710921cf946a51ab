"""An imitation of a job, for the analyser: ranks run programs over several groups until all are through or nothing moves.

It knows nothing of the analyser: a fault is put into the programs, and what the ranks would dump is written as files. The
oracle of a test is the fault that it put in.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SECOND = 10**9
EPOCH = 1_700_000_000 * SECOND


@dataclass(frozen=True)
class Call:
    group: str
    op: str = "all_reduce"
    elements: int = 1000
    dtype: str = "float32"
    reduce_op: str = "sum"
    root: int = -1
    site: str = "/app/train.py:20 step"
    is_async: bool = False


@dataclass(frozen=True)
class Work:
    seconds: float


@dataclass(frozen=True)
class Wait:
    """For all that the rank has started."""


@dataclass(frozen=True)
class Message:
    group: str
    op: str  # send, recv
    peer: int  # group rank
    elements: int = 1000
    site: str = "/app/pipeline.py:7 exchange"


@dataclass(frozen=True)
class End:
    """The rank goes no further. `how`: outside, killed, stopped, exit or error."""

    how: str
    site: str = "/app/data.py:33 load"


Step = Call | Work | Wait | Message | End


@dataclass
class Cluster:
    hosts: int
    per_host: int
    groups: dict[str, list[int]]

    @property
    def size(self) -> int:
        return self.hosts * self.per_host

    def host(self, rank: int) -> int:
        return rank // self.per_host


@dataclass
class _Rank:
    program: list[Step]
    clock: float = 0.0
    at: int = 0
    seq: dict[str, int] = field(default_factory=dict)
    messages: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    pending: list[dict[str, Any]] = field(default_factory=list)
    ended: End | None = None
    called: bool = False  # the call at `at` has been made


@dataclass
class Job:
    """`transfer` seconds of a collective by group, `skew` seconds of each host's clock, `jitter` of the ends."""

    cluster: Cluster
    programs: list[list[Step]]
    seed: int = 0
    transfer: dict[str, float] = field(default_factory=dict)
    skew: list[float] = field(default_factory=list)
    broken: tuple[int, int] | None = None  # two hosts whose link is dead
    broken_from: float = 0.0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.ranks = [_Rank(program) for program in self.programs]
        self.met: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
        self.sent: dict[tuple[str, int, int, str], list[dict[str, Any]]] = {}
        self.free: dict[str, float] = {}

    def run(self, until: float = float("inf")) -> float:
        """Runs all ranks as far as they go, or to a moment; returns when the last of them moved."""
        moved = True
        while moved:
            moved = False
            for number, rank in enumerate(self.ranks):
                while self._advance(number, rank, until):
                    moved = True
        return max((rank.clock for rank in self.ranks), default=0.0)

    def _advance(self, number: int, rank: _Rank, until: float) -> bool:
        if rank.at >= len(rank.program) or rank.ended is not None or rank.clock > until:
            return False
        step = rank.program[rank.at]
        if isinstance(step, Work):
            rank.clock += step.seconds
        elif isinstance(step, End):
            rank.ended = step
            return False
        elif isinstance(step, Wait):
            if any(not record["end"] for record in rank.pending):
                return False
            rank.clock = max([rank.clock, *(record["end"] for record in rank.pending)])
            rank.pending = []
        else:
            if not rank.called:
                self._call(number, rank, step)
                rank.called = True
            if not (isinstance(step, Call) and step.is_async):
                record = rank.records[-1]
                if not record["end"]:
                    return False
                rank.clock = record["end"]
        rank.called = False
        rank.at += 1
        return True

    def _call(self, number: int, rank: _Rank, step: Call | Message) -> None:
        members = self.cluster.groups[step.group]
        record: dict[str, Any] = {"step": step, "start": rank.clock, "end": 0.0, "failed": ""}
        rank.records.append(record)
        me = members.index(number)
        if isinstance(step, Message):
            rank.messages += 1
            record["seq"] = rank.messages
            pair = (me, step.peer) if step.op == "send" else (step.peer, me)
            other = "recv" if step.op == "send" else "send"
            waiting = self.sent.setdefault((step.group, *pair, other), [])
            if waiting:
                partner = waiting.pop(0)
                partner["end"] = record["end"] = max(rank.clock, partner["start"]) + 1e-3
            else:
                self.sent.setdefault((step.group, *pair, step.op), []).append(record)
            return
        record["seq"] = rank.seq[step.group] = rank.seq.get(step.group, 0) + 1
        rank.pending.append(record)
        there = self.met.setdefault((step.group, record["seq"]), {})
        there[number] = record
        if len(there) == len(members):
            self._meet(step.group, record["seq"], there)

    def _meet(self, group: str, seq: int, there: dict[int, dict[str, Any]]) -> None:
        said = {replace(one["step"], site="", is_async=False) for one in there.values()}
        start = max([self.free.get(group, 0.0), *(one["start"] for one in there.values())])
        hosts = {self.cluster.host(rank) for rank in there}
        cut = self.broken is not None and set(self.broken) <= hosts and start >= self.broken_from
        if len(said) > 1 or cut or self.free.get(group) == float("inf"):
            self.free[group] = float("inf")
            return
        end = start + self.transfer.get(group, 1e-3)
        self.free[group] = end
        for one in there.values():
            one["end"] = end + self.random.uniform(0, 2e-5)

    # Dumps

    def dump(self, folder: Path, at: float, reason: str = "demand", failing: bool = False, peers: bool = True) -> None:
        """What every rank that can would write at a moment. `failing`: open calls have failed, as at a deadline."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, rank in enumerate(self.ranks):
            if rank.ended is not None and rank.ended.how in ("killed", "stopped"):
                continue
            self._write(folder, number, rank, at, reason, failing, peers)

    def _write(
        self, folder: Path, number: int, rank: _Rank, at: float, reason: str, failing: bool, peers: bool
    ) -> None:
        ended = rank.ended.how if rank.ended else ""
        skew = self.skew[self.cluster.host(number)] if self.skew else 0.0
        reason = ended if ended in ("exit", "error") else reason
        mine = {name: ranks for name, ranks in self.cluster.groups.items() if number in ranks}
        states = {}
        for other, there in enumerate(self.ranks):
            if other != number and self.cluster.host(other) == self.cluster.host(number) and peers:
                how = there.ended.how if there.ended else ""
                states[str(other)] = {"killed": "gone", "error": "gone", "exit": "gone", "stopped": "stopped"}.get(
                    how, "alive"
                )
        stack = ["/app/train.py:5 <module>", "/app/train.py:20 step"]
        if rank.ended is not None:
            stack.append(rank.ended.site)
        elif rank.at < len(rank.program):
            stack.append("/usr/lib/python3/site-packages/ncclx_py/runtime/work.py:80 wait")
        header = {
            "format": "ncclx-trace", "version": 1, "rank": number, "world_size": self.cluster.size,
            "host": f"host{self.cluster.host(number)}", "pid": 1000 + number, "reason": reason,
            "detail": "ValueError: a bug" if ended == "error" else "", "time_ns": self._ns(at, skew), "monotonic_ns": 1,
            "dropped": 0, "groups": {name: {"ranks": ranks, "desc": "", "size": len(ranks)} for name, ranks in mine.items()},
            "aborts": {}, "peers": states, "threads": {"MainThread": stack}, "step": 1,
            "site": rank.ended.site if rank.ended and ended == "error" else "",
        }  # fmt: skip
        lines = [
            header,
            *(self._line(number, record, at, skew, failing) for record in rank.records if record["start"] <= at),
        ]
        lines.append({"end": True, "records": len(lines) - 1})
        (folder / f"trace-rank-{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def _ns(self, seconds: float, skew: float) -> int:
        return EPOCH + int((seconds + skew) * SECOND)

    def _line(self, number: int, record: dict[str, Any], at: float, skew: float, failing: bool) -> dict[str, Any]:
        step = record["step"]
        members = self.cluster.groups[step.group]
        message = isinstance(step, Message)
        done = bool(record["end"]) and record["end"] <= at
        shape = [[step.elements]]
        size = len(members)
        gathers, scatters = step.op == "all_gather", step.op == "reduce_scatter"
        waiting, progress = None, None
        if not done and not message:
            there = self.met.get((step.group, record["seq"]), {})
            waiting, progress = self._plan(number, members, there, record["start"])
        return {
            "seq": record["seq"], "group": step.group, "op": step.op,
            "state": "completed" if done else "failed" if failing else "started",
            "input_sizes": [[step.elements * size]] if scatters else shape,
            "output_sizes": [[step.elements * size]] if gathers else shape,
            "dtype": "float32" if message else step.dtype, "root": -1 if message else step.root,
            "peer": step.peer if message else -1, "reduce_op": "" if message else step.reduce_op, "bytes": 4 * step.elements,
            "algorithm": "" if message else "ring", "reason": "the model", "plan_step": progress, "waiting_for": waiting,
            "scheduled_ns": self._ns(record["start"], skew), "started_ns": self._ns(record["start"], skew),
            "finished_ns": self._ns(record["end"] if done else at, skew) if done or failing else 0,
            "call_site": step.site, "error": "timed out: no end after 5 s" if failing and not done else None,
            "async": getattr(step, "is_async", False), "timeout_s": None, "splits": None,
        }  # fmt: skip

    def _plan(
        self, number: int, members: list[int], there: dict[int, Any], start: float
    ) -> tuple[list[int], list[int]]:
        """A ring: each waits for the one before; how far it is depends on the distance from the edge that does not move."""
        size, me = len(members), members.index(number)
        before = members[me - 1]
        stuck = [
            place for place, rank in enumerate(members)
            if members[place - 1] not in there
            or (self.broken and {self.cluster.host(rank), self.cluster.host(members[place - 1])} == set(self.broken))
        ]  # fmt: skip
        distance = min(((me - place) % size for place in stuck), default=0)
        return [members.index(before)], [distance, 2 * (size - 1)]
