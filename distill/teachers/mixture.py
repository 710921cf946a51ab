"""Several teachers as one: the mean of their probabilities, p = Σ wᵢ·pᵢ with Σ wᵢ = 1, of whatever each of them says.

    logits, hidden    exact: log p = logsumexpᵢ(log wᵢ + log pᵢ), teacher by teacher and in chunks of rows
    sampled           exact, the same at one token
    topk              the union of the lists, a *lower bound* of each probability: pᵢ of an id that is not in teacher i's list is
                      taken as 0 and stays in the rest. No id is off by more than Σ wᵢ·(mass that teacher i did not list), the
                      figure ``teacher/unlisted`` (mean over tokens); with complete lists it is 0 and the mean exact. An exact
                      alternative is the intersection of the lists; but it drops what one teacher alone is sure of.

Vocabularies of one family may differ in size: an id that a teacher does not have is impossible to it (−inf, never 0). The
student's own vocabulary cuts the mean like any teacher's (``distill.kernels.divergence``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from distill.data.batch import TokenBatch
from distill.teachers.routing import Several
from distill.teachers.signals import ROW_BUDGET, FullLogits, HiddenStates, SampledToken, Signal, TopK

if TYPE_CHECKING:
    from distill.teachers.base import Scorer


class Mean:
    """Adds up signals of one kind for the same T positions: no more than the sum and one teacher's signal are held.

    Weights that do not add up to 1 (a teacher is lost) are scaled to.
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._sum: Tensor | None = None  # log Σ w·p of the teachers so far: [T, V], or [T] for sampled
        self._lists: list[tuple[Tensor, Tensor]] = []  # ids and log w·p of topk
        self.unlisted: Tensor | None = None  # fp64: Σ over positions of Σ w·(mass outside a list); topk

    def add(self, signal: Signal, weight: float) -> None:
        """``weight``: this teacher's share of the mean, above 0."""
        shift = math.log(weight)
        self._weight += weight
        if isinstance(signal, TopK):
            self._lists.append((signal.ids, (signal.logprobs + shift).masked_fill(signal.ids < 0, -torch.inf)))
            rest = 1.0 - signal.logprobs.double().exp().masked_fill(signal.ids < 0, 0.0).sum(-1)
            added = weight * rest.clamp_min(0.0).sum()
            self.unlisted = added if self.unlisted is None else self.unlisted + added
        elif isinstance(signal, SampledToken):
            logprobs = signal.logprobs.float() + shift
            self._sum = logprobs if self._sum is None else torch.logaddexp(self._sum, logprobs)
        else:
            assert isinstance(signal, FullLogits | HiddenStates)
            self._add_whole(signal, shift)

    def result(self) -> Signal:
        """Of all teachers that were added."""
        excess = 0.0 if math.isclose(self._weight, 1.0) else math.log(self._weight)
        if self._lists:
            ids, logprobs = (torch.cat(parts, -1) for parts in zip(*self._lists, strict=True))
            return merged(ids, logprobs - excess)
        assert self._sum is not None
        self._sum -= excess
        return SampledToken(self._sum) if self._sum.dim() == 1 else FullLogits(self._sum)

    def _add_whole(self, signal: FullLogits | HiddenStates, shift: float) -> None:
        if isinstance(signal, HiddenStates):
            source, width = signal.hidden, len(signal.head.weight)
        else:
            source, width = signal.values, signal.values.shape[-1]
        self._widen(len(source), width, source.device)
        assert self._sum is not None
        rows = max(1, ROW_BUDGET // width)
        for part, total in zip(source.split(rows), self._sum.split(rows), strict=True):
            block = HiddenStates(part, signal.head).logits() if isinstance(signal, HiddenStates) else part
            block = block.float()  # a copy only where it is not fp32, so nothing is changed in place below
            block = block - (block.logsumexp(-1, keepdim=True) - shift)
            torch.logaddexp(total[:, :width], block, out=total[:, :width])

    def _widen(self, rows: int, width: int, device: torch.device) -> None:
        if self._sum is None:
            self._sum = torch.full((rows, width), -torch.inf, device=device)
        elif width > self._sum.shape[-1]:
            self._sum = functional.pad(self._sum, (0, width - self._sum.shape[-1]), value=-torch.inf)


def merged(ids: Tensor, logprobs: Tensor) -> TopK:
    """Lists in which an id may stand more than once in a position ``[T, M]`` → the same with each id once, its probabilities added.

    Negative ids are padding, before and after.
    """
    ids, order = ids.sort(-1)
    values = logprobs.gather(-1, order).masked_fill(ids < 0, -torch.inf)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    run = first.long().cumsum(-1) - 1  # which distinct id of its row
    # Relative to the largest of its row, in fp64: what underflows there is nothing beside it.
    top = values.amax(-1, keepdim=True).clamp_min(-1e30) if ids.shape[-1] else values
    sums = torch.zeros_like(values, dtype=torch.float64).scatter_add_(-1, run, (values - top).double().exp())
    kept = torch.full_like(ids, -1).scatter_(-1, run, ids)
    return TopK(kept.clamp_min(-1), (sums.log() + top).float())


class Mixed(Several):
    """A ``Scorer`` that asks every teacher about every sample and answers with the mean of those that are left."""

    def __init__(self, scorers: Mapping[str, Scorer], weights: Mapping[str, float], continues: bool = False) -> None:
        super().__init__({name: scorer for name, scorer in scorers.items() if weights[name] > 0}, continues)
        total = sum(weights[name] for name in self.scorers)
        self.weights = {name: weights[name] / total for name in self.scorers}
        self._unlisted: Tensor | None = None
        self._positions = 0

    def submit(self, batches: Sequence[TokenBatch]) -> None:
        for scorer in self.asked().values():
            scorer.submit(batches)

    def take(self, batch: TokenBatch) -> Signal:
        mean = Mean()
        for name in self.scorers:
            signal = self.ask(name, batch)
            if signal is not None:
                mean.add(signal, self.weights[name])
        if mean.unlisted is not None:
            self._unlisted = mean.unlisted if self._unlisted is None else self._unlisted + mean.unlisted
            self._positions += len(batch.target_ids)
        return mean.result()

    def consequence(self, name: str) -> str:
        left = {other: self.weights[other] for other in self.asked()}
        return f"the mean is now that of {', '.join(f'{other} ({w / sum(left.values()):.3g})' for other, w in left.items())}"

    def figures(self) -> dict[str, float]:
        figures = super().figures()
        if self._unlisted is not None:
            figures |= {"unlisted": float(self._unlisted), "unlisted#": float(self._positions)}
            self._unlisted, self._positions = None, 0
        return figures

    def cancel(self) -> None:
        for scorer in self.asked().values():
            scorer.cancel()
