"""Wakes a rank of this host that sleeps until something is posted or taken.

A rank that has nothing to do says so in its window and waits for its sockets; whoever posts a message for it, or takes
one of its own, sends a byte to its Unix name. On a machine with fewer cores than ranks that leaves the processor to those
who have work, and costs nothing while everyone is awake.

The word is looked at without a fence, so a byte may rarely be missed: a sleep is short in any case.
"""

from __future__ import annotations

import contextlib
import socket

from ncclx_py.transport.window import ASLEEP, Window


class Bell:
    """Rings at one neighbour, whose window is `theirs` and whose name `name`, over a socket of this rank that does not block."""

    __slots__ = ("_name", "_socket", "_words")

    def __init__(self, line: socket.socket, name: str, theirs: Window) -> None:
        self._socket, self._name = line, name
        self._words = theirs.words

    def ring(self) -> None:
        """Wakes the neighbour if it sleeps."""
        if self._words[ASLEEP]:
            with contextlib.suppress(OSError):  # it is awake with its hands full, or gone: others notice that
                self._socket.sendto(b"\0", self._name)


def hear(line: socket.socket) -> None:
    """Takes the bytes that have come."""
    with contextlib.suppress(OSError):  # BlockingIOError: that was all
        while True:
            line.recv(1)
