"""Which send belongs to which receive: the half of a mailbox (``mail.py``) that touches no socket but through its peers' outlets.

Per peer and tag, the first send meets the first receive, and so on. A receive is asked for with a WANT as soon as it is posted.
A send that finds one answers with the body; one that finds none says HAVE, or sends a short body at once, and ends when its
WANT comes. Nothing here is thread-safe: the mailbox has the lock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ncclx_py.errors import CollectiveError
from ncclx_py.transport.letters import (
    ABORTED,
    DATA,
    EAGER,
    HAVE,
    LEFT,
    MISFIT,
    SHORT,
    WANT,
    Inlet,
    Letter,
    described,
    frame,
    misfit,
)
from ncclx_py.transport.tcp import Sender

REMEDY = "Look at the log of that rank, then destroy this group and start again."

_UNSEEN = 64 * 1024  # bytes of bodies sent to a peer that has not asked for them yet
_SLOTS = 256  # tags of a peer that are remembered although nothing is on its way
_LEFT = "it has left the group"


class Have(NamedTuple):
    """A message that a peer has announced; `body` is None where it comes on demand."""

    number: int  # counts up in the order in which they came
    size: int
    dtype: bytes
    body: bytes | None


class Slot:
    """The messages of one tag between this rank and one peer, each queue in order."""

    __slots__ = ("announced", "haves", "receives", "sends", "wants")

    def __init__(self) -> None:
        self.sends: deque[Letter] = deque()  # that nobody has asked for
        self.wants: deque[tuple[int, bytes]] = deque()  # receives of the peer that no send is there for
        self.receives: deque[Letter] = deque()  # that have asked
        self.announced = 0  # the first so many of them have a HAVE
        self.haves: deque[Have] = deque()  # that no receive is there for

    def idle(self) -> bool:
        return not (self.sends or self.wants or self.receives or self.haves)


class Peer:
    """What this rank knows of another one. `why` it is gone, "" while it is not."""

    __slots__ = ("doubt", "inlet", "leaving", "outlet", "rank", "slots", "suspect", "unseen", "why")

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.outlet: Sender | None = None
        self.inlet: Inlet | None = None
        self.slots: dict[int, Slot] = {}
        # letters that end, well or with an error, when the last of what they have to say has left
        self.leaving: list[tuple[Letter, RuntimeError | None]] = []
        self.unseen = 0
        self.suspect = math.inf  # time.monotonic() when it hung up on us, and
        self.doubt = ""  # how that showed
        self.why = ""

    def slot(self, tag: int) -> Slot:
        known = self.slots.get(tag)
        if known is None:
            if len(self.slots) >= _SLOTS:
                self.slots = {other: slot for other, slot in self.slots.items() if not slot.idle()}
            known = self.slots[tag] = Slot()
        return known

    def say(self, kind: int, letter: Letter, with_body: bool = False) -> int:
        """Sends a frame about a letter; how much the outlet must have flushed for it to have left."""
        assert self.outlet is not None
        body = letter.memory if with_body else None
        return self.outlet.send(frame(kind, letter.tag, letter.size, letter.dtype), body)


class Sorter:
    """The letters of `rank`, one of `size`: those that are `pending`, and those that are `over` and must be told.

    `reach(peer)` opens the connection to a peer, or loses the peer; `part(peer)` closes its connections. `refusal` is the
    error of every letter from now on; `aborted` is what a peer gave as the reason of an abort.
    """

    def __init__(self, rank: int, size: int, reach: Callable[[Peer], None], part: Callable[[Peer], None]) -> None:
        self.peers: dict[int, Peer] = {}
        self.pending: set[Letter] = set()
        self.over: deque[Letter] = deque()
        self.refusal: CollectiveError | None = None
        self.aborted = ""
        self._rank, self._size = rank, size
        self._reach, self._part = reach, part
        self._any: dict[int, deque[Letter]] = {}  # receives from any source, by tag
        self._offers = 0

    def peer(self, rank: int) -> Peer:
        known = self.peers.get(rank)
        if known is None:
            known = self.peers[rank] = Peer(rank)
        return known

    # What is posted here

    def send(self, letter: Letter) -> None:
        peer = self._enter(letter)
        if peer is None:
            return
        slot = peer.slot(letter.tag)
        if slot.wants:
            self._transmit(peer, letter, slot.wants.popleft())
            return
        slot.sends.append(letter)
        letter.eager = letter.size <= SHORT and peer.unseen + letter.size <= _UNSEEN
        if letter.eager:
            peer.unseen += letter.size
        letter.target = peer.say(EAGER if letter.eager else HAVE, letter, with_body=letter.eager)

    def receive(self, letter: Letter) -> None:
        peer = self._enter(letter)
        if peer is None:
            return
        slot = peer.slot(letter.tag)
        letter.target = peer.say(WANT, letter)
        if not slot.haves:
            slot.receives.append(letter)
            return
        have = slot.haves.popleft()
        if have.body is None:
            slot.receives.append(letter)
            slot.announced += 1
        else:
            self._fill(peer, letter, have)

    def receive_any(self, letter: Letter) -> None:
        offers = [peer for peer in self.peers.values() if (slot := peer.slots.get(letter.tag)) and slot.haves]
        if offers:
            letter.peer = min(offers, key=lambda peer: peer.slots[letter.tag].haves[0].number).rank
            self.receive(letter)
            return
        self.pending.add(letter)
        dead = self._in_vain()
        if self.refusal is not None or dead is not None:
            self.finish(letter, self.refusal if dead is None else gone(dead))
        else:
            self._any.setdefault(letter.tag, deque()).append(letter)

    def flushed(self, peer: Peer) -> None:
        """Its outlet has sent something."""
        assert peer.outlet is not None
        done = [one for one in peer.leaving if one[0].target <= peer.outlet.flushed]
        for letter, error in done:
            peer.leaving.remove((letter, error))
            self.finish(letter, error)

    def finish(self, letter: Letter, error: RuntimeError | None = None) -> None:
        """It has ended, and is to be told so. Again: nothing."""
        if letter in self.pending:
            self.pending.discard(letter)
            letter.error = error
            self.over.append(letter)

    # What comes from a peer (`letters.Reader`)

    def arrived(self, peer: int, kind: int, tag: int, size: int, dtype: bytes, body: bytes) -> None:
        known = self.peer(peer)
        if kind == WANT:
            self._wanted(known, known.slot(tag), (size, dtype))
        elif kind in (HAVE, EAGER):
            self._offered(known, tag, Have(self._offers, size, dtype, body if kind == EAGER else None))
        elif kind == MISFIT:
            letter = self._next(known, tag)
            if letter is not None:
                self.finish(letter, self._misfit(letter, (size, dtype)))
        elif kind == LEFT:
            self.lose(known, _LEFT)
        elif kind == ABORTED:
            self.aborted = self.aborted or body.decode(errors="replace")

    def arriving(self, peer: int, tag: int, size: int) -> Letter | None:
        letter = self._next(self.peer(peer), tag)
        return letter if letter is not None and letter.size == size else None

    def filled(self, letter: Letter) -> None:
        self.finish(letter)

    def ended(self, peer: int, why: str) -> None:
        self.lose(self.peer(peer), why)

    def lose(self, peer: Peer, why: str) -> None:
        """Nothing more is sent to it or comes from it."""
        if peer.why:
            return
        self._forget(peer, why)
        for letter in [one for one in self.pending if one.peer == peer.rank]:
            self.finish(letter, gone(peer))
        dead = self._in_vain()
        if dead is not None:
            for waiting in self._any.values():
                for letter in waiting:
                    self.finish(letter, gone(dead))
            self._any.clear()

    def fail_all(self, error: CollectiveError) -> None:
        """Everything on its way has failed, and so will everything else. Nothing touches the memory of letters any more."""
        self.refusal = error
        for letter in list(self.pending):
            self.finish(letter, error)
        self._any.clear()
        for peer in self.peers.values():
            self._forget(peer, peer.why or "the group has ended here")

    # Parts

    def _enter(self, letter: Letter) -> Peer | None:
        """Takes up a letter. Its peer, which can be reached; None where it has failed at once."""
        self.pending.add(letter)
        if self.refusal is not None:
            self.finish(letter, self.refusal)
            return None
        peer = self.peer(letter.peer)
        if peer.outlet is None and not peer.why:
            self._reach(peer)
        if peer.why:
            self.finish(letter, gone(peer))
            return None
        return peer

    def _transmit(self, peer: Peer, letter: Letter, want: tuple[int, bytes]) -> None:
        """Sends the body that `want` asks for."""
        if want != (letter.size, letter.dtype):
            letter.target = peer.say(MISFIT, letter)
            self._leave(peer, letter, self._misfit(letter, want))
            return
        letter.target = peer.say(DATA, letter, with_body=True)
        self._leave(peer, letter)

    def _leave(self, peer: Peer, letter: Letter, error: RuntimeError | None = None) -> None:
        """It ends as soon as its bytes are out of the caller's memory, and what the peer waits for is on its way: where no
        letter is left, nobody would see to that."""
        assert peer.outlet is not None
        if letter.target <= peer.outlet.flushed:
            self.finish(letter, error)
        else:
            peer.leaving.append((letter, error))

    def _wanted(self, peer: Peer, slot: Slot, want: tuple[int, bytes]) -> None:
        if not slot.sends:
            slot.wants.append(want)
            return
        letter = slot.sends.popleft()
        if not letter.eager:
            self._transmit(peer, letter, want)
            return
        peer.unseen -= letter.size
        if want != (letter.size, letter.dtype):
            self._leave(peer, letter, self._misfit(letter, want))  # the receiver finds out by itself
        else:
            self._leave(peer, letter)

    def _offered(self, peer: Peer, tag: int, have: Have) -> None:
        slot = peer.slot(tag)
        if len(slot.receives) > slot.announced:  # the sender had not seen our WANT when it wrote
            if have.body is None:
                slot.announced += 1
            else:
                letter = slot.receives[slot.announced]
                del slot.receives[slot.announced]
                self._fill(peer, letter, have)
            return
        self._offers += 1
        slot.haves.append(have)
        waiting = self._any.get(tag)
        if waiting:
            letter = waiting.popleft()
            letter.peer = peer.rank
            self.receive(letter)

    def _next(self, peer: Peer, tag: int) -> Letter | None:
        """The receive that the next body of a peer is for."""
        slot = peer.slot(tag)
        slot.announced = max(0, slot.announced - 1)
        return slot.receives.popleft() if slot.receives else None

    def _fill(self, peer: Peer, letter: Letter, have: Have) -> None:
        """Takes a body that came unasked."""
        assert have.body is not None
        if (have.size, have.dtype) != (letter.size, letter.dtype):
            self._leave(peer, letter, self._misfit(letter, (have.size, have.dtype)))
            return
        if letter.memory is not None:
            letter.memory[:] = have.body
        self._leave(peer, letter)

    def _misfit(self, letter: Letter, other: tuple[int, bytes]) -> CollectiveError:
        mine, theirs = described(letter.size, letter.dtype), described(*other)
        if letter.sends:
            return misfit(self._rank, mine, letter.peer, theirs, letter.tag)
        return misfit(letter.peer, theirs, self._rank, mine, letter.tag)

    def _in_vain(self) -> Peer | None:
        """A peer because of which a receive from any source may wait in vain: one that died, or the last to leave."""
        lost = [peer for peer in self.peers.values() if peer.why]
        died = [peer for peer in lost if peer.why != _LEFT]
        return died[0] if died else lost[-1] if lost and len(lost) == self._size - 1 else None

    def _forget(self, peer: Peer, why: str) -> None:
        peer.why, peer.suspect = why, math.inf
        peer.slots.clear()
        peer.leaving.clear()
        self._part(peer)


def gone(peer: Peer) -> CollectiveError:
    return CollectiveError(f"rank {peer.rank} is gone ({peer.why}). {REMEDY}")
