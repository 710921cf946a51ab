"""Brings the ranks of one host together: the first of them makes their shared memory (`house`) and hands it to the others.

Every rank has one Unix datagram socket, bound to an abstract name that follows from its card. The memory comes over it, later
the bytes that wake it (`bells`); and as long as the name is there, so is the rank: a name goes with its process. A
rank so has as many descriptors and mappings on a host of 64 ranks as on one of two, and meets all neighbours with one message.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from ncclx_py.transport import house as houses
from ncclx_py.transport.bells import Bell
from ncclx_py.transport.channels import Neighbour
from ncclx_py.transport.house import House
from ncclx_py.transport.identity import Card, unix_name

_TOKEN = 32  # bytes, with which a message begins
_LONGEST = 2048  # bytes of a message
_PROBE = 0.05  # seconds between two looks whether the first rank is still there


def listen(token: str) -> socket.socket:
    """This rank's socket. Must stand before the rank's card is published."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    line.bind(unix_name(token))
    return line


class Household:
    """This rank and its neighbours, in order of rank: `me` among `cards`; `line` is the socket of `listen`."""

    def __init__(self, line: socket.socket, cards: Sequence[Card], rank: int, house: House) -> None:
        self.line = line
        self._cards = {card.rank: card for card in cards}
        self._places = {card.rank: place for place, card in enumerate(cards)}
        self._rank, self._house = rank, house
        place = self._places[rank]
        self.me = Neighbour(rank, place, house.window(place), house.own_arena(place))
        self._known = {rank: self.me}
        self._bells: dict[int, Bell] = {}
        self._probe: socket.socket | None = None
        line.setblocking(False)

    @property
    def others(self) -> list[int]:
        """The ranks of the neighbours."""
        return [rank for rank in self._cards if rank != self._rank]

    def neighbour(self, rank: int) -> Neighbour:
        known = self._known.get(rank)
        if known is None:
            place = self._places[rank]
            known = self._known[rank] = Neighbour(rank, place, self._house.window(place), self._house.arena(place))
        return known

    def bell(self, rank: int) -> Bell:
        known = self._bells.get(rank)
        if known is None:
            name = unix_name(self._cards[rank].token)
            known = self._bells[rank] = Bell(self.line, name, self.neighbour(rank).window)
        return known

    def set_abort_text(self, text: str) -> None:
        """Shows all neighbours why this rank has aborted the group."""
        self.me.window.set_abort_text(text)
        self._house.aborted[self.me.place] = 1

    def abort_text(self) -> str:
        """Why a neighbour has aborted the group; "" while none has."""
        for rank, place in self._places.items() if any(self._house.aborted) else ():
            if rank != self._rank and self._house.aborted[place]:
                return self.neighbour(rank).window.abort_text()
        return ""

    def is_there(self, rank: int) -> bool:
        """Whether the process of a neighbour lives and is in the group. Costs microseconds. From any thread."""
        if self._probe is None:
            self._probe = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        return _is_there(self._probe, self._cards[rank])

    def state(self, rank: int) -> str:
        """Of a neighbour's process: "alive", "stopped" or "gone"; "" where it cannot be known (another PID namespace)."""
        mine, card = self._cards[self._rank], self._cards[rank]
        if not self.is_there(rank):
            return "gone"
        return process_state(card.pid) if card.pids == mine.pids else ""

    def close_sockets(self) -> None:
        self.line.close()
        if self._probe is not None:
            self._probe.close()

    def close(self) -> None:
        self.close_sockets()
        for neighbour in self._known.values():
            neighbour.window.close()
        self._house.close()


def move_in(line: socket.socket, cards: Sequence[Card], rank: int, until: float) -> Household:
    """Shares memory with the other ranks of this host, whose cards (mine included) are given in order of rank.

    Raises TimeoutError or ConnectionError, naming the rank, when somebody does not come. `line` stays open then.
    """
    first = cards[0]
    if first.rank == rank:
        descriptor = houses.create(f"ncclx-house-{rank}", len(cards))
    else:
        me = next(card for card in cards if card.rank == rank)
        descriptor = _receive(line, first, me, until)
    try:
        house = House(descriptor, len(cards))
        if first.rank == rank:
            try:
                _hand_out(line, cards, descriptor, until)
            except BaseException:
                house.close()
                raise
    finally:
        os.close(descriptor)
    return Household(line, cards, rank, house)


def process_state(pid: int) -> str:
    """Of a process of this PID namespace: "alive", "stopped" or "gone"; "" where it cannot be known."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"
    except (OSError, IndexError):
        return ""
    return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(state, "alive")


def _hand_out(line: socket.socket, cards: Sequence[Card], descriptor: int, until: float) -> None:
    """Gives the memory to all neighbours; or where one cannot be reached, tells that to all the others."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        missing = next((card for card in cards if not _is_there(probe, card)), None)
    if missing is not None:
        why = _unreachable(missing, "nobody has its name")
        for card in cards[1:]:
            with contextlib.suppress(OSError):
                line.sendto(card.token.encode() + why.encode()[: _LONGEST - _TOKEN], unix_name(card.token))
        raise ConnectionError(why)
    gift = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))
    for card in cards[1:]:
        line.settimeout(_left(until, f"rank {card.rank}"))
        try:
            line.sendmsg([card.token.encode()], [gift], 0, unix_name(card.token))
        except OSError as error:
            raise ConnectionError(_unreachable(card, error)) from error


def _receive(line: socket.socket, first: Card, me: Card, until: float) -> int:
    """The memory that the first rank of this host hands out; what strangers send is passed over."""
    while True:
        line.settimeout(min(_PROBE, _left(until, f"rank {first.rank}")))
        try:
            message, descriptors, _, _ = socket.recv_fds(line, _LONGEST, 1, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
                if _is_there(probe, first):
                    continue
            raise ConnectionError(_unreachable(first, "nobody has its name")) from None
        if message[:_TOKEN] != me.token.encode():
            for descriptor in descriptors:
                os.close(descriptor)
        elif descriptors:
            return descriptors[0]
        else:
            raise ConnectionError(message[_TOKEN:].decode(errors="replace"))


def _is_there(probe: socket.socket, card: Card) -> bool:
    """Whether the name of a card's rank is bound. Connecting a datagram socket sends nothing."""
    try:
        probe.connect(unix_name(card.token))
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except OSError:
        return True
    return True


def _unreachable(card: Card, error: object) -> str:
    return (
        f"rank {card.rank} has the same host id, {card.host!r}, but cannot be reached over a Unix socket ({error}): "
        "it died, or it is in another network namespace. Set NCCLX_HOST_ID so that it is equal only on one host."
    )


def _left(until: float, who: str) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"{who} of this host did not come in time to make the group: see its log.")
    return left
