"""The frozen models beside the student: a teacher and a reference, in process, that score its positions and never learn.

Every rank holds them whole. The teacher is ``model.teacher``, or for a method with ``self_teacher`` a copy of the student that
is renewed every so many steps; the reference is ``model.reference``, or a copy of the student as the run starts. A copy
exists only where the method asks for it. What a checkpoint must hold of them is little: the renewed copy is stored, the
initial one follows from the configuration and is only checked.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.assembly import Parts
from distill.data.batch import TokenBatch
from distill.distributed import device
from distill.engine import TrainEngine
from distill.errors import CheckpointError
from distill.models import TargetLogits, causal_lm


class FrozenModel:
    """A model on the student's rank, frozen and in evaluation mode; ``model`` may be a peft wrapper."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self._targets = TargetLogits(model)

    @torch.no_grad()
    def logits(self, batch: TokenBatch) -> Tensor:
        """Logits ``[T, V]`` at the batch's supervised positions."""
        return self._targets(batch)


class FrozenModels:
    """Teacher and reference of one run. Make it before the training engine, which takes the student apart under ZeRO-3."""

    def __init__(self, parts: Parts) -> None:
        method = parts.method
        self.every = method.self_teacher
        # What training changes; the rest of a copy (a frozen base under adapters) stays as it was copied.
        self._trained = [name for name, p in parts.student.named_parameters() if p.requires_grad]
        teacher = parts.teacher if self.every is None else copy.deepcopy(parts.student)
        self.teacher = None if teacher is None else FrozenModel(teacher)
        self.reference: FrozenModel | None = None
        if "reference" in method.needs:
            self.reference = FrozenModel(parts.reference or copy.deepcopy(parts.student))
        self.needs = method.needs
        initial = [self.reference] if self.reference is not None and parts.reference is None else []
        initial += [self.teacher] if self.teacher is not None and self.every == 0 else []
        self._initial = [fingerprint(frozen.model, self._trained) for frozen in initial]

    def teacher_logits(self, batch: TokenBatch) -> Tensor | None:
        """``[T, V_t]``; None for a method that does not read them."""
        if self.teacher is None or "teacher" not in self.needs:
            return None
        return self.teacher.logits(batch)

    def reference_logits(self, batch: TokenBatch) -> Tensor | None:
        """``[T, V_r]``; None for a method that does not read them."""
        return None if self.reference is None else self.reference.logits(batch)

    @property
    def writer(self) -> PreTrainedModel | None:
        """The teacher as a causal LM that can write."""
        return None if self.teacher is None else causal_lm(self.teacher.model)

    def renew(self, engine: TrainEngine, done: int) -> None:
        """Make the self-teacher the student as it is now, where that is due after ``done`` optimizer steps."""
        if not self.every or not done or done % self.every:
            return
        assert self.teacher is not None
        with engine.whole_student() as student, torch.no_grad():
            source = dict(student.named_parameters())
            target = dict(self.teacher.model.named_parameters())
            for name in self._trained:
                target[name].copy_(source[name])

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to continue with the same models; only rank 0's counts."""
        renewed = None
        if self.every:
            assert self.teacher is not None
            parameters = dict(self.teacher.model.named_parameters())
            renewed = {name: parameters[name].detach().cpu() for name in self._trained}
        return {"renewed": renewed, "initial": self._initial}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError where the student that the run started from is not the one that this run loaded."""
        if len(state["initial"]) != len(self._initial) or not all(map(close, state["initial"], self._initial)):
            raise CheckpointError(
                "the student that this run was started from has changed, and a frozen copy of it is needed as it was; "
                "point model.student.path at the same weights as before, or use another run.dir"
            )
        if state["renewed"] is not None:
            assert self.teacher is not None
            target = dict(self.teacher.model.named_parameters())
            with torch.no_grad():
                for name, value in state["renewed"].items():
                    target[name].copy_(value.to(device()))


def fingerprint(model: nn.Module, names: list[str]) -> list[float]:
    """Two sums over the named parameters, fp64: different weights give different numbers, for practical purposes."""
    parameters = dict(model.named_parameters())
    values = [parameters[name].detach().double() for name in names]
    return [sum(float(v.sum()) for v in values), sum(float(v.abs().sum()) for v in values)]


def close(ours: list[float], theirs: list[float]) -> bool:
    """Whether two fingerprints agree to the rounding that another device may give them."""
    scale = max(ours[1], theirs[1], 1e-300)
    return all(abs(a - b) <= 1e-6 * scale for a, b in zip(ours, theirs, strict=True))
