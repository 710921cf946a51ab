"""What a placement of a teacher must do, and what the trainer holds: teacher and reference, however they are placed.

The teacher is ``model.teacher`` (or those of ``teacher.many``), or for a method with ``self_teacher`` a copy of the student that is
renewed every so many steps; the reference is ``model.reference``, or a copy of the student as the run starts. A copy exists
only where the method asks for it, and only in process. What a checkpoint must hold of them is little: the renewed copy is
stored, the initial one follows from the configuration and is only checked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.assembly import Parts
from distill.data.batch import TokenBatch
from distill.distributed import device
from distill.engine import TrainEngine
from distill.errors import CheckpointError, ModelError
from distill.methods import Method
from distill.micro_batches import MicroBatch
from distill.models import causal_lm
from distill.teachers.frozen import FrozenModel, close, fingerprint
from distill.teachers.signals import Signal


class Scorer(Protocol):
    """Token ids → signals, in the order in which they were asked for."""

    ahead: bool  # whether it gains from being asked before its answer is needed
    may_be_lost: bool  # whether `take` may raise TeacherRankLost, on some ranks only

    def submit(self, batches: Sequence[TokenBatch]) -> None:
        """Asks for the signals of these micro-batches, in order; may wait where too much is asked for already."""

    def take(self, batch: TokenBatch) -> Signal:
        """The signal of ``batch``, which must be the oldest one submitted and not taken: T positions, on its device."""

    def figures(self) -> dict[str, float]:
        """What to log, by name without ``teacher/``, of this rank since the last call; the same names on every rank, whose
        values are added up; then ``NAME`` is divided by ``NAME#``, where there is one."""

    def cancel(self) -> None:
        """Forgets what was submitted and not taken."""

    def recover(self) -> bool:
        """After `TeacherRankLost`: whether it goes on with who is left. All ranks call it together."""

    def close(self) -> None:
        """Ends what it has started; may be called twice."""


class Held(Protocol):
    """A model that is known by its weights, wherever it is."""

    def fingerprint(self) -> list[float]:
        """See ``frozen.fingerprint``. All ranks call it together."""


class SelfCopies:
    """Copies of the student that serve as its teacher or reference. Make them before the training engine, which takes the
    student apart under ZeRO-3."""

    def __init__(self, method: Method, parts: Parts) -> None:
        self.every = method.self_teacher
        # What training changes; the rest of a copy (a frozen base under adapters) stays as it was copied.
        self._trained = [name for name, p in parts.student.named_parameters() if p.requires_grad]
        self.teacher = None if self.every is None else FrozenModel(copy.deepcopy(parts.student))
        wants_reference = "reference" in method.needs and parts.reference is None
        self.reference = FrozenModel(copy.deepcopy(parts.student), "reference") if wants_reference else None
        initial = [self.reference] if self.reference is not None else []
        initial += [self.teacher] if self.teacher is not None and self.every == 0 else []
        self._initial = [fingerprint(frozen.model, self._trained) for frozen in initial]

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


class Teachers:
    """Teacher and reference of one run, as the trainer uses them; ``open_teachers`` makes it.

    ``writer`` is the teacher as a causal LM that can write, where there is one in process. ``silent`` says, after `take`, which
    positions ``[T]`` of a batch no teacher is left for. ``held`` are the models whose weights must stay as they are, by name.
    """

    def __init__(
        self,
        copies: SelfCopies,
        teacher: Scorer | None,
        reference: Scorer | None,
        writer: FrozenModel | None,
        silent: Callable[[TokenBatch], Tensor | None] | None = None,
        held: Mapping[str, Held] | None = None,
    ) -> None:
        self._held = dict(held or {})
        self._prints = {name: one.fingerprint() for name, one in self._held.items()}
        self.copies, self._teacher, self._reference, self._silent = copies, teacher, reference, silent
        self.writer: PreTrainedModel | None = None if writer is None else causal_lm(writer.model)

    @property
    def ahead(self) -> bool:
        """Whether it is worth asking for the next step's signals during this one."""
        return any(scorer.ahead for scorer in self._scorers())

    @property
    def may_be_lost(self) -> bool:
        """Whether ranks have to agree that nobody has lost a teacher before a step is taken."""
        return any(scorer.may_be_lost for scorer in self._scorers())

    def recover(self) -> bool:
        """Whether the run can go on after a teacher's rank was lost."""
        return all(scorer.recover() for scorer in self._scorers())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of them. Raises ModelError on all ranks where the weights of one have changed since the start."""
        for name, one in self._held.items():
            if not close(found := one.fingerprint(), self._prints[name]):
                error = ModelError(
                    f"the weights of the {name} have changed since the run began (sums {found}, were {self._prints[name]}), so "
                    "that its signals are not what they were; continue from the last checkpoint, with nothing that trains it"
                )
                error.on_every_rank = True
                raise error
        return {**self.copies.state(), "held": self._prints}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError where a model is not the one that the run was started with."""
        self.copies.restore(state)
        for name, found in self._prints.items():
            before = state.get("held", {}).get(name)
            if before is not None and not close(found, before):
                raise CheckpointError(
                    f"the {name} has other weights than the one that this run was started with; point its path at the same weights "
                    "as before, or use another run.dir"
                )

    def submit(self, batches: Sequence[MicroBatch]) -> None:
        """Asks for what the method needs to know of these micro-batches."""
        if self._teacher is not None:
            self._teacher.submit([batch.teacher for batch in batches])
        if self._reference is not None:
            self._reference.submit([batch.student for batch in batches])

    def take(self, batch: MicroBatch) -> tuple[Signal | None, Signal | None]:
        """What teacher and reference say about the oldest batch not yet taken; None for what the method does not read.

        Positions that no teacher is left for get the scale 0 in ``batch``.
        """
        teacher = None if self._teacher is None else self._teacher.take(batch.teacher)
        if self._silent is not None and (flags := self._silent(batch.student)) is not None:
            batch.scales.masked_fill_(flags, 0.0)
        return teacher, None if self._reference is None else self._reference.take(batch.student)

    def figures(self) -> dict[str, float]:
        """Figures of this rank since the last call, ``teacher/…`` and ``reference/…``, to be added up over ranks."""
        named = {"teacher": self._teacher, "reference": self._reference}
        found = {name: scorer.figures() for name, scorer in named.items() if scorer is not None}
        return {f"{name}/{key}": value for name, figures in found.items() for key, value in figures.items()}

    @staticmethod
    def ratios(figures: dict[str, float]) -> dict[str, float]:
        """Figures that were added up over ranks, each ``NAME`` with a ``NAME#`` beside it divided by that."""
        named = {name: value for name, value in figures.items() if not name.endswith("#")}
        return {name: value / (figures.get(f"{name}#", 1.0) or 1.0) for name, value in named.items()}

    def cancel(self) -> None:
        """Forgets what was asked for and not taken."""
        for scorer in self._scorers():
            scorer.cancel()

    def close(self) -> None:
        for scorer in self._scorers():
            scorer.close()

    def _scorers(self) -> list[Scorer]:
        return [scorer for scorer in (self._teacher, self._reference) if scorer is not None]
