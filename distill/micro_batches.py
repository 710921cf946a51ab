"""A step's sequences as micro-batches: laid out, with the teacher's view of them and what scales each token's loss.

The loss of a step is Σ_t scale_t · ℓ_t / denominator over all micro-batches of all ranks (``distill.aggregation``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.data.batch import TokenBatch, collate
from distill.data.tokenize import TokenSequence
from distill.methods.base import StudentSignal, Targets, Weight
from distill.rollouts.sampling import seed_keys, uniforms
from distill.teachers.signals import Signal


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """T supervised positions. ``teacher``'s targets are the same tokens in the same order as ``student``'s."""

    student: TokenBatch
    teacher: TokenBatch  # the same object where the teacher sees the same prompts
    scales: Tensor  # [T] fp32
    advantages: Tensor  # [T] fp32
    draws: Tensor | None  # [T] fp32, see ``Targets``

    @property
    def tokens(self) -> int:
        return len(self.student.target_ids)

    def targets(
        self, student: StudentSignal, teacher: Signal | None, reference: Signal | None, progress: float = 0.0
    ) -> Targets:
        """What a method is given: this micro-batch, with what the three models say about it."""
        return Targets(
            student,
            teacher,
            self.student.target_ids,
            reference=reference,
            sequence_index=self.student.sequence_index,
            advantages=self.advantages,
            behaviour_logprobs=self.student.behaviour_logprobs,
            draws=self.draws,
            progress=progress,
            scales=self.scales,
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """How sequences are laid out: ``size`` per micro-batch, ``count`` micro-batches, packed into shared rows or padded."""

    size: int
    count: int
    pack: bool
    pad_id: int
    device: torch.device


def micro_batches(
    layout: Layout,
    sequences: Sequence[TokenSequence],
    scales: Sequence[float],
    weights: Sequence[Weight],
    draw_seeds: Sequence[int] | None,
) -> list[MicroBatch]:
    """Exactly ``layout.count`` micro-batches, empty ones included: every rank must make the same number of passes.

    ``scales``, ``weights`` and ``draw_seeds`` (None: no draws) belong to the sequences, in their order.
    """
    factors = torch.tensor([scale * weight.weight for scale, weight in zip(scales, weights, strict=True)])
    advantages = torch.tensor([weight.advantage for weight in weights])
    parts = []
    for number in range(layout.count):
        chosen = slice(number * layout.size, (number + 1) * layout.size)
        part = sequences[chosen]
        batch = _lay_out(part, layout)
        index = batch.sequence_index
        draws = None if draw_seeds is None else _draws(draw_seeds[chosen], batch)
        student = batch.to(layout.device)
        view = _teacher_view(part, batch, layout)
        parts.append(
            MicroBatch(
                student=student,
                teacher=student if view is None else view.to(layout.device),
                scales=factors[chosen][index].to(layout.device),
                advantages=advantages[chosen][index].to(layout.device),
                draws=None if draws is None else draws.to(layout.device),
            )
        )
    return parts


def _lay_out(sequences: Sequence[TokenSequence], layout: Layout) -> TokenBatch:
    """Packed rows are as long as the longest sequence: never more work than padding, in projections or in attention."""
    longest = max((len(sequence.ids) for sequence in sequences), default=1)
    return collate(sequences, layout.pad_id, longest if layout.pack else None)


def _teacher_view(sequences: Sequence[TokenSequence], batch: TokenBatch, layout: Layout) -> TokenBatch | None:
    """The same responses behind the teacher's prompts; None where those are the student's."""
    if all(sequence.teacher_prompt is None for sequence in sequences):
        return None
    view = _lay_out([sequence.before_teacher() for sequence in sequences], layout)
    assert torch.equal(view.target_ids, batch.target_ids)
    return view


def _draws(seeds: Sequence[int], batch: TokenBatch) -> Tensor:
    """A uniform number per target, from its sequence's seed and its place there: the same in any layout."""
    rows, columns = batch.target_index.unbind(1)
    places = batch.position_ids[rows, columns]
    keys = seed_keys(seeds)[batch.sequence_index.numpy()] if seeds else seed_keys([])
    return torch.from_numpy(
        np.floor(uniforms(keys, places.numpy()) * 2**24) / 2**24
    ).float()  # exact in fp32: stays below 1
