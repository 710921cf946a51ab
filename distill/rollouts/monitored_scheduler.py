"""Many monitored trajectories at once: who decodes, who is judged, who is taken over, and when.

A trajectory is in one of four places:

    explore   the student decodes its next step            (a flight over the student's session)
    pending   the step is complete and waits for judgement
    suffix    the teacher writes to the end                 (a flight over the teacher's session)
    repair    the teacher writes one step                   (another flight over the same session)

Every tick does what moves most rows: one batched decode step of the largest flight, or, once half of the explorers wait, one
batched prefill of all their new tokens through the teacher and a vectorised verdict. Steps of unequal length therefore
never hold each other up; as rows wait or move on to the teacher, new prompts enter, so batches stay full. What a trajectory
becomes depends on its prompt, its seed and the weights only, never on its neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from distill.rollouts.boundary import boundaries, breaches, step_values
from distill.rollouts.flight import Flight, Segment
from distill.rollouts.forward import unwrap
from distill.rollouts.generator import open_shared
from distill.rollouts.monitored_options import MonitorOptions
from distill.rollouts.monitored_rules import Rules
from distill.rollouts.monitored_teacher import SharedSession, read_steps
from distill.rollouts.monitored_trajectory import Draft, Marker, MonitoredTrajectory, Step
from distill.rollouts.rollout import Finish
from distill.rollouts.sampling import SamplingParams
from distill.rollouts.stops import StopMatcher

_ENTER_SHARE = 8
"""Rows enter together once an eighth of the slots is free: a prefill costs a small model as much as a decode step."""


@dataclass(slots=True)
class Usage:
    """Work of both models in one call: tokens generated, tokens judged, seconds at work, seconds in all."""

    student_tokens: int = 0
    teacher_tokens: int = 0
    judged_tokens: int = 0
    student_s: float = 0.0
    teacher_s: float = 0.0
    wall_s: float = 0.0

    def figures(self) -> dict[str, float]:
        """Speeds while at work (the teacher's counts what it reads and what it writes), and shares of time idle."""
        wall = max(self.wall_s, 1e-9)
        return {
            "student_tokens_per_s": self.student_tokens / max(self.student_s, 1e-9),
            "teacher_tokens_per_s": (self.teacher_tokens + self.judged_tokens) / max(self.teacher_s, 1e-9),
            "student_idle": max(0.0, 1.0 - self.student_s / wall),
            "teacher_idle": max(0.0, 1.0 - self.teacher_s / wall),
        }


@dataclass(frozen=True, slots=True)
class Kit:
    """What all trajectories of an engine share. ``steps`` ends at delimiters too, ``whole`` at the caller's stop strings only."""

    options: MonitorOptions
    steps: SamplingParams
    whole: SamplingParams
    steps_matcher: StopMatcher
    whole_matcher: StopMatcher | None
    marker: Marker
    student_eos: set[int]
    teacher_eos: set[int]
    slots: int
    context: int


class Scheduler:
    """One call's worth of trajectories; `run` yields them as they end, with the number of their prompt."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        kit: Kit,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
    ) -> None:
        self._kit, self._prompts, self._seeds = kit, prompts, seeds
        self._rules = Rules(kit.options, kit.whole, kit.marker, kit.student_eos, kit.context)
        self.usage = Usage()
        slots = min(kit.slots, len(prompts))
        # While `slots` decode, 1.5 times as many may wait for judgement, so that the teacher reads few and large batches; as many
        # as `slots` may be with the teacher.
        pool = 2 * slots + slots // 2
        self._slots, self._vocabulary = slots, vocabulary(teacher)
        shared = min(vocabulary(student), self._vocabulary)
        self._student = SharedSession(student, slots=pool, context_length=kit.context, vocabulary=shared)
        self._teacher = SharedSession(teacher, slots=pool + slots, context_length=kit.context, vocabulary=shared)
        self._explore = Flight(self._student, kit.steps, sorted(kit.student_eos), kit.steps_matcher)
        self._suffix = Flight(self._teacher, kit.whole, sorted(kit.teacher_eos), kit.whole_matcher)
        self._repair = Flight(self._teacher, kit.steps, sorted(kit.teacher_eos), kit.steps_matcher)
        # Longest first, equal prompts together: they share their prefill.
        self._waiting = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i], -i))
        self._pending: list[tuple[Draft, Segment]] = []
        self._returning: list[Draft] = []
        self._by_row: dict[int, Draft] = {}
        self._by_monitor: dict[int, Draft] = {}
        self._targets: dict[int, int] = {}  # prompt number → the step index that the teacher is replacing

    def run(self) -> Iterator[tuple[int, MonitoredTrajectory]]:
        """(prompt number, trajectory), in the order in which they end."""
        began = time.perf_counter()
        while self._waiting or self._by_monitor:
            self._enter()
            if self._judgement_due():
                finished = self._judge()
            else:
                flight = max((self._explore, self._suffix, self._repair), key=len)
                finished = self._decode(flight)
            self.usage.wall_s = time.perf_counter() - began
            yield from finished
            began = time.perf_counter() - self.usage.wall_s  # the caller's time is not ours

    # ------------------------------------------------------------------ entering

    def _enter(self) -> None:
        """New prompts and repaired trajectories join the explorers, several at a time."""
        idle = not self._explore and not self._pending
        if self._returning and (idle or len(self._returning) * _ENTER_SHARE >= self._slots):
            self._send_exploring(self._returning)
            self._returning = []
        room = min(self._student.free, self._teacher.free, self._slots - len(self._explore), len(self._waiting))
        idle = not self._explore and not self._pending
        if room > 0 and (idle or room * _ENTER_SHARE >= self._slots or room == len(self._waiting)):
            self._open([self._waiting.pop() for _ in range(room)])

    def _open(self, numbers: list[int]) -> None:
        prompts = [self._prompts[i] for i in numbers]
        with self._at_work("student"):
            rows = open_shared(self._student, prompts)
        with self._at_work("teacher"):
            monitors = open_shared(self._teacher, prompts)
        drafts = [Draft(i, self._prompts[i], self._seeds[i], r, m) for i, r, m in zip(numbers, rows, monitors)]
        self._by_row |= {draft.row: draft for draft in drafts}
        self._by_monitor |= {draft.monitor: draft for draft in drafts}
        self._send_exploring(drafts)

    def _send_exploring(self, drafts: list[Draft]) -> None:
        seeds = [self._rules.explore_seed(draft) for draft in drafts]
        limits = [self._rules.explore_limit(draft) for draft in drafts]
        with self._at_work("student"):
            self._explore.add([draft.row for draft in drafts], seeds, limits)

    # ------------------------------------------------------------------ decoding

    def _decode(self, flight: Flight) -> list[tuple[int, MonitoredTrajectory]]:
        exploring = flight is self._explore
        with self._at_work("student" if exploring else "teacher"):
            segments = flight.step()
        if exploring:
            self.usage.student_tokens += sum(len(segment.ids) for segment in segments)
            self._pending += [(self._by_row[segment.row], segment) for segment in segments]
            return []
        self.usage.teacher_tokens += sum(len(segment.ids) for segment in segments)
        return [done for segment in segments for done in self._taken_over(flight, segment)]

    def _taken_over(self, flight: Flight, segment: Segment) -> list[tuple[int, MonitoredTrajectory]]:
        draft = self._by_monitor[segment.row]
        draft.take_over(self._targets.pop(draft.index), segment.ids)
        if flight is self._suffix:
            return [self._finished(draft, segment.finish)]
        finish = self._rules.end(draft, segment.finish, segment.stop_string)
        if finish is not None:
            return [self._finished(draft, finish)]
        self._student.append([draft.row], [segment.ids])
        self._returning.append(draft)
        return []

    def _finished(self, draft: Draft, finish: Finish) -> tuple[int, MonitoredTrajectory]:
        if draft.row in self._by_row and self._by_row[draft.row] is draft:
            self._close_student(draft)
        self._teacher.close([draft.monitor])
        del self._by_monitor[draft.monitor]
        return draft.index, draft.done(finish)

    def _close_student(self, draft: Draft) -> None:
        self._student.close([draft.row])
        del self._by_row[draft.row]

    # ------------------------------------------------------------------ judging

    def _judgement_due(self) -> bool:
        return bool(self._pending) and len(self._pending) >= len(self._explore)

    def _judge(self) -> list[tuple[int, MonitoredTrajectory]]:
        """One prefill of all pending steps through the teacher, and what follows from it."""
        pending, self._pending = self._pending, []
        options = self._kit.options
        steps = [segment.ids for _, segment in pending]
        with self._at_work("teacher"):
            theirs, entropy = read_steps(
                self._teacher, [draft.monitor for draft, _ in pending], steps, options.top_k, self._vocabulary
            )
        self.usage.judged_tokens += len(theirs)
        ours = np.concatenate([np.array(segment.logprobs, dtype=np.float64) for _, segment in pending])
        values = step_values(options.value, theirs, ours, np.array([len(ids) for ids in steps]))
        limits = boundaries(entropy, options.epsilon, options.theta)
        found = breaches(options.value, values, limits)
        going_on, finished = [], []
        breached: list[Draft] = []
        for n, (draft, segment) in enumerate(pending):
            draft.judge(Step(steps[n], float(values[n]), float(limits[n]), float(entropy[n]), bool(found[n])))
            if found[n] and self._hand_over(draft):
                breached.append(draft)
                continue
            draft.accept()
            finish = self._rules.end(draft, segment.finish, segment.stop_string)
            if finish is None and not found[n]:
                going_on.append(draft)
            else:
                finished.append(self._finished(draft, finish or "length"))
        self._start_teacher(breached)
        if going_on:
            self._send_exploring(going_on)
        return finished

    def _hand_over(self, draft: Draft) -> bool:
        """Rewind both models to t*; false where the context leaves no room for a correction: then the student's steps stand."""
        handed = self._rules.hand_over(draft)
        if handed is None:
            return False
        self._targets[draft.index], kept = handed
        self._teacher.rewind(draft.monitor, len(draft.prompt) + kept)
        if self._rules.writes_on(draft):
            self._close_student(draft)
        else:
            self._student.rewind(draft.row, len(draft.prompt) + kept)
        return True

    def _start_teacher(self, drafts: list[Draft]) -> None:
        for flight, last in ((self._suffix, True), (self._repair, False)):
            chosen = [draft for draft in drafts if self._rules.writes_on(draft) is last]
            if chosen:
                limits = [self._rules.takeover_limit(draft) for draft in chosen]
                seeds = [self._rules.takeover_seed(draft) for draft in chosen]
                with self._at_work("teacher"):
                    flight.add([draft.monitor for draft in chosen], seeds, limits)

    @contextmanager
    def _at_work(self, who: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        if who == "student":
            self.usage.student_s += spent
        else:
            self.usage.teacher_s += spent


def vocabulary(model: PreTrainedModel) -> int:
    """Rows of a model's output layer, padding included."""
    return int(unwrap(model).config.get_text_config(decoder=True).vocab_size)
