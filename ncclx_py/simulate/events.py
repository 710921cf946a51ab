"""Plays a schedule on a cluster, event by event, with all events of one instant at once: fast enough for thousands of ranks.

    outcome = play(schedule, cluster)
    outcome.seconds, outcome.busiest(5), outcome.ended

The model is that of ``plans/replay.py``, which plays one event after another and is what the tests compare this with: a
message takes α, of which each end is busy for OVERHEAD·α; bytes flow over pipes that their flows share evenly. Added are
tiers of switches, failed and slow NICs, late and slow ranks (cluster.py). Symmetric ranks do the same at the same instant, so
that one round of array operations moves them all. Where something is wrong on a large cluster, every rank has instants of its
own: events within `grain` seconds are then moved in one round, each with its own time, and only the shares of pipes and the
order of a rank's work are coarser by as much.
"""

from __future__ import annotations

import heapq
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ncclx_py.plans.topology import OVERHEAD
from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.flows import Flows
from ncclx_py.simulate.schedule import LOCAL, RECEIVE, SEND, Floats, Ints, Schedule
from ncclx_py.simulate.wiring import Links, Pipes, Wiring

INSTANT = 1e-10  # seconds: events that are closer than this are at one time
_NEVER = np.iinfo(np.int64).max
_TRAVEL = 1 - 2 * OVERHEAD

Handler = Callable[[Ints, Floats], None]


@dataclass(frozen=True)
class Outcome:
    """`seconds` until the last rank is done and `finished` when each is; `started` and `ended` of every step; the bytes that
    went through each pipe of `links`; `player` has the steps themselves."""

    seconds: float
    finished: Floats
    started: Floats
    ended: Floats
    pipe_bytes: Floats
    links: Links
    rounds: int
    player: Player

    def busiest(self, count: int, only: str = "") -> list[tuple[str, float, float]]:
        """(name, bytes, share of the time that it was full) of the pipes with the largest share; `only` filters names."""
        with np.errstate(invalid="ignore", divide="ignore"):
            share = self.pipe_bytes / self.links.capacity / max(self.seconds, INSTANT)
        found: list[tuple[str, float, float]] = []
        for pipe in np.argsort(-np.nan_to_num(share), kind="stable"):
            if len(found) == count or not self.pipe_bytes[pipe]:
                break
            if pipe != len(share) - 1 and only in self.links.name(int(pipe)):
                found.append((self.links.name(int(pipe)), float(self.pipe_bytes[pipe]), float(share[pipe])))
        return found


