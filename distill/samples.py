"""From global sample numbers to token sequences: the data side of one training step.

Sample number i names a prompt (i // samples_per_prompt, through the seeded order), a source (through the method) and the
seed of its random choices, so a step's sequences follow from (seed, i) and the weights alone: the same on any world size
and after any restart, with nothing lost or repeated.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import RolloutConfig, RunConfig
from distill.data import Example, Task
from distill.data.order import SampleOrder
from distill.data.tokenize import CannotEncode, OnLong, TokenSequence, TooLong, encode_examples, encode_prompt
from distill.errors import DataError
from distill.methods.base import Method, SequenceFacts, Source
from distill.models import context_length
from distill.monitors import BY_STUDENT, WordCounter
from distill.rollouts.engines import BuiltinEngine, Engine, Who
from distill.rollouts.generator import Generator
from distill.rollouts.rollout import Trajectory
from distill.rollouts.sampling import SamplingParams
from distill.rollouts.slot_time import SlotTime
from distill.seeds import mix
from distill.teachers.routing import Route

ORDER, SOURCE, ROLLOUT, PROBE = 11, 12, 13, 15  # purposes: keep the random choices apart


@dataclass(slots=True)
class StepSamples:
    """One rank's sequences of one step, and what making them cost."""

    sequences: list[TokenSequence] = field(default_factory=list)
    facts: list[SequenceFacts] = field(default_factory=list)  # one per sequence
    skipped: int = 0  # samples too long for the context (data.on_long=skip)
    generated_tokens: int = 0  # in texts that are trained on
    finished: int = 0
    rollouts: int = 0
    correct: int = 0
    student_tokens: float = 0.0  # decoded by the student, probes and discarded spans included
    teacher_tokens: float = 0.0
    teacher_read: float = 0.0  # read by the teacher and not written by it, see ``distill.token_counts``
    seconds: float = 0.0
    slot_time: SlotTime | None = (
        None  # of the student's rollouts that are trained on; None without any, or from a server
    )


@dataclass(frozen=True, slots=True)
class Wanted:
    """One sample to be made."""

    sample: int
    group: int
    example: Example
    source: Source


