"""The plan: what each rank does in one collective, as data. Five readers: verify, cost, simulate, execute, print.

Units are elements of the caller's dtype, never bytes. Ranks are group ranks. A plan has one `RankPlan` per rank, and
the plan of one rank is built without those of the others.

**Steps.** ``send`` offers `src` to `peer`; ``recv`` stores the peer's message in `dst`; ``reduce`` combines into `dst`
the peer's message (with `peer`) or the local `src` (without); ``copy`` stores `src` in `dst`; ``native`` is a library
collective among `group`, with the meaning that `native` names.

**Order.** A step is *started*, then *complete*. It may start when every step in its `deps` is complete and the step
before it in its lane has been started (if that is a send) or is complete (if it is anything else). A send is complete
when nobody needs its `src` any more. Nothing else orders steps: lanes run at the same time.

**Messages.** A channel is (sender, receiver, lane). The k-th send on a channel meets the k-th recv or reduce of the same
channel, and both have the same length. A send of length zero is a signal.

**Buffers** are named: ``data`` (all_reduce, broadcast: read and overwritten), ``input`` and ``output`` (the others;
`input` is never written), ``scratch`` (private, its contents undefined at the start).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Op = Literal["send", "recv", "reduce", "copy", "native"]
Collective = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "reduce"]
INTRA, INTER = "intra", "inter"


class Span(NamedTuple):
    """Elements `start` to `stop` (exclusive) of `buffer`."""

    buffer: str
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.buffer}[{self.start}:{self.stop}]"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that one rank does; see the module's text for what each `op` means.

    `deps` are indexes of earlier steps of the same rank. `chunk` numbers the part of a pipelined tensor that the step
    belongs to, and `level` the links that a message crosses ("intra", "inter"); both are for readers, not for order.
    """

    op: Op
    lane: int = 0
    peer: int | None = None
    src: Span | None = None
    dst: Span | None = None
    deps: tuple[int, ...] = ()
    chunk: int = 0
    level: str = INTRA
    native: str = ""
    group: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """What is asked of a collective among `size` ranks, the same on every rank.

    - all_reduce, broadcast, reduce: `count` elements (and `root`).
    - reduce_scatter: `counts[r]` elements end on rank r; `input` holds their sum. all_gather: rank r brings `counts[r]`.
    - all_to_all: `matrix[s][d]` elements go from rank s to rank d; `input` and `output` lie in the order of ranks.
    """

    collective: Collective
    size: int
    count: int = 0
    root: int = 0
    counts: tuple[int, ...] = ()
    matrix: tuple[tuple[int, ...], ...] = ()

    def lengths(self, rank: int) -> dict[str, int]:
        """The length in elements of each of the caller's buffers on `rank`."""
        if self.collective in ("all_reduce", "broadcast"):
            return {"data": self.count}
        if self.collective == "reduce":
            return {"input": self.count, "output": self.count if rank == self.root else 0}
        if self.collective == "reduce_scatter":
            return {"input": sum(self.counts), "output": self.counts[rank]}
        if self.collective == "all_gather":
            return {"input": self.counts[rank], "output": sum(self.counts)}
        return {"input": sum(self.matrix[rank]), "output": sum(row[rank] for row in self.matrix)}


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The steps of `rank`, and how many elements of scratch they need."""

    rank: int
    steps: tuple[Step, ...]
    scratch: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """All ranks' steps for a problem; `ranks[r].rank == r`. `parameters` are the algorithm's own (chunks, lanes, …)."""

    problem: Problem
    algorithm: str
    ranks: tuple[RankPlan, ...]
    parameters: dict[str, int] = field(default_factory=dict)


class Program:
    """Builds one rank's steps from a plain sequential programme, and derives the dependencies.

    Write the steps in an order in which they would be right if each ran to its end before the next. `deps` then come
    from the spans: a step waits for the earlier ones that write what it reads, and for those that read or write what it
    writes. An empty span touches nothing.

        program = Program(rank)
        program.send(Span("data", 0, 8), to=1)
        program.reduce(Span("data", 8, 16), source=1)
        rank_plan = program.finish(scratch=0)
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._steps: list[Step] = []
        self._memory: dict[str, _Accesses] = {}

    def send(self, src: Span, to: int, *, lane: int = 0, chunk: int = 0, level: str = INTRA) -> int:
        return self._add(Step("send", lane, to, src, None, self._hazards(src, None), chunk, level))

    def recv(self, dst: Span, source: int, *, lane: int = 0, chunk: int = 0, level: str = INTRA) -> int:
        return self._add(Step("recv", lane, source, None, dst, self._hazards(None, dst), chunk, level))

    def reduce(
        self,
        dst: Span,
        source: int | None = None,
        src: Span | None = None,
        *,
        lane: int = 0,
        chunk: int = 0,
        level: str = INTRA,
    ) -> int:
        """Combines into `dst` a message from the rank `source`, or the local span `src`."""
        return self._add(Step("reduce", lane, source, src, dst, self._hazards(src, dst), chunk, level))

    def copy(self, src: Span, dst: Span, *, lane: int = 0, chunk: int = 0) -> int:
        return self._add(Step("copy", lane, None, src, dst, self._hazards(src, dst), chunk, INTRA))

    def native(
        self,
        what: str,
        group: Sequence[int],
        src: Span,
        dst: Span,
        *,
        lane: int = 0,
        chunk: int = 0,
        level: str = INTRA,
    ) -> int:
        """A library collective `what` among `group`, from `src` to `dst` (which may be the same span)."""
        deps = self._hazards(src, dst)
        return self._add(Step("native", lane, None, src, dst, deps, chunk, level, what, tuple(group)))

    def finish(self, scratch: int = 0) -> RankPlan:
        return RankPlan(self.rank, tuple(self._steps), scratch)

    def _add(self, step: Step) -> int:
        index = len(self._steps)
        self._steps.append(step)
        if step.src is not None:
            self._accesses(step.src).read(step.src, index)
        if step.dst is not None:
            self._accesses(step.dst).write(step.dst, index)
        return index

    def _hazards(self, src: Span | None, dst: Span | None) -> tuple[int, ...]:
        found: set[int] = set()
        if src is not None:
            self._accesses(src).add_writers(src, found)
        if dst is not None:
            self._accesses(dst).add_users(dst, found)
        return tuple(sorted(found))

    def _accesses(self, span: Span) -> _Accesses:
        return self._memory.setdefault(span.buffer, _Accesses())


