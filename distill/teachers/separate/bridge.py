"""The bridge between student ranks and teacher ranks of one job: requests go one way, answers the other.

Every student and every teacher takes part in each tick, in the same order:

    header     all-to-all of int64: from each student to each teacher what it wants, and how many words follow
    words      all-to-all-v of int32: rows of token ids (``requests``)
    answer     all-to-all-v of bytes, in a group of its own: what the teachers say (``..wire``), so that the request of one tick
               does not wait for the answer of another

Students start all three at once and go on; both sides know the size of an answer from the request. Payloads are tensors on
the rank's device. A rank that ends without a word fails the ticks of all others: ``Bridge.why`` names it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ncclx_py.elastic.lanes import connect_group

SCORE, CHECK, END = 1, 2, 3  # what a student wants; 0: nothing
HEADER = 4  # numbers per pair of ranks: want, service, words, exit status
IDLE_S = (
    24 * 3600.0
)  # a student may write for hours between two requests; one that died shows by its end, not by silence
NOTICE_S = 3.0  # within which the end of a process is known to those that were connected to it


@dataclass(frozen=True)
class Seats:
    """Who sits at the bridge: ``ranks`` are the job's numbers, the students' first; ``me`` is this process's place among them."""

    ranks: tuple[int, ...]
    students: int
    me: int

    @property
    def teachers(self) -> int:
        return len(self.ranks) - self.students

    @property
    def teaches(self) -> bool:
        return self.me >= self.students

    def named(self, places: Sequence[int]) -> str:
        """Ranks by their numbers in the job, for messages."""
        numbers = [str(self.ranks[place]) for place in places]
        return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(numbers)}"


class BridgeError(Exception):
    """An exchange failed: a rank is gone, late, or has ended the bridge."""


@contextmanager
def _named() -> Iterator[None]:
    """Errors of a collective as BridgeErrors, so that those of a model (also RuntimeErrors) are not taken for them."""
    try:
        yield
    except RuntimeError as error:
        raise BridgeError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Passage:
    """An exchange under way. What is sent is held until it has arrived."""

    sent: Tensor
    received: Tensor
    work: Any

    def wait(self) -> Tensor:
        """What was received. Raises BridgeError."""
        with _named():
            self.work.wait()
        return self.received


class Bridge:
    """This rank's end. ``generation`` counts the bridges of a job: after a loss those that are left build the next one."""

    def __init__(
        self,
        backend: str,
        store: Any,
        seats: Seats,
        world: bool,
        timeout_s: float,
        device: torch.device,
        generation: int,
    ) -> None:
        self.seats, self.store, self.generation = seats, store, generation
        self.timeout_s, self.device, self.backend = timeout_s, device, backend
        # NCCL sees no dead peer: there the deadline is all there is.
        idle = timeout_s if backend == "nccl" else max(timeout_s, IDLE_S)
        self._requests = self._connect("requests", world, idle)
        self._answers = self._connect("answers", world, timeout_s)
        self.ended = False

    def _connect(self, lane: str, world: bool, timeout_s: float) -> Any:
        name = f"teachers.{lane}" + (f".{self.generation}" if self.generation else "")
        store = dist.PrefixStore(name, self.store)
        store.set_timeout(timedelta(seconds=self.timeout_s))
        return connect_group(self.backend, store, self.seats.me, self.seats.ranks, timeout_s, name, world)

    def headers(self, sent: Tensor) -> Passage:
        """Starts the exchange of headers ``[W, HEADER]``. This and what follows raise BridgeError."""
        flat = sent.reshape(-1)
        return self._start(self._requests, flat, torch.empty_like(flat), [], [])

    def words(self, sent: Tensor, sent_counts: list[int], counts: list[int]) -> Passage:
        """Starts the exchange of int32 words; ``counts`` come from each rank."""
        received = torch.empty(sum(counts), dtype=torch.int32, device=self.device)
        return self._start(self._requests, sent, received, counts, sent_counts)

    def answers(self, sent: Tensor, sent_counts: list[int], counts: list[int]) -> Passage:
        """Starts the exchange of answers in bytes."""
        received = torch.empty(sum(counts), dtype=torch.uint8, device=self.device)
        return self._start(self._answers, sent, received, counts, sent_counts)

    def _start(self, lane: Any, sent: Tensor, received: Tensor, counts: list[int], sent_counts: list[int]) -> Passage:
        with _named():
            return Passage(sent, received, lane.all_to_all_single(received, sent, counts, sent_counts))

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """``tensor`` of the rank at place ``source`` on every rank, in place; at the start only."""
        with _named():
            self._answers.broadcast([tensor], root=source).wait()

    @property
    def group(self) -> Any:
        """The process group of the requests."""
        return self._requests

    def lost(self) -> list[int]:
        """Places of ranks whose processes are known to be gone or stopped."""
        states = {**self._requests.peers(), **self._answers.peers()}
        return sorted(self.seats.ranks.index(rank) for rank, state in states.items() if state in ("gone", "stopped"))

    def why(self, error: BridgeError) -> str:
        """What ended the bridge: the ranks that are lost, where that can be known, and what the collective said."""
        until = time.monotonic() + NOTICE_S
        while not (lost := self.lost()) and time.monotonic() < until:
            time.sleep(0.02)
        story = str(error).split(". ")[0].split("\n")[0]
        if not lost:
            return f"the exchange between students and teachers failed: {story}"
        roles = [("student", [p for p in lost if p < self.seats.students])]
        roles += [("teacher", [p for p in lost if p >= self.seats.students])]
        who = " and ".join(f"{role} {self.seats.named(places)}" for role, places in roles if places)
        return f"{who} of this job {'is' if len(lost) == 1 else 'are'} lost ({story})"

    def shutdown(self) -> None:
        """Ends it in good order, after the last tick."""
        if not self.ended:
            self.ended = True
            self._requests.shutdown()
            self._answers.shutdown()

    def abort(self) -> None:
        """Ends it now: whoever waits at it, on any rank, raises."""
        if not self.ended:
            self.ended = True
            self._requests.abort()
            self._answers.abort()


def header(want: int, service: int = 0, words: int = 0, status: int = 0) -> list[int]:
    return [want, service, words, status]
