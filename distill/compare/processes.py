"""The processes of one run: start its ranks, notice the first that fails, end the others, say why.

Ranks are forked from a server that has imported torch and the trainer once: a run starts in a fraction of a second and still has a
process of its own, so that one that crashes, leaks or fills the disk harms no other. Where there is a GPU nothing is imported
beforehand, because a driver that was asked before a fork does not work after it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess

from distill.compare.plan import Job
from distill.compare.worker import run_rank
from distill.local_ranks import environments

GRACE_S = 10.0  # between the first rank that fails and the end of the others
LAST_LINES = 10  # of a failed run's log, shown on the terminal


def server() -> ForkServerContext:
    """The context whose processes are forked from the server; one thread each."""
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"  # read when the server imports torch
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [] if torch.cuda.is_available() else ["distill.trainer", "distill.train", "distill.eval"]
    )
    return context


class Running:
    """A job's ranks at work."""

    def __init__(self, job: Job, context: ForkServerContext, timeout_s: float) -> None:
        self.job, self.began = job, time.monotonic()
        self._until = self.began + timeout_s
        self._timeout_s = timeout_s
        self._ranks: list[ForkServerProcess] = []
        self._reports: list[Connection] = []
        self._messages: dict[int, tuple[bool, str]] = {}
        self._failed_at: float | None = None
        self._late = False
        for environment in environments(job.ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=run_rank, args=(job, environment, theirs))
            process.start()
            theirs.close()
            self._ranks.append(process)
            self._reports.append(ours)

    @property
    def sentinels(self) -> list[int]:
        """To wait on, for the end of any rank."""
        return [process.sentinel for process in self._ranks if process.is_alive()]

    def poll(self) -> bool:
        """True once all ranks have ended; ends those that outlive a failed one or the time limit."""
        now = time.monotonic()
        if now > self._until and not self._late:
            self._late = True
            self.end()
        if self._failed_at is None and any(process.exitcode for process in self._ranks):
            self._failed_at = now
        if self._failed_at is not None and now > self._failed_at + GRACE_S:
            self.end()
        if any(process.is_alive() for process in self._ranks):
            return False
        for number, report in enumerate(self._reports):
            if report.poll():
                with contextlib.suppress(EOFError):  # a rank that was killed has nothing to say
                    self._messages[number] = report.recv()
            report.close()
        self._reports = []
        return True

    def end(self) -> None:
        """Kill what still runs: a run survives that like any other crash."""
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.join(GRACE_S)

    @property
    def failure(self) -> str | None:
        """Why the run failed, once `poll` says that it has ended; None for success."""
        codes = [process.exitcode for process in self._ranks]
        if not any(codes):
            return None
        if self._late:
            return f"not done after compare.run_timeout_s={self._timeout_s:g}; the same command continues it"
        if self._messages:
            # A rank that fails alone is the cause; what its peers then report is the consequence.
            alone = [text for everywhere, text in self._messages.values() if not everywhere]
            return (alone or [text for _, text in self._messages.values()])[0]
        rank = next(number for number, code in enumerate(codes) if code)
        code = codes[rank]
        assert code is not None
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"rank {rank} {how}; the same command continues the run"

    def last_lines(self) -> list[str]:
        """The end of the log."""
        try:
            text = self.job.log.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            return [f"{self.job.log}: {error.strerror}"]
        return [line for line in text.splitlines() if line.strip()][-LAST_LINES:]
