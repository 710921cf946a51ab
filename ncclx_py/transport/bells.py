"""Wakes a rank of this host that sleeps until something is posted or taken.

A rank that has nothing to do says so in its window and waits for its sockets; whoever posts a message for it, or takes
one of its own, sends a byte over the Unix socket between the two. On a machine with fewer cores than ranks that leaves
the processor to those who have work, and costs nothing while everyone is awake.

The word is looked at without a fence, so a byte may rarely be missed: a sleep is short in any case.
"""

from __future__ import annotations

import contextlib
import socket

from ncclx_py.transport.window import ASLEEP, Window


class Bell:
    """Rings at one neighbour, whose window is `theirs`, over `connection` (not blocking)."""

    __slots__ = ("_connection", "_words")

    def __init__(self, connection: socket.socket, theirs: Window) -> None:
        self._connection = connection
        self._words = theirs.words

    def ring(self) -> None:
        """Wakes the neighbour if it sleeps."""
        if self._words[ASLEEP]:
            with contextlib.suppress(OSError):  # it is awake with its hands full, or gone: others notice that
                self._connection.send(b"\0")


def heard(connection: socket.socket) -> bool:
    """Takes what has come over `connection`. False when its other end is gone."""
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
