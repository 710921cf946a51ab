"""What a model can do: greedy and sampled accuracy, length, and distance to its teacher on held-out text.

Problems are shared out over the ranks and the results gathered per problem, so the figures do not depend on the world size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import RunConfig
from distill.data import Example, Task
from distill.data.batch import TokenBatch, collate
from distill.data.mixed import PART
from distill.data.tokenize import OnLong, TokenSequence, encode_examples, encode_prompt
from distill.distributed import all_or_nothing, device, gathered, rank, total, world_size
from distill.errors import DataError
from distill.methods.base import DivergenceSpec, Targets
from distill.models import final_logits, target_hidden
from distill.monitors import WordCounter
from distill.rollouts.generator import Generator
from distill.rollouts.rollout import Rollout
from distill.rollouts.sampling import SamplingParams
from distill.samples import prompt_fits
from distill.seeds import mix
from distill.teachers.signals import FullLogits, HiddenStates, head_of
from distill.wire import travels

EVAL = 21  # purpose of the random choices made here

Progress = Callable[[int], None]  # called with the number of responses finished so far


@travels
@dataclass(frozen=True, slots=True)
class Outcome:
    """One response to one problem."""

    problem: int
    correct: bool
    exact_chain: bool | None
    length: int
    finished: bool
    words: int = 0  # epistemic words, see ``distill.monitors``
    part: str | None = None  # of data=mixed


class Evaluator:
    """Measures models on the held-out split; keeps a generator per model. All ranks call ``measure`` together."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        *,
        in_training: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.config, self.task, self.tokenizer = config, task, tokenizer
        self.in_training, self.progress = in_training, progress
        self._words = WordCounter(config.monitor.epistemic_words)
        self._generators: dict[int, Generator] = {}

    def problems(self, count: int) -> range:
        """``count`` problems of the split: its last ones during training, its first ones otherwise."""
        size = len(self.task)
        return range(max(0, size - count), size) if self.in_training else range(min(count, size))

    def measure(self, model: PreTrainedModel, teacher: PreTrainedModel | None) -> dict[str, float]:
        """Figures over ``eval.examples`` problems: ``pass_at_1`` (greedy), ``exact_chain``, ``mean_length`` (tokens),
        ``finished``, and ``epistemic_density`` where it is not 0; with ``eval.samples`` also ``sampled_pass_at_<k>`` and
        ``sampled_mean_length``; with a teacher ``kl_teacher`` (forward KL in nats per token on held-out references).
        """
        options = self.config.eval
        mine = self.problems(options.examples)[rank() :: world_size()]
        examples = {i: self.task[i] for i in mine}
        greedy = self._answer(model, examples, 0, SamplingParams(max_new_tokens=self._budget, temperature=0.0))
        figures = summarise(greedy)
        if options.samples:
            params = SamplingParams(
                max_new_tokens=self._budget, temperature=options.temperature, top_p=options.top_p, stop=self._stop
            )
            drawn = [o for n in range(options.samples) for o in self._answer(model, examples, n + 1, params)]
            figures |= pass_at_k(drawn, options.samples, options.k)
            figures["sampled_mean_length"] = summarise(drawn)["mean_length"]
        if teacher is not None and options.kl_examples:
            kl = self.kl_to_teacher(model, teacher, self.problems(options.kl_examples))
            figures |= {} if kl is None else {"kl_teacher": kl}
        return figures

    @property
    def _budget(self) -> int:
        return self.config.eval.max_new_tokens or self.config.rollout.max_new_tokens

    @property
    def _stop(self) -> tuple[str, ...]:
        return tuple(self.config.rollout.stop)

    def _answer(
        self, model: PreTrainedModel, examples: dict[int, Example], sample: int, params: SamplingParams
    ) -> list[Outcome]:
        """Every rank's outcomes of sample number ``sample`` (0: greedy), in problem order."""
        numbers, progress = list(examples), self.progress
        before = sample * len(numbers)
        with all_or_nothing(DataError):
            prompts = self._prompts(examples)
        rollouts = self._generator(model).generate(
            list(prompts.values()),
            params,
            [mix(self.config.seed, EVAL, i, sample) for i in prompts],
            (lambda done, _: progress(before + done)) if progress else None,
        )
        outcomes = [self._judge(i, examples[i], rollout) for i, rollout in zip(prompts, rollouts, strict=True)]
        outcomes += [Outcome(i, False, None, 0, False) for i in numbers if i not in prompts]
        return sorted((o for part in gathered(outcomes) for o in part), key=lambda outcome: outcome.problem)

    def _prompts(self, examples: dict[int, Example]) -> dict[int, list[int]]:
        """Prompts that leave room for an answer; with data.on_long=skip the others count as wrong, else they are an error."""
        prompts = {i: encode_prompt(self.tokenizer, example) for i, example in examples.items()}
        return {i: prompt for i, prompt in prompts.items() if prompt_fits(examples[i], prompt, self.config)}

    def _judge(self, problem: int, example: Example, rollout: Rollout) -> Outcome:
        text = str(self.tokenizer.decode(rollout.response_ids, skip_special_tokens=True))
        finished = rollout.finish != "length"
        length, words = len(rollout.response_ids), self._words.count(text)
        part = example.metadata.get(PART) if self.config.data.name == "mixed" else None
        if example.answer is None:
            return Outcome(problem, False, None, length, finished, words, part)
        verdict = self.task.verify(example, text)
        return Outcome(problem, verdict.correct, verdict.exact_chain, length, finished, words, part)

    def _generator(self, model: PreTrainedModel) -> Generator:
        if id(model) not in self._generators:
            self._generators[id(model)] = Generator(
                model, self.tokenizer, slots=self.config.rollout.slots, context_length=self.config.train.max_length
            )
        return self._generators[id(model)]

    @torch.no_grad()
    def kl_to_teacher(self, model: PreTrainedModel, teacher: PreTrainedModel, problems: Sequence[int]) -> float | None:
        """Mean forward KL(teacher ‖ model) in nats per token on the references of ``problems``; None without references."""
        examples = [e for e in (self.task[i] for i in problems[rank() :: world_size()]) if e.reference is not None]
        on_long: OnLong = "skip" if self.config.data.on_long == "skip" else "truncate"
        with all_or_nothing(DataError):
            sequences, _ = encode_examples(self.tokenizer, examples, self.config.train.max_length, on_long)
        sums = [0.0, 0.0]
        for batch in micro_batches(sequences, self.config.train.micro_batch_size, self._pad):
            ours, theirs = (said_by(m, batch) for m in (model, teacher))
            loss = DivergenceSpec(kind="forward_kl")(Targets(ours, theirs, batch.target_ids)).loss
            sums[0] += float(loss.double().sum())
            sums[1] += loss.numel()
        kl, tokens = total(sums)
        return kl / tokens if tokens else None

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        return pad


