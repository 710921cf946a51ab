"""A job on its own: the questions that the trainer asks about replicas, with the answers of a run that has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from distill.config import RunConfig
from distill.data.order import shard
from distill.distributed import gathered, rank, total, world_size
from distill.methods.base import SequenceFacts
from distill.metrics import MetricsLog
from distill.rollouts.slot_time import SlotTime

if TYPE_CHECKING:
    from distill.replicas.books import SharedLog
    from distill.trainer import Trainer

# A rank's sequences, or why there are none, and what writing them took.
Made = tuple[list[SequenceFacts], str | None, SlotTime | None]


class OneReplica:
    """All ranks of the job make the whole batch; nobody comes or goes. All ranks call every method together."""

    leads = True  # this replica saves checkpoints and writes figures

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def enter(self, trainer: Trainer) -> bool:
        """Take up the run: True where it continues from a state."""
        return trainer.load_newest()

    def begin(self, trainer: Trainer) -> None:
        """Before each attempt at a step. May load a newer state into the trainer."""

    @property
    def place(self) -> int:
        """A number of this rank among all that make the batch, for its random choices."""
        return rank()

    def share(self, samples: range) -> range:
        """This rank's part of the samples of a step."""
        part = shard(samples, rank(), world_size())
        assert isinstance(part, range)
        return part

    def passes(self, samples: range, size: int) -> int:
        """Micro-batches of ``size`` sequences that every rank of this job makes in a step."""
        return len(samples) // (world_size() * size)

    def facts(self, made: Made) -> list[Made]:
        """What all ranks have made, in the order of the samples."""
        return gathered(made)

    def total(self, values: list[float]) -> list[float]:
        """Element-wise sum over all ranks."""
        return total(values)

    def commit(self, trainer: Trainer) -> None:
        """The gradient of the step becomes that of all replicas; when this returns the step must be taken."""

    def figures(self) -> dict[str, float]:
        """``replica/…`` of the last step."""
        return {}

    def log(self, trainer: Trainer) -> MetricsLog | SharedLog:
        """Where the figures of each step go; rank 0 only."""
        kept = trainer.done or -1  # without a checkpoint step 0 is measured again
        return MetricsLog(trainer.folder, self.config.run, kept, self.config.resolved)

    def save(self, save: Callable[[], None]) -> None:
        """Write a checkpoint, if that is this replica's task."""
        save()

    def conclude(self, write: Callable[[], None]) -> None:
        """The run is complete: write what came out, once."""
        write()

    def close(self) -> None:
        """The run is over for this job, in whatever way."""


def deal(samples: range, places: int, place: int) -> range:
    """Part ``place`` of ``samples`` in as many parts: consecutive, and of equal size but for one sample."""
    if not 0 <= place < places:
        raise ValueError(f"place {place} does not exist among {places}")
    size = len(samples)
    return samples[place * size // places : (place + 1) * size // places]


def most(samples: range, places: int, mine: Sequence[int]) -> int:
    """The largest part that any of the places in ``mine`` gets."""
    return max((len(deal(samples, places, place)) for place in mine), default=0)
