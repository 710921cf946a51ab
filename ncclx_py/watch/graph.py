"""Who waits for whom, over all groups of a job; and where that chain ends.

A rank that is in a collective waits for the ranks of the group that have not called it; those may be in another collective
of another group, and wait for others. Following the chain from a call that has waited too long ends at a *root*:

- a rank that is behind and waits for nobody (`Behind`), or of which there is no dump;
- a circle of ranks, each in a collective that the next has not called (`Circle`);
- a collective that every rank has called and that ends nowhere (`Inside`).

Everything else that waits is a cascade of these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ncclx_py.watch.circles import circles
from ncclx_py.watch.grid import is_counted
from ncclx_py.watch.model import COMPLETED, FAILED, PEER_OPS, Group, Job, Open, Place, RankTrace

PATIENCE = 10.0  # seconds after which a wait in a dump that nothing but curiosity caused is a stall
LEFT = ("exit",)  # reasons of dumps that are written when the process ends

_ROOMS = ("runtime/", "transport/", "elastic/", "faults/", "dispatch.py", "watch/triggers.py", "watch/watcher.py")
_OURS = (  # parts of paths: where a rank that waits for others is
    *(f"/ncclx_py/{room}" for room in _ROOMS),
    *(f"/torch/{part}" for part in ("distributed/", "futures/", "autograd/graph.py", "cuda/")),
)
_MEETING = ("init_process_group", "rendezvous", "_store_based_barrier")


@dataclass(slots=True)
class Behind:
    """Ranks that have not made the call at `place`, and are in no other; `waiting` are those that wait there."""

    place: Place
    ranks: list[int]
    waiting: list[int]


@dataclass(slots=True)
class Circle:
    """`steps`: a rank, the call it is in, and so on; each call lacks the next rank, the last one the first."""

    steps: list[tuple[int, Open]]


@dataclass(slots=True)
class Inside:
    """A collective that all its ranks have called, or a message that both its ranks know of, and that does not end."""

    place: Place
    calls: dict[int, Open]


@dataclass(slots=True)
class Findings:
    behind: list[Behind] = field(default_factory=list)
    circles: list[Circle] = field(default_factory=list)
    inside: list[Inside] = field(default_factory=list)
    stalled: list[tuple[int, Open]] = field(default_factory=list)  # where the search began

    @property
    def victims(self) -> list[int]:
        return sorted({rank for rank, _ in self.stalled})


class Waits:
    """The graph of a job; `patience` as in `PATIENCE`."""

    def __init__(self, job: Job, patience: float = PATIENCE) -> None:
        self.job, self.patience = job, patience
        self._went_on = {rank: _last_success(trace) for rank, trace in job.ranks.items()}
        self.reached = {rank: _reached(job, trace) for rank, trace in job.ranks.items()}
        self._lacking: dict[Place, list[int]] = {}
        self._blocking: dict[int, list[Open]] = {}

    def find(self) -> Findings:
        """The roots of everything that has waited too long."""
        found = Findings()
        for rank, trace in self.job.ranks.items():
            found.stalled += [(rank, call) for call in trace.open if self.is_stalled(trace, call)]
        behind: dict[Place, set[int]] = {}
        inside: dict[Place, dict[int, Open]] = {}
        edges: dict[int, list[int]] = {}
        todo = found.victims
        seen = set(todo)
        while todo:
            rank = todo.pop()
            edges[rank] = []
            for call in self.blocking(rank) or _oldest(self.job.ranks[rank].open):
                awaited = self.awaited(call, rank)
                if not awaited:
                    inside.setdefault(call.place, {})[rank] = call
                for other in awaited:
                    if self.blocking(other):
                        edges[rank].append(other)
                        if other not in seen:
                            seen.add(other)
                            todo.append(other)
                    else:
                        behind.setdefault(call.place, set()).add(other)
        found.behind = [Behind(place, sorted(ranks), self.waiting_at(place)) for place, ranks in behind.items()]
        found.behind.sort(key=lambda one: self._since(one.place))
        found.inside = [Inside(place, calls) for place, calls in inside.items()]
        found.circles = [Circle([(rank, self._call_towards(rank, after)) for rank, after in _turns(ring)])
                         for ring in circles(edges)]  # fmt: skip
        return found

    def is_stalled(self, trace: RankTrace, call: Open) -> bool:
        """Whether a call has waited longer than a healthy one would: it failed and the rank has not got over it, or it is
        old when the dump is written."""
        if call.state == FAILED:
            return call.ended >= self._went_on[trace.rank]
        waited = (trace.time_ns - call.since) / 1e9
        return waited >= self.patience or (call.timeout_s > 0 and waited >= 0.8 * call.timeout_s)

    def lacking(self, place: Place) -> list[int]:
        """The ranks of the group that have not made a call, and those that are not known to have."""
        known = self._lacking.get(place)
        if known is None:
            known = [rank for rank in place.group.ranks if self.reached.get(rank, {}).get(place.group, -1) < place.seq]
            self._lacking[place] = known
        return known

    def blocking(self, rank: int) -> list[Open]:
        """The calls that a rank's program waits in; none where the program is elsewhere or there is no dump."""
        known = self._blocking.get(rank)
        if known is None:
            trace = self.job.ranks.get(rank)
            known = self._blocking[rank] = [] if trace is None else blocking(trace)
        return known

    def awaited(self, call: Open, rank: int) -> list[int]:
        """The ranks that must do something before `call` of `rank` can go on; none when all have joined it."""
        if call.asked.op not in PEER_OPS:
            return self.lacking(call.place)
        if call.asked.peer < 0:
            return []
        peer = call.group.ranks[call.asked.peer]
        return [] if self._answers(peer, rank, call) else [peer]

    def _answers(self, peer: int, rank: int, call: Open) -> bool:
        """Whether the other end of a message is in the matching call."""
        others = ("recv", "recv_any_source") if call.asked.op == "send" else ("send",)
        return any(
            one.group == call.group
            and one.asked.op in others
            and (one.asked.peer < 0 or one.group.ranks[one.asked.peer] == rank)
            for one in self.blocking(peer)
        )

    def _call_towards(self, rank: int, other: int) -> Open:
        """The call of `rank` that waits for `other`."""
        return next(call for call in self.blocking(rank) if other in self.awaited(call, rank))

    def minority(self, circle: Circle) -> list[int]:
        """The ranks in that call of a circle in which the fewest are; all of the circle's where none has fewest."""
        crowds = {call.place: self.waiting_at(call.place) for _, call in circle.steps}
        smallest = min(len(crowd) for crowd in crowds.values())
        few = [crowd for crowd in crowds.values() if len(crowd) == smallest]
        return few[0] if len(few) == 1 else sorted({rank for crowd in few for rank in crowd})

    def waiting_at(self, place: Place) -> list[int]:
        """The ranks that are in a call, or would be after others of the same group that came before."""
        return sorted(rank for rank in place.group.ranks if any(_leads_to(call, place) for call in self.blocking(rank)))

    def _since(self, place: Place) -> int:
        return min((call.since for rank in self.waiting_at(place) for call in self.blocking(rank)), default=0)


