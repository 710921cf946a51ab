"""From global sample numbers to token sequences: the data side of one training step.

Sample number i names an example (through the seeded order), a source (through the method) and the seed of its random
choices, so a step's sequences follow from (seed, i) and the weights alone: the same on any world size and after any
restart, with nothing lost or repeated.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import RolloutConfig, RunConfig
from distill.data import Example, Task
from distill.data.order import SampleOrder
from distill.data.tokenize import CannotEncode, OnLong, TokenSequence, TooLong, encode_examples, encode_prompt
from distill.errors import DataError
from distill.methods import Method, Source
from distill.rollouts.generator import Generator
from distill.rollouts.rollout import Rollout
from distill.rollouts.sampling import SamplingParams
from distill.seeds import mix

ORDER, SOURCE, ROLLOUT = 11, 12, 13  # purposes: keep the random choices apart


@dataclass(slots=True)
class StepSamples:
    """One rank's sequences of one step, and what making them cost."""

    sequences: list[TokenSequence]
    skipped: int = 0  # samples too long for the context (data.on_long=skip)
    generated_tokens: int = 0
    finished: int = 0
    rollouts: int = 0
    correct: int = 0
    seconds: float = 0.0
    sources: Counter[str] = field(default_factory=Counter)


class SampleSource:
    """Makes sequences for ranges of global sample numbers."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        method: Method,
        teacher: PreTrainedModel | None,
    ) -> None:
        self.config, self.task, self.tokenizer, self.method, self.teacher = config, task, tokenizer, method, teacher
        self.order = SampleOrder(len(task), mix(config.seed, ORDER))
        self._generators: dict[int, Generator] = {}

    def examples(self, samples: range) -> list[Example]:
        return [self.task[index] for index in self.order.indices(samples.start, len(samples))]

    def make(self, samples: range, student: PreTrainedModel | None) -> StepSamples:
        """Sequences for these samples, in order. ``student`` and the teacher write where the method wants them to.

        ``student`` may be None for a method that never asks it to write.

        Raises DataError naming the example that cannot be encoded or is too long.
        """
        try:
            return self._make(samples, student)
        except (TooLong, CannotEncode) as error:
            raise DataError(str(error)) from None

    def _make(self, samples: range, student: PreTrainedModel | None) -> StepSamples:
        started = time.perf_counter()
        examples = self.examples(samples)
        sources = [self.method.source(sample, mix(self.config.seed, SOURCE)) for sample in samples]
        made = StepSamples([], sources=Counter(source.value for source in sources))
        slots: list[TokenSequence | None] = [None] * len(examples)
        limit, on_long = self.config.train.max_length, cast(OnLong, self.config.data.on_long)
        for i, (example, source) in enumerate(zip(examples, sources, strict=True)):
            if source is Source.REFERENCE:
                encoded, _ = encode_examples(self.tokenizer, [example], limit, on_long)
                slots[i] = encoded[0] if encoded else None
        for source, writer in ((Source.STUDENT, student), (Source.TEACHER, self.teacher)):
            wanted = [i for i, chosen in enumerate(sources) if chosen is source]
            if wanted:
                assert writer is not None
                self._write(writer, wanted, examples, samples, slots, made)
        made.sequences = [sequence for sequence in slots if sequence is not None]
        made.skipped = len(slots) - len(made.sequences)
        made.seconds = time.perf_counter() - started
        return made

    def _write(
        self,
        writer: PreTrainedModel,
        wanted: Sequence[int],
        examples: Sequence[Example],
        samples: range,
        slots: list[TokenSequence | None],
        made: StepSamples,
    ) -> None:
        """Fill ``slots[i]`` for every wanted i with the writer's own continuation of prompt i."""
        prompts = {i: encode_prompt(self.tokenizer, examples[i]) for i in wanted}
        fitting = [i for i in wanted if prompt_fits(examples[i], prompts[i], self.config)]
        rollouts = self._generator(writer).generate(
            [prompts[i] for i in fitting],
            sampling_params(self.config.rollout),
            [mix(self.config.seed, ROLLOUT, samples[i]) for i in fitting],
        )
        for i, rollout in zip(fitting, rollouts, strict=True):
            slots[i] = TokenSequence(rollout.prompt_ids + rollout.response_ids, len(rollout.prompt_ids), examples[i].id)
            self._count(examples[i], rollout, made)

    def _count(self, example: Example, rollout: Rollout, made: StepSamples) -> None:
        made.rollouts += 1
        made.generated_tokens += len(rollout.response_ids)
        made.finished += rollout.finish != "length"
        if example.answer is not None:
            text = self.tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
            made.correct += self.task.verify(example, str(text)).correct

    def _generator(self, writer: PreTrainedModel) -> Generator:
        """One generator per model, kept for its cache."""
        if id(writer) not in self._generators:
            self._generators[id(writer)] = Generator(
                writer, self.tokenizer, slots=self.config.rollout.slots, context_length=self.config.train.max_length
            )
        return self._generators[id(writer)]


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
