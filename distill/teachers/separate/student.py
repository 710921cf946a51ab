"""The student's end: a ``Scorer`` that asks teacher ranks, some micro-batches ahead of the one in training.

Every rank of the students makes the same ticks in the same order: what is asked when follows from how many micro-batches were
submitted and taken, which is equal on all of them. Never more than ``queue`` are asked for ahead, so that neither side holds more
than so many answers.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.data.batch import TokenBatch
from distill.errors import TeacherLost, TeacherRankLost
from distill.progress import say
from distill.teachers.frozen import close
from distill.teachers.separate.bridge import CHECK, END, SCORE, Bridge, BridgeError, Passage, Seats, header
from distill.teachers.separate.recovery import next_bridge
from distill.teachers.separate.requests import Part, deal, put_together, to_words
from distill.teachers.separate.services import PRINT_BYTES, STATS_BYTES, Service
from distill.teachers.signals import Head, Signal
from distill.teachers.wire import from_tensors


@dataclass
class Answer:
    """What is on its way for one request: bytes from each place at the bridge. No passages: the bridge had failed."""

    counts: list[int]
    passages: list[Passage]

    def pieces(self) -> list[Tensor]:
        """Waits; bytes by place. Raises BridgeError."""
        received = [passage.wait() for passage in self.passages]
        return list(received[-1].split(self.counts))


class Client:
    """This student rank at the bridge: makes ticks, keeps the count of bytes and the teachers' own figures."""

    def __init__(self, bridge: Bridge, on_loss: str) -> None:
        self.bridge = bridge
        self.failed: BridgeError | None = None
        self.moves: list[tuple[Seats, Seats]] = []  # from one bridge to the next
        self._on_loss = on_loss
        self.spent: dict[int, tuple[float, float]] = {}  # job rank of a teacher → seconds at work, and in all

    def tick(self, headers: dict[int, list[int]], words: dict[int, Tensor], sizes: dict[int, int]) -> Answer:
        """One tick: by teachers' places what is wanted, the words, and the bytes that will come back. Never waits, and keeps a
        failure for whoever takes the answer."""
        bridge, places = self.bridge, range(len(self.bridge.seats.ranks))
        answer = Answer([sizes.get(place, 0) for place in places], [])
        if self.failed is not None:
            return answer
        none = torch.empty(0, dtype=torch.int32)
        heads = torch.tensor([headers.get(place, header(0)) for place in places], device=bridge.device)
        asked = [words.get(place, none) for place in places]
        silent = [0] * len(places)
        try:
            answer.passages.append(bridge.headers(heads))
            answer.passages.append(
                bridge.words(torch.cat(asked).to(bridge.device), [len(part) for part in asked], silent)
            )
            nothing = torch.empty(0, dtype=torch.uint8, device=bridge.device)
            answer.passages.append(bridge.answers(nothing, silent, answer.counts))
        except BridgeError as error:
            self.failed = error
        return answer

    def take(self, answer: Answer) -> list[Tensor]:
        """The answer's bytes by place. Raises TeacherRankLost where the bridge has failed."""
        if self.failed is None:
            try:
                return answer.pieces()
            except BridgeError as error:
                self.failed = error
        raise TeacherRankLost(
            f"{self.bridge.why(self.failed)}. That rank's own output says more; the same command continues from the last step"
        )

    def recover(self) -> bool:
        """After TeacherRankLost, on all students together: whether there is a bridge to go on with, among those who are left."""
        before = self.bridge
        self.failed = self.failed or BridgeError("another student has lost a teacher's rank")
        if self._on_loss != "continue":
            return False
        try:
            self.bridge = next_bridge(before)
        except BridgeError as error:
            say(f"cannot go on without the lost ranks: {error}")
            return False
        self.failed = None
        self.moves.append((before.seats, self.bridge.seats))
        return True

    def note(self, place: int, stats: Tensor) -> None:
        """A teacher's seconds at work and in all, since its last answer."""
        busy, elapsed = struct.unpack("dd", bytes(stats.cpu().numpy()))
        rank = self.bridge.seats.ranks[place]
        before = self.spent.get(rank, (0.0, 0.0))
        self.spent[rank] = (before[0] + busy, before[1] + elapsed)

    def end(self, status: int) -> None:
        """The last tick: the teachers leave with exit status ``status``. Raises TeacherRankLost where they have left already."""
        seats = self.bridge.seats
        self.take(self.tick({p: header(END, status=status) for p in range(seats.students, len(seats.ranks))}, {}, {}))


@dataclass(frozen=True, slots=True)
class _Asked:
    """A micro-batch under way, dealt to the service's ranks in ``parts``, ``words`` of 4 bytes in all."""

    batch: TokenBatch
    parts: list[Part]
    words: int
    answer: Answer