class SampleSource:
    """Makes sequences for ranges of global sample numbers. ``teacher`` writes where the method wants teacher text.

    ``engine`` makes the rollouts; None: the built-in one.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        method: Method,
        teacher: PreTrainedModel | None,
        engine: Engine | None = None,
    ) -> None:
        self.config, self.task, self.tokenizer, self.method, self.teacher = config, task, tokenizer, method, teacher
        self.engine = engine or BuiltinEngine(config, tokenizer, method, teacher)
        self.order = SampleOrder(len(task), mix(config.seed, ORDER))
        self._words = WordCounter(config.monitor.epistemic_words)
        section = config.teacher
        self.route = Route(section) if section.many and section.mixture == "route" else None
        self._readers = max(len(section.many), 1) if self.route is None else 1  # teachers that score each sequence
        self._teacher_context = context_length(teacher) if teacher is not None else None

    def state(self) -> dict[str, Any] | None:
        """This rank's part of a checkpoint. None: what is made follows from the sample numbers alone."""
        return None

    def restore(self, state: dict[str, Any] | None) -> None:
        """Put back what `state` returned."""

    @property
    def needs_student(self) -> bool:
        """Whether the student has to write anything."""
        return bool(self.method.probe_rollouts) or not self.method.uses().isdisjoint(BY_STUDENT)

    def epoch(self, sample: int) -> float:
        """How often the prompts before this sample number have gone through the data."""
        return self.order.epoch(sample // self.method.samples_per_prompt)

    def wanted(self, samples: range, progress: float = 0.0) -> list[Wanted]:
        """What these samples are, before anything is written."""
        groups = [sample // self.method.samples_per_prompt for sample in samples]
        indices = dict(zip(range(groups[0], groups[-1] + 1), self.order.indices(groups[0], groups[-1] + 1 - groups[0])))
        examples = {group: self.task[index] for group, index in indices.items()}
        seed = mix(self.config.seed, SOURCE)
        return [
            Wanted(sample, group, examples[group], self.method.source(sample, seed, progress))
            for sample, group in zip(samples, groups, strict=True)
        ]

    def weight(self, sequence: TokenSequence) -> float:
        """What the loss of a sequence is multiplied by, for its teacher."""
        return 1.0 if self.route is None or sequence.tag is None else self.route.weights[sequence.tag]

    def make(self, samples: range, student: PreTrainedModel | None, progress: float = 0.0) -> StepSamples:
        """Sequences for these samples, in order; samples that do not fit are skipped under data.on_long=skip.

        ``student`` may be None unless ``needs_student``. Raises DataError naming the example that cannot be encoded or is
        too long.
        """
        try:
            return self._make(self.wanted(samples, progress), student)
        except (TooLong, CannotEncode) as error:
            raise DataError(str(error)) from None

    def _make(self, wanted: Sequence[Wanted], student: PreTrainedModel | None) -> StepSamples:
        started = time.perf_counter()
        made = StepSamples()
        probed = self._probe(wanted, student, made)
        slots: dict[int, TokenSequence] = {}
        for sample in wanted:
            if sample.source is Source.REFERENCE and (sequence := self._reference(sample)) is not None:
                slots[sample.sample] = sequence
        for source in (Source.STUDENT, Source.TEACHER, Source.MONITORED):
            part = [sample for sample in wanted if sample.source is source]
            if part:
                self._write(source, part, student, slots, made)
        for sample in wanted:
            if sample.sample in slots:
                self._finish(sample, slots[sample.sample], probed.get(sample.group), made)
        made.skipped = len(wanted) - len(made.sequences)
        made.seconds = time.perf_counter() - started
        return made

    def _finish(self, wanted: Wanted, sequence: TokenSequence, probed: float | None, made: StepSamples) -> None:
        """The method's say in what counts and what the teacher sees; the facts of the text as it was written."""
        length, words = len(sequence.response_ids), 0
        if wanted.source in BY_STUDENT:
            words = self._words.count(self._text(sequence.response_ids))
        view = self.method.teacher_view(wanted.example)
        if view is not None:
            sequence = replace(sequence, teacher_prompt=encode_prompt(self.tokenizer, view))
        tag = None if self.route is None else self.route.teacher_of(wanted.example)
        prompt = (view or wanted.example).prompt
        sequence = replace(sequence, sample=wanted.sample, tag=tag, prompt=prompt)
        sequence = self.method.supervise(sequence, self.tokenizer)
        if not self._teacher_can_read(sequence):
            return
        if "teacher" in self.method.needs:
            made.teacher_read += self._readers * len(sequence.before_teacher().ids)
        flags = sequence.supervised
        tokens = len(sequence.response_ids) if flags is None else sum(flags)
        made.sequences.append(sequence)
        made.facts.append(
            SequenceFacts(
                wanted.sample,
                wanted.group,
                wanted.source,
                tokens,
                length,
                sequence.correct,
                probed,
                words,
                sequence.notes,
            )
        )

    def _teacher_can_read(self, sequence: TokenSequence) -> bool:
        """Whether a longer prompt for the teacher leaves room for the response. Raises TooLong unless data.on_long=skip."""
        length, limit = len(sequence.before_teacher().ids), self._teacher_context
        if sequence.teacher_prompt is None or limit is None or length <= limit:
            return True
        if self.config.data.on_long == "skip":
            return False
        remedy = "lower rollout.max_new_tokens, shorten the context that the method gives the teacher, or set data.on_long=skip"
        raise TooLong(sequence.example_id, "what the teacher sees has", length, limit, remedy)

    def _reference(self, wanted: Wanted) -> TokenSequence | None:
        limit, on_long = self.config.train.max_length, cast(OnLong, self.config.data.on_long)
        encoded, _ = encode_examples(self.tokenizer, [wanted.example], limit, on_long)
        return encoded[0] if encoded else None

    def _write(
        self,
        source: Source,
        wanted: Sequence[Wanted],
        student: PreTrainedModel | None,
        slots: dict[int, TokenSequence],
        made: StepSamples,
    ) -> None:
        """Fill ``slots`` with what the source's writer makes of each prompt that leaves room."""
        prompts = {w.sample: encode_prompt(self.tokenizer, w.example) for w in wanted}
        fitting = [w for w in wanted if prompt_fits(w.example, prompts[w.sample], self.config)]
        written = self._trajectories(source, fitting, [prompts[w.sample] for w in fitting], student, made)
        for w, trajectory in zip(fitting, written, strict=True):
            accepted = trajectory.accepted_ids
            correct = self._judge(w.example, trajectory.ids if accepted is None else accepted)
            prompt = prompts[w.sample]
            slots[w.sample] = TokenSequence(
                [*prompt, *trajectory.ids],
                len(prompt),
                w.example.id,
                trajectory.supervised,
                trajectory.logprobs,
                correct=correct,
                notes=trajectory.notes,
            )
            made.rollouts += 1
            made.generated_tokens += len(trajectory.ids)
            made.finished += trajectory.finished
            made.correct += correct == 1.0
            by_teacher = len(trajectory.ids) if source is Source.TEACHER else 0
            made.student_tokens += trajectory.notes.get("student_tokens", len(trajectory.ids) - by_teacher)
            made.teacher_tokens += trajectory.notes.get("teacher_tokens", by_teacher)
            if source is not Source.STUDENT:  # the teacher reads the prompt, and the steps that it judges
                judged = trajectory.notes.get("student_tokens", 0.0) if source is Source.MONITORED else 0.0
                made.teacher_read += len(prompt) + judged

    def _seed(self, sample: int) -> int:
        """Of the random numbers that write this sample."""
        return mix(self.config.seed, ROLLOUT, sample)

    def _trajectories(
        self,
        source: Source,
        wanted: Sequence[Wanted],
        prompts: list[list[int]],
        student: PreTrainedModel | None,
        made: StepSamples,
    ) -> Sequence[Trajectory]:
        """What the source's writer makes of each prompt, in order."""
        seeds = [self._seed(w.sample) for w in wanted]
        if source is Source.MONITORED:
            assert student is not None
            return self.engine.writer(student).generate(prompts, seeds)
        who: Who = "student" if source is Source.STUDENT else "teacher"
        model = student if source is Source.STUDENT else self.teacher
        assert model is not None
        generator = self.engine.generator(who, model)
        rollouts = generator.generate(prompts, sampling_params(self.config.rollout), seeds)
        if source is Source.STUDENT and isinstance(generator, Generator):
            made.slot_time = generator.slot_time
        return [Trajectory(r.response_ids, None, r.logprobs, r.finish != "length") for r in rollouts]

    def _probe(
        self, wanted: Sequence[Wanted], student: PreTrainedModel | None, made: StepSamples
    ) -> dict[int, float | None]:
        """Group → share of ``probe_rollouts`` answers of the current student that are right, where it can be judged."""
        count = self.method.probe_rollouts
        if not count:
            return {}
        assert student is not None
        examples = {w.group: w.example for w in wanted if w.example.answer is not None}
        prompts = {group: encode_prompt(self.tokenizer, example) for group, example in examples.items()}
        asked = [g for g in examples if prompt_fits(examples[g], prompts[g], self.config) for _ in range(count)]
        seeds = [mix(self.config.seed, PROBE, group, number % count) for number, group in enumerate(asked)]
        params = sampling_params(self.config.rollout)
        generator = self.engine.generator("student", student)
        rollouts = generator.generate([prompts[group] for group in asked], params, seeds)
        right = dict.fromkeys(asked, 0.0)
        for group, rollout in zip(asked, rollouts, strict=True):
            right[group] += self._judge(examples[group], rollout.response_ids) or 0.0
            made.student_tokens += len(rollout.response_ids)
        return {group: correct / count for group, correct in right.items()}

    def _judge(self, example: Example, response: list[int]) -> float | None:
        """1 or 0; None for an example without an answer."""
        if example.answer is None:
            return None
        return float(self.task.verify(example, self._text(response)).correct)

    def _text(self, response: list[int]) -> str:
        return str(self.tokenizer.decode(response, skip_special_tokens=True))


def prompt_fits(example: Example, prompt: Sequence[int], config: RunConfig) -> bool:
    """Whether ``prompt`` leaves room for a response. Raises TooLong where it does not, unless data.on_long=skip."""
    limit = config.train.max_length
    if len(prompt) >= limit and config.data.on_long != "skip":
        remedy = "raise train.max_length, or set data.on_long=skip"
        raise TooLong(example.id, "its prompt alone has", len(prompt), limit, remedy)
    return len(prompt) < limit


def sampling_params(config: RolloutConfig) -> SamplingParams:
    """The generator's parameters from the configuration."""
    return SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop=tuple(config.stop),
    )
