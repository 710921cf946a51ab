"""Messages between two ranks of a group, over connections that are opened when two ranks first need one.

    mail = Mailbox(rank, cards, doors, rail)             # `fabric.mail`; connects nothing
    mail.start(look, adopt, abort)                       # see `start`
    letter = mail.send(tensor, torch.float32, 1, 7, call)     # tensor is flat, contiguous, and kept until the end
    mail.receive(tensor, torch.float32, -1, 7, call).wait()   # -1: from any rank
    mail.close("the group has been destroyed")

Each rank writes on connections that it has opened, and reads from those that it has accepted (``lines.py``). A receive asks the
sender for its message (``sorting.py``), so nothing long is sent that nobody wants.

Whoever waits for a letter drives all of them, without the GIL while nothing happens; a second one who waits is served by the
first. A thread looks after letters that nobody waits for. It starts with the first message, ends when none has been on its
way for a second, and lets those who wait go first: a hand-over between threads costs as much as a short message.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial

import torch
from torch import Tensor

from ncclx_py.errors import Call, CollectiveError, CollectiveTimeout
from ncclx_py.transport.doors import Doors
from ncclx_py.transport.identity import Card
from ncclx_py.transport.letters import ABORTED, LEFT, SHORT, TEXT, Inlet, Letter, frame
from ncclx_py.transport.lines import Handler, Lines
from ncclx_py.transport.sorting import REMEDY, Peer, Sorter
from ncclx_py.transport.tcp import lost_text

_LOOK = 0.1  # seconds between two looks at the rest of the group
_GLANCE = 1e-3  # seconds between two looks of the thread at letters that nobody may be waiting for
_DOZE = 1.0  # seconds without letters after which the thread ends
_RETRY = 0.02  # seconds after which one who waits sees whether the driver has left
_SUSPECT = 0.2, 2.0  # seconds for the last words of a peer that has hung up: without and with a connection of its own
_JOIN = 5.0  # seconds for the driver to leave

_LATE = (
    "Some rank is late, dead, or sends and receives in another order: compare the ranks' logs. If the work is just slow, "
    "pass a longer timeout= to init_process_group or new_group."
)


class Mailbox:
    """The messages of `rank`, one of those with `cards`; `rail` is the one it sends on. Any thread may call.

    `timeout` is asked for the group's; whoever knows it sets it.
    """

    def __init__(self, rank: int, cards: Sequence[Card], doors: Doors, rail: int) -> None:
        self.timeout: Callable[[], timedelta] = lambda: timedelta(minutes=30)
        self._rank = rank
        self._lock = threading.Lock()  # of lines and letters; never held while somebody is called back
        self._lines = Lines(rank, cards, doors, rail, self._admit)
        self._sorter = Sorter(rank, len(cards), self._reach, self._part)
        self._reason = ""  # why nothing more is sent or received
        self._closed = False
        self._driver = 0  # the thread that waits for the sockets, 0 while none does
        self._turns = 0  # how often somebody became the driver
        self._next_look = 0.0
        self._thread: threading.Thread | None = None
        self._dozing = False
        self._nudge = threading.Semaphore(0)
        self._look: Callable[[], str] = lambda: ""
        self._adopt: Callable[[str], None] = lambda reason: None
        self._abort: Callable[[str], None] = self.end

    def start(self, look: Callable[[], str], adopt: Callable[[str], None], abort: Callable[[str], None]) -> None:
        """`look()` says why the group has been aborted, "" while it has not; `adopt` is told a peer's reason, and `abort` is
        called when a message has passed the deadline."""
        self._look, self._adopt, self._abort = look, adopt, abort

    # What the group calls

    def send(self, tensor: Tensor, dtype: torch.dtype, peer: int, tag: int, call: Call) -> Letter:
        """`dtype` is that of the caller's tensor, which must be the same at both ends."""
        letter = Letter(self, tensor, dtype, peer, tag, call)
        with self._lock:
            self._open()
            known = self._sorter.peers.get(peer)
            if letter.size > SHORT and known is not None and known.inlet is not None and not known.why:
                self._handle([(known.inlet.connection.fileno(), 0)])  # the peer may have asked: that saves a round trip
            self._sorter.send(letter)
        self._tell()
        return letter

    def receive(self, tensor: Tensor, dtype: torch.dtype, peer: int, tag: int, call: Call) -> Letter:
        """`peer` −1: from any."""
        letter = Letter(self, tensor, dtype, peer, tag, call)
        with self._lock:
            self._open()
            if peer < 0:
                self._sorter.receive_any(letter)
            else:
                self._sorter.receive(letter)
        self._tell()
        return letter

    def wait_for(self, letter: Letter, seconds: float) -> bool:
        """False when `seconds` pass first."""
        until, me = time.monotonic() + seconds, threading.get_ident()
        while not letter.is_completed():
            left = until - time.monotonic()
            if left <= 0:
                return False
            if self._driver == me:  # from a callback of a letter that this thread has brought through
                self._drive(letter, until)
            elif self._sit(me):
                try:
                    self._drive(letter, until)
                finally:
                    self._driver = 0
            else:
                letter.pause(min(left, _RETRY))
        return True

    def expire(self, letter: Letter, seconds: float) -> None:
        """The group's timeout has passed: that ends the group."""
        why = f"no end after {seconds:g} s: {letter}"
        what = f"{letter.call.op} (message {letter.call.sequence}): {why}"
        with self._lock:
            self._sorter.finish(letter, CollectiveTimeout(f"{why}. {_LATE}"))
            self._reason = self._reason or f"rank {self._rank}: {what}"
            self._fail_all(self._aborted())  # at once: what still came would go into memory that nobody keeps
        self._tell()
        self._abort(what)

    def limit(self, letter: Letter) -> None:
        """From now on the group's timeout holds for it although nobody waits here."""
        letter.deadline = min(letter.deadline, time.monotonic() + self.timeout().total_seconds())

    def abandon(self, letter: Letter) -> None:
        """Leaving the group does not wait for it any more."""
        letter.waited = False

    def drain(self, seconds: float) -> bool:
        """Waits until all sends are through; False when `seconds` pass first."""
        until = time.monotonic() + seconds
        with self._lock:
            sends = [letter for letter in self._sorter.pending if letter.sends and letter.waited]
        return all(self.wait_for(letter, max(0.0, until - time.monotonic())) for letter in sends)

    def end(self, reason: str) -> None:
        """The group has been aborted: who waits raises soon. It does not wait, and may be called from a signal handler."""
        self._reason = self._reason or reason
        self._lines.wake()

    def close(self, reason: str) -> None:
        """Fails what is on its way, tells the peers, and lets go of everything. Again: nothing."""
        if not self._lock.acquire(timeout=_JOIN):  # a signal handler that has interrupted its owner
            self.end(reason)
            return
        try:
            if self._closed:
                return
            if self._reason:
                self._fail_all(self._aborted())
            else:
                self._fail_all(CollectiveError(f"{reason} before this message was through. Wait for it first."), LEFT)
            self._closed = True
        finally:
            self._lock.release()
        self._lines.wake()
        self._nudge.release()
        self._tell()
        until, me = time.monotonic() + _JOIN, threading.get_ident()
        while self._driver not in (0, me) and time.monotonic() < until:
            time.sleep(_GLANCE / 10)
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN)
        self._lines.close()

    def after_fork(self) -> None:
        """In a forked child: the messages are the parent's."""
        self._lock, self._driver, self._closed = threading.Lock(), 0, True
        error = CollectiveError("this process was forked from the one that made the group, and is no part of it.")
        pending, self._sorter.pending = self._sorter.pending, set()
        for letter in pending:
            letter.error = error
            letter.let_go()
        self._lines.close()
        self._sorter.fail_all(error)

    # With the lock held

    def _open(self) -> None:
        """A message is posted: its peer must be heard, and somebody must look after it."""
        if self._closed:
            return
        self._lines.open()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="ncclx-mail", daemon=True)
            self._thread.start()
        elif self._dozing:
            self._dozing = False
            self._nudge.release()

    def _reach(self, peer: Peer) -> None:
        try:
            peer.outlet = self._lines.call(peer.rank, self._hung_up, partial(self._sorter.flushed, peer))
        except OSError as error:
            self._sorter.lose(peer, lost_text(error))
        except ValueError as error:
            self._sorter.lose(peer, f"it cannot be reached: {error}")

    def _hung_up(self, rank: int, why: str) -> None:
        """A peer does not read any more. What it wrote before that may still be on its way to us."""
        peer = self._sorter.peer(rank)
        if not peer.why and peer.suspect == math.inf:
            peer.suspect, peer.doubt, self._next_look = time.monotonic(), why, 0.0
            if peer.outlet is not None:
                self._lines.ignore(peer.outlet.connection)

    def _admit(self, rank: int, connection: socket.socket) -> Handler | None:
        peer = self._sorter.peer(rank)
        if peer.inlet is not None or peer.why:
            return None
        peer.inlet = Inlet(rank, connection, self._sorter)
        return peer.inlet.on_event

    def _part(self, peer: Peer) -> None:
        for end in (peer.outlet, peer.inlet):
            if end is not None:
                self._lines.drop(end.connection)

    def _handle(self, events: list[tuple[int, int]]) -> None:
        try:
            self._lines.handle(events)
        except Exception as error:  # the thread has nobody to raise it to, and no message may wait for ever
            self._reason = (
                self._reason or f"rank {self._rank}: its messages broke off ({type(error).__name__}: {error})"
            )

    def _fail_all(self, error: CollectiveError, last: int = ABORTED) -> None:
        """Everything on its way has failed; the peers learn why."""
        text = self._reason.encode()[:TEXT] if last == ABORTED else b""
        for peer in self._sorter.peers.values():
            if peer.outlet is not None and not peer.why and peer.outlet.idle():
                peer.outlet.send(frame(last, size=len(text)) + text, None)
        self._sorter.fail_all(error)

    def _aborted(self) -> CollectiveError:
        return CollectiveError(f"the group was aborted by {self._reason}. {REMEDY}")

    # Driving

    def _sit(self, me: int) -> bool:
        """Makes this thread the driver, unless there is one."""
        with self._lock:
            if self._driver or self._closed:
                return False
            self._driver = me
            self._turns += 1
            return True

    def _drive(self, letter: Letter | None, until: float) -> None:
        """Serves all connections until `letter` has ended, or all letters (None), or it is time."""
        sorter = self._sorter
        while not self._closed and (sorter.pending if letter is None else not letter.is_completed()):
            now = time.monotonic()
            if now >= until:
                return
            pause = _LOOK if now < self._next_look else _RETRY
            events = self._lines.poll(min(pause, until - now))
            if events:
                with self._lock:
                    self._handle(events)
            if sorter.over:
                self._tell()
            if self._reason or sorter.aborted or now >= self._next_look:
                self._check(now)

    def _check(self, now: float) -> None:
        """What no socket tells: an abort, deadlines, peers that have hung up."""
        reason = self._look()
        with self._lock:
            told, self._sorter.aborted = self._sorter.aborted, ""
            self._reason = self._reason or told or reason
            if self._reason:
                self._fail_all(self._aborted())
            suspects = [peer for peer in self._sorter.peers.values() if peer.suspect < math.inf]
            for peer in suspects:
                if now > peer.suspect + _SUSPECT[peer.inlet is not None]:
                    self._sorter.lose(peer, peer.doubt)
            self._next_look = now if suspects else now + _LOOK
            late = [letter for letter in self._sorter.pending if letter.deadline < now]
        if told:
            self._adopt(told)
        self._tell()
        for letter in late:
            self.expire(letter, self.timeout().total_seconds())

    def _watch(self) -> None:
        """The thread: drives where letters are on their way and nobody has waited for any since it looked last."""
        me, turns = threading.get_ident(), -1
        while True:
            with self._lock:
                awake = bool(self._sorter.pending) and not self._closed
                self._dozing = not awake
            if awake:
                if turns == self._turns and self._sit(me):
                    try:
                        self._drive(None, math.inf)
                    finally:
                        self._driver = 0
                turns = self._turns
                time.sleep(_GLANCE)
            elif self._closed or not self._nudge.acquire(timeout=_DOZE):
                with self._lock:
                    if self._closed or not self._sorter.pending:
                        self._thread, self._dozing = None, False
                        return

    def _tell(self) -> None:
        """Tells those who wait, and calls back. Without the lock."""
        over = self._sorter.over
        while over:
            with contextlib.suppress(IndexError):  # another thread was faster
                over.popleft().end()