class Separate:
    """A ``Scorer`` of one service of the teacher ranks (a teacher, or the reference)."""

    ahead = may_be_lost = True

    def __init__(self, client: Client, service: Service, head: Head | None, queue: int) -> None:
        self.client, self.service, self._head, self._queue = client, service, head, queue
        self._waiting: deque[TokenBatch] = deque()
        self._asked: deque[_Asked] = deque()
        self._bytes = self._request_bytes = 0
        self._wait_s = 0.0
        self._spent = (0.0, 0.0)
        self.moves = 0  # bridges that the service's places have followed

    def submit(self, batches: Sequence[TokenBatch]) -> None:
        if self.service.places:
            self._waiting.extend(batches)
        self._top_up()

    def take(self, batch: TokenBatch) -> Signal:
        """Raises TeacherRankLost when a teacher's rank is; TeacherLost, on all students alike, from then on where it was the last
        one that held this teacher, and the run went on with the others."""
        if not self.service.places:
            raise TeacherLost(f"no rank of this job is left that holds the teacher '{self.service.name}'")
        asked = self._asked.popleft()
        assert asked.batch is batch, "signals are taken in the order in which they were asked for"
        began = time.perf_counter()
        try:
            pieces = self.client.take(asked.answer)
        finally:
            self._top_up()
        self._wait_s += time.perf_counter() - began
        return self._read(asked, pieces)

    def figures(self) -> dict[str, float]:
        """Bytes of answers and of requests, seconds waited, and the share of their time that the teacher ranks computed (all of
        them, as the first student rank knows it)."""
        found = {
            "bytes": float(self._bytes),
            "request_bytes": float(self._request_bytes),
            "wait_s": self._wait_s,
            "busy": self._busy_share(),
        }
        self._bytes = self._request_bytes = 0
        self._wait_s = 0.0
        return found

    def _busy_share(self) -> float:
        """Of this service's ranks since the last call, as the first student knows it; 0 on others."""
        ranks = [self.client.bridge.seats.ranks[place] for place in self.service.places]
        spent = [self.client.spent.get(rank, (0.0, 0.0)) for rank in ranks]
        busy, elapsed = (sum(one[part] for one in spent) for part in (0, 1))
        before, self._spent = self._spent, (busy, elapsed)
        return (busy - before[0]) / (elapsed - before[1]) if elapsed > before[1] else 0.0

    def cancel(self) -> None:
        """What was asked is still answered, and thrown away."""
        self._waiting.clear()
        while self._asked:
            answer = self._asked.popleft().answer
            with suppress(TeacherRankLost):
                self.client.take(answer)

    def recover(self) -> bool:
        """After TeacherRankLost, on all students together: whether the run goes on, on a new bridge, without the lost ranks."""
        if self.moves == len(self.client.moves) and not self.client.recover():
            return False
        while self.moves < len(self.client.moves):
            before, after = self.client.moves[self.moves]
            self.service = self.service.without(before.ranks, after.ranks)
            self._busy_share()  # of fewer ranks from now on
            self.moves += 1
        return True

    def close(self) -> None:
        """The job's end tells the teachers, see ``roles``."""
        self._waiting.clear()

    def fingerprint(self) -> list[float]:
        """Of the parameters as they are now on every rank that holds them: where one differs from what it was, that one's.
        While the bridge is down, the last that is known."""
        known, places, seats = list(self.service.fingerprint), self.service.places, self.client.bridge.seats
        asked = {place: header(CHECK, self.service.number) for place in range(seats.students, len(seats.ranks))}
        try:
            pieces = self.client.take(self.client.tick(asked, {}, dict.fromkeys(places, PRINT_BYTES)))
        except TeacherRankLost:  # the next answer to be taken says so, where all students listen
            return known
        found = [list(struct.unpack("dd", bytes(pieces[place].cpu().numpy()))) for place in places]
        return next((one for one in found if not close(one, known)), known)

    def _top_up(self) -> None:
        while self._waiting and len(self._asked) < self._queue:
            self._ask(self._waiting.popleft())

    def _ask(self, batch: TokenBatch) -> None:
        seats, places = self.client.bridge.seats, self.service.places
        parts = deal(batch, seats.me, seats.students, len(places))
        words = {place: to_words(part.batch) for place, part in zip(places, parts, strict=True)}
        sizes = {place: self.service.token_bytes * len(part.places) for place, part in zip(places, parts, strict=True)}
        teachers = range(seats.students, len(seats.ranks))
        headers = {place: header(SCORE, self.service.number, len(words.get(place, ()))) for place in teachers}
        if seats.me == 0:
            sizes = {place: sizes.get(place, 0) + STATS_BYTES for place in teachers}
        answer = self.client.tick(headers, words, sizes)
        self._asked.append(_Asked(batch, parts, sum(map(len, words.values())), answer))

    def _read(self, asked: _Asked, pieces: list[Tensor]) -> Signal:
        seats, batch, parts = self.client.bridge.seats, asked.batch, asked.parts
        if seats.me == 0:
            for place in range(seats.students, len(seats.ranks)):
                self.client.note(place, pieces[place][:STATS_BYTES])
                pieces[place] = pieces[place][STATS_BYTES:]
        self._bytes += sum(map(len, pieces))
        self._request_bytes += 4 * asked.words
        named = [
            self.service.unpack(pieces[place], len(part.places))
            for place, part in zip(self.service.places, parts, strict=True)
        ]
        tensors = {name: put_together(parts, [one[name] for one in named]) for name in self.service.shapes}
        return from_tensors(
            self.service.kind, {n: t.to(batch.target_ids.device) for n, t in tensors.items()}, self._head
        )
