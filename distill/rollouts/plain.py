"""Records of text that one model writes alone, in the form of monitored trajectories: no steps, no takeovers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from distill.rollouts.engines import Generates, Who
from distill.rollouts.monitored_scheduler import Usage
from distill.rollouts.monitored_trajectory import MonitoredTrajectory
from distill.rollouts.sampling import SamplingParams


class Plain:
    """Streams as `Monitored` does; ``size`` prompts at a time, whose texts are given out when the last of them has ended."""

    def __init__(self, generator: Generates, who: Who, params: SamplingParams, size: int) -> None:
        self._generator, self._who, self._params, self._size = generator, who, params, size
        self.usage = Usage()

    def stream(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> Iterator[tuple[int, MonitoredTrajectory]]:
        """(prompt number, trajectory). Each depends on its prompt, its seed and the weights only."""
        self.usage = Usage()
        for start in range(0, len(prompts), self._size):
            part = slice(start, start + self._size)
            began = time.perf_counter()
            rollouts = self._generator.generate(prompts[part], self._params, seeds[part])
            self._count(sum(len(rollout.response_ids) for rollout in rollouts), time.perf_counter() - began)
            for number, rollout in enumerate(rollouts, start):
                written = float(len(rollout.response_ids))
                by_teacher = written if self._who == "teacher" else 0.0
                yield (
                    number,
                    MonitoredTrajectory(
                        rollout.response_ids,
                        logprobs=rollout.logprobs,
                        finished=rollout.finish != "length",
                        notes={"student_tokens": written - by_teacher, "teacher_tokens": by_teacher},
                        prompt_ids=list(rollout.prompt_ids),
                        finish=rollout.finish,
                        teacher_share=float(self._who == "teacher"),
                    ),
                )

    def _count(self, tokens: int, seconds: float) -> None:
        usage = self.usage
        usage.wall_s += seconds
        if self._who == "teacher":
            usage.teacher_tokens, usage.teacher_s = usage.teacher_tokens + tokens, usage.teacher_s + seconds
        else:
            usage.student_tokens, usage.student_s = usage.student_tokens + tokens, usage.student_s + seconds
