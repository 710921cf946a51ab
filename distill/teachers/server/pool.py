"""Several servers of one model: each request goes to one that answers; what fails is asked again; where all are away it waits.

    pool = Pool(members, recheck, retry_s=60, pause_s=3600)
    answer = pool.ask(Request(data, read, "example gsm8k-17"), wanted=lambda: True)       # from many threads
    pool.away()                                     # (seconds, problem) while no server answers

A server that failed (no connection, half an answer, no JSON, status 5xx, too late) gets no request until the checker thread has
seen it answer the probe, as the model that it was; pauses between checks grow with jitter up to ``retry_s``. Status 429 only
asks it to wait. A request that fails ``TRIES`` times on servers that answer the probe is at fault itself: ServerError names it.
A new connection may lead to a new process: its answers count once the probe has been answered, too.
Any other status 4xx is never asked again. Where nobody has answered anything for ``pause_s``, TeacherLost ends the wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from distill.endpoints import Backoff, Endpoint, NoReply, Reply, explain
from distill.errors import DistillError, ServerError, TeacherLost
from distill.teachers.server.probe import NotNow
from distill.teachers.server.question import PATH, BadAnswer

T = TypeVar("T")
TRIES = 8
CHECKED_S = 5.0  # an answer on a new connection counts without a check where the last one is not older
_LATER = {429, 503}
_FAILED = {408, 425, 500, 502, 504}


class NotWanted(Exception):
    """Whoever asked no longer wants the answer."""


@dataclass(frozen=True, slots=True)
class Request(Generic[T]):
    """``read`` makes the answer of a reply, or raises BadAnswer; ``what`` names the request in errors."""

    data: bytes
    read: Callable[[Reply], T]
    what: str


@dataclass(slots=True)
class Member:
    """One server. ``problem``: what it failed by, until it has answered a request again."""

    endpoint: Endpoint
    suspect: bool = False  # gets no request before a check
    problem: str | None = None
    due: float = 0.0  # not before this time
    busy: int = 0  # requests under way
    checked: float = field(default_factory=time.monotonic)
    checking: threading.Lock = field(default_factory=threading.Lock)
    backoff: Backoff = field(default_factory=lambda: Backoff(60.0))


@dataclass(slots=True)
class Traffic:
    """Counted since the last look; ``sent`` and ``received`` are bytes of bodies."""

    requests: int = 0
    retries: int = 0
    sent: int = 0
    received: int = 0


class Pool:
    """``check`` asks the probe: it raises NotNow or ServerError while a server is not what it was. ``note`` tells the person."""

    def __init__(
        self,
        members: Sequence[Member],
        check: Callable[[Endpoint], None],
        refuse: Callable[[Endpoint, Reply, str], ServerError],
        *,
        retry_s: float,
        pause_s: float,
        note: Callable[[str], None],
    ) -> None:
        self._members, self._check, self._refuse, self._note = list(members), check, refuse, note
        self._retry_s, self._pause_s = retry_s, pause_s
        for member in self._members:
            member.backoff = Backoff(retry_s)
        self.traffic = Traffic()
        self._changed = threading.Condition()
        self._turn, self._closed, self._last_good = 0, False, time.monotonic()
        self._away_since: float | None = None
        self._checker = threading.Thread(target=self._keep_checking, name="teacher-check", daemon=True)
        self._checker.start()

    def ask(self, request: Request[T], wanted: Callable[[], bool]) -> T:
        """The answer, from any of the servers. Raises ServerError, TeacherLost, and NotWanted once ``wanted`` is false."""
        failures, began = 0, time.monotonic()
        while True:
            member, reply = self._member(wanted, began), None
            try:
                reply = member.endpoint.once("POST", PATH, request.data)
                answer = self._judged(member, reply, request)
                if reply.fresh:
                    self._known(member)
            except (NoReply, BadAnswer, NotNow) as error:
                problem = str(error)
            else:
                self._answered(member, len(request.data), reply.size)
                return answer
            finally:
                self._done(member)
            later = reply is not None and reply.status in _LATER
            failures += not later
            self._failed(
                member, problem, None if reply is None else reply.wait_s, suspect=reply is None or reply.status != 429
            )
            if failures == TRIES:
                raise ServerError(
                    f"the teacher's server at {member.endpoint.address} failed {failures} times over {request.what}, and answers "
                    f"other requests ({problem}); look at its log. A longer teacher.server.request_s, or a lower "
                    "teacher.server.concurrency, gives it more time"
                )

    def away(self) -> tuple[float, str] | None:
        """(seconds since the last server failed, what is wrong) while no server takes requests."""
        with self._changed:
            if any(m.problem is None and not m.suspect for m in self._members):
                return None
            # A late answer may have come from a server that is under suspicion: it still takes no requests.
            since = self._last_good if self._away_since is None else self._away_since
            return time.monotonic() - since, self._problems() or "it is being checked"

    def wake(self) -> None:
        """Let waiting requests look again whether they are wanted."""
        with self._changed:
            self._changed.notify_all()

    def take_traffic(self) -> Traffic:
        """What was sent and received since the last call."""
        with self._changed:
            traffic, self.traffic = self.traffic, Traffic()
            return traffic

    def close(self) -> None:
        """No more requests: those under way end with NotWanted."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for member in self._members:
            member.endpoint.close()

    def _judged(self, member: Member, reply: Reply, request: Request[T]) -> T:
        """The answer. Raises BadAnswer for what another try may change, ServerError for what none will."""
        if reply.status == 200:
            return request.read(reply)
        if reply.status in _LATER or reply.status in _FAILED:
            raise BadAnswer(f"status {reply.status}: {explain(reply.answer)}")
        raise self._refuse(member.endpoint, reply, request.what)

    def _known(self, member: Member) -> None:
        """See that the server is the model that it was, where that was not seen just now. Raises BadAnswer, NotNow."""
        with member.checking:
            if time.monotonic() - member.checked > CHECKED_S:
                try:
                    self._check(member.endpoint)
                except DistillError as error:
                    raise BadAnswer(str(error)) from None
                member.checked = time.monotonic()

    def _member(self, wanted: Callable[[], bool], began: float) -> Member:
        """The next server in turn of those with the least to do. Waits where none takes requests."""
        with self._changed:
            while True:
                if self._closed or not wanted():
                    raise NotWanted
                now, count = time.monotonic(), len(self._members)
                fit = [n for n, m in enumerate(self._members) if not m.suspect and m.due <= now]
                if fit:
                    number = min(fit, key=lambda n: (self._members[n].busy, (n - self._turn) % count))
                    self._turn = number + 1
                    self._members[number].busy += 1
                    return self._members[number]
                silent_s = now - max(began, self._last_good)
                if silent_s > self._pause_s:
                    raise TeacherLost(
                        f"no server of the teacher has answered for {silent_s:.0f} s (teacher.server.pause_s={self._pause_s:g}): "
                        f"{self._problems()}. Start it again, and run the same command once more"
                    )
                self._changed.wait(min([0.5, *(m.due - now for m in self._members if not m.suspect)]))

    def _problems(self) -> str:
        return "; ".join(f"{m.endpoint.address}: {m.problem}" for m in self._members if m.problem)

    def _done(self, member: Member) -> None:
        with self._changed:
            member.busy -= 1

    def _answered(self, member: Member, sent: int, received: int) -> None:
        with self._changed:
            self.traffic.requests += 1
            self.traffic.sent += sent
            self.traffic.received += received
            self._last_good, self._away_since = time.monotonic(), None
            if member.problem is not None:
                member.problem, member.due, member.backoff = None, 0.0, Backoff(self._retry_s)
                self._changed.notify_all()

    def _failed(self, member: Member, problem: str, asked_s: float | None, suspect: bool) -> None:
        with self._changed:
            if self._closed:
                return
            self.traffic.retries += 1
            first, now = member.problem is None, time.monotonic()
            if member.due <= now:  # several requests may find the same failure
                member.due = now + member.backoff.pause(asked_s)
            member.problem, member.suspect = problem, member.suspect or suspect
            others = sum(m.problem is None for m in self._members)
            if not others and self._away_since is None:
                self._away_since = now
            self._changed.notify_all()
        if first and others:
            self._note(
                f"the teacher's server at {member.endpoint.address} is left out ({problem}); {others} others go on"
            )

    def _keep_checking(self) -> None:
        """The checker thread: each server that failed, when it is due."""
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                due = [m for m in self._members if m.suspect and m.due <= now]
                if not due:
                    self._changed.wait(min([0.5, *(max(m.due - now, 0.0) for m in self._members if m.suspect)]))
                    continue
            for member in due:
                self._check_one(member)

    def _check_one(self, member: Member) -> None:
        problem, misfit = None, False
        try:
            self._check(member.endpoint)
        except NotNow as error:
            problem = str(error)
        except DistillError as error:
            problem, misfit = str(error), True
        except Exception as error:  # a defect of ours must not leave the run waiting for a checker that is no more
            problem, misfit = f"{type(error).__name__}: {error}", True
        with self._changed:
            changed = problem is not None and problem != member.problem
            if problem is None:
                member.suspect, member.due, member.checked = False, 0.0, time.monotonic()
            else:
                member.problem = problem
                member.due = time.monotonic() + member.backoff.pause()
            told = misfit and changed and not self._closed
            self._changed.notify_all()
        if told:
            self._note(str(problem))