def said_by(model: PreTrainedModel, batch: TokenBatch) -> FullLogits | HiddenStates:
    """What a model says at the batch's supervised positions: hidden states, as a whole batch's logits would be large; logits
    where the head is no plain matrix (it may have an adapter)."""
    hidden = target_hidden(model, batch)
    if type(model.get_output_embeddings()) is nn.Linear:
        return HiddenStates(hidden, head_of(model))
    return FullLogits(final_logits(model, hidden))


def micro_batches(sequences: Sequence[TokenSequence], size: int, pad_id: int) -> list[TokenBatch]:
    """Padded batches of at most ``size`` sequences each, on this rank's device."""
    return [collate(sequences[i : i + size], pad_id, None).to(device()) for i in range(0, len(sequences), size)]


def summarise(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Shares and means over outcomes, one per problem; ``epistemic_density`` (words per 1,000 tokens) where there are any, and
    ``pass_at_1/PART`` of data=mixed."""
    count = max(len(outcomes), 1)
    figures = {
        "pass_at_1": sum(o.correct for o in outcomes) / count,
        "mean_length": sum(o.length for o in outcomes) / count,
        "finished": sum(o.finished for o in outcomes) / count,
    }
    words = sum(o.words for o in outcomes)
    if words:
        figures["epistemic_density"] = 1000.0 * words / sum(o.length for o in outcomes)
    for part in sorted({o.part for o in outcomes if o.part is not None}):
        own = [o.correct for o in outcomes if o.part == part]
        figures[f"pass_at_1/{part}"] = sum(own) / len(own)
    chains = [o.exact_chain for o in outcomes if o.exact_chain is not None]
    return figures | ({"exact_chain": sum(chains) / len(chains)} if chains else {})


def pass_at_k(outcomes: Sequence[Outcome], samples: int, ks: Sequence[int]) -> dict[str, float]:
    """Unbiased pass@k over problems with ``samples`` responses each: mean of ``1 − C(n−c, k) / C(n, k)``.

    n samples, c of them correct (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    correct: dict[int, int] = {}
    for outcome in outcomes:
        correct[outcome.problem] = correct.get(outcome.problem, 0) + outcome.correct
    return {
        f"sampled_pass_at_{k}": sum(1 - comb(samples - c, k) / comb(samples, k) for c in correct.values())
        / max(len(correct), 1)
        for k in ks
    }
