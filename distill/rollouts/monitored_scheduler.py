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
from distill.rollouts.monitored_teacher import SharedSession, read_steps
from distill.rollouts.monitored_trajectory import Draft, Marker, MonitoredTrajectory, Step
from distill.rollouts.rollout import Finish
from distill.rollouts.sampling import SamplingParams
from distill.rollouts.stops import StopMatcher
from distill.seeds import mix

STUDENT, TEACHER = 31, 32  # purposes of the seeds after a takeover
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
        self.usage = Usage()
        slots = min(kit.slots, len(prompts))
        # Half as many again may wait for judgement while `slots` decode; as many again may be with the teacher.
        pool = slots + slots // 2
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
        """The first stretch draws as a plain rollout with this seed does; after a takeover the seed is a new one, as the same
        positions are drawn again.
        """
        seeds = [mix(d.seed, STUDENT, len(d.takeovers)) if d.takeovers else d.seed for d in drafts]
        limits = [min(self._kit.options.step_tokens, self._left(draft)) for draft in drafts]
        with self._at_work("student"):
            self._explore.add([draft.row for draft in drafts], seeds, limits)

    def _left(self, draft: Draft) -> int:
        """Tokens that the budget of the trajectory and the context still allow."""
        budget = self._kit.whole.max_new_tokens - len(draft.accepted)
        return min(budget, self._kit.context - len(draft.prompt) - len(draft.text))

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
        finish = self._end(draft, segment)
        if finish is not None:
            return [self._finished(draft, finish)]
        self._student.append([draft.row], [segment.ids])
        self._returning.append(draft)
        return []

    def _end(self, draft: Draft, segment: Segment) -> Finish | None:
        """Why the trajectory ends with this segment, which it already holds; None where it goes on."""
        if segment.finish == "eos" or (segment.finish == "stop" and segment.stop_string in self._kit.whole.stop):
            return segment.finish
        return "length" if self._left(draft) < 1 else None

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
            finish = self._end(draft, segment)
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
        kit, options = self._kit, self._kit.options
        target = draft.target(options)
        flawed = draft.flawed_text(kit.marker, kit.student_eos) if options.keep_flawed else None
        kept = draft.kept(target)
        text = kept if flawed is None else len(flawed[0]) + len(flawed[1])
        if kit.context - len(draft.prompt) - text < 1:
            draft.forgo(target)
            return False
        draft.take_back(target, flawed, options.mask_flawed)
        self._targets[draft.index] = target
        self._teacher.rewind(draft.monitor, len(draft.prompt) + kept)
        if self._writes_on(draft):
            self._close_student(draft)
        else:
            self._student.rewind(draft.row, len(draft.prompt) + kept)
        return True

    def _writes_on(self, draft: Draft) -> bool:
        """Whether the takeover that begins is the last one: the teacher writes to the end."""
        most = self._kit.options.max_breaches
        return most > 0 and len(draft.takeovers) + 1 >= most

    def _start_teacher(self, drafts: list[Draft]) -> None:
        options = self._kit.options
        for flight, last in ((self._suffix, True), (self._repair, False)):
            chosen = [draft for draft in drafts if self._writes_on(draft) is last]
            if not chosen:
                continue
            limits = []
            for draft in chosen:
                budget = self._kit.whole.max_new_tokens - len(draft.accepted)
                budget = max(budget, options.suffix_floor) if last else min(budget, options.step_tokens)
                limits.append(min(budget, self._kit.context - len(draft.prompt) - len(draft.text)))
            seeds = [mix(draft.seed, TEACHER, len(draft.takeovers)) for draft in chosen]
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
