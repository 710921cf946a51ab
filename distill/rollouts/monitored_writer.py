"""What the two engines of monitored trajectories share: all of them in order, from a stream in the order of their ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from distill.rollouts.monitored_scheduler import Usage
from distill.rollouts.monitored_trajectory import MonitoredTrajectory


class MonitoredWriter(ABC):
    """Makes monitored trajectories; ``usage`` is that of the last call."""

    usage: Usage

    @abstractmethod
    def stream(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> Iterator[tuple[int, MonitoredTrajectory]]:
        """(number of the prompt, its trajectory), as trajectories end."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[MonitoredTrajectory]:
        """One trajectory per prompt, in order; ``progress(done, total)`` is called as they end. Errors as in `stream`."""
        found: dict[int, MonitoredTrajectory] = {}
        for number, trajectory in self.stream(prompts, seeds):
            found[number] = trajectory
            if progress is not None:
                progress(len(found), len(prompts))
        figures = self.usage.figures()
        for trajectory in found.values():
            trajectory.notes.update(figures)
        return [found[number] for number in range(len(prompts))]
