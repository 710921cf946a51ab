"""A step before it is taken: its samples made, known to every rank, weighted by the method and laid out as micro-batches.

Nothing here depends on gradients. Where the text does not depend on the student's weights either (``fixed``), a step can be
made while an earlier one is still in training, so that a teacher elsewhere can score it meanwhile.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from distill.aggregation import aggregation_scales, tokens_per_sequence
from distill.config import RunConfig
from distill.distributed import raise_first
from distill.engine import TrainEngine
from distill.errors import DataError, ServerError
from distill.methods.base import BatchFacts, Method, Source
from distill.micro_batches import Layout, MicroBatch, micro_batches
from distill.models import causal_lm
from distill.rollouts.engines import Engine
from distill.rollouts.slot_time import SlotTime
from distill.samples import SampleSource, StepSamples
from distill.seeds import mix

if TYPE_CHECKING:
    from distill.replicas.one import OneReplica

DRAWS = 16  # purpose of the random numbers that a method draws per token


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """One rank's part of a step. Its loss is Σ scale·ℓ / denominator over the micro-batches of all ranks."""

    samples: range  # global sample numbers of the whole step
    made: StepSamples
    facts: BatchFacts  # of all ranks' sequences
    slot_times: list[SlotTime | None]  # of all ranks
    batches: list[MicroBatch]
    denominator: float


class StepMaker:
    """Prepares steps by their number. All ranks call ``make`` together."""

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        engine: TrainEngine,
        source: SampleSource,
        rollouts: Engine,
        replicas: OneReplica,
        layout: Layout,
    ) -> None:
        self.config, self.method, self.engine, self.source = config, method, engine, source
        self.rollouts, self.replicas, self.layout = rollouts, replicas, layout
        self.fixed = method.uses() == {Source.REFERENCE} and not source.needs_student

    def make(self, done: int) -> PreparedStep:
        """The step after ``done`` steps. Raises DataError on every rank if one failed."""
        size = self.config.train.batch_size
        samples = range(done * size, (done + 1) * size)
        made, facts, slot_times = self._write(samples, done)
        batches, denominator = self._lay_out(made, facts, self.replicas.passes(samples, self.layout.size))
        return PreparedStep(samples, made, facts, slot_times, batches, denominator)

    def _write(self, samples: range, done: int) -> tuple[StepSamples, BatchFacts, list[SlotTime | None]]:
        """This rank's sequences, what every rank knows of all of them, and all ranks' slot-times."""
        progress, problem, made = done / self.config.train.steps, None, StepSamples()
        share = self.replicas.share(samples)
        with self.engine.whole_student() if self.source.needs_student else nullcontext() as student:
            self.rollouts.refresh(student)
            try:
                if share:
                    made = self.source.make(share, None if student is None else causal_lm(student), progress)
            except (DataError, ServerError) as error:
                problem = str(error)
        answers = self.replicas.facts((made.facts, problem, made.slot_time))
        raise_first(DataError, [text for _, text, _ in answers])
        facts = BatchFacts([fact for facts, _, _ in answers for fact in facts], progress)
        return made, facts, [slot_time for _, _, slot_time in answers]

    def _lay_out(self, made: StepSamples, facts: BatchFacts, count: int) -> tuple[list[MicroBatch], float]:
        """This rank's ``count`` micro-batches, and what the sum of their scaled losses is to be divided by."""
        lengths = [sequence.tokens for sequence in facts.sequences]
        scales = aggregation_scales(self.config.train.aggregation, lengths, tokens_per_sequence(self.config))
        weights = self.method.weigh(facts)
        place = {sequence.sample: position for position, sequence in enumerate(facts.sequences)}
        mine = [place[sequence.sample] for sequence in made.sequences]
        seeds = [mix(self.config.seed, DRAWS, sequence.sample) for sequence in made.sequences]
        batches = micro_batches(
            replace(self.layout, count=count),
            made.sequences,
            [scales.relative[p] * self.source.weight(one) for p, one in zip(mine, made.sequences, strict=True)],
            [weights[position] for position in mine],
            seeds if self.method.draws else None,
        )
        return batches, scales.denominator
