"""One rank's sums over a training step, kept on the device until the step's one reduction.

Reading a number from a GPU waits for everything before it: nothing here does, until ``values``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.data.batch import TokenBatch
from distill.methods import TokenLosses


class StepTotals:
    """Sums of the scaled loss and of each monitoring figure over supervised tokens, and the count of losses that are not finite.

    ``teachers``: names in ``TokenSequence.tag``, for each of which tokens and their losses are added up apart.
    """

    def __init__(self, teachers: Sequence[str] = ()) -> None:
        self.names: list[str] = []
        self.teachers = list(teachers)
        self.tokens = 0
        self._sums: Tensor | None = None  # fp64: loss, non-finite tokens, then one per name
        self._parts: list[tuple[Tensor, TokenBatch]] = []

    def add(self, losses: TokenLosses, scales: Tensor, batch: TokenBatch) -> None:
        """Take in one micro-batch; ``scales [T]`` multiply the losses, not the monitoring figures."""
        self.names = sorted(losses.stats)
        self.tokens += len(batch.target_ids)
        loss = losses.loss.detach()
        # A token outside the shared vocabulary has log-probability −inf: it must not blot out the figure of all others.
        stats = [losses.stats[name].nan_to_num(0.0, 0.0, 0.0) for name in self.names]
        columns = [loss * scales, ~loss.isfinite(), *self._by_teacher(loss, batch), *stats]
        sums = torch.stack([column.sum(dtype=torch.float64) for column in columns])
        self._sums = sums if self._sums is None else self._sums + sums
        self._parts.append((loss, batch))

    def _by_teacher(self, loss: Tensor, batch: TokenBatch) -> list[Tensor]:
        """Per teacher: which of the T positions are its samples', and their losses."""
        if not self.teachers:
            return []
        numbers = [self.teachers.index(sequence.tag) for sequence in batch.sequences if sequence.tag is not None]
        owner = torch.tensor(numbers or [0]).to(loss.device)[batch.sequence_index]
        return [
            column for number in range(len(self.teachers)) for column in (owner == number, loss * (owner == number))
        ]

    def values(self) -> list[float]:
        """``[loss, non-finite tokens, (tokens, loss) of each teacher …, figures in the order of names …]``."""
        assert self._sums is not None
        return self._sums.tolist()

    def teacher_figures(self, sums: Sequence[float]) -> dict[str, float]:
        """``teacher/NAME/tokens`` and ``teacher/NAME/loss`` (per token), from what follows the first two of ``values``, added up
        over ranks."""
        figures: dict[str, float] = {}
        for number, name in enumerate(self.teachers):
            tokens, loss = sums[2 * number : 2 * number + 2]
            figures |= {f"teacher/{name}/tokens": tokens} | ({f"teacher/{name}/loss": loss / tokens} if tokens else {})
        return figures

    def bad_samples(self) -> list[str]:
        """Ids of the samples that have a NaN or infinite loss on some token."""
        return [name for loss, batch in self._parts for name in bad_samples(loss, batch)]


def bad_samples(loss: Tensor, batch: TokenBatch) -> list[str]:
    """Ids of a micro-batch's samples with a loss ``[T]`` that is not finite somewhere."""
    wrong = batch.sequence_index[~torch.isfinite(loss)]
    return [batch.example_ids[i] for i in sorted(set(wrong.tolist()))]
