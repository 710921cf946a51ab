"""All-to-all for skewed counts: what a host sends to another host is levelled over its ranks, and so over its rails.

Pairwise rounds take as long as the busiest rank's NIC; here every NIC of a host carries its share of what the host sends
and receives, so that the busiest *host* sets the pace (in the spirit of FAST, "An efficient scheduler for all-to-all GPU
communication", 2025). All elements that go from one host to another are a *flow*:

1. Each rank of the sending host carries a share of the flow, in proportion to its NIC; it keeps what it can of its own,
   and ranks that have too much give the rest to those that have too little (inside the host).
2. Carriers send to ranks of the receiving host, of which each takes a share in proportion to its NIC.
3. These hand the elements to the ranks that they are for (inside the host).

Shares are cut into chunks, so that the three overlap. Flows from host h go to h + 1, h + 2, …: rounds are permutations.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from ncclx_py.plans.algorithms.host_rounds import HostRounds
from ncclx_py.plans.algorithms.layout import HAND_ON, INSIDE, cut, offsets, rail_weights, split
from ncclx_py.plans.plan import Problem, RankPlan, Span
from ncclx_py.plans.topology import Topology

SMALLEST_CHUNK = 1024  # elements; shorter ones cost more in steps than they gain


class Fragment(NamedTuple):
    """`length` consecutive elements of the block from rank `source` to rank `target`, from `offset` in it."""

    source: int
    target: int
    offset: int
    length: int


class Message(NamedTuple):
    """What rank `carrier` of one host sends to rank `receiver` of another at once."""

    carrier: int
    receiver: int
    chunk: int
    fragments: tuple[Fragment, ...]


class Run(NamedTuple):
    """Consecutive elements in a buffer of `rank`."""

    rank: int
    place: Span


def balanced(problem: Problem, topology: Topology, rank: int, chunks: int, window: int) -> RankPlan:
    """See above; at most `window` of the rounds between hosts are under way."""
    return _Balanced(problem, topology, rank, chunks).plan(window)


def flow(problem: Problem, topology: Topology, here: int, there: int, chunks: int) -> list[Message]:
    """The messages from host `here` to host `there`, the same whichever rank asks."""
    sources, targets = topology.hosts[here], topology.hosts[there]
    streams = {
        source: _Stream([Fragment(source, target, 0, problem.matrix[source][target]) for target in targets])
        for source in sources
    }
    total = sum(stream.length for stream in streams.values())
    if not total:
        return []
    loads = [span.length for span in cut(Span("", 0, total), rail_weights(topology, here))]
    kept = {source: streams[source].take(load) for source, load in zip(sources, loads)}
    spare = _Stream([fragment for source in sources for fragment in streams[source].rest()])
    arrivals = [span.length for span in cut(Span("", 0, total), rail_weights(topology, there))]
    receivers = iter(zip(targets, arrivals))
    receiver, room = next(receivers)
    messages = []
    for source, load in zip(sources, loads):
        carried = _Stream(kept[source])
        carried.add(spare.take(load - carried.length))
        while carried.length:
            while not room:
                receiver, room = next(receivers)
            share = min(room, carried.length)
            room -= share
            pieces = split(Span("", 0, share), max(1, min(chunks, share // SMALLEST_CHUNK)))
            for chunk, piece in enumerate(pieces):
                messages.append(Message(source, receiver, chunk, tuple(carried.take(piece.length))))
    return messages


class _Stream:
    """Fragments from which elements are taken in order."""

    def __init__(self, fragments: list[Fragment]) -> None:
        self.length = 0
        self._fragments: list[Fragment] = []
        self.add(fragments)

    def add(self, fragments: list[Fragment]) -> None:
        for fragment in fragments:
            if fragment.length:
                self._fragments.append(fragment)
                self.length += fragment.length

    def take(self, number: int) -> list[Fragment]:
        """Up to `number` elements from the front."""
        taken = []
        while number and self._fragments:
            fragment = self._fragments.pop(0)
            part = min(number, fragment.length)
            taken.append(fragment._replace(length=part))
            if part < fragment.length:
                self._fragments.insert(
                    0, fragment._replace(offset=fragment.offset + part, length=fragment.length - part)
                )
            number -= part
            self.length -= part
        return taken

    def rest(self) -> list[Fragment]:
        return self.take(self.length)


class _Balanced(HostRounds):
    def __init__(self, problem: Problem, topology: Topology, rank: int, chunks: int) -> None:
        super().__init__(problem, topology, rank)
        self.chunks = chunks

    def send_to(self, there: int, lane: int) -> None:
        for messages in _by_chunk(flow(self.problem, self.topology, self.host, there, self.chunks)):
            for message in messages:
                for run in self._sources(message) if message.carrier != self.rank else ():
                    if run.rank == self.rank:
                        self.script.send(run.place, message.carrier, INSIDE, message.chunk)
            for message in messages:
                if message.carrier == self.rank:
                    self.script.send(self._gathered(message), message.receiver, lane, message.chunk)

    def _gathered(self, message: Message) -> Span:
        """Where the elements of a message lie together, once the ranks that have them have sent them."""
        runs = self._sources(message)
        if len(runs) == 1 and runs[0].rank == self.rank:
            return runs[0].place
        area = self.script.scratch(sum(run.place.length for run in runs))
        for run, place in zip(runs, _places(area, runs)):
            if run.rank == self.rank:
                self.script.copy(run.place, place, INSIDE, message.chunk)
            else:
                self.script.recv(place, run.rank, INSIDE, message.chunk)
        return area

    def receive_from(self, there: int, lane: int) -> None:
        for messages in _by_chunk(flow(self.problem, self.topology, there, self.host, self.chunks)):
            for message in messages:
                if message.receiver == self.rank:
                    self._take(message, lane)
            for message in messages:
                for run in self._targets(message) if message.receiver != self.rank else ():
                    if run.rank == self.rank:
                        self.script.recv(run.place, message.receiver, HAND_ON, message.chunk)

    def _take(self, message: Message, lane: int) -> None:
        """Receives a message and hands its elements to the ranks that they are for."""
        runs = self._targets(message)
        if len(runs) == 1 and runs[0].rank == self.rank:
            self.script.recv(runs[0].place, message.carrier, lane, message.chunk)
            return
        area = self.script.scratch(sum(run.place.length for run in runs))
        self.script.recv(area, message.carrier, lane, message.chunk)
        for run, place in zip(runs, _places(area, runs)):
            if run.rank == self.rank:
                self.script.copy(place, run.place, HAND_ON, message.chunk)
            else:
                self.script.send(place, run.rank, HAND_ON, message.chunk)

    def _sources(self, message: Message) -> list[Run]:
        """The parts of a message by the rank that has them, and where in its input."""
        matrix = self.problem.matrix
        return _runs(
            Run(source, _part("input", sum(matrix[source][:target]) + offset, length))
            for source, target, offset, length in message.fragments
        )

    def _targets(self, message: Message) -> list[Run]:
        """The parts of a message by the rank that they are for, and where in its output."""
        matrix = self.problem.matrix
        return _runs(
            Run(target, _part("output", sum(row[target] for row in matrix[:source]) + offset, length))
            for source, target, offset, length in message.fragments
        )


def _part(buffer: str, start: int, length: int) -> Span:
    return Span(buffer, start, start + length)


def _runs(parts: Iterable[Run]) -> list[Run]:
    """The parts, those joined that follow directly on one another in the memory of the same rank."""
    runs: list[Run] = []
    for rank, place in parts:
        if runs and runs[-1].rank == rank and runs[-1].place.stop == place.start:
            runs[-1] = Run(rank, Span(place.buffer, runs[-1].place.start, place.stop))
        else:
            runs.append(Run(rank, place))
    return runs


def _places(area: Span, runs: list[Run]) -> list[Span]:
    """Where each run lies in an area that holds them one after the other."""
    points = offsets([run.place.length for run in runs])
    return [Span(area.buffer, area.start + start, area.start + stop) for start, stop in pairwise(points)]


def _by_chunk(messages: list[Message]) -> list[list[Message]]:
    last = max((message.chunk for message in messages), default=-1)
    return [[message for message in messages if message.chunk == chunk] for chunk in range(last + 1)]
