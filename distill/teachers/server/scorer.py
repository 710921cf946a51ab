"""A teacher behind a server as a ``Scorer``: texts go out as the micro-batches are submitted, answers are taken in their order.

Of the micro-batches submitted, the oldest 1 + ``queue`` are asked about, ``concurrency`` requests at a time; the others wait
here, so that answers do not pile up. Each sequence is one request, cut behind its last supervised token; its answer goes to
its place in the batch, whenever it arrives. Sequences without a supervised token are not asked about.

``take`` waits for as long as the servers are away and says so. On several ranks it is a collective call: a rank that has its
answers waits beside those that do not in short all-reduces, so that no deadline of the process group ends a run that only
pauses. All ranks raise TeacherRankLost together, at every ``take`` until ``cancel``; the trainer then saves and stops.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from distill.data.batch import TokenBatch
from distill.distributed import gathered, raise_first, total, world_size
from distill.errors import DistillError, TeacherRankLost
from distill.teachers.server.pool import NotWanted, Pool, Request
from distill.teachers.server.question import Answer, Question
from distill.teachers.signals import FullLogits, SampledToken, Signal, TopK

_TOLD_EVERY_S = 60.0


@dataclass(slots=True)
class Text:
    """One sequence up to its last supervised token: token ``ids[places[i]]`` is row ``targets[i]`` of the batch's T."""

    name: str
    ids: list[int]
    places: list[int]
    targets: list[int]


@dataclass(slots=True)
class Job:
    """One micro-batch: its texts, and what has been answered about each."""

    batch: TokenBatch
    texts: list[Text]
    answers: list[Answer | None]
    left: int
    problem: Exception | None = None
    wanted: bool = True
    asked: bool = False  # its texts are with the workers


@dataclass(slots=True)
class Spent:
    """Seconds in ``take``: waiting, and of these with no server that answers; bytes of signals taken."""

    wait_s: float = 0.0
    paused_s: float = 0.0
    size: float = 0.0


