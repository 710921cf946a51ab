"""Messages between ranks of one host: the sender says where the bytes lie, the receiver reads them there.

A channel is (sender, receiver, lane). The sender writes (where, bytes, digest, call) into a ring in its own window and
raises `posted`; the receiver reads the bytes and raises `consumed` in its own. `where` is an offset in the sender's
window, or, with `IN_ARENA`, in its arena.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from ncclx_py.transport.arena import Arena
from ncclx_py.transport.bells import Bell
from ncclx_py.transport.window import RING, Window, block_word, fence

IN_ARENA = 1 << 62

_CONSUMED = 8  # words after the start of the block
_RING = 16


class Neighbour(NamedTuple):
    """A rank of this host: its group rank, its place on the host, and its memory as mapped here."""

    rank: int
    place: int
    window: Window
    arena: Arena


class Outbox:
    """The sender's end of a channel. Never blocks: what the ring cannot take waits in `backlog`."""

    __slots__ = ("_bell", "_consumed", "_posted", "_ring", "_theirs", "_words", "backlog", "count", "peer")

    def __init__(self, me: Neighbour, peer: Neighbour, lane: int, bell: Bell) -> None:
        self.peer = peer.rank
        self._bell = bell
        self._words, self._theirs = me.window.words, peer.window.words
        self._posted = block_word(peer.place, lane)
        self._ring = self._posted + _RING
        self._consumed = block_word(me.place, lane) + _CONSUMED
        self.count = self._words[self._posted]  # messages sent so far, with those in the backlog
        self.backlog: deque[tuple[int, int, int, int]] = deque()

    def post(self, where: int, length: int, digest: int, call: int) -> None:
        if self.backlog or self.count - self._theirs[self._consumed] >= RING:
            self.backlog.append((where, length, digest, call))
            self.count += 1
            return
        self._write(self.count, where, length, digest, call)
        self.count += 1

    def drain(self) -> bool:
        """Posts what of the backlog the ring can take by now."""
        moved = False
        while self.backlog and self.count - len(self.backlog) - self._theirs[self._consumed] < RING:
            self._write(self.count - len(self.backlog), *self.backlog[0])
            self.backlog.popleft()
            moved = True
        return moved

    def consumed(self, count: int) -> bool:
        """Whether the receiver has taken the first `count` messages."""
        return self._theirs[self._consumed] >= count

    def _write(self, number: int, where: int, length: int, digest: int, call: int) -> None:
        words, at = self._words, self._ring + number % RING * 4
        words[at] = where
        words[at + 1] = length
        words[at + 2] = digest
        words[at + 3] = call
        if fence:
            fence()
        words[self._posted] = number + 1
        self._bell.ring()


class Inbox:
    """The receiver's end of a channel."""

    __slots__ = (
        "_arena",
        "_bell",
        "_consumed",
        "_posted",
        "_ring",
        "_theirs",
        "_window",
        "_words",
        "count",
        "neighbour",
    )

    def __init__(self, me: Neighbour, peer: Neighbour, lane: int, bell: Bell) -> None:
        self.neighbour = peer
        self._bell = bell
        self._words, self._theirs = me.window.words, peer.window.words
        self._window, self._arena = peer.window.address, peer.arena.address - IN_ARENA
        self._posted = block_word(me.place, lane)
        self._ring = self._posted + _RING
        self._consumed = block_word(peer.place, lane) + _CONSUMED
        self.count = self._words[self._consumed]  # messages taken so far

    def ready(self) -> bool:
        return self._theirs[self._posted] > self.count

    def message(self) -> tuple[int, int, int, int]:
        """The message that is there: its address in this process, its length in bytes, digest and call."""
        if fence:
            fence()
        theirs, at = self._theirs, self._ring + self.count % RING * 4
        where = theirs[at]
        address = where + (self._window if where < IN_ARENA else self._arena)
        return address, theirs[at + 1], theirs[at + 2], theirs[at + 3]

    def consume(self) -> None:
        """Tells the sender that its bytes are no longer needed."""
        if fence:
            fence()
        self.count += 1
        self._words[self._consumed] = self.count
        self._bell.ring()
