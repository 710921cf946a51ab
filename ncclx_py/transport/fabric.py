"""The fabric of a group: how its ranks reach each other's memory. Shared windows inside a host, TCP between hosts.

    fabric = Fabric.connect(store, rank, size, timeout)     # all ranks of the group
    executor = Executor(fabric)                             # runs plans over it, see `executor`
    tensor = fabric.arena.allocate((1 << 20,), torch.float32)
    fabric.abort("why")                                     # any thread: everyone who waits raises
    fabric.close()

Connecting exchanges one card per rank through the store (`exchange`: three messages a rank, at any size), and shares memory
between the ranks of each host (`neighbours`). TCP connections are opened by the first plan that needs them. A peer's death
shows as the end of its name inside a host, and of a connection between hosts; an abort is a flag in shared memory inside a host
and a message between hosts.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from ncclx_py.errors import CollectiveError
from ncclx_py.plans.topology import Topology
from ncclx_py.transport import neighbours, tcp
from ncclx_py.transport.arena import Arena
from ncclx_py.transport.bells import hear
from ncclx_py.transport.channels import Inbox, Neighbour, Outbox
from ncclx_py.transport.doors import Doors
from ncclx_py.transport.exchange import exchange
from ncclx_py.transport.identity import Card, host_numbers, make_card
from ncclx_py.transport.mail import Mailbox
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
    host. `said` is what each rank gave to `connect`. `lock` is held by whoever runs a plan. `mail` carries messages between two
    ranks.
    """

    def __init__(
        self,
        rank: int,
        cards: list[Card],
        household: Household,
        network: Network | None,
        poller: Poller,
        doors: Doors,
        said: list[Any],
    ) -> None:
        """For `connect`."""
        self.said = said
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
        self._outboxes: dict[tuple[int, int], Outbox] = {}
        self._inboxes: dict[tuple[int, int], Inbox] = {}
        self._reason = ""
        self._told = self._closed = False
        self._abort_lock = threading.RLock()  # a signal handler may abort while this thread does
        poller.register(household.line.fileno(), lambda mask: hear(household.line), READABLE)
        if network is not None:
            network.start(self.lose, self.adopt)
        self.mail = Mailbox(rank, cards, doors, household.me.place % self.rails)
        self.mail.start(self.look_aside, self.adopt, self.abort)
        _living.add(self)

    @classmethod
    def connect(cls, store: Any, rank: int, size: int, timeout: timedelta, says: Any = None) -> Fabric:
        """Joins all ranks of a group; each must call it, with a store of their own for this. `says` is a JSON value that travels
        with this rank's card.

        Raises CollectiveError, which names the rank, when some rank does not come before `timeout` has passed, or
        when what the ranks say about themselves does not fit together.
        """
        until = time.monotonic() + timeout.total_seconds()
        with contextlib.ExitStack() as opened:
            tcp_server = opened.enter_context(tcp.listen())
            doors = opened.enter_context(contextlib.closing(Doors()))
            try:
                mine = make_card(rank, tcp_server.getsockname()[1], os.environ, doors.port)
                line = opened.enter_context(neighbours.listen(mine.token))
                doors.open(mine.token)
                rows = exchange(store, "fabric", rank, size, [*mine.row(), says], timeout)
                cards = [Card.from_row(other, row[:-1]) for other, row in enumerate(rows)]
                _check_rails(cards, mine)
                local = [card for card in cards if card.host == mine.host]
                household = neighbours.move_in(line, local, rank, until)
            except (OSError, ValueError, RuntimeError) as error:
                if isinstance(error, CollectiveError):
                    raise
                raise CollectiveError(f"Rank {rank} of {size} could not join its group: {error}") from error
            opened.pop_all()
        poller = Poller()
        network = None
        if len(local) < size:
            network = Network(tcp_server, cards, rank, household.me.place % mine.rails, poller)
        else:
            tcp_server.close()
        return cls(rank, cards, household, network, poller, doors, [row[-1] for row in rows])

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
        return self._household.neighbour(rank)

    def outbox(self, peer: int, lane: int) -> Outbox:
        known = self._outboxes.get((peer, lane))
        if known is None:
            known = self._outboxes[peer, lane] = Outbox(self.me, self.neighbour(peer), lane, self._household.bell(peer))
        return known

    def inbox(self, peer: int, lane: int) -> Inbox:
        known = self._inboxes.get((peer, lane))
        if known is None:
            known = self._inboxes[peer, lane] = Inbox(self.me, self.neighbour(peer), lane, self._household.bell(peer))
        return known

    def abort(self, reason: str) -> None:
        """Ends the group: everyone who waits, here or on other ranks, raises with the first reason that was given.

        May be called from any thread, and again. It does not wait.
        """
        self.adopt(f"rank {self.rank}: {reason}")
        self.mail.end(self._reason)
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
            self._household.set_abort_text(reason)

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
        text = self._household.abort_text()
        if text:
            self.adopt(text)

    def look_for(self, ranks: Iterable[int]) -> None:
        """Takes note of those of `ranks` on this host whose process is gone."""
        for rank in ranks:
            if rank not in self.gone and self.is_local(rank) and not self._household.is_there(rank):
                self.lose(rank)

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
        others = [] if self._closed else self._household.others
        known = {peer: self._household.state(peer) for peer in others}
        return {peer: state for peer, state in known.items() if state} | dict.fromkeys(list(self.gone), "gone")

    def links(self) -> list[dict[str, int]]:
        """Figures of the data connections to other hosts (``tcp_info``), with the group rank `peer`. From any thread."""
        return self.network.links() if self.network is not None and not self._closed else []

    def close(self) -> None:
        """Lets go of all memory, sockets and descriptors. Waits for a plan that runs: abort it to end it."""
        self.mail.close("this rank has left the group")
        with self.lock, self._abort_lock:
            if self._closed:
                return
            self._closed = True
            self._reason = self._reason or f"rank {self.rank}: it has left the group"
            if self.network is not None:
                self.network.close()
            self.poller.close()
            self._outboxes.clear()
            self._inboxes.clear()
            self._household.close()
            _living.discard(self)

    def forget_sockets(self) -> None:
        """In a forked child: closes its copies, so that the end of the parent is seen by its peers."""
        self._household.close_sockets()
        if self.network is not None:
            self.network.forget_sockets()
        self.poller.close()
        self.mail.after_fork()


def _check_rails(cards: Sequence[Card], mine: Card) -> None:
    for card in cards:
        if card.rails != mine.rails or card.rails_named != mine.rails_named:
            raise ValueError(
                f"rank {card.rank} has {_rails(card)} and rank {mine.rank} has {_rails(mine)}: set NCCLX_RAILS to as "
                "many interfaces on every host."
            )


def _rails(card: Card) -> str:
    return f"{card.rails} rails named in NCCLX_RAILS" if card.rails_named else "NCCLX_RAILS not set"


def _after_fork() -> None:
    for fabric in list(_living):
        fabric.forget_sockets()
    _living.clear()


os.register_at_fork(after_in_child=_after_fork)
