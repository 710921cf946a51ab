"""Which ranks share a vocabulary, which of its rows each holds, and rows of unequal number brought together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distill.errors import ConfigError


@dataclass(frozen=True, slots=True)
class VocabularyGroup:
    """``size`` neighbouring ranks; ``place`` is this rank's among them, and the number of its part of the vocabulary.

    All parts have ``rows`` rows; the last may end in padding. ``alike`` are the ranks of all groups with the same part (None:
    this one alone).
    """

    ranks: dist.ProcessGroup
    alike: dist.ProcessGroup | None
    size: int
    place: int
    vocabulary: int
    rows: int

    @property
    def start(self) -> int:
        """First id of this rank's part."""
        return self.place * self.rows

    def valid(self, vocabulary: int) -> int:
        """Rows of this part whose ids lie below ``vocabulary``."""
        return max(0, min(self.rows, vocabulary - self.start))

    def part(self, whole: Tensor) -> Tensor:
        """A copy of this rank's rows of ``whole [V, …]``, padded with zeros."""
        part = whole.new_zeros(self.rows, *whole.shape[1:])
        mine = whole[self.start : self.start + self.rows]
        part[: len(mine)] = mine
        return part

    def whole(self, part: Tensor) -> Tensor:
        """``[V, …]`` on every rank of the group from the ``part`` of each."""
        gathered = part.new_empty(self.size * self.rows, *part.shape[1:])
        dist.all_gather_into_tensor(gathered, part.contiguous(), group=self.ranks)
        return gathered[: self.vocabulary]


def make_group(size: int, vocabulary: int) -> VocabularyGroup:
    """The group of this rank among those of ``size`` neighbours. All ranks of the job call it.

    Raises ConfigError where the ranks or the vocabulary cannot be divided so.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % size:
        fitting = [n for n in range(2, world + 1) if world % n == 0]
        remedy = f"set it to one of {fitting}" if fitting else "start more ranks, or set it to 1"
        raise ConfigError(f"engine.vocab_parallel={size} does not divide the {world} ranks of this job; {remedy}")
    rows = -(-vocabulary // size)
    if vocabulary <= (size - 1) * rows:
        raise ConfigError(
            f"engine.vocab_parallel={size} leaves a rank without any of the {vocabulary} tokens of the vocabulary; set it lower"
        )
    # Every rank makes every group, in one order: making one is collective over the job.
    neighbours = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    alike = (
        [dist.new_group(list(range(place, world, size))) for place in range(size)] if size < world else [None] * size
    )
    place = rank % size
    return VocabularyGroup(neighbours[rank // size], alike[place], size, place, vocabulary, rows)


@dataclass(frozen=True, slots=True)
class Rows:
    """How many rows each rank of a group has, and with that how they lie side by side: ``width`` apiece, in rank order."""

    group: VocabularyGroup
    counts: list[int]

    @staticmethod
    def agreed(group: VocabularyGroup, count: int, device: torch.device) -> Rows:
        """Tells the group how many rows this rank has. A collective call."""
        counts = torch.empty(group.size, dtype=torch.int64, device=device)
        dist.all_gather_into_tensor(counts, torch.tensor([count], device=device), group=group.ranks)
        return Rows(group, counts.tolist())

    @property
    def width(self) -> int:
        return max(self.counts)

    @property
    def own(self) -> slice:
        """This rank's rows among all."""
        first = self.group.place * self.width
        return slice(first, first + self.counts[self.group.place])

    def gather(self, mine: Tensor, padding: float = 0.0) -> Tensor:
        """``[P·width, …]`` of all ranks from ``mine [own, …]``."""
        shape = (self.width, *mine.shape[1:])
        padded = mine.new_full(shape, padding)
        padded[: len(mine)] = mine
        gathered = mine.new_empty(self.group.size * self.width, *mine.shape[1:])
        if gathered.numel():
            dist.all_gather_into_tensor(gathered, padded, group=self.group.ranks)
        return gathered

    def sum_to_owners(self, partial: Tensor) -> Tensor:
        """``[own, …]``: the sum over ranks of their ``partial [P·width, …]``, each row at the rank that owns it."""
        total = partial.new_empty(self.width, *partial.shape[1:])
        if partial.numel():
            dist.reduce_scatter_tensor(total, partial.contiguous(), group=self.group.ranks)
        return total[: self.counts[self.group.place]]

    def valid(self, device: torch.device) -> Tensor:
        """``[P·width]`` bool: rows that are no padding."""
        places = torch.arange(self.width, device=device)
        return torch.cat([places < count for count in self.counts])
