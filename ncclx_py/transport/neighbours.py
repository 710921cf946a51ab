"""Brings the ranks of one host together: each hands its window and its arena to each other, over abstract Unix sockets.

The sockets stay open: the end of one says at once that the process behind it is gone, and a byte wakes it (`bells`).
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path

from ncclx_py.transport import arena as arenas
from ncclx_py.transport import window as windows
from ncclx_py.transport.arena import Arena
from ncclx_py.transport.channels import Neighbour
from ncclx_py.transport.identity import Card
from ncclx_py.transport.window import Window

_HELLO = struct.Struct("<32sI")  # the token of the rank that is called, and the rank that calls


def unix_name(token: str) -> str:
    """The abstract name under which a rank listens while a group is made."""
    return f"\0ncclx-{token}"


def listen(token: str) -> socket.socket:
    """Must stand before the rank's card is published."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(unix_name(token))
    server.listen(512)
    return server


class Household:
    """This rank and its neighbours: `me`, `others` by rank (without me), and a socket to each of them."""

    def __init__(self, me: Neighbour) -> None:
        self.me = me
        self.others: dict[int, Neighbour] = {}
        self.sockets: dict[int, socket.socket] = {}

    def close(self) -> None:
        for connection in self.sockets.values():
            connection.close()
        for neighbour in [self.me, *self.others.values()]:
            neighbour.window.close()
            neighbour.arena.close()


def move_in(server: socket.socket, cards: Sequence[Card], rank: int, until: float) -> Household:
    """Exchanges memory with the other ranks of this host, whose cards (mine included) are given in order of rank.

    Closes `server`. Raises TimeoutError or ConnectionError, naming the rank, when somebody does not come.
    """
    places = {card.rank: place for place, card in enumerate(cards)}
    window_fd, window = windows.create(f"ncclx-window-{rank}", len(cards))
    arena_fd, arena = arenas.create(f"ncclx-arena-{rank}")
    household = Household(Neighbour(rank, places[rank], window, arena))
    try:
        for card in cards:
            if card.rank < rank:
                household.sockets[card.rank] = _call(card, rank, until)
        mine = next(card for card in cards if card.rank == rank)
        later = {card.rank for card in cards if card.rank > rank}
        while later:
            connection, caller = _answer(server, mine.token, later, until)
            household.sockets[caller] = connection
            later.discard(caller)
        for connection in household.sockets.values():
            socket.send_fds(connection, [b"\0"], [window_fd, arena_fd])
        for other, connection in household.sockets.items():
            household.others[other] = _receive(connection, other, places[other], len(cards), until)
            connection.setblocking(False)
    except BaseException:
        household.close()
        raise
    finally:
        server.close()
        os.close(window_fd)
        os.close(arena_fd)
    return household


def process_state(connection: socket.socket) -> str:
    """Of the process at the other end: "alive", "stopped" or "gone"; "" where it cannot be known (another PID namespace)."""
    try:
        pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if pid <= 0:
            return ""
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"
    except (OSError, IndexError):
        return ""
    return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(state, "alive")


def _call(card: Card, rank: int, until: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_left(until, f"rank {card.rank}"))
        connection.connect(unix_name(card.token))
        connection.sendall(_HELLO.pack(card.token.encode(), rank))
    except OSError as error:
        connection.close()
        raise ConnectionError(
            f"rank {card.rank} has the same host id, {card.host!r}, but cannot be reached over a Unix socket ({error}): "
            "it died, or it is in another network namespace. Set NCCLX_HOST_ID so that it is equal only on one host."
        ) from error
    return connection


def _answer(server: socket.socket, token: str, expected: set[int], until: float) -> tuple[socket.socket, int]:
    """The next connection from one of the `expected` ranks; strangers are turned away."""
    while True:
        waits_for = f"ranks {sorted(expected)} of this host"
        server.settimeout(_left(until, waits_for))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue  # _left names those who are missing
        connection.settimeout(_left(until, waits_for))
        try:
            hello = connection.recv(_HELLO.size, socket.MSG_WAITALL)
        except OSError:
            hello = b""
        if len(hello) == _HELLO.size:
            shown, caller = _HELLO.unpack(hello)
            if shown == token.encode() and caller in expected:
                return connection, caller
        connection.close()


def _receive(connection: socket.socket, rank: int, place: int, neighbours: int, until: float) -> Neighbour:
    connection.settimeout(_left(until, f"rank {rank}"))
    try:
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 2, socket.MSG_CMSG_CLOEXEC)
    except TimeoutError as error:
        raise TimeoutError(f"rank {rank} of this host has not sent its window in time.") from error
    if len(descriptors) != 2:
        raise ConnectionError(f"rank {rank} of this host went away while the group was made: see its log.")
    try:
        window = Window(descriptors[0], neighbours)
        try:
            return Neighbour(rank, place, window, Arena(descriptors[1]))
        except BaseException:
            window.close()
            raise
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _left(until: float, who: str) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"{who} did not come in time to make the group: see its log.")
    return left
