"""What a plan costs when its steps are played on the links, event by event: the reference for the closed forms of cost.py.

    replay(plan, topology, itemsize=4).seconds

The model, in LogP's terms. A message of level l takes α_l on its own: OVERHEAD·α_l at the sender, the same at the
receiver, and travel between. Each rank has one thread for these overheads and for γ. Bytes flow over shared pipes, which
their flows divide evenly: inside a host the sender's and the receiver's port (`intra.bandwidth` each) and the host's
memory, where the topology limits it; between hosts the NIC of the sender's rail on both hosts, each direction apart. Inside a host
the receiver reads what the sender offers, so bytes flow once both are ready; between hosts the sender pushes, and buffers
in between are large enough. Local copies and reductions use the rank's receiving port.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ncclx_py.plans.plan import Plan, Step
from ncclx_py.plans.topology import OVERHEAD, Topology

Pipe = tuple[str, int, int]


@dataclass(frozen=True)
class Replayed:
    """`seconds` until the last rank is done, when each rank is done, and the bytes that left each NIC (host, rail)."""

    seconds: float
    finished: tuple[float, ...]
    nic_bytes: dict[tuple[int, int], int]


def replay(plan: Plan, topology: Topology, itemsize: int) -> Replayed:
    """Plays all ranks' steps. Raises ValueError when the plan has native steps, is for another world or never ends."""
    if plan.problem.size != topology.size or len(plan.ranks) != topology.size:
        raise ValueError(f"The plan is for {plan.problem.size} ranks, but the topology has {topology.size}.")
    return _Replay(plan, topology, itemsize).run()


@dataclass(eq=False)
class _Flow:
    """Bytes on their way through `pipes`; `arrived` is called with the time when the last one is through."""

    left: float
    pipes: tuple[Pipe, ...]
    arrived: Callable[[float], None]
    since: float = 0.0
    rate: float = 0.0
    version: int = 0


@dataclass(eq=False)
class _Message:
    """A send and the step that receives it, by index; times are when they were ready, or negative."""

    source: int
    target: int
    lane: int
    alpha: float
    local: bool
    send: int = -1
    receive: int = -1
    posted: float = -1.0
    wanted: float = -1.0
    arrived: float = -1.0


@dataclass(eq=False)
class _Rank:
    steps: tuple[Step, ...]
    waits: list[int]  # per step: events that it still waits for
    at_start: list[list[int]]  # per step: steps that may start once it has started
    at_end: list[list[int]]  # and once it is complete
    free: float = 0.0  # when the rank's thread has nothing left to do
    done: float = 0.0


class _Pipes:
    """Flows that share pipes evenly; each runs at the pace of its tightest pipe."""

    def __init__(self, capacity: Callable[[Pipe], float], at: Callable[[float, Callable[[float], None]], None]) -> None:
        self._capacity, self._at = capacity, at
        self._flows: dict[Pipe, dict[_Flow, None]] = {}

    def open(self, now: float, flow: _Flow) -> None:
        if not flow.left:
            flow.arrived(now)
            return
        for pipe in flow.pipes:
            self._flows.setdefault(pipe, {})[flow] = None
        flow.since = now
        self._share(now, flow.pipes)

    def _share(self, now: float, changed: tuple[Pipe, ...]) -> None:
        touched = {flow: None for pipe in changed for flow in self._flows[pipe]}
        for flow in touched:
            flow.left = max(0.0, flow.left - flow.rate * (now - flow.since))
            flow.since = now
            flow.rate = min(self._capacity(pipe) / len(self._flows[pipe]) for pipe in flow.pipes)
            flow.version += 1
            self._at(now + flow.left / flow.rate, self._end(flow, flow.version))

    def _end(self, flow: _Flow, version: int) -> Callable[[float], None]:
        def end(now: float) -> None:
            if flow.version != version:
                return  # its pace has changed since: another end is under way
            for pipe in flow.pipes:
                del self._flows[pipe][flow]
            self._share(now, flow.pipes)
            flow.arrived(now)

        return end


