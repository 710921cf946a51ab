"""Runs the jobs that are not complete, some at a time; a failed one stops only what needs its model.

Progress is counted in optimizer steps over all jobs, read from their metrics, so that it moves during long runs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext

from rich.markup import escape

from distill.compare.plan import Job
from distill.compare.processes import Running, server
from distill.compare.state import begin, complete
from distill.errors import CheckpointError
from distill.progress import StepProgress

LOOK_S = 2.0  # between two looks at the progress of the runs
SHOWN = ("pass_at_1", "mean_length", "kl_teacher", "records", "breach")  # of a run that has ended
NOT_RUN = "not run, because"  # how the reason of a job that waited in vain begins


class Schedule:
    """``run`` returns what failed: job title → reason, one line."""

    def __init__(self, jobs: Sequence[Job], parallel: int, timeout_s: float) -> None:
        self.jobs, self.parallel, self.timeout_s = list(jobs), parallel, timeout_s
        self.failures: dict[str, str] = {}
        self._done = {job.title for job in jobs if complete(job) is not None}
        self._ready = len(self._done)  # complete before this call
        self._running: list[Running] = []

    def run(self) -> dict[str, str]:
        """Raises CheckpointError where a job's folder cannot be written at all; ends all runs on the way out of any error."""
        waiting = [job for job in self.jobs if job.title not in self._done]
        total = sum(job.steps for job in self.jobs)
        with StepProgress("compare", total, self._steps(), max(total // 50, 1)) as progress:
            if self._ready:
                progress.note(f"{self._ready} of {len(self.jobs)} runs are complete already")
            if not waiting:
                return {}
            context = server()
            try:
                while waiting or self._running:
                    waiting = self._start(waiting, context, progress)
                    if self._running:
                        living = [sentinel for run in self._running for sentinel in run.sentinels]
                        wait(living, LOOK_S if living else 0)
                        self._collect(progress)
                    progress.update(self._steps(), {"runs": len(self._done), "of": len(self.jobs)})
            finally:
                for run in self._running:
                    run.end()
        return self.failures

    def _start(self, waiting: list[Job], context: ForkServerContext, progress: StepProgress) -> list[Job]:
        """Start what may start now; returns what still waits."""
        still = []
        for job in waiting:
            broken = next((used for used in job.after if used.title in self.failures), None)
            if broken is not None:
                self.failures[job.title] = f"{NOT_RUN} {broken.title} failed"
            elif len(self._running) < self.parallel and all(used.title in self._done for used in job.after):
                try:
                    begin(job)
                except OSError as error:
                    raise CheckpointError(
                        f"{job.folder.path} cannot be written ({error.strerror}); free some space and run the same command "
                        "again: finished runs are kept"
                    ) from None
                self._running.append(Running(job, context, self.timeout_s))
            else:
                still.append(job)
        return still

    def _collect(self, progress: StepProgress) -> None:
        """Take in the runs that have ended."""
        for run in [run for run in self._running if run.poll()]:
            self._running.remove(run)
            reason = run.failure
            if reason is not None:
                self._fail(run.job, reason, run.last_lines(), progress)
                continue
            self._done.add(run.job.title)
            figures = complete(run.job) or {}
            shown = "  ".join(f"{name} {figures[name]:.4g}" for name in SHOWN if name in figures)
            progress.note(f"{run.job.title}: {shown}")

    def _fail(self, job: Job, reason: str, last: list[str], progress: StepProgress) -> None:
        self.failures[job.title] = reason
        progress.note(escape(f"{job.title} failed: {reason}"))
        if last:
            progress.note(escape("\n".join(f"    {line}" for line in [*last, f"(all of it: {job.log})"])))

    def _steps(self) -> int:
        running = {run.job.title for run in self._running}
        return sum(
            job.steps if job.title in self._done or job.title in self.failures else _lines(job)
            for job in self.jobs
            if job.title in self._done or job.title in self.failures or job.title in running
        )


def _lines(job: Job) -> int:
    """Steps that a run has taken, by the lines of its metrics."""
    try:
        return min(job.folder.metrics.read_bytes().count(b"\n"), job.steps)
    except OSError:
        return 0
