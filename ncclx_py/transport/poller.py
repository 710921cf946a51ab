"""Waits for sockets, edge-triggered: an event says that something may be read or written now, once.

A handler remembers that, and goes on until the socket has no more; data that nobody wants yet then wakes nobody.
"""

from __future__ import annotations

import select
from collections.abc import Callable

READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
WRITABLE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
_FD_SETSIZE = 1024

Handler = Callable[[int], None]


class Poller:
    """Calls the handler of each registered descriptor with the events that it has."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}

    def register(self, descriptor: int, handler: Handler, events: int = READABLE | WRITABLE) -> None:
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, events | select.EPOLLET)

    def unregister(self, descriptor: int) -> None:
        if self._handlers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def poll(self, seconds: float = 0.0) -> bool:
        """Handles what is there, or comes within `seconds`. False when that was nothing."""
        if seconds:
            seconds = self._sleep(seconds)
        events = self._epoll.poll(seconds)
        for descriptor, mask in events:
            handler = self._handlers.get(descriptor)
            if handler is not None:  # an earlier handler of this round may have closed it
                handler(mask)
        return bool(events)

    def close(self) -> None:
        self._handlers.clear()
        self._epoll.close()

    def _sleep(self, seconds: float) -> float:
        """Sleeps with the resolution of microseconds that epoll lacks; returns what is left for epoll to wait."""
        if self._epoll.fileno() >= _FD_SETSIZE:
            return seconds
        select.select([self._epoll.fileno()], [], [], seconds)
        return 0.0