def play(
    schedule: Schedule,
    cluster: Cluster,
    grain: float = INSTANT,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Plays all steps; `progress` is told now and then how many of how many have ended.

    Raises ValueError when the schedule is for another number of ranks, or never ends.
    """
    if schedule.ranks != cluster.topology.size:
        raise ValueError(f"The schedule is for {schedule.ranks} ranks, but the cluster has {cluster.topology.size}.")
    links = Wiring(cluster, schedule)
    return Player(schedule, links, cluster.topology.gamma, max(grain, INSTANT), progress, cluster).run()


class Player:
    """The state of all ranks and steps. What handles an event takes steps and the time of each.

    `cluster` says which ranks are late or slow; None: none.
    """

    def __init__(
        self,
        schedule: Schedule,
        links: Links,
        gamma: float,
        grain: float = INSTANT,
        progress: Callable[[int, int], None] | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        self.schedule, self.links, self.gamma, self.grain, self.progress = schedule, links, gamma, grain, progress
        self.flows = Flows(links.capacity, links.width, grain)
        ranks, steps = schedule.ranks, schedule.steps
        sizes = np.array([shape.steps for shape in schedule.shapes])
        shape_base = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self.rank_of = schedule.rank_of
        self.row = np.arange(steps) - np.repeat(schedule.base - shape_base[schedule.shape_of], sizes[schedule.shape_of])
        self.kind = np.concatenate([shape.kind for shape in schedule.shapes])
        self.reduces = np.concatenate([shape.reduces for shape in schedule.shapes])
        self.size = np.concatenate([shape.size for shape in schedule.shapes])
        self.at_start = _stacked([shape.at_start for shape in schedule.shapes])
        self.at_end = _stacked([shape.at_end for shape in schedule.shapes])
        self.waits = np.concatenate([shape.waits for shape in schedule.shapes])[self.row]
        self.ready_at = np.zeros(steps)  # the latest of what a step has waited for
        self.free, self.slowness = np.zeros(ranks), np.ones(ranks)
        for rank, delay in cluster.delays.items() if cluster else ():
            self.free[rank] = delay
        for rank, factor in cluster.slowness.items() if cluster else ():
            self.slowness[rank] = factor
        self.is_even = bool((self.slowness == 1).all())
        self.posted, self.wanted, self.arrived = (np.full(steps, -1.0) for _ in range(3))
        self.started, self.ended = np.full(steps, np.nan), np.full(steps, np.nan)
        self.pushed = np.full(steps, -1.0)
        self.held = np.zeros(steps, np.bool_)  # a send whose connection still carries the one before
        self.held[schedule.next_send[schedule.next_send >= 0]] = True
        self.left = steps
        self.heap: list[int] = []
        self.due: dict[int, list[tuple[Handler, Ints, Floats]]] = {}
        self.window = 0

    def run(self) -> Outcome:
        ready = np.flatnonzero(self.waits == 0)
        self._at(self.free[self.rank_of[ready]], self._start, ready)
        rounds = told = 0
        while True:
            window = min(self.heap[0] if self.heap else _NEVER, self.flows.next_end())
            if window == _NEVER:
                break
            self.window = window
            rounds += 1
            arrived, times = self.flows.close(window)
            if len(arrived):
                self._through(arrived, times)
            while self.heap and self.heap[0] == window:
                heapq.heappop(self.heap)
                for handler, steps, times in _merged(self.due.pop(window)):
                    handler(steps, times)
            self.flows.settle(window)
            if self.progress is not None and rounds - told >= 500:
                told = rounds
                self.progress(self.schedule.steps - self.left, self.schedule.steps)
        if self.left:
            raise ValueError(f"The plan never ends: {self.left} steps wait for something that no other step does.")
        finished = np.zeros(self.schedule.ranks)
        np.maximum.at(finished, self.rank_of, self.ended)
        seconds = float(finished.max(initial=0.0))
        return Outcome(seconds, finished, self.started, self.ended, self.flows.bytes, self.links, rounds, self)

    def _at(self, times: Floats, handler: Handler, steps: Ints) -> None:
        """Has each of `steps` handled at its time."""
        if not len(steps):
            return
        windows = np.maximum(np.floor(times / self.grain + 0.5).astype(np.int64), self.window)
        if windows[0] == windows[-1] and (windows == windows[0]).all():
            self._put(int(windows[0]), handler, steps, times)
            return
        order = np.argsort(windows, kind="stable")
        windows, steps, times = windows[order], steps[order], times[order]
        cuts = [0, *(np.flatnonzero(np.diff(windows)) + 1).tolist(), len(steps)]
        for first, last in itertools.pairwise(cuts):
            self._put(int(windows[first]), handler, steps[first:last], times[first:last])

    def _put(self, window: int, handler: Handler, steps: Ints, times: Floats) -> None:
        if window not in self.due:
            self.due[window] = []
            heapq.heappush(self.heap, window)
        self.due[window].append((handler, steps, times))

    def _busy(self, ranks: Ints, times: Floats, durations: Floats) -> Floats:
        """Occupies each rank's thread from its times on, for its durations, one after the other; returns when each is over."""
        durations = durations if self.is_even else durations * self.slowness[ranks]
        if len(ranks) == 1 or (np.diff(ranks) > 0).all():
            over = np.maximum(self.free[ranks], times) + durations
            self.free[ranks] = over
            return over
        order = np.lexsort((times, ranks))
        ranks, times, durations = ranks[order], times[order], durations[order]
        first = np.concatenate([[True], np.diff(ranks) > 0])
        group = np.cumsum(first) - 1
        total = np.cumsum(durations)
        before = total - durations
        # over_i = total_i + max over j ≤ i of (ready_j − before_j), rank by rank: later ranks are lifted above earlier ones.
        ready = np.where(first, np.maximum(times, self.free[ranks]), times) - before
        lift = (ready.max() - ready.min() + 1.0) * group
        over = np.maximum.accumulate(ready + lift) - lift + total
        last = np.concatenate([first[1:], [True]])
        self.free[ranks[last]] = over[last]
        result = np.empty_like(over)
        result[order] = over
        return result

    def _start(self, steps: Ints, times: Floats) -> None:
        self.started[steps] = times
        kinds = self.kind[self.row[steps]]
        for kind, handler in ((SEND, self._start_sends), (RECEIVE, self._start_receives), (LOCAL, self._start_local)):
            these = kinds == kind
            if these.any():
                handler(steps[these], times[these])
        self._release(steps, times, self.at_start)

    def _start_local(self, steps: Ints, times: Floats) -> None:
        self._flow(steps, times, self.links.copying(steps), self.size[self.row[steps]])

    def _start_sends(self, sends: Ints, times: Floats) -> None:
        posted = self._busy(self.rank_of[sends], times, OVERHEAD * self.links.alpha(sends))
        self.posted[sends] = posted
        local = self.links.is_local(sends)
        self._at(posted[~local], self._push, sends[~local])
        offered = sends[local]
        self._meet(offered[self.wanted[self.schedule.match[offered]] >= 0])

    def _start_receives(self, receives: Ints, times: Floats) -> None:
        self.wanted[receives] = times
        match = self.schedule.match[receives]
        local = self.links.is_local(receives)
        offered = match[local]
        self._meet(offered[self.posted[offered] >= 0])
        here = ~local & (self.arrived[match] >= 0)
        self._at(np.maximum(times, self.arrived[match])[here], self._take, receives[here])

    def _meet(self, sends: Ints) -> None:
        """Inside a host the receiver copies once it wants the message and has seen that it is there."""
        if len(sends):
            receives = self.schedule.match[sends]
            seen = self.posted[sends] + _TRAVEL * self.links.alpha(sends)
            self._at(np.maximum(seen, self.wanted[receives]), self._pull, receives)

    def _pull(self, receives: Ints, times: Floats) -> None:
        busy = self._busy(self.rank_of[receives], times, OVERHEAD * self.links.alpha(receives))
        self._at(busy, self._copy, receives)

    def _copy(self, receives: Ints, times: Floats) -> None:
        size = self.size[self.row[self.schedule.match[receives]]]
        self._flow(receives, times, self.links.inside(receives), size)

    def _push(self, sends: Ints, times: Floats) -> None:
        """A channel is a connection: its messages leave one after another."""
        self.pushed[sends] = times
        clear = ~self.held[sends]
        self._leave(sends[clear], times[clear])

    def _leave(self, sends: Ints, times: Floats) -> None:
        if len(sends):
            self._flow(sends, times, self.links.between(sends), self.size[self.row[sends]])

    def _flow(self, owners: Ints, times: Floats, pipes: Pipes, sizes: Floats) -> None:
        some = sizes > 0
        if some.any():
            rows, share = pipes
            self.flows.open(owners[some], times[some], rows[some], None if share is None else share[some], sizes[some])
        if not some.all():
            self._through(owners[~some], times[~some])

    def _through(self, owners: Ints, times: Floats) -> None:
        """The last bytes of these flows are through."""
        kinds = self.kind[self.row[owners]]
        sends = kinds == SEND
        if sends.any():
            self._sent(owners[sends], times[sends])
        receives = kinds == RECEIVE
        if receives.any():
            self._complete(self.schedule.match[owners[receives]], times[receives])
        if not sends.all():
            self._reduce(owners[~sends], times[~sends])

    def _sent(self, sends: Ints, times: Floats) -> None:
        following = self.schedule.next_send[sends]
        behind = following >= 0
        self.held[following[behind]] = False
        behind &= self.pushed[following] >= 0
        self._leave(following[behind], np.maximum(times[behind], self.pushed[following[behind]]))
        self._complete(sends, times)
        arrived = times + _TRAVEL * self.links.alpha(sends)
        self.arrived[sends] = arrived
        receives = self.schedule.match[sends]
        wanted = self.wanted[receives] >= 0
        self._at(np.maximum(arrived, self.wanted[receives])[wanted], self._take, receives[wanted])

    def _take(self, receives: Ints, times: Floats) -> None:
        """Between hosts: the receiver takes what has arrived, and combines it."""
        busy = OVERHEAD * self.links.alpha(receives)
        if self.gamma:
            rows = self.row[receives]
            busy = busy + np.where(self.reduces[rows], self.size[rows] * self.gamma, 0.0)
        self._at(self._busy(self.rank_of[receives], times, busy), self._complete, receives)

    def _reduce(self, steps: Ints, times: Floats) -> None:
        """The bytes are there; a reduction still has to be computed."""
        rows = self.row[steps]
        reduces = self.reduces[rows] & (self.gamma > 0)
        if reduces.any():
            durations = self.size[rows[reduces]] * self.gamma
            over = self._busy(self.rank_of[steps[reduces]], times[reduces], durations)
            self._at(over, self._complete, steps[reduces])
        if not reduces.all():
            self._complete(steps[~reduces], times[~reduces])

    def _complete(self, steps: Ints, times: Floats) -> None:
        self.ended[steps] = times
        self.left -= len(steps)
        self._release(steps, times, self.at_end)

    def _release(self, steps: Ints, times: Floats, successors: tuple[Ints, Ints]) -> None:
        pointers, indexes = successors
        rows = self.row[steps]
        counts = pointers[rows + 1] - pointers[rows]
        total = int(counts.sum())
        if not total:
            return
        ends = np.cumsum(counts)
        places = np.arange(total) - np.repeat(ends - counts, counts) + np.repeat(pointers[rows], counts)
        found = indexes[places] + np.repeat(self.schedule.base[self.rank_of[steps]], counts)
        np.subtract.at(self.waits, found, 1)
        np.maximum.at(self.ready_at, found, np.repeat(times, counts))
        ready = np.unique(found[self.waits[found] == 0])
        self._at(self.ready_at[ready], self._start, ready)


def _merged(parts: list[tuple[Handler, Ints, Floats]]) -> list[tuple[Handler, Ints, Floats]]:
    """Neighbours with one handler as one."""
    found: list[tuple[Handler, Ints, Floats]] = []
    for handler, group in itertools.groupby(parts, key=operator.itemgetter(0)):
        several = list(group)
        steps, times = (np.concatenate([part[index] for part in several]) for index in (1, 2))
        found.append((handler, steps, times))
    return found


def _stacked(rows: list[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    """The successor tables of several shapes as one; indexes stay within their shape."""
    pointers, offset = [np.zeros(1, np.int64)], 0
    for starts, indexes in rows:
        pointers.append(starts[1:] + offset)
        offset += len(indexes)
    return np.concatenate(pointers), np.concatenate([indexes for _, indexes in rows])
