"""Monitored rollouts (MOTAB) by two servers: the algorithm of `distill.rollouts.monitored`, one trajectory after its own pace.

    engine = VllmMonitored(student, teacher, tokenizer, MonitorOptions(...), SamplingParams(...), slots=64, context_length=4096)
    for number, trajectory in engine.stream(prompts, seeds):
        ...

``slots`` trajectories are under way at once, each in a thread that asks for one thing after the other; the servers batch what
comes together. Per step the student gets one request (its next step) and the teacher one, which scores the step's tokens and
also says what may follow them: the entropy of the next step's boundary. A rewind is a shorter list of token ids, whose prefix
the servers find in their caches. Decisions (budgets, seeds, t*, who writes) are `Rules`, the same as the built-in engine's, so
greedy runs of both give the same records but for the rounding of probabilities.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from distill.rollouts.boundary import boundaries, breaches, step_values, top_k_entropy
from distill.rollouts.monitored_options import MonitorOptions
from distill.rollouts.monitored_rules import Rules
from distill.rollouts.monitored_scheduler import Usage
from distill.rollouts.monitored_trajectory import Draft, Marker, MonitoredTrajectory, Step
from distill.rollouts.monitored_writer import MonitoredWriter
from distill.rollouts.rollout import Rollout
from distill.rollouts.sampling import SamplingParams
from distill.rollouts.stops import StopMatcher
from distill.rollouts.vllm.generator import Decoder, check_prompts, side_by_side


class VllmMonitored(MonitoredWriter):
    """For one student and one teacher of the same tokenizer family; arguments as those of the built-in `Monitored`.

    Raises ConfigError for a marker that the tokenizer cannot write.
    """

    def __init__(
        self,
        student: Decoder,
        teacher: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        options: MonitorOptions,
        params: SamplingParams,
        *,
        slots: int,
        context_length: int,
    ) -> None:
        self.student, self.teacher, self.options, self.slots = student, teacher, options, slots
        marker = Marker(tokenizer, options.marker if options.keep_flawed else "")
        self.rules = Rules(options, params, marker, student.eos, context_length)
        self._whole = params
        self._steps = replace(params, stop=tuple(dict.fromkeys((*options.delimiters, *params.stop))))
        self._steps_matcher = StopMatcher(tokenizer, self._steps.stop)
        self._whole_matcher = StopMatcher(tokenizer, params.stop) if params.stop else None
        self.usage = Usage()
        self._clock = _Clock(self.usage)

    def stream(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> Iterator[tuple[int, MonitoredTrajectory]]:
        """(prompt number, trajectory) as they end. Each depends on its prompt, its seed and the weights only.

        ``usage`` grows while it runs. Raises ``ValueError`` for an empty prompt, one that leaves no room in the context, or
        seeds that do not match; ServerError where a server fails.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"rollout: {len(prompts)} prompts but {len(seeds)} seeds; each prompt needs one")
        check_prompts(prompts, self.rules.context)
        self.usage = Usage()
        self._clock = _Clock(self.usage)
        began = time.perf_counter()

        def write(number: int) -> MonitoredTrajectory:
            return self._trajectory(number, [int(token) for token in prompts[number]], seeds[number])

        for number, trajectory in side_by_side(write, len(prompts), self.slots):
            self.usage.wall_s = time.perf_counter() - began
            yield number, trajectory

    def _trajectory(self, number: int, prompt: list[int], seed: int) -> MonitoredTrajectory:
        draft = Draft(number, prompt, seed, row=-1, monitor=-1)
        following = self._peek(prompt)
        while True:
            step, following = self._step(draft, following)
            if draft.steps[-1].breach:
                handed = self.rules.hand_over(draft)
                if handed is None:
                    draft.accept()
                    return draft.done(self.rules.end(draft, step.finish, step.stop_string) or "length")
                last = self.rules.writes_on(draft)
                step = self._take_over(draft, handed[0], last)
                if last:
                    return draft.done(step.finish)
                following = []
            else:
                draft.accept()
            finish = self.rules.end(draft, step.finish, step.stop_string)
            if finish is not None:
                return draft.done(finish)
            following = following or self._peek(prompt + draft.accepted)

    def _step(self, draft: Draft, following: list[float]) -> tuple[Rollout, list[float]]:
        """The student's next step, judged; with what the teacher thinks may follow it. ``following``: the same where it begins."""
        options, state = self.options, draft.prompt + draft.accepted
        limit, seed = self.rules.explore_limit(draft), self.rules.explore_seed(draft)
        with self._clock.at_work("student"):
            step = self.student.run(state, limit, seed, self._steps, self._steps_matcher)
        ids = step.response_ids
        with self._clock.at_work("teacher"):
            scores = self.teacher.server.score(state + ids, len(state), options.top_k)
        with self._clock.lock:
            self.usage.student_tokens += len(ids)
            self.usage.judged_tokens += len(ids)
        entropy = top_k_entropy(torch.tensor([following], dtype=torch.float64), options.top_k)
        theirs, ours = np.array(scores.logprobs), np.array(step.logprobs, dtype=np.float64)
        if math.isnan(float(entropy[0])) or np.isnan(theirs).any():
            raise FloatingPointError("the teacher's logits are not finite; its weights or inputs hold NaN or infinity")
        value = step_values(options.value, theirs, ours, np.array([len(ids)]))
        limits = boundaries(entropy, options.epsilon, options.theta)
        breach = breaches(options.value, value, limits)
        draft.judge(Step(ids, float(value[0]), float(limits[0]), float(entropy[0]), bool(breach[0])))
        return step, scores.following

    def _take_over(self, draft: Draft, target: int, last: bool) -> Rollout:
        """The teacher's part: to the end, or one step."""
        limit, seed = self.rules.takeover_limit(draft), self.rules.takeover_seed(draft)
        params, matcher = (self._whole, self._whole_matcher) if last else (self._steps, self._steps_matcher)
        with self._clock.at_work("teacher"):
            part = self.teacher.run(draft.prompt + draft.accepted, limit, seed, params, matcher)
        with self._clock.lock:
            self.usage.teacher_tokens += len(part.response_ids)
        draft.take_over(target, part.response_ids)
        return part

    def _peek(self, ids: list[int]) -> list[float]:
        with self._clock.at_work("teacher"):
            return self.teacher.server.peek(ids, self.options.top_k)


class _Clock:
    """Adds up the seconds during which at least one request to a model is under way."""

    def __init__(self, usage: Usage) -> None:
        self._usage, self.lock = usage, threading.Lock()
        self._active, self._began = {"student": 0, "teacher": 0}, {"student": 0.0, "teacher": 0.0}

    @contextmanager
    def at_work(self, who: str) -> Iterator[None]:
        with self.lock:
            if not self._active[who]:
                self._began[who] = time.perf_counter()
            self._active[who] += 1
        try:
            yield
        finally:
            with self.lock:
                self._active[who] -= 1
                if not self._active[who]:
                    spent = time.perf_counter() - self._began[who]
                    if who == "student":
                        self._usage.student_s += spent
                    else:
                        self._usage.teacher_s += spent
