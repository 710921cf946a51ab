"""Operations within a host: messages through shared windows, and what a rank does by itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ncclx_py.transport.channels import Inbox, Outbox
from ncclx_py.transport.memory import copy
from ncclx_py.transport.operations import DONE, STARTED, Mismatch, Operation, Run, difference

BLOCK = 256 * 1024  # bytes that are reduced from all neighbours before the next ones: they stay in the cache
PATIENCE = 40  # idle rounds that a reduction waits for further neighbours before it starts with those that are there


class LocalSend(Operation):
    """Shows a span to a neighbour: in place where it can read it, else as a copy in the window.

    `fill` numbers the copy, `mirror` is its offset: sends of one span share one.
    """

    __slots__ = ("_buffer", "_fill", "_length", "_mirror", "_outbox", "_start")

    def __init__(
        self, index: int, outbox: Outbox, buffer: int, start: int, length: int, fill: int, mirror: int
    ) -> None:
        super().__init__(index, outbox.peer)
        self._outbox = outbox
        self._buffer, self._start, self._length = buffer, start, length
        self._fill, self._mirror = fill, mirror

    def advance(self, run: Run) -> bool:
        where = run.shown[self._buffer]
        if where >= 0:
            where += self._start
            run.done[self.index] = STARTED
            run.target[self.index] = self._outbox.count + 1
        else:
            where = run.mirror + self._mirror
            if not run.filled[self._fill]:
                run.filled[self._fill] = 1
                copy(run.window + where, run.address[self._buffer] + self._start, self._length)
            run.done[self.index] = DONE
        self._outbox.post(where, self._length, run.digest, run.call)
        return True

    def complete(self, run: Run) -> bool:
        return self._outbox.consumed(run.target[self.index])

    def reads(self, buffers: Sequence[int]) -> bool:
        """Whether the source lies in one of these buffers."""
        return self._buffer in buffers


class LocalReceive(Operation):
    __slots__ = ("_buffer", "_inbox", "_length", "_start")

    def __init__(self, index: int, inbox: Inbox, buffer: int, start: int, length: int) -> None:
        super().__init__(index, inbox.neighbour.rank)
        self._inbox, self._buffer, self._start, self._length = inbox, buffer, start, length

    def advance(self, run: Run) -> bool:
        inbox = self._inbox
        if not inbox.ready():
            return False
        source = take(inbox, run, self._length)
        copy(run.address[self._buffer] + self._start, source, self._length)
        inbox.consume()
        run.done[self.index] = DONE
        return True


class LocalReduce(Operation):
    """Combines messages of several neighbours into one span, in the order of the plan, block by block.

    `indexes` are the steps, in a row in their lane. It prefers to take all at once, and is patient for that; the result
    does not depend on it. With `round_once`, half precision is combined in single precision and rounded at the end.
    """

    __slots__ = ("_at", "_buffer", "_inboxes", "_indexes", "_length", "_round_once", "_start", "_wide")

    def __init__(
        self, indexes: list[int], inboxes: list[Inbox], round_once: bool, buffer: int, start: int, length: int
    ) -> None:
        super().__init__(indexes[0], inboxes[0].neighbour.rank)
        self._indexes, self._inboxes, self._round_once = indexes, inboxes, round_once
        self._buffer, self._start, self._length = buffer, start, length
        self._at = 0
        self._wide: Tensor | None = None  # what has been combined, until the rest comes

    def advance(self, run: Run) -> bool:
        inboxes, count = self._inboxes, len(self._inboxes)
        ready = self._at
        while ready < count and inboxes[ready].ready():
            ready += 1
        if ready == self._at or (ready < count and run.idle < PATIENCE):
            return False
        finished = ready == count
        sources = [take(inbox, run, self._length) for inbox in inboxes[self._at : ready]]
        if self._round_once and count > 1 and run.widens and self._length:
            self._combine_wide(run, sources, finished)
        else:
            self._combine(run, sources)
        for at in range(self._at, ready):
            inboxes[at].consume()
            run.done[self._indexes[at]] = DONE
        run.moved = True
        self._at = 0 if finished else ready
        self.peer = inboxes[self._at].neighbour.rank
        return finished

    def _combine(self, run: Run, sources: list[int]) -> None:
        views, combine = run.views, run.combine
        target = run.address[self._buffer] + self._start
        for start in range(0, self._length, BLOCK):
            size = min(BLOCK, self._length - start)
            part = views(target + start, size)
            for source in sources:
                combine(part, views(source + start, size))

    def _combine_wide(self, run: Run, sources: list[int], finished: bool) -> None:
        """Like `_combine`, in single precision. What cannot be finished now is kept whole."""
        views, combine = run.views, run.combine
        target = run.address[self._buffer] + self._start
        if self._wide is None and not finished:
            self._wide = views(target, self._length).float()
        for start in range(0, self._length, BLOCK):
            size = min(BLOCK, self._length - start)
            part = views(target + start, size)
            at = start // part.itemsize
            total = part.float() if self._wide is None else self._wide[at : at + part.numel()]
            for source in sources:
                combine(total, views(source + start, size))
            if finished:
                part.copy_(total)
        if finished:
            self._wide = None


class LocalCopy(Operation):
    """Moves a span within this rank."""

    __slots__ = ("_length", "_source", "_source_start", "_start", "_target")

    def __init__(self, index: int, target: int, start: int, source: int, source_start: int, length: int) -> None:
        super().__init__(index, None)
        self._target, self._start, self._length = target, start, length
        self._source, self._source_start = source, source_start

    def advance(self, run: Run) -> bool:
        target, source = run.address[self._target] + self._start, run.address[self._source] + self._source_start
        if target != source:
            copy(target, source, self._length)
        run.done[self.index] = DONE
        return True


class LocalCombine(LocalCopy):
    """Combines a span of this rank into another."""

    __slots__ = ()

    def advance(self, run: Run) -> bool:
        target, source = run.address[self._target] + self._start, run.address[self._source] + self._source_start
        if self._length:
            run.combine(run.views(target, self._length), run.views(source, self._length))
        run.done[self.index] = DONE
        return True


def take(inbox: Inbox, run: Run, length: int) -> int:
    """The address of the message that is there. Raises Mismatch when it is not what the call expects."""
    address, found, digest, call = inbox.message()
    if digest != run.digest or found != length:
        peer = inbox.neighbour
        raise Mismatch(difference(peer.rank, peer.window.call(call), digest, found, run, length))
    return address
