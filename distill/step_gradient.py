"""The gradient of one step: rollout → score → loss → backward.

One optimizer step takes ``train.batch_size`` samples by their global numbers. Each rank makes its share of the sequences; all
ranks learn a few facts of every sequence (lengths, verdicts); from these follow the method's weights w and the scale c of
each sequence, and each rank adds up, micro-batch by micro-batch, the gradient of

    loss = Σ_i c_i w_i Σ_t ℓ_it        (see ``distill.aggregation``)

so that the result does not depend on the number of ranks, on accumulation, or on how sequences are laid out in rows.

    step, totals = gradient.add_up(done, place)      # or TeacherRankLost, on every rank; then:
    gradient.forget()                                # as if nothing had been asked
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distill.distributed import gathered, raise_first
from distill.engine import TrainEngine
from distill.errors import TeacherRankLost
from distill.methods.base import StudentSignal, TokenLosses
from distill.micro_batches import MicroBatch, micro_batches
from distill.preparing import PreparedStep, StepMaker
from distill.seeds import mix
from distill.teachers.base import Teachers
from distill.teachers.routing import losses_by_teacher
from distill.totals import StepTotals

DROPOUT = 14  # purpose of the random numbers during a step


class StepGradient:
    """This rank's part in the gradient. All ranks call every method together, but for ``forget``."""

    def __init__(self, maker: StepMaker, engine: TrainEngine, teachers: Teachers) -> None:
        self.maker, self.engine, self.teachers = maker, engine, teachers
        self.config, self.method = maker.config, maker.method
        self._next: PreparedStep | None = None  # its teacher has been asked already
        self._lost: str | None = None  # what this rank knows of a teacher's rank that is gone

    def add_up(self, done: int, place: int) -> tuple[PreparedStep, StepTotals]:
        """Everything between the weights after ``done`` steps and the next step, but the step itself.

        ``place`` is a number of this rank among all that make the batch. Raises DataError or TeacherRankLost on every rank.
        """
        torch.manual_seed(mix(self.config.seed, DROPOUT, done, place) % (1 << 63))
        self.teachers.copies.renew(self.engine, done)
        step = self._prepared(done)
        route = self.maker.source.route
        totals = StepTotals([] if route is None else list(route.weights))
        for number, batch in enumerate(step.batches, 1):
            self.engine.announce(last=number == len(step.batches))
            self._accumulate(batch, step, totals)
            if number < len(step.batches):
                self.engine.step()
        if self.teachers.may_be_lost:
            raise_first(TeacherRankLost, gathered(self._lost))
        return step, totals

    def forget(self) -> None:
        """Back to before the step: no gradient, nothing asked of the teacher."""
        self.engine.discard()
        self.teachers.cancel()
        self._next = self._lost = None

    def install(self, gradients: Sequence[Tensor], done: int) -> None:
        """Have the gradient that others have added up, as `TrainEngine.gradients` has it, in place of one of our own."""
        self.teachers.copies.renew(self.engine, done)
        self.engine.announce(last=True)
        nothing = micro_batches(replace(self.maker.layout, count=1), [], [], [], None)[0]
        losses = self.engine.token_losses(nothing.student, lambda student: TokenLosses(student.logits().sum(-1)))
        self.engine.backward(losses.loss.sum() * 0.0)
        for ours, theirs in zip(self.engine.gradients(), gradients, strict=True):
            ours.copy_(theirs)

    def _prepared(self, done: int) -> PreparedStep:
        """The step to be taken now, its teacher asked; where that pays, the teacher is asked about the next one too."""
        step, self._next = self._next, None
        if step is None:
            step = self.maker.make(done)
            self.teachers.submit(step.batches)
        if self.teachers.ahead and self.maker.fixed and done + 1 < self.config.train.steps:
            self._next = self.maker.make(done + 1)
            self.teachers.submit(self._next.batches)
        return step

    def _accumulate(self, batch: MicroBatch, step: PreparedStep, totals: StepTotals) -> None:
        """Forward and backward of one micro-batch; adds to ``totals``."""
        losses = self.engine.token_losses(batch.student, lambda student: self._score(student, batch, step))
        if self._lost is not None:
            self.engine.backward(losses.loss.sum() * 0.0)
            return
        totals.add(losses, batch.scales, batch.student)
        loss = (losses.loss * batch.scales).sum()
        # No targets at all: still a backward pass, because ZeRO reduces gradients inside it on every rank.
        self.engine.backward(loss / step.denominator if batch.tokens else losses.loss.sum() * 0.0)

    def _score(self, student: StudentSignal, batch: MicroBatch, step: PreparedStep) -> TokenLosses:
        """The method's loss of every token, next to what the teacher says."""
        try:
            teacher, reference = self.teachers.take(batch)
        except TeacherRankLost as error:  # other students may not know yet: go on as they do, to where all agree
            self._lost = str(error)
            return TokenLosses(student.logits().sum(-1) * 0.0)
        targets = batch.targets(student, teacher, reference, step.facts.progress)
        return losses_by_teacher(self.method, targets)
