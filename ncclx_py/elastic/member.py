"""One rank's part in an elastic run: its heartbeats, its questions to the store, and the alarm when the epoch ends.

Every rank of a replica has one; rank 0 speaks for the replica (`join`, `begin`, `arrive`, `vote`, …), all ranks send heartbeats
and learn from the answers when the epoch they work in is over: then `on_change` is called, once, from the heartbeat's
thread, to abort what this rank waits for.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ncclx_py.elastic.client import Client
from ncclx_py.elastic.errors import Dropped, ElasticError, EpochChanged, RunFinished
from ncclx_py.elastic.membership import Rules
from ncclx_py.elastic.states import Gone

BEATS = 8  # heartbeats per lease
WAIT_S = 20.0  # after which a question that is still undecided comes back as StillWaiting


class StillWaiting(Exception):
    """The store has not decided yet: ask again."""


@dataclass(frozen=True, slots=True)
class Seat:
    """What the store says when a step begins: the epoch, its members (sorted) and the step."""

    epoch: int
    members: tuple[int, ...]
    step: int
    serve: tuple[str, ...] = ()  # sessions of newcomers that fetch their state from this replica
    notes: tuple[str, ...] = ()  # what happened since the epoch that the caller knew
    paused: bool = False  # fewer members than the run needs: only serve


@dataclass(frozen=True, slots=True)
class Fetch:
    """Where a newcomer finds a state: at replica `donor`, under the name `session`."""

    donor: int
    session: str


class Member:
    """Rank `rank` of replica `replica`; `incarnation` tells this process of it from earlier ones (equal on its ranks)."""

    def __init__(
        self, address: str, replica: int, rank: int, incarnation: str, rules: Rules, patience_s: float = 60.0
    ) -> None:
        self.replica, self.rank, self.incarnation, self.rules = replica, rank, incarnation, rules
        self.client = Client(address, patience_s)
        self.known = 0  # reasons of epochs up to this one have been told
        self.busy = False
        self._pulse = Client(address, patience_s)
        self._watched: tuple[int, Callable[[], None]] | None = None
        self._watch_lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="ncclx-elastic-beat")

    # Any rank

    def start(self) -> None:
        """Begin to send heartbeats."""
        self._thread.start()

    def watch(self, epoch: int, on_change: Callable[[], None]) -> None:
        """Call `on_change` once the epoch is over."""
        with self._watch_lock:
            self._watched = (epoch, on_change)

    def unwatch(self) -> None:
        with self._watch_lock:
            self._watched = None

    def close(self) -> None:
        """No more heartbeats: the store will miss this rank unless the replica has left."""
        self._stop.set()
        self.unwatch()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)
        self._pulse.close()
        self.client.close()

    def _beat(self) -> None:
        while not self._stop.is_set():
            try:
                answer = self._ask_pulse()
            except ElasticError:
                continue  # rank 0 says so when it asks the store itself
            self._look(int(answer["epoch"]))
            self._stop.wait(self.rules.lease_s / BEATS)

    def _ask_pulse(self) -> dict[str, Any]:
        return self._pulse.ask("beat", **self._me(), rank=self.rank, busy=self.busy)

    def _look(self, epoch: int) -> None:
        with self._watch_lock:
            over = self._watched is not None and self._watched[0] < epoch
            alarm = self._watched[1] if over and self._watched is not None else None
            if over:
                self._watched = None
        if alarm is not None:
            alarm()

    # Rank 0, for the replica

    def join(self, step: int) -> Seat | Fetch:
        """A place in the run, for a replica whose own state is that of `step`. Raises RunFinished."""
        answer = self._decide("join", step=step, rules=asdict(self.rules))
        if answer["answer"] == "fetch":
            return Fetch(answer["donor"], answer["session"])
        return self._seat(answer)

    def ready(self, step: int) -> Seat | None:
        """Become a member with the state of `step`; None while the store waits for a commit, or `step` is too old.

        Raises Dropped, RunFinished; Gone when the donor is not a member any more.
        """
        answer = self.client.ask("ready", **self._me(), step=step)
        if answer["answer"] == "again":
            raise Gone("the donor is gone")
        return None if answer["answer"] in ("behind", "wait") else self._seat(answer)

    def begin(self, step: int) -> Seat:
        """The epoch in which `step` is to be made. Raises Dropped, RunFinished."""
        seat = self._seat(self._decide("begin", step=step, known=self.known))
        self.known = max(self.known, seat.epoch)
        return seat

    def arrive(self, epoch: int, stage: str) -> None:
        """Wait until all members have come to this stage. Raises EpochChanged, Dropped."""
        self._expect("go", self._decide("arrive", epoch=epoch, stage=stage))

    def vote(self, epoch: int, step: int) -> None:
        """Returns when the step is committed. Raises EpochChanged, Dropped: then it is not, and never will be in `epoch`."""
        self._expect("commit", self._decide("vote", epoch=epoch, step=step))

    def fail(self, epoch: int, why: str) -> None:
        """Tell the others that the step cannot be completed in this epoch."""
        self.client.ask("fail", **self._me(), epoch=epoch, why=why)

    def leave(self) -> None:
        self.client.ask("leave", **self._me())

    def finish(self) -> None:
        """The run is complete, and what came out is on disk."""
        self.client.ask("finish", **self._me())

    def await_finish(self, epoch: int) -> None:
        """Returns when another member has finished the run. Raises EpochChanged, Dropped."""
        self._expect("finished", self._decide("await_finish", epoch=epoch), finished_is_fine=True)

    def _decide(self, operation: str, **fields: Any) -> dict[str, Any]:
        until = time.monotonic() + WAIT_S
        answer = self.client.decide(operation, lambda: time.monotonic() > until, **self._me(), **fields)
        if answer["answer"] == "wait":
            raise StillWaiting
        return answer

    def _me(self) -> dict[str, Any]:
        return {"replica": self.replica, "incarnation": self.incarnation}

    def _seat(self, answer: dict[str, Any]) -> Seat:
        _raise_for(answer)
        return Seat(
            answer["epoch"],
            tuple(answer["members"]),
            answer["step"],
            tuple(answer.get("serve", ())),
            tuple(answer.get("notes", ())),
            answer["answer"] == "paused",
        )

    def _expect(self, wanted: str, answer: dict[str, Any], finished_is_fine: bool = False) -> None:
        if not finished_is_fine:
            _raise_for(answer)
        if answer["answer"] == "dropped":
            raise Dropped
        if answer["answer"] != wanted:
            raise EpochChanged


def _raise_for(answer: dict[str, Any]) -> None:
    if answer["answer"] == "finished":
        raise RunFinished
    if answer["answer"] == "dropped":
        raise Dropped


def new_incarnation() -> str:
    return secrets.token_hex(8)
