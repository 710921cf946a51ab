"""The sockets of a mailbox (``mail.py``): what it listens on, the connections that it has opened and those that it has accepted.

Nothing is watched before the first message. Everything but `wake` and `poll` needs the mailbox's lock.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable, Sequence
from functools import partial

from ncclx_py.transport import doors as doors_
from ncclx_py.transport.doors import Doors
from ncclx_py.transport.identity import Card
from ncclx_py.transport.tcp import Lost, Sender

_IN = select.EPOLLIN | select.EPOLLRDHUP
_OUT = select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET

Handler = Callable[[int], None]
Admit = Callable[[int, socket.socket], Handler | None]


class Lines:
    """The connections of `rank`, one of those with `cards`; `rail` is the one that it calls on.

    `admit(rank, connection)` is asked what serves the connection that a peer has opened; None turns it away.
    """

    def __init__(self, rank: int, cards: Sequence[Card], doors: Doors, rail: int, admit: Admit) -> None:
        self._rank, self._cards, self._doors, self._rail = rank, cards, doors, rail
        self._admit = admit
        self._epoll: select.epoll | None = None
        self._bell = -1  # an eventfd
        self._handlers: dict[int, Handler] = {}
        self._sockets: list[socket.socket] = []
        if all(card.host == cards[rank].host for card in cards):
            doors.narrow()

    def open(self) -> None:
        """From now on peers are answered."""
        if self._epoll is None:
            self._epoll, self._bell = select.epoll(), os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._register(self._bell, self._hear, _IN)
            for server in self._doors.sockets():
                self._register(server.fileno(), partial(self._accept, server), _IN)

    def poll(self, seconds: float) -> list[tuple[int, int]]:
        """What `handle` is to be called with; waits for it without the GIL."""
        assert self._epoll is not None
        return self._epoll.poll(seconds)

    def handle(self, events: list[tuple[int, int]]) -> None:
        for descriptor, mask in events:
            handler = self._handlers.get(descriptor)
            if handler is not None:  # an earlier handler of this round may have closed it
                handler(mask)

    def wake(self) -> None:
        """Ends a `poll`. From any thread, and from signal handlers."""
        with contextlib.suppress(OSError, ValueError):
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)

    def call(self, peer: int, lost: Lost, moved: Callable[[], None]) -> Sender:
        """A connection to a peer. `lost` is told when it breaks, `moved` called when something may have been sent.

        Raises OSError where the peer does not answer any more, ValueError where it has no address that can work.
        """
        connection, hello, stands = doors_.call(self._cards, self._rank, peer, self._rail)
        self._sockets.append(connection)
        sender = Sender(peer, connection, hello, lost)

        def on_event(mask: int) -> None:
            sender.on_event(mask)
            sender.flush()
            moved()

        if stands:
            sender.on_event(select.EPOLLOUT)
        self._register(connection.fileno(), on_event, _OUT)
        return sender

    def ignore(self, connection: socket.socket) -> None:
        if self._handlers.pop(connection.fileno(), None) is not None and self._epoll is not None:
            self._epoll.unregister(connection.fileno())

    def drop(self, connection: socket.socket) -> None:
        if connection.fileno() >= 0:
            self.ignore(connection)
            connection.close()
            self._sockets.remove(connection)

    def close(self) -> None:
        """Nobody may be in `poll`. Also in a forked child, for its copies."""
        self._doors.close()
        for one in self._sockets:
            one.close()
        self._sockets.clear()
        self._handlers.clear()
        if self._epoll is not None:
            self._epoll.close()
            bell, self._bell, self._epoll = self._bell, -1, None
            os.close(bell)

    def _hear(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)

    def _accept(self, server: socket.socket, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = server.accept()
                connection.setblocking(False)
                self._sockets.append(connection)
                self._register(connection.fileno(), partial(self._greet, connection, bytearray()), _IN)

    def _greet(self, connection: socket.socket, hello: bytearray, mask: int) -> None:
        """Makes a connection that of the peer that its first bytes name; strangers are turned away."""
        try:
            piece = connection.recv(doors_.HELLO.size - len(hello))
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        hello += piece
        if piece and len(hello) < doors_.HELLO.size:
            return
        rank = doors_.caller(bytes(hello), self._cards[self._rank], len(self._cards))
        handler = self._admit(rank, connection) if rank >= 0 else None
        if handler is None:
            self.drop(connection)
        else:
            self._handlers[connection.fileno()] = handler

    def _register(self, descriptor: int, handler: Handler, mask: int) -> None:
        assert self._epoll is not None
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, mask)
