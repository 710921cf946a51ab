"""How a mailbox (``mail.py``) is reached, and reaches others: an abstract Unix name inside a host, a TCP port from elsewhere.

Whoever connects shows the token of the rank that it calls, and says who it is; strangers are turned away.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence

from ncclx_py.transport import tcp
from ncclx_py.transport.identity import Card, reach

HELLO = struct.Struct("<8s32si")  # magic, token of the rank that is called, rank that calls
_MAGIC = b"ncclxm1\0"
_BACKLOG = 4096  # connections to a name that is not answered yet: each rank of the host may have called


class Doors:
    """What a rank listens on for as long as its group lives. Made before its card, which says the `port`."""

    def __init__(self) -> None:
        self._tcp: socket.socket | None = tcp.listen()
        self._unix: socket.socket | None = None
        self.port: int = self._tcp.getsockname()[1]

    def open(self, token: str) -> None:
        """Takes the name that goes with the card; before the card is published."""
        self._unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._unix.bind(_unix_name(token))
        self._unix.listen(_BACKLOG)
        self._unix.setblocking(False)

    def narrow(self) -> None:
        """All ranks are on this host: nobody calls from elsewhere."""
        if self._tcp is not None:
            self._tcp.close()
            self._tcp = None

    def sockets(self) -> list[socket.socket]:
        found = [one for one in (self._unix, self._tcp) if one is not None]
        for one in found:
            one.setblocking(False)
        return found

    def close(self) -> None:
        for one in self.sockets():
            one.close()
        self._unix = self._tcp = None


def call(cards: Sequence[Card], rank: int, peer: int, rail: int) -> tuple[socket.socket, bytes, bool]:
    """A connection of `rank` to `peer` that is not blocking, what to say first, and whether it stands already.

    Raises OSError where the peer does not answer any more, ValueError where it has no address that can work.
    """
    me, card = cards[rank], cards[peer]
    hello = HELLO.pack(_MAGIC, card.token.encode(), rank)
    if me.host == card.host:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        where: tuple[str, int] | str = _unix_name(card.token)
    else:
        address = reach(me, card, rail)
        connection = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        where = (address, card.mail)
    try:
        if me.rails_named and me.host != card.host:
            connection.bind((me.addresses[rail], 0))
        failed = connection.connect_ex(where)
        if failed not in (0, errno.EINPROGRESS):
            raise OSError(failed, os.strerror(failed))
    except OSError:
        connection.close()
        raise
    return connection, hello, not failed


def caller(hello: bytes, card: Card, size: int) -> int:
    """The rank that says `hello` to the rank of `card`, −1 for a stranger."""
    if len(hello) == HELLO.size:
        magic, token, rank = HELLO.unpack(hello)
        if magic == _MAGIC and token == card.token.encode() and 0 <= rank < size and rank != card.rank:
            return int(rank)
    return -1


def _unix_name(token: str) -> str:
    return f"\0ncclx-mail-{token}"
