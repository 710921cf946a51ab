"""Progress for a person: a bar on a terminal, a plain line now and then in a log file. Rank 0 only."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distill.distributed import rank

console = Console(stderr=True, highlight=False, soft_wrap=True)


class StepProgress:
    """Shows steps done, tokens per second, time left and the newest figures."""

    def __init__(self, title: str, total: int, done: int, log_every: int) -> None:
        self.title, self.total, self.log_every = title, total, log_every
        self.visible = rank() == 0
        self._logged = done // log_every
        self._began, self._first = time.perf_counter(), done
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not (self.visible and console.is_terminal),
        )
        self._task = self._bar.add_task(title, total=total, completed=done, figures="")

    def update(self, done: int, figures: Mapping[str, float]) -> None:
        """Report that ``done`` steps are complete; ``figures`` maps short names to numbers."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self._bar.update(self._task, completed=done, figures=text)
        due = done // self.log_every > self._logged or done == self.total
        if self.visible and not console.is_terminal and due:
            self._logged = done // self.log_every
            spent = time.perf_counter() - self._began
            left = spent / max(done - self._first, 1) * (self.total - done)
            console.print(f"{self.title}  {done}/{self.total}  {spent:.0f} s, {left:.0f} s left  {text}")

    def note(self, text: str) -> None:
        """A line of its own above the bar."""
        if self.visible:
            self._bar.console.print(text)

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def say(text: str) -> None:
    """Print for the person, once per job."""
    if rank() == 0:
        console.print(text)