def _leads_to(call: Open, place: Place) -> bool:
    if place.ends or call.ends:
        return call.place == place
    return call.group == place.group and call.seq >= place.seq


def _turns(ring: list[int]) -> Iterable[tuple[int, int]]:
    return zip(ring, [*ring[1:], ring[0]])


def _oldest(calls: list[Open]) -> list[Open]:
    """The first open call of each group."""
    oldest: dict[Group, Open] = {}
    for call in calls:
        oldest.setdefault(call.group, call)
    return list(oldest.values())


def blocking(trace: RankTrace) -> list[Open]:
    """The calls of a dump that its program cannot get past: the one it has made and waits in, else, where its main thread
    waits inside the library or that is not known, the oldest of each group that it started and has not seen end."""
    calls = trace.open
    held = [call for call in calls if not call.is_async or call.state == FAILED]
    if held:
        first = min(held, key=lambda call: (call.state != FAILED, call.since))
        return [first]
    if not calls or trace.reason in LEFT or not waits_inside(trace):
        return []
    return _oldest(calls)


def waits_inside(trace: RankTrace) -> bool:
    """Whether the main thread is in the library, as far as its stack tells; True without a stack."""
    frames = main_stack(trace)
    return not frames or any(part in frames[-1] for part in _OURS)


def is_meeting(trace: RankTrace) -> bool:
    """Whether the main thread is where the first group is made."""
    return any(part in frame for frame in main_stack(trace) for part in _MEETING)


def main_stack(trace: RankTrace) -> tuple[str, ...]:
    """The frames of the main thread, the innermost last."""
    return trace.threads.get("MainThread", ())


def own_frame(trace: RankTrace) -> str:
    """Where the user's program is: the innermost frame of the main thread that is not of a library; "" if unknown."""
    frames = main_stack(trace)
    own = [frame for frame in frames if not any(part in frame for part in ("/site-packages/", "/lib/python", *_OURS))]
    own = [frame for frame in own if not frame.startswith("<")]
    return (own or list(frames) or [""])[-1]


def _last_success(trace: RankTrace) -> int:
    """When the latest call was made that has completed; ns."""
    done = trace.table["state"] == COMPLETED if trace.rows else np.zeros(0, dtype=bool)
    return int(trace.table["scheduled"][done].max()) if done.any() else 0


def _reached(job: Job, trace: RankTrace) -> dict[Group, int]:
    """The number of the latest call of each group: 0 once the group is made or being made."""
    table = trace.table
    reached: dict[Group, int] = {}
    if not trace.rows:
        return reached
    counted = np.array([is_counted(one) for one in job.asked])[table["asked"]]
    seqs = np.where(counted, table["seq"], 0)
    for number in np.unique(table["group"]):
        reached[job.groups[number]] = int(seqs[table["group"] == number].max())
    return reached
