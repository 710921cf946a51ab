"""One rank's sums over a training step, kept on the device until the step's one reduction.

Reading a number from a GPU waits for everything before it: nothing here does, until ``values``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.data.batch import TokenBatch
from distill.methods import TokenLosses


class StepTotals:
    """Sums of the scaled loss and of each monitoring figure over supervised tokens, and the count of losses that are not finite."""

    def __init__(self) -> None:
        self.names: list[str] = []
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
        columns = [loss * scales, ~loss.isfinite(), *stats]
        sums = torch.stack([column.sum(dtype=torch.float64) for column in columns])
        self._sums = sums if self._sums is None else self._sums + sums
        self._parts.append((loss, batch))

    def values(self) -> list[float]:
        """``[loss, non-finite tokens, figures in the order of names…]``."""
        assert self._sums is not None
        return self._sums.tolist()

    def bad_samples(self) -> list[str]:
        """Ids of the samples that have a NaN or infinite loss on some token."""
        return [name for loss, batch in self._parts for name in bad_samples(loss, batch)]


def bad_samples(loss: Tensor, batch: TokenBatch) -> list[str]:
    """Ids of a micro-batch's samples with a loss ``[T]`` that is not finite somewhere."""
    wrong = batch.sequence_index[~torch.isfinite(loss)]
    return [batch.example_ids[i] for i in sorted(set(wrong.tolist()))]
