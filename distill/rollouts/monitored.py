"""Monitored rollouts: the student explores step by step, the teacher takes over where a step breaches its boundary (MOTAB).

    engine = Monitored(student, teacher, tokenizer, MonitorOptions(delimiters=["\\n"]), SamplingParams(temperature=0.6))
    for number, trajectory in engine.stream(prompts, seeds):     # as they end
        trajectory.ids, trajectory.supervised, trajectory.notes
    trajectories = engine.generate(prompts, seeds)                # all of them, in the order of the prompts

Paper: arXiv 2605.19433; formulas in `boundary`, stitching in `monitored_trajectory`, batching in `monitored_scheduler`. What
differs from the released code, on purpose:

a. the delimiter stays in the text and everything is token ids, so contexts are exactly what was sampled;
b. an end token ends a trajectory, a delimiter ends a step: the two are told apart;
c. the entropy is that of the top k tokens (the code reads one token's, which is always 0);
d. every token of a step counts with its own probability (the code counts a missing first one as 1);
e. step boundaries are positions, never lengths of text tokenised again;
f. prompts come as the models' own ids, chat template included;
g. one teacher prefill per step gives value and entropy, and feeds each token once;
h. records can be resumed, and a teacher that fails stops the run: no step is accepted in silence (`distill.rollout`);
i. trajectories run in batches, with new ones entering as others end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.rollouts.forward import check_supported, unwrap
from distill.rollouts.generator import eos_ids, eval_mode
from distill.rollouts.monitored_options import MonitorOptions
from distill.rollouts.monitored_scheduler import Kit, Scheduler, Usage
from distill.rollouts.monitored_trajectory import Marker, MonitoredTrajectory
from distill.rollouts.monitored_writer import MonitoredWriter
from distill.rollouts.sampling import SamplingParams
from distill.rollouts.session import resolve_context
from distill.rollouts.stops import StopMatcher

__all__ = ["MonitorOptions", "Monitored", "MonitoredTrajectory", "Usage"]


class Monitored(MonitoredWriter):
    """The engine for one student and one teacher of the same tokenizer family.

    ``params`` serve both models; its ``max_new_tokens`` is a trajectory's budget, its ``stop`` strings end a trajectory. About
    ``slots`` rows decode together; caches hold 2.5 (student) and 3.5 (teacher) times as many. ``context_length`` bounds
    the prompt with its stitched response. The models are used as they are at each call.

    Raises ConfigError for a marker that the tokenizer cannot write, ``ValueError`` for a context beyond either model's,
    `UnsupportedModelError` for a model whose cache is not plain full attention.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: MonitorOptions,
        params: SamplingParams,
        *,
        slots: int = 64,
        context_length: int | None = None,
    ) -> None:
        if slots < 1:
            raise ValueError(f"rollout: slots must be at least 1, not {slots}")
        self.student, self.teacher = student, teacher
        for model in (student, teacher):
            check_supported(unwrap(model))
        context = min(resolve_context(unwrap(model), context_length) for model in (student, teacher))
        steps = replace(params, stop=tuple(dict.fromkeys((*options.delimiters, *params.stop))))
        self._kit = Kit(
            options=options,
            steps=steps,
            whole=params,
            steps_matcher=StopMatcher(tokenizer, steps.stop),
            whole_matcher=StopMatcher(tokenizer, params.stop) if params.stop else None,
            marker=Marker(tokenizer, options.marker if options.keep_flawed else ""),
            student_eos=eos_ids(student, tokenizer),
            teacher_eos=eos_ids(teacher, tokenizer),
            slots=slots,
            context=context,
        )
        self.usage = Usage()

    def stream(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> Iterator[tuple[int, MonitoredTrajectory]]:
        """(prompt number, trajectory) as they end. Each depends on its prompt, its seed and the weights only.

        ``usage`` grows while it runs. Raises ``ValueError`` for an empty prompt, one that leaves no room in the context, or
        seeds that do not match; ``FloatingPointError`` where either model's logits are not finite.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"rollout: {len(prompts)} prompts but {len(seeds)} seeds; each prompt needs one")
        for number, prompt in enumerate(prompts):
            if not 1 <= len(prompt) < self._kit.context:
                raise ValueError(
                    f"rollout: prompt {number} has {len(prompt)} tokens; the context of {self._kit.context} allows 1 to "
                    f"{self._kit.context - 1}: shorten it or raise the context length"
                )
        self.usage = Usage()
        if not prompts:
            return
        with ExitStack() as modes:
            for model in (self.student, self.teacher):
                modes.enter_context(eval_mode(model))
            scheduler = Scheduler(self.student, self.teacher, self._kit, [list(map(int, p)) for p in prompts], seeds)
            self.usage = scheduler.usage
            yield from scheduler.run()
