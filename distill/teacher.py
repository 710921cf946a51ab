"""The teacher in process: scores the student's positions and writes text, never learns.

Every rank holds the whole teacher. Its parameters are frozen, its forward passes run without autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.data.batch import TokenBatch
from distill.models import TargetLogits


class ColocatedTeacher:
    """Teacher on the student's rank. ``model`` must be frozen (see ``distill.models.freeze``)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._targets = TargetLogits(model)

    @torch.no_grad()
    def logits(self, batch: TokenBatch) -> Tensor:
        """Teacher logits ``[T, V_t]`` at the batch's supervised positions."""
        return self._targets(batch)
