"""The fabric of a group: how its ranks reach each other's memory. Shared windows inside a host, TCP between hosts.

    fabric = Fabric.connect(store, rank, size, timeout)     # all ranks of the group
    executor = Executor(fabric)                             # runs plans over it, see `executor`
    tensor = fabric.arena.allocate((1 << 20,), torch.float32)
    fabric.abort("why")                                     # any thread: everyone who waits raises
    fabric.close()

Connecting exchanges one card per rank through the store (`exchange`: three messages a rank, at any size), and windows
between the ranks of each host. TCP connections are opened by the first plan that needs them. A peer's death shows as
the end of a socket; an abort is a flag in the window inside a host and a message between hosts.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

from ncclx_py.errors import CollectiveError
from ncclx_py.plans.topology import Topology
from ncclx_py.transport import neighbours, tcp
from ncclx_py.transport.arena import Arena
from ncclx_py.transport.bells import Bell, heard
from ncclx_py.transport.channels import Inbox, Neighbour, Outbox
from ncclx_py.transport.exchange import exchange
from ncclx_py.transport.identity import Card, host_numbers, make_card
from ncclx_py.transport.neighbours import Household
from ncclx_py.transport.poller import READABLE, Poller
from ncclx_py.transport.segments import Segments
from ncclx_py.transport.tcp import Network

_GONE = "it exited, was killed or left the group"
_living: weakref.WeakSet[Fabric] = weakref.WeakSet()


class Gone(NamedTuple):
    """A peer whose process has gone, why we think so, and when (time.monotonic) we saw it."""

    why: str
    since: float


class Fabric:
    """This rank's connections to the other ranks of a group of `size`.

    `host_of` has the host of each rank, numbered in the order of their first rank; `rails` is the number of NICs per
    host. `lock` is held by whoever runs a plan.
    """

    def __init__(
        self, rank: int, cards: list[Card], household: Household, network: Network | None, poller: Poller
    ) -> None:
        """For `connect`."""
        self.rank, self.size = rank, len(cards)
        self.host_of = host_numbers(cards)
        self.rails = cards[rank].rails
        self.network = network
        self.poller = poller
        self.gone: dict[int, Gone] = {}
        self.lock = threading.Lock()
        self.calls = 0  # plans run so far
        self.segments = Segments(household.me.window)
        self._household = household
        self._bells = {
            peer: Bell(connection, household.others[peer].window) for peer, connection in household.sockets.items()
        }
        self._outboxes: dict[tuple[int, int], Outbox] = {}
        self._inboxes: dict[tuple[int, int], Inbox] = {}
        self._reason = ""
        self._told = self._closed = False
        self._abort_lock = threading.RLock()  # a signal handler may abort while this thread does
        for peer, connection in household.sockets.items():
            poller.register(connection.fileno(), self._watcher(peer, connection))
        if network is not None:
            network.start(self.lose, self.adopt)
        _living.add(self)

    @classmethod
    def connect(cls, store: Any, rank: int, size: int, timeout: timedelta) -> Fabric:
        """Joins all ranks of a group; each must call it, with a store of their own for this.

        Raises CollectiveError, which names the rank, when some rank does not come before `timeout` has passed, or
        when what the ranks say about themselves does not fit together.
        """
        until = time.monotonic() + timeout.total_seconds()
        tcp_server = tcp.listen()
        mine = make_card(rank, tcp_server.getsockname()[1], os.environ)
        unix_server = neighbours.listen(mine.token)
        try:
            cards = _exchange_cards(store, mine, size, timeout)
            local = [card for card in cards if card.host == mine.host]
            household = neighbours.move_in(unix_server, local, rank, until)
        except (OSError, ValueError, RuntimeError) as error:
            tcp_server.close()
            unix_server.close()
            if isinstance(error, CollectiveError):
                raise
            raise CollectiveError(f"Rank {rank} of {size} could not join its group: {error}") from error
        poller = Poller()
        network = None
        if len(local) < size:
            place = household.me.place
            network = Network(tcp_server, cards, rank, place % mine.rails, poller)
        else:
            tcp_server.close()
        return cls(rank, cards, household, network, poller)

    @property
    def topology(self) -> Topology:
        return Topology(self.host_of, self.rails)

    @property
    def arena(self) -> Arena:
        """Where tensors can be allocated that the ranks of this host read in place."""
        return self._household.me.arena

    @property
    def me(self) -> Neighbour:
        return self._household.me

    @property
    def reason(self) -> str:
        """Why the group was aborted, with the rank that did; "" while it was not."""
        return self._reason

    def is_local(self, peer: int) -> bool:
        return self.host_of[peer] == self.host_of[self.rank]

    def neighbour(self, rank: int) -> Neighbour:
        return self._household.others[rank]

    def outbox(self, peer: int, lane: int) -> Outbox:
        known = self._outboxes.get((peer, lane))
        if known is None:
            known = self._outboxes[peer, lane] = Outbox(self.me, self.neighbour(peer), lane, self._bells[peer])
        return known

    def inbox(self, peer: int, lane: int) -> Inbox:
        known = self._inboxes.get((peer, lane))
        if known is None:
            known = self._inboxes[peer, lane] = Inbox(self.me, self.neighbour(peer), lane, self._bells[peer])
        return known

    def abort(self, reason: str) -> None:
        """Ends the group: everyone who waits, here or on other ranks, raises with the first reason that was given.

        May be called from any thread, and again. It does not wait.
        """
        self.adopt(f"rank {self.rank}: {reason}")
        if self.lock.acquire(blocking=False):
            try:
                self.tell()
            finally:
                self.lock.release()

    def adopt(self, reason: str) -> None:
        """Takes over a reason for an abort, from here or from a peer, and shows it to the neighbours."""
        with self._abort_lock:
            if self._reason or self._closed:
                return
            self._reason = reason
            self.me.window.set_abort_text(reason)

    def tell(self) -> None:
        """Passes the reason on to other hosts. With `lock` held."""
        if self.network is not None and not self._told and not self._closed:
            self._told = True
            self.poller.poll()  # connections that nobody has accepted yet are told, too
            self.network.tell(self._reason)

    def lose(self, peer: int, why: str = _GONE) -> None:
        self.gone.setdefault(peer, Gone(why, time.monotonic()))

    def look(self) -> None:
        """Takes note of aborts of neighbours and of whatever the sockets have to say."""
        self.poller.poll()
        self.look_at_neighbours()

    def look_at_neighbours(self) -> None:
        for other in self._household.others.values():
            if other.window.words[0]:
                self.adopt(other.window.abort_text())

    def look_aside(self) -> str:
        """The reason of an abort, also of one that comes while no plan runs here. From any thread; it does not wait."""
        if self.lock.acquire(blocking=False):
            try:
                if not self._closed:
                    self.look()
                    if self._reason:
                        self.tell()
            finally:
                self.lock.release()
        return "" if self._closed else self._reason

    def peers(self) -> dict[int, str]:
        """What is known of the processes of other ranks: "alive", "stopped" or "gone". From any thread."""
        sockets = {} if self._closed else dict(self._household.sockets)
        known = {peer: neighbours.process_state(connection) for peer, connection in sockets.items()}
        return {peer: state for peer, state in known.items() if state} | dict.fromkeys(list(self.gone), "gone")

    def links(self) -> list[dict[str, int]]:
        """Figures of the data connections to other hosts (``tcp_info``), with the group rank `peer`. From any thread."""
        return self.network.links() if self.network is not None and not self._closed else []

    def close(self) -> None:
        """Lets go of all memory, sockets and descriptors. Waits for a plan that runs: abort it to end it."""
        with self.lock, self._abort_lock:
            if self._closed:
                return
            self._closed = True
            self._reason = self._reason or f"rank {self.rank}: it has left the group"
            for connection in self._household.sockets.values():
                self.poller.unregister(connection.fileno())
            if self.network is not None:
                self.network.close()
            self.poller.close()
            self._outboxes.clear()
            self._inboxes.clear()
            self._household.close()
            _living.discard(self)

    def _watcher(self, peer: int, connection: socket.socket) -> Callable[[int], None]:
        def on_event(mask: int) -> None:
            if mask & READABLE and not heard(connection):
                self.poller.unregister(connection.fileno())
                self.lose(peer)

        return on_event

    def forget_sockets(self) -> None:
        """In a forked child: closes its copies, so that the end of the parent is seen by its peers."""
        for connection in self._household.sockets.values():
            connection.close()
        if self.network is not None:
            self.network.forget_sockets()
        self.poller.close()


def _exchange_cards(store: Any, mine: Card, size: int, timeout: timedelta) -> list[Card]:
    cards = [Card.from_json(text) for text in exchange(store, "fabric", mine.rank, size, mine.to_json(), timeout)]
    for card in cards:
        if card.rails != mine.rails or card.rails_named != mine.rails_named:
            raise ValueError(
                f"rank {card.rank} has {_rails(card)} and rank {mine.rank} has {_rails(mine)}: set NCCLX_RAILS to as "
                "many interfaces on every host."
            )
    return cards


def _rails(card: Card) -> str:
    return f"{card.rails} rails named in NCCLX_RAILS" if card.rails_named else "NCCLX_RAILS not set"


def _after_fork() -> None:
    for fabric in list(_living):
        fabric.forget_sockets()
    _living.clear()


os.register_at_fork(after_in_child=_after_fork)
