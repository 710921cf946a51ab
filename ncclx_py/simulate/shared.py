"""Plans played on hosts that share one machine, as emulated hosts do: the engine of events.py, with cores in short supply.

    seconds = call_seconds(plan, 4, cluster, machine)

Each rank has one thread, which does one thing after another; `machine.cores` of them run at a time, and share them evenly when
there are more. A message costs its sender and its receiver a part of a core, and more where the receiver slept; so do bytes
between hosts, and copies (a message inside a host is copied by its sender, where the neighbours cannot read it in place, and
again by its receiver). Shaped NICs let a burst pass, and lose a part where many streams share them, unevenly. Calls are played
as they are timed: some in a row, after one that does not count, each rank by its own clock; the slowest counts.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ncclx_py.plans.plan import Plan, RankPlan, Span, Step
from ncclx_py.plans.topology import Link
from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.events import INSTANT, Player
from ncclx_py.simulate.fair import FairFlows
from ncclx_py.simulate.machine import Machine
from ncclx_py.simulate.schedule import Floats, Ints, Schedule, from_plan
from ncclx_py.simulate.wiring import Wiring

_IN_A_ROW, _ALIKE = 8, 2  # calls that are played after the first: then they are alike; and where links have no burst
_SAMPLE_SECONDS, _MOST_INNER, _LONG = 0.05, 50, 0.3  # as in bench/timing.py
_DRAWS = 3  # of what streams hold on to: for calls that are timed one by one
_CALL_LANE = -1
_NOTHING = Span("scratch", 0, 0)
_WIRE, _POST, _TAKE, _PULL, _COPY = range(5)  # what a flow stands for: its owner is step + steps × this


def call_seconds(plan: Plan, itemsize: int, cluster: Cluster, machine: Machine) -> float:
    """Seconds of a call as it is timed (bench/timing.py). Raises ValueError where the plan cannot be played."""
    draws = range(_DRAWS if machine.spread else 1)
    alone = statistics.fmean(float(_play(plan, itemsize, cluster, machine, 1, draw).max()) for draw in draws)
    if alone >= _LONG:
        return alone
    calls = max(1, min(_MOST_INNER, math.ceil(_SAMPLE_SECONDS / max(alone, INSTANT))))
    played = min(calls, _IN_A_ROW if machine.burst else _ALIKE)
    rows = (_play(plan, itemsize, cluster, machine, 1 + played, draw) for draw in (draws if played == 1 else draws[:1]))
    return statistics.fmean(_timed(ends, calls, played) for ends in rows)


def _timed(ends: Floats, calls: int, played: int) -> float:
    """The mean of `calls` calls after the first, of which `played` were played; those that were not are like the last."""
    # A rank's clock starts when it is through with the first call: who is through early waits longest.
    slowest = (ends[:, -1] - ends[:, 0]).max()
    half = (played + 1) // 2
    others = (ends[:, -1].max() - ends[:, -1 - half].max()) / half
    return float(slowest + (calls - played) * others) / calls


def _play(plan: Plan, itemsize: int, cluster: Cluster, machine: Machine, times: int, draw: int) -> Floats:
    """When each rank ends each of so many calls in a row: `[rank, call]`; `draw` says which streams are the quick ones."""
    row = in_a_row(plan, times, cluster)
    schedule = from_plan(row, itemsize)
    player = SharedPlayer(schedule, cluster, machine, work_at_start(row, itemsize, cluster, machine), draw)
    ended = player.run().ended
    found = np.zeros((len(row.ranks), times))
    for rank, ranked in enumerate(row.ranks):
        calls = np.cumsum([step.lane == _CALL_LANE for step in ranked.steps]) - 1
        own = ended[int(schedule.base[rank]) : int(schedule.base[rank]) + len(ranked.steps)]
        waited = np.array([step.op != "send" for step in ranked.steps])
        np.maximum.at(found[rank], calls[waited], own[waited])
    return found


def in_a_row(plan: Plan, times: int, cluster: Cluster) -> Plan:
    """The plan so many times over. Each begins with a step for the call itself, once the rank is through with the one before."""
    host_of = cluster.topology.host_of
    return replace(plan, ranks=tuple(_repeated(ranked, times, host_of) for ranked in plan.ranks))


def _repeated(ranked: RankPlan, times: int, host_of: tuple[int, ...]) -> RankPlan:
    steps: list[Step] = []
    through: tuple[int, ...] = ()
    for _ in range(times):
        call = len(steps)
        steps.append(Step("copy", _CALL_LANE, None, _NOTHING, _NOTHING, through))
        lanes: set[int] = set()
        for step in ranked.steps:
            after = tuple(call + 1 + dep for dep in step.deps)
            steps.append(replace(step, deps=after if step.lane in lanes else (call, *after)))
            lanes.add(step.lane)
        through = tuple(
            number
            for number, step in enumerate(steps[call:], call)
            if step.op != "send" or (step.peer is not None and host_of[step.peer] != host_of[ranked.rank])
        )
    return replace(ranked, steps=tuple(steps))


def work_at_start(plan: Plan, itemsize: int, cluster: Cluster, machine: Machine) -> Floats:
    """Core seconds that each step takes when it starts, beside its message: a call, or the copy that neighbours read."""
    found: list[float] = []
    host_of = cluster.topology.host_of
    for ranked in plan.ranks:
        shown: set[Span] = set()
        for step in ranked.steps:
            seconds = machine.call if step.lane == _CALL_LANE else 0.0
            span = step.src
            local = step.op == "send" and step.peer is not None and host_of[step.peer] == host_of[ranked.rank]
            if local and span is not None and span.buffer != "scratch" and span not in shown:
                shown.add(span)
                seconds = machine.copy * itemsize * span.length
            if step.dst is not None:
                shown = {one for one in shown if not _overlap(one, step.dst)}
            if step.lane == _CALL_LANE:
                shown.clear()
            found.append(seconds)
    return np.array(found)


def _overlap(one: Span, other: Span) -> bool:
    return one.buffer == other.buffer and one.start < other.stop and other.start < one.stop


class SharedPlayer(Player):
    """`work` as from `work_at_start`. NICs have their burst at the start, as after a pause."""

    def __init__(self, schedule: Schedule, cluster: Cluster, machine: Machine, work: Floats, draw: int = 0) -> None:
        topology = cluster.topology  # ports and memory are what cores copy
        free = replace(topology, intra=Link(topology.intra.alpha, np.inf), memory=0.0, gamma=0.0)
        links = Wiring(replace(cluster, topology=free), schedule)
        super().__init__(schedule, links, 0.0, INSTANT)
        self.machine, self.work = machine, work
        ranks, first = schedule.ranks, len(links.capacity)
        self._threads, self._cores = first, first + ranks
        capacity = np.concatenate([links.capacity, np.ones(ranks), [float(machine.cores)]])
        shaped = np.zeros(len(capacity), np.bool_)
        shaped[: links.unlimited] = [" NIC " in links.name(pipe) for pipe in range(links.unlimited)]
        self._chance = np.random.default_rng(draw)  # which stream is quick changes from message to message
        self.fair = FairFlows(capacity, links.width + 3, INSTANT, shaped, machine.burst, machine.sharing)
        self.flows = self.fair  # type: ignore[assignment]
        self._jobs: list[deque[tuple[int, float]]] = [deque() for _ in range(ranks)]
        self._active = np.zeros(ranks, np.bool_)
        self._cost = np.where(self._between(np.arange(schedule.steps)), machine.remote, machine.local) / 2
        self._handlers: dict[int, Callable[[Ints, Floats], None]] = {
            _POST: self._posted,
            _TAKE: self._complete,
            _PULL: self._pulled,
            _COPY: self._complete,
        }

    def _between(self, steps: Ints) -> np.ndarray:
        far = self.schedule.peer[steps] >= 0
        far[far] = ~self.links.is_local(steps[far])
        return far

    # The engine's handlers, with work for the rank's thread where it has durations

    def _start_local(self, steps: Ints, times: Floats) -> None:
        self._job(_COPY, steps, self.work[steps] + self.machine.copy * self.size[self.row[steps]])

    def _start_sends(self, sends: Ints, times: Floats) -> None:
        self._job(_POST, sends, self._cost[sends] + self.work[sends])

    def _posted(self, sends: Ints, times: Floats) -> None:
        self.posted[sends] = times
        local = ~self._between(sends)
        self._push(sends[~local], times[~local])
        offered = sends[local]
        self._meet(offered[self.wanted[self.schedule.match[offered]] >= 0])

    def _leave(self, sends: Ints, times: Floats) -> None:
        size = self.size[self.row[sends]]
        self._through(sends[size == 0], times[size == 0])
        sends, size = sends[size > 0], size[size > 0]
        if not len(sends):
            return
        links = self.links.between(sends).rows
        pipes, wire = np.empty((len(sends), links.shape[1] + 3), np.int64), self.machine.wire
        pipes[:, :-3] = links
        pipes[:, -3] = self._threads + self.rank_of[sends]
        pipes[:, -2] = self._threads + self.schedule.peer[sends]
        pipes[:, -1] = self._cores
        uses = np.ones(pipes.shape)
        uses[:, -3:] = wire / 2, wire / 2, wire
        self.fair.open(sends, pipes, uses, self._holds(len(sends)) / wire, size)

    def _holds(self, streams: int) -> Floats:
        """What each stream gets of a NIC that it shares, beside others."""
        return np.exp(self.machine.spread * self._chance.standard_normal(streams))

    def _meet(self, sends: Ints) -> None:
        if len(sends):
            receives = self.schedule.match[sends]
            seen = self.posted[sends] + self._travel(sends)
            self._at(np.maximum(seen, self.wanted[receives]), self._pull, receives)

    def _pull(self, receives: Ints, times: Floats) -> None:
        size = self.size[self.row[self.schedule.match[receives]]]
        self._job(_PULL, receives, self._received(receives) + self.machine.copy * size)

    def _pulled(self, receives: Ints, times: Floats) -> None:
        self._complete(self.schedule.match[receives], times)
        self._complete(receives, times)

    def _sent(self, sends: Ints, times: Floats) -> None:
        following = self.schedule.next_send[sends]
        behind = following >= 0
        self.held[following[behind]] = False
        behind &= self.pushed[following] >= 0
        self._leave(following[behind], times[behind])
        self._complete(sends, times)
        arrived = times + self._travel(sends)
        self.arrived[sends] = arrived
        receives = self.schedule.match[sends]
        wanted = self.wanted[receives] >= 0
        self._at(np.maximum(arrived, self.wanted[receives])[wanted], self._take, receives[wanted])

    def _take(self, receives: Ints, times: Floats) -> None:
        rows = self.row[receives]
        combining = np.where(self.reduces[rows], self.size[rows] * self.machine.copy, 0.0)
        self._job(_TAKE, receives, self._received(receives) + combining)

    def _travel(self, sends: Ints) -> Floats:
        """What is left of α, which was measured between two ranks that sleep, once a core has done its part."""
        return np.maximum(0.0, self.links.alpha(sends) - 2 * self._cost[sends] - self.machine.wake)

    def _received(self, receives: Ints) -> Floats:
        """A message costs more where its receiver has nothing else to do, and so slept."""
        ranks = self.rank_of[receives]
        sleeps = ~self._active[ranks] & np.array([not self._jobs[rank] for rank in ranks])
        return self._cost[receives] + np.where(sleeps, self.machine.wake, 0.0)

    def _through(self, owners: Ints, times: Floats) -> None:
        steps, kinds = owners % self.schedule.steps, owners // self.schedule.steps
        for kind in np.unique(kinds):
            these = kinds == kind
            if kind == _WIRE:
                self._sent(steps[these], times[these])
                continue
            for rank in self.rank_of[steps[these]]:
                self._active[rank] = False
                self._next(int(rank))
            self._handlers[int(kind)](steps[these], times[these])

    # A rank's thread

    def _job(self, kind: int, steps: Ints, seconds: Floats) -> None:
        for step, duration in zip(steps.tolist(), seconds.tolist()):
            rank = int(self.rank_of[step])
            self._jobs[rank].append((step + kind * self.schedule.steps, duration))
            self._next(rank)

    def _next(self, rank: int) -> None:
        if self._active[rank] or not self._jobs[rank]:
            return
        self._active[rank] = True
        owner, seconds = self._jobs[rank].popleft()
        pipes = np.full((1, self.links.width + 3), len(self.links.capacity) - 1, np.int64)
        pipes[0, :2] = self._threads + rank, self._cores
        uses = np.zeros(pipes.shape)
        uses[0, :2] = 1.0
        self.fair.open(np.array([owner]), pipes, uses, np.ones(1), np.array([max(seconds, 1e-12)]))
