"""A teacher on the student's own rank: it scores each micro-batch when that is taken, on the same device."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from distill.data.batch import TokenBatch
from distill.teachers.frozen import FrozenModel
from distill.teachers.signals import Signal


class Colocated:
    """A ``Scorer`` around a model in process. Nothing travels, and nothing is computed before it is wanted."""

    ahead = may_be_lost = False

    def __init__(self, model: FrozenModel, kind: str, top_k: int) -> None:
        self.model, self._kind, self._top_k = model, kind, top_k
        self._waiting: deque[TokenBatch] = deque()

    def submit(self, batches: Sequence[TokenBatch]) -> None:
        self._waiting.extend(batches)

    def take(self, batch: TokenBatch) -> Signal:
        oldest = self._waiting.popleft()
        assert oldest is batch, "signals are taken in the order in which they were asked for"
        return self.model.signal(batch, self._kind, self._top_k)

    def figures(self) -> dict[str, float]:
        return {}

    def cancel(self) -> None:
        self._waiting.clear()

    def recover(self) -> bool:
        return True

    def close(self) -> None:
        self.cancel()
