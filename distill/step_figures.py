"""What all ranks learn of a step before they take it: sums over ranks and replicas, and the figures made of them.

sums = agree(step.made, totals, teachers, replicas)     # one reduction
sums.bad                                                # losses that are not finite: the step must not be taken
figures(sums, step, totals)                             # `train/…`, `data/…`, `teacher/…`, `monitor/…`, `rollout/…`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distill.preparing import PreparedStep
from distill.replicas.one import OneReplica
from distill.samples import StepSamples
from distill.teachers.base import Teachers
from distill.totals import StepTotals


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSums:
    """Sums over all ranks: counts of samples and tokens, the scaled loss, and what teachers say of themselves."""

    skipped: float
    rollouts: float
    generated: float  # tokens in texts that are trained on
    finished: float
    correct: float
    trained: float  # supervised tokens
    by_student: float  # tokens, as are the next two; see ``distill.token_counts``
    by_teacher: float
    read: float
    teacher: dict[str, float]  # figures
    loss: float
    bad: float  # tokens whose loss is not finite
    stats: list[float]  # per teacher, then per monitoring figure, as in `StepTotals`

    def spent(self) -> dict[str, float]:
        """The step's tokens by the names of `TokenCounts`."""
        return {
            "student_generated": self.by_student,
            "teacher_generated": self.by_teacher,
            "teacher_read": self.read,
            "trained": self.trained,
        }


def agree(made: StepSamples, totals: StepTotals, teachers: Teachers, replicas: OneReplica) -> StepSums:
    """Add up the step over all ranks, which call this together."""
    counts = {
        "skipped": made.skipped,
        "rollouts": made.rollouts,
        "generated": made.generated_tokens,
        "finished": made.finished,
        "correct": made.correct,
        "trained": totals.tokens,
        "by_student": made.student_tokens,
        "by_teacher": made.teacher_tokens,
        "read": made.teacher_read,
    }
    said = teachers.figures()
    sums = replicas.total([*map(float, counts.values()), *said.values(), *totals.values()])
    counted, sums = sums[: len(counts)], sums[len(counts) :]
    asked, (loss, bad, *stats) = sums[: len(said)], sums[len(said) :]
    ratios = teachers.ratios(dict(zip(said, asked, strict=True)))
    return StepSums(teacher=ratios, loss=loss, bad=bad, stats=stats, **dict(zip(counts, counted, strict=True)))


def figures(
    sums: StepSums, step: PreparedStep, totals: StepTotals, epoch: float, tokens: Mapping[str, float]
) -> dict[str, float]:
    """By their names in the metrics. ``epoch`` of the data after the step; ``tokens``: figures of all steps so far."""
    seconds = step.made.seconds
    found = {
        "train/loss": sums.loss / step.denominator,
        "train/tokens": sums.trained,
        "data/samples": float(step.samples.stop),
        "data/epoch": epoch,
        "data/skipped": sums.skipped,
        "perf/sample_s": seconds,
        **tokens,
        **sums.teacher,
        **totals.teacher_figures(sums.stats),
    }
    per_token = max(sums.trained, 1.0)
    monitored = sums.stats[2 * len(totals.teachers) :]
    found |= {f"monitor/{name}": value / per_token for name, value in zip(totals.names, monitored, strict=True)}
    if sums.by_student or sums.by_teacher:
        found |= {"rollout/student_tokens": sums.by_student, "rollout/teacher_tokens": sums.by_teacher}
    if sums.rollouts:
        found |= {
            "rollout/share": sums.rollouts / len(step.samples),
            "rollout/mean_length": sums.generated / sums.rollouts,
            "rollout/finished": sums.finished / sums.rollouts,
            "rollout/pass_rate": sums.correct / sums.rollouts,
            "rollout/tokens_per_s": sums.generated / max(seconds, 1e-9),
        }
    return found
