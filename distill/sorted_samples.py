"""Samples of a step under ``rollout.schedule=sorted``: what the student writes comes from a pool, in the order in which it ends.

A step takes as many of the student's texts as without a schedule, but of other samples: those of the pool that are through. Text
of any other writer is made in the step that its sample number belongs to, so a method's mixture stays what it is. Each rank has
a pool of its own, filled with its shares of the steps to come; it looks no further than the last step, so a whole run trains on
exactly the samples that it would have trained on without a schedule, each once.

A sample's number decides its prompt, its source and its random numbers, whenever it is written; a pool's state is part of the
checkpoint. What a step takes therefore follows from the seed, the weights and the number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import RunConfig
from distill.data import Task
from distill.data.tokenize import encode_prompt
from distill.distributed import rank, world_size
from distill.errors import ConfigError
from distill.methods.base import BatchFacts, Method, Source
from distill.rollouts.engines import Engine
from distill.rollouts.generator import Generator
from distill.rollouts.pool import Pool, Response, Unit
from distill.rollouts.rollout import Finish, Trajectory
from distill.rollouts.slot_time import SlotTime, bubble_ratio
from distill.rollouts.sorting import SortedRollouts
from distill.samples import SampleSource, StepSamples, Wanted, prompt_fits, sampling_params


class SortedSamples(SampleSource):
    """A `SampleSource` with a pool. ``make`` must be called for every step in turn."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        method: Method,
        teacher: PreTrainedModel | None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(config, task, tokenizer, method, teacher, engine)
        options = config.rollout
        self._rollouts = SortedRollouts(Pool(options.oversubscribe, options.unfinished, options.max_staleness))
        self._entered = 0  # prompts of this rank's shares that have been looked at
        self._taken: dict[int, tuple[Response, int]] = {}  # sample → its text and staleness
        self._slot_time = SlotTime()

    def state(self) -> dict[str, Any]:
        """The pool, and how far it has been filled."""
        return {"entered": self._entered, "pool": self._rollouts.pool.state()}

    def restore(self, state: dict[str, Any] | None) -> None:
        assert state is not None
        self._entered = state["entered"]
        self._rollouts.pool.restore(state["pool"])

    def _make(self, wanted: Sequence[Wanted], student: PreTrainedModel | None) -> StepSamples:
        others = [sample for sample in wanted if sample.source is not Source.STUDENT]
        needed = (len(wanted) - len(others)) // self.method.samples_per_prompt
        if not needed:
            return super()._make(wanted, student)
        assert student is not None
        started = time.perf_counter()
        generator = self.engine.generator("student", student)
        assert isinstance(generator, Generator)  # as the configuration asks for the built-in engine
        version = wanted[0].sample // self.config.train.batch_size
        params = sampling_params(self.config.rollout)
        units, self._slot_time = self._rollouts.update(generator, params, needed, version, self._more)
        self._taken = {r.sample: (r, unit.staleness(version)) for unit in units for r in unit.responses}
        taken = [sample for unit in units for sample in self._members(unit.number)]
        made = super()._make(sorted([*others, *taken], key=lambda w: w.sample), student)
        made.seconds = time.perf_counter() - started
        return made

    def _more(self, count: int) -> list[Unit]:
        """The next prompts of this rank's shares that the student answers; fewer than ``count`` where the run ends."""
        batch, size = self.config.train.batch_size, self.method.samples_per_prompt
        share = batch // world_size() // size
        units: list[Unit] = []
        while len(units) < count and self._entered < self.config.train.steps * share:
            step, place = divmod(self._entered, share)
            self._entered += 1
            members = self._members(step * (batch // size) + rank() * share + place)
            if members[0].source is Source.STUDENT:
                units.append(self._unit(members))
        return units

    def _members(self, group: int) -> list[Wanted]:
        """The samples of one prompt, as the step that they belong to would want them."""
        size, train = self.method.samples_per_prompt, self.config.train
        first = group * size
        return self.wanted(range(first, first + size), first // train.batch_size / train.steps)

    def _unit(self, members: Sequence[Wanted]) -> Unit:
        example = members[0].example
        prompt = encode_prompt(self.tokenizer, example)
        skipped: Finish | None = None if prompt_fits(example, prompt, self.config) else "length"
        return Unit(
            members[0].group, [Response(w.sample, prompt, self._seed(w.sample), finish=skipped) for w in members]
        )

    def _trajectories(
        self,
        source: Source,
        wanted: Sequence[Wanted],
        prompts: list[list[int]],
        student: PreTrainedModel | None,
        made: StepSamples,
    ) -> Sequence[Trajectory]:
        if source is not Source.STUDENT:
            return super()._trajectories(source, wanted, prompts, student, made)
        taken = [self._taken[w.sample] for w in wanted]
        made.slot_time = self._slot_time
        # What was decoded in this step, not what is taken in it.
        made.student_tokens += self._slot_time.busy - sum(len(response.ids) for response, _ in taken)
        return [
            Trajectory(r.ids, None, r.logprobs, r.finish != "length", {"staleness": float(age)}) for r, age in taken
        ]


def check_schedule(config: RunConfig, method: Method) -> None:
    """Raise ConfigError where ``rollout.schedule=sorted`` cannot work with this method or batch."""
    if config.rollout.schedule != "sorted":
        return
    name, uses, size = config.method["name"], method.uses(), method.samples_per_prompt
    remedy = "set rollout.schedule=plain"
    if Source.STUDENT not in uses:
        what = (
            "monitored rollouts, which have a schedule of their own"
            if Source.MONITORED in uses
            else "no text of the student"
        )
        raise ConfigError(f"rollout.schedule=sorted has nothing to sort: method={name} trains on {what}; {remedy}")
    if size > 1 and uses != {Source.STUDENT}:
        raise ConfigError(
            f"rollout.schedule=sorted keeps the {size} samples of a prompt together, and method={name} mixes writers; {remedy}"
        )
    whole = world_size() * size
    if config.train.batch_size % whole:
        raise ConfigError(
            f"rollout.schedule=sorted gives each of the {world_size()} ranks whole prompts of {size} samples, and "
            f"train.batch_size={config.train.batch_size} is not a multiple of {whole}; set "
            f"train.batch_size={-(-config.train.batch_size // whole) * whole}, or {remedy.removeprefix('set ')}"
        )


def schedule_figures(config: RunConfig, facts: BatchFacts, ranks: Sequence[SlotTime | None]) -> dict[str, float]:
    """Figures of one step from all ranks: the bubble ratio, and under ``sorted`` what was dropped and how stale the texts are.

    Staleness is counted in steps, from a text's oldest token to the step that trains on it; ``rollout/stale_K`` are texts.
    """
    times = [time for time in ranks if time is not None]
    if not times:
        return {}
    figures = {"rollout/bubble": bubble_ratio(times), "rollout/ticks": float(max(time.ticks for time in times))}
    if config.rollout.schedule != "sorted":
        return figures
    ages = [sequence.notes["staleness"] for sequence in facts.sequences if "staleness" in sequence.notes]
    figures |= {
        "rollout/dropped_tokens": float(sum(time.dropped for time in times)),
        "rollout/requeued": float(sum(time.requeued for time in times)),
        "rollout/staleness_mean": sum(ages) / max(len(ages), 1),
        "rollout/staleness_max": max(ages, default=0.0),
    }
    counts = range(config.rollout.max_staleness + 1)
    return figures | {f"rollout/stale_{age}": float(sum(seen == age for seen in ages)) for age in counts}