class ServerScorer:
    """``queue``: micro-batches asked about beside the oldest; ``tick_s``: longest wait between two all-reduces of ``take``."""

    ahead = True
    may_be_lost = True

    def __init__(
        self,
        pool: Pool,
        question: Question,
        *,
        concurrency: int,
        queue: int,
        tick_s: float,
        note: Callable[[str], None],
    ) -> None:
        self._pool, self._question, self._window, self._tick_s, self._note = pool, question, 1 + queue, tick_s, note
        self._jobs: deque[Job] = deque()
        self._work: deque[tuple[Job, int]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._lost: str | None = None  # why no answer will come for what was submitted
        self._spent = Spent()
        for number in range(concurrency):
            threading.Thread(target=self._keep_asking, name=f"teacher-{number}", daemon=True).start()

    def submit(self, batches: Sequence[TokenBatch]) -> None:
        jobs = [Job(batch, texts, [None] * len(texts), len(texts)) for batch in batches for texts in (texts_of(batch),)]
        with self._changed:
            self._jobs.extend(jobs)
            self._hand_out()

    def take(self, batch: TokenBatch) -> Signal:
        """Raises TeacherRankLost, on every rank alike, where the servers stayed away for too long or refuse a request."""
        if self._lost is not None:
            raise TeacherRankLost(self._lost)
        job = self._jobs[0]
        assert job.batch is batch, "signals are taken in the order in which they were asked for"
        began = time.monotonic()
        try:
            self._wait(job)
        except TeacherRankLost as error:
            self._lost = str(error)
            raise
        self._spent.wait_s += time.monotonic() - began
        with self._changed:
            self._jobs.popleft()
            self._hand_out()
        signal, size = self._signal(job)
        self._spent.size += size
        return signal

    def figures(self) -> dict[str, float]:
        """``bytes`` of the signals themselves, ``wire_bytes`` of what the servers sent (JSON), seconds in ``take``, and counts."""
        spent, self._spent = self._spent, Spent()
        traffic = self._pool.take_traffic()
        return {
            "bytes": spent.size,
            "request_bytes": float(traffic.sent),
            "wire_bytes": float(traffic.received),
            "wait_s": spent.wait_s,
            "paused_s": spent.paused_s,
            "requests": float(traffic.requests),
            "retries": float(traffic.retries),
        }

    def cancel(self) -> None:
        self._lost = None
        with self._changed:
            for job in self._jobs:
                job.wanted = False
            self._jobs.clear()
            self._work.clear()
        self._pool.wake()

    def recover(self) -> bool:
        return False

    def close(self) -> None:
        self.cancel()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._pool.close()

    def _hand_out(self) -> None:
        """Give the texts of the oldest batches to the workers."""
        for job, _ in zip(self._jobs, range(self._window), strict=False):
            if not job.asked:
                job.asked = True
                self._work.extend((job, number) for number in range(len(job.texts)))
        self._changed.notify_all()

    def _keep_asking(self) -> None:
        """A worker: one text after the other."""
        while True:
            with self._changed:
                while not self._work and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job, number = self._work.popleft()
            answer, problem = None, None
            try:
                answer = self._ask(job, job.texts[number])
            except NotWanted:
                continue
            except Exception as error:  # told by `take`, in the thread that trains
                problem = error
            with self._changed:
                job.answers[number] = answer
                job.left -= 1
                job.problem = job.problem or problem
                self._changed.notify_all()

    def _ask(self, job: Job, text: Text) -> Answer:
        request = Request(
            self._question.data(text.ids),
            lambda reply: self._question.read(reply, text.ids, text.places),
            f"the {len(text.ids)} tokens of {text.name}",
        )
        return self._pool.ask(request, lambda: job.wanted and job.problem is None)

    def _wait(self, job: Job) -> None:
        """Until every rank has its answers. Raises TeacherRankLost."""
        told_s, paused_s = 0.0, 0.0
        while True:
            began = time.monotonic()
            done = self._answered(job, self._tick_s if world_size() > 1 else min(self._tick_s, 0.1))
            away = None if done else self._pool.away()
            if away is not None:
                if not paused_s or away[0] - told_s >= _TOLD_EVERY_S:
                    told_s = away[0]
                    self._note(f"the run pauses: no server of the teacher has answered for {away[0]:.0f} s ({away[1]})")
                paused_s += time.monotonic() - began
            if self._together(job, done):
                break
        self._spent.paused_s += paused_s
        if paused_s:
            self._note(f"the teacher's server answers again: the run goes on after a pause of {paused_s:.0f} s")

    def _together(self, job: Job, done: bool) -> bool:
        """Whether all ranks are done. Raises TeacherRankLost on all where one cannot go on."""
        failed = job.problem is not None
        waiting, lost = (
            total([float(not done), float(failed)]) if world_size() > 1 else [float(not done), float(failed)]
        )
        if lost:
            problem = None if job.problem is None else _told(job.problem)
            raise_first(TeacherRankLost, gathered(problem) if world_size() > 1 else [problem])
        return not waiting

    def _answered(self, job: Job, wait_s: float) -> bool:
        """Whether nothing is left to be answered, after at most ``wait_s``."""
        deadline = time.monotonic() + wait_s
        with self._changed:
            while job.left and job.problem is None:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                self._changed.wait(left_s)
        return True

    def _signal(self, job: Job) -> tuple[Signal, int]:
        """The answers in the order of the batch's targets, on its device, and their size as arithmetic has it."""
        batch = job.batch
        count, device = len(batch.target_ids), batch.target_ids.device
        shape = (count,) if self._question.kind == "sampled" else (count, self._question.top_k)
        logprobs, ids = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
        for text, answer in zip(job.texts, job.answers, strict=True):
            assert answer is not None
            logprobs[text.targets] = answer.logprobs
            if answer.ids is not None:
                ids[text.targets] = answer.ids
        values = torch.from_numpy(logprobs).to(device)
        if self._question.kind == "topk":
            return TopK(torch.from_numpy(ids).to(device), values), 8 * values.numel()
        kind = SampledToken if self._question.kind == "sampled" else FullLogits
        return kind(values), 4 * values.numel()


def texts_of(batch: TokenBatch) -> list[Text]:
    """The batch's sequences that hold supervised tokens, in the order of their first ones."""
    rows, columns = (index.tolist() for index in batch.target_index.cpu().unbind(1))
    ids, positions = batch.input_ids.cpu(), batch.position_ids.cpu()
    owners = batch.sequence_index.tolist()
    found: dict[tuple[int, int], Text] = {}
    for target, (row, column, owner) in enumerate(zip(rows, columns, owners, strict=True)):
        place = int(positions[row, column]) + 1
        text = found.setdefault((row, column + 1 - place), Text(batch.example_ids[owner], [], [], []))
        text.places.append(place)
        text.targets.append(target)
    for (row, start), text in found.items():
        text.ids = ids[row, start : start + max(text.places) + 1].tolist()
    return list(found.values())


def _told(problem: Exception) -> str:
    return str(problem) if isinstance(problem, DistillError) else f"{type(problem).__name__}: {problem}"
