"""What algorithms write their steps with: a `Program` that knows the topology and leaves out empty messages."""

from __future__ import annotations

from ncclx_py.plans.plan import Program, RankPlan, Span
from ncclx_py.plans.topology import Topology


class Script:
    """One rank's steps in the making.

    A message of no elements is left out. Both ends know its length, so both leave it out: an algorithm can be written
    as if every piece of the tensor had elements.
    """

    def __init__(self, topology: Topology, rank: int) -> None:
        self.topology = topology
        self.rank = rank
        self._program = Program(rank)
        self._scratch = 0

    def send(self, src: Span, to: int, lane: int = 0, chunk: int = 0) -> None:
        if src.length:
            self._program.send(src, to, lane=lane, chunk=chunk, level=self.topology.level(self.rank, to))

    def recv(self, dst: Span, source: int, lane: int = 0, chunk: int = 0) -> None:
        if dst.length:
            self._program.recv(dst, source, lane=lane, chunk=chunk, level=self.topology.level(self.rank, source))

    def reduce(self, dst: Span, source: int, lane: int = 0, chunk: int = 0) -> None:
        """Combines the message from `source` into `dst`."""
        if dst.length:
            self._program.reduce(dst, source, lane=lane, chunk=chunk, level=self.topology.level(self.rank, source))

    def combine(self, src: Span, dst: Span, lane: int = 0, chunk: int = 0) -> None:
        """Combines the local `src` into `dst`."""
        if dst.length:
            self._program.reduce(dst, src=src, lane=lane, chunk=chunk)

    def copy(self, src: Span, dst: Span, lane: int = 0, chunk: int = 0) -> None:
        if dst.length:
            self._program.copy(src, dst, lane=lane, chunk=chunk)

    def scratch(self, length: int) -> Span:
        """A fresh span of scratch."""
        self._scratch += length
        return Span("scratch", self._scratch - length, self._scratch)

    def finish(self) -> RankPlan:
        return self._program.finish(self._scratch)