class _Accesses:
    """Which step last wrote each piece of a buffer, and which have read it since.

    Earlier accesses are ordered before the last write, so later steps need only that. Pieces are kept in order, and cut
    where a span starts or stops; steps mostly use spans that were used before, for which there is nothing to do.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._pieces: list[_Piece] = []

    def add_writers(self, span: Span, found: set[int]) -> None:
        for piece in self._cover(span):
            found.update(piece.writer)

    def add_users(self, span: Span, found: set[int]) -> None:
        for piece in self._cover(span):
            found.update(piece.writer, piece.readers)

    def read(self, span: Span, step: int) -> None:
        for piece in self._cover(span):
            piece.readers.append(step)

    def write(self, span: Span, step: int) -> None:
        for piece in self._cover(span):
            piece.writer, piece.readers = (step,), []

    def _cover(self, span: Span) -> list[_Piece]:
        """The pieces that make up `span`, made where they are missing."""
        start, stop = span.start, span.stop
        if start >= stop:
            return []
        first = bisect_right(self._starts, start) - 1
        if first >= 0 and self._starts[first] == start and self._pieces[first].stop == stop:
            return [self._pieces[first]]
        if first >= 0 and self._starts[first] < start < self._pieces[first].stop:
            self._cut(first, start)
        if first < 0 or self._starts[first] < start:
            first += 1
        place, reached = first, start
        while reached < stop:
            if place == len(self._starts) or self._starts[place] > reached:
                until = stop if place == len(self._starts) else min(stop, self._starts[place])
                self._starts.insert(place, reached)
                self._pieces.insert(place, _Piece(until, (), []))
            elif self._pieces[place].stop > stop:
                self._cut(place, stop)
            reached = self._pieces[place].stop
            place += 1
        return self._pieces[first:place]

    def _cut(self, place: int, at: int) -> None:
        piece = self._pieces[place]
        self._starts.insert(place + 1, at)
        self._pieces.insert(place + 1, _Piece(piece.stop, piece.writer, list(piece.readers)))
        piece.stop = at


@dataclass(slots=True)
class _Piece:
    """Elements up to `stop`; `writer` holds the last step that wrote them, if any has."""

    stop: int
    writer: tuple[int, ...]
    readers: list[int]