class _Replay:
    def __init__(self, plan: Plan, topology: Topology, itemsize: int) -> None:
        self.topology, self.itemsize = topology, itemsize
        self.ranks = [_rank_state(ranked.steps) for ranked in plan.ranks]
        self.left = sum(len(rank.steps) for rank in self.ranks)
        self.channels: dict[tuple[int, int, int], deque[_Message]] = {}
        self.connections: dict[tuple[int, int, int], deque[_Flow]] = {}
        self.pipes = _Pipes(self._capacity, self._at)
        self.nic_bytes: dict[tuple[int, int], int] = {}
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.count = 0

    def run(self) -> Replayed:
        for rank, state in enumerate(self.ranks):
            for index, waits in enumerate(state.waits):
                if not waits:
                    self._at(0.0, self._starter(rank, index))
        while self.events:
            now, _, action = heapq.heappop(self.events)
            action(now)
        if self.left:
            raise ValueError(f"The plan never ends: {self.left} steps wait for something that no other step does.")
        return Replayed(max(state.done for state in self.ranks), tuple(s.done for s in self.ranks), self.nic_bytes)

    def _at(self, time: float, action: Callable[[float], None]) -> None:
        self.count += 1
        heapq.heappush(self.events, (time, self.count, action))

    def _starter(self, rank: int, index: int) -> Callable[[float], None]:
        return lambda now: self._start(now, rank, index)

    def _busy(self, rank: int, now: float, duration: float) -> float:
        """Occupies the rank's thread; returns when it is free again."""
        state = self.ranks[rank]
        state.free = max(state.free, now) + duration
        return state.free

    def _start(self, now: float, rank: int, index: int) -> None:
        step = self.ranks[rank].steps[index]
        if step.op == "send":
            assert step.peer is not None
            self._post(now, self._message(rank, step.peer, step.lane, sends=True), index)
        elif step.peer is not None:
            self._want(now, self._message(step.peer, rank, step.lane, sends=False), index)
        elif step.op == "native":
            raise ValueError(f"Step {index} of rank {rank} is native: only plans of single messages can be replayed.")
        else:
            pipes = (("port in", rank, 0), *self._memory(rank))
            self.pipes.open(now, _Flow(self._size(step), pipes, lambda end: self._finish(end, rank, index)))
        self._release(now, rank, self.ranks[rank].at_start[index])

    def _message(self, source: int, target: int, lane: int, sends: bool) -> _Message:
        """The oldest message of the channel whose other end is there already, or a new one."""
        queue = self.channels.setdefault((source, target, lane), deque())
        if queue and (queue[0].send < 0 if sends else queue[0].receive < 0):
            return queue.popleft()
        local = self.topology.is_local(source, target)
        link = self.topology.intra if local else self.topology.inter
        queue.append(_Message(source, target, lane, link.alpha, local))
        return queue[-1]

    def _post(self, now: float, message: _Message, index: int) -> None:
        message.send = index
        message.posted = self._busy(message.source, now, OVERHEAD * message.alpha)
        if message.local:
            self._meet(message)
            return
        size = self._size(self.ranks[message.source].steps[index])
        host, rail = self.topology.host_of[message.source], self.topology.rail(message.source)
        target = self.topology.host_of[message.target]
        self.nic_bytes[host, rail] = self.nic_bytes.get((host, rail), 0) + size
        flow = _Flow(size, (("nic out", host, rail), ("nic in", target, rail)), lambda end: self._sent(end, message))
        self._at(message.posted, lambda then: self._push(then, flow, message))

    def _push(self, now: float, flow: _Flow, message: _Message) -> None:
        """A channel is a connection: its messages leave one after another."""
        queue = self.connections.setdefault((message.source, message.target, message.lane), deque())
        queue.append(flow)
        if len(queue) == 1:
            self.pipes.open(now, flow)

    def _sent(self, now: float, message: _Message) -> None:
        """The last byte has left the sender's host."""
        queue = self.connections[message.source, message.target, message.lane]
        queue.popleft()
        if queue:
            self.pipes.open(now, queue[0])
        self._complete(now, message.source, message.send)
        message.arrived = now + (1 - 2 * OVERHEAD) * message.alpha
        if message.receive >= 0:
            self._at(message.arrived, lambda then: self._take(then, message))

    def _want(self, now: float, message: _Message, index: int) -> None:
        message.receive, message.wanted = index, now
        if message.local:
            self._meet(message)
        elif message.arrived >= 0:
            self._at(max(now, message.arrived), lambda then: self._take(then, message))

    def _meet(self, message: _Message) -> None:
        """Inside a host: the receiver copies once it wants the message and has seen that it is there."""
        if message.posted >= 0 and message.wanted >= 0:
            seen = max(message.posted + (1 - 2 * OVERHEAD) * message.alpha, message.wanted)
            self._at(seen, lambda now: self._pull(now, message))

    def _pull(self, now: float, message: _Message) -> None:
        start = self._busy(message.target, now, OVERHEAD * message.alpha)
        pipes = (("port out", message.source, 0), ("port in", message.target, 0), *self._memory(message.source))
        size = self._size(self.ranks[message.source].steps[message.send])

        def arrived(end: float) -> None:
            self._complete(end, message.source, message.send)
            self._finish(end, message.target, message.receive)

        self._at(start, lambda then: self.pipes.open(then, _Flow(size, pipes, arrived)))

    def _take(self, now: float, message: _Message) -> None:
        """Between hosts: the receiver takes what has arrived."""
        ready = self._busy(message.target, now, OVERHEAD * message.alpha)
        self._finish(ready, message.target, message.receive)

    def _finish(self, now: float, rank: int, index: int) -> None:
        """The bytes of a receiving or local step are there; a reduction still has to be computed."""
        step = self.ranks[rank].steps[index]
        if step.op == "reduce" and self.topology.gamma:
            now = self._busy(rank, now, self._size(step) * self.topology.gamma)
        self._at(now, lambda then: self._complete(then, rank, index))

    def _complete(self, now: float, rank: int, index: int) -> None:
        state = self.ranks[rank]
        self.left -= 1
        state.done = max(state.done, now)
        self._release(now, rank, state.at_end[index])

    def _release(self, now: float, rank: int, steps: list[int]) -> None:
        for index in steps:
            self.ranks[rank].waits[index] -= 1
            if not self.ranks[rank].waits[index]:
                self._at(now, self._starter(rank, index))

    def _size(self, step: Step) -> int:
        span = step.dst if step.src is None else step.src
        return self.itemsize * (span.length if span else 0)

    def _memory(self, rank: int) -> tuple[Pipe, ...]:
        return (("memory", self.topology.host_of[rank], 0),) if self.topology.memory else ()

    def _capacity(self, pipe: Pipe) -> float:
        kind, host, rail = pipe
        if kind == "memory":
            return self.topology.memory
        return self.topology.nic(host, rail) if kind.startswith("nic") else self.topology.intra.bandwidth


def _rank_state(steps: tuple[Step, ...]) -> _Rank:
    waits = [len(step.deps) for step in steps]
    at_start: list[list[int]] = [[] for _ in steps]
    at_end: list[list[int]] = [[] for _ in steps]
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        for dep in step.deps:
            at_end[dep].append(index)
        if step.lane in last:
            before = last[step.lane]
            (at_start if steps[before].op == "send" else at_end)[before].append(index)
            waits[index] += 1
        last[step.lane] = index
    return _Rank(steps, waits, at_start, at_end)
