"""Runs the collectives of one group in the order in which they were called, beside the program that called them.

    progress = Progress("group name")
    job = progress.start(run, inline=False)      # returns at once; `run()` does the work on the group's thread
    job.wait(); job.is_completed(); job.get_future()

A `Job` has the part of a c10d work that `CollectiveWork` asks for. Jobs run one after the other. A caller that waits
anyway says `inline`: its job then runs in the calling thread if nothing is before it, which saves two thread switches
(tens of µs, most of the time of a small collective). Otherwise a thread is started with the first job; it sleeps without
the GIL while there are none, and keeps nothing of a job that has ended.

A callback of a job's future may start another and wait for it (PowerSGD's hook of DDP does): that one runs at once, right
after the job that the callback belongs to, on every rank.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from ncclx_py.ending import Ending
from ncclx_py.errors import Call, CollectiveError


class Job(Ending):
    """One collective in flight.

    `engine` is what carries it (an algorithm), known once it has been chosen; `call`, or the one given to `belongs_to`,
    learns it for its error messages. `call` also learns when the job begins and ends.
    """

    __slots__ = ("_action", "_call", "engine")

    def __init__(self, action: Callable[[Job], None], call: Call | None = None) -> None:
        super().__init__()
        self.engine = ""
        self._action: Callable[[Job], None] | None = action
        self._call = call

    @property
    def call(self) -> Call | None:
        return self._call

    def belongs_to(self, call: Call) -> None:
        if self.engine:
            call.engine = self.engine
        else:
            self._call = call

    def carried_by(self, engine: str, decision: Any = None) -> None:
        self.engine = engine
        if self._call is not None:
            self._call.engine, self._call.decision = engine, decision

    def stuck_at(self, progress: tuple[int, int, list[int]]) -> None:
        """Notes how far a plan has come that failed; see `Call`."""
        if self._call is not None:
            self._call.progress = progress

    def work(self) -> None:
        """Does what is to be done; what goes wrong is kept for those who wait."""
        action, self._action = self._action, None
        call = self._call
        if call is not None:
            call.begun()
        try:
            if action is not None:
                action(self)
        except RuntimeError as error:
            self.error = error.with_traceback(None)  # its frames would keep the tensors
        except BaseException as error:
            self.error = RuntimeError(f"{type(error).__name__}: {error}")
            self.error.__cause__ = error
        if call is not None:
            call.over() if self.error is None else call.failed(self.error)

    def refuse(self, reason: str) -> None:
        """Ends a job that has not begun."""
        self._action = None
        self.error = CollectiveError(reason)
        if self._call is not None:
            self._call.failed(self.error)
        self.let_go()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Blocks without the GIL until the job has ended. Raises its error, or RuntimeError when `timeout` passes."""
        seconds = timeout.total_seconds() if timeout else -1
        if not self.pause(seconds):
            raise RuntimeError(f"Timed out waiting {seconds:g} s")
        self.raise_error()
        return True


class Progress:
    """The jobs of one group; `name` is for the thread's name."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._thread: threading.Thread | None = None
        self.running: Call | None = None  # what the running job is for
        self._runner = 0  # the thread that is running a job, 0 while none does
        self._telling = 0  # the same while it runs the callbacks of that job
        self._closed = ""

    def start(self, action: Callable[[Job], None], inline: bool, call: Call | None = None) -> Job:
        """Runs `action(job)` for `call` after all that was started before; here and now if `inline` and nothing is
        before it.

        Raises CollectiveError when the group has been closed.
        """
        job = Job(action, call)
        if self._telling == threading.get_ident():
            job.work()
            job.let_go()
            return job
        with self._changed:
            if self._closed:
                raise CollectiveError(self._closed)
            here = inline and not self._runner and not self._jobs
            if here:
                self._runner = threading.get_ident()
            else:
                self._jobs.append(job)
                self._wake()
        if here:
            self._run(job)
        return job

    def close(self, reason: str, seconds: float) -> bool:
        """Lets nothing more start, refuses what has not begun with `reason`, and waits up to `seconds` for the rest.

        True when nothing runs any more and no thread is left; False also from inside a job. The one who closes sees to
        it that the running job ends.
        """
        with self._changed:
            self._closed = self._closed or reason
            waiting, self._jobs = list(self._jobs), deque()
            thread, inside = self._thread, self._runner == threading.get_ident()
            self._changed.notify_all()
        for job in waiting:
            job.refuse(reason)
        if inside or not self.drain(seconds):
            return False
        if thread is not None:
            thread.join(seconds)
        return thread is None or not thread.is_alive()

    def drain(self, seconds: float) -> bool:
        """Waits until all jobs have ended; False when `seconds` pass first."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._runner and not self._jobs, seconds)

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"ncclx-{self._name}", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _run(self, job: Job) -> None:
        try:
            self.running = job.call
            job.work()
            self.running = None
            self._telling = self._runner
            job.let_go()
        finally:
            with self._changed:
                self._runner = self._telling = 0
                self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._jobs and not self._runner))
                if not self._jobs:
                    return
                job = self._jobs.popleft()
                self._runner = threading.get_ident()
            self._run(job)
            del job
