"""What came out: one row of figures per run, their means over seeds, and the curves of the pictures.

Figures of a run: those of its final evaluation (see ``distill.evaluation``), ``steps``, ``student_tokens`` (generated),
``teacher_tokens`` (read and generated), ``spent_tokens`` (their sum), ``trained_tokens``, and ``seconds``, the time of its
optimizer steps with rollouts and scoring, without evaluation, checkpoints and start-up. Who learns from records is charged with
the tokens that they cost. A stage that writes records has the figures of ``distill rollout``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill.compare.plan import Job
from distill.compare.state import complete
from distill.compare.statistics import Spread, spread
from distill.metrics import read_metrics


@dataclass(slots=True)
class RunRow:
    """One run; ``failure`` says why there are no figures."""

    job: Job
    figures: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    curve: dict[int, dict[str, float]] = field(default_factory=dict)  # step → "tokens" and "eval/…"


def rows_of(jobs: Sequence[Job], failures: Mapping[str, str]) -> list[RunRow]:
    """Stages that were trained (or taken) first, then entries, in the order of the jobs."""
    rows = []
    for job in jobs:
        figures = complete(job)
        if figures is None:
            rows.append(RunRow(job, failure=failures.get(job.title, "not run")))
            continue
        if job.records is not None:
            rows.append(RunRow(job, figures))
            continue
        metrics = read_metrics(job.folder.metrics)
        rows.append(RunRow(job, {**figures, **spendings(metrics)}, None, curve(metrics)))
        charge(rows[-1], [complete(used) or {} for used in job.after if used.records is not None])
    return rows


def charge(row: RunRow, records: Sequence[Mapping[str, Any]]) -> None:
    """Add what the records of a run cost to what it spent itself."""
    for made in records:
        for name in ("student_tokens", "teacher_tokens", "spent_tokens"):
            row.figures[name] += made[name]
        for point in row.curve.values():
            point["tokens"] += made["spent_tokens"]


def spendings(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Steps, tokens and seconds of a run from its metrics."""
    last = metrics[-1]
    student, read, written = (
        float(last[f"tokens/{name}"]) for name in ("student_generated", "teacher_read", "teacher_generated")
    )
    return {
        "steps": float(last["step"]),
        "student_tokens": student,
        "teacher_tokens": read + written,
        "spent_tokens": student + read + written,
        "trained_tokens": float(last["tokens/trained"]),
        "seconds": round(sum(float(row.get("perf/step_s", 0.0)) for row in metrics), 2),
    }


def curve(metrics: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Every in-training evaluation: ``tokens`` spent so far, and its figures."""
    return {
        int(row["step"]): {
            "tokens": float(
                row["tokens/student_generated"] + row["tokens/teacher_read"] + row["tokens/teacher_generated"]
            ),
            **{key: float(value) for key, value in row.items() if key.startswith("eval/")},
        }
        for row in metrics
        if "eval/pass_at_1" in row
    }


def groups(rows: Sequence[RunRow]) -> dict[str, list[RunRow]]:
    """Rows by name, in order."""
    found: dict[str, list[RunRow]] = {}
    for row in rows:
        found.setdefault(row.job.name, []).append(row)
    return found


def summarise(rows: Sequence[RunRow]) -> dict[str, Spread]:
    """Mean and interval of every figure over the runs that have it."""
    names = dict.fromkeys(name for row in rows for name in row.figures)
    return {name: spread([row.figures[name] for row in rows if name in row.figures]) for name in names}


def differences(rows: Sequence[RunRow], baseline: Sequence[RunRow]) -> dict[str, Spread]:
    """Mean and interval of every figure's difference to the baseline's run of the same seed.

    What a seed does to all entries alike (an easy student) cancels, so this tells entries apart whose own intervals overlap.
    """
    other = {row.job.seed: row.figures for row in baseline}
    pairs = [(row.figures, other[row.job.seed]) for row in rows if other.get(row.job.seed)]
    names = dict.fromkeys(name for ours, theirs in pairs for name in ours if name in theirs)
    return {name: spread([a[name] - b[name] for a, b in pairs if name in a and name in b]) for name in names}


def mean_curve(rows: Sequence[RunRow], figure: str) -> list[tuple[float, Spread]]:
    """Points (mean tokens spent, accuracy over seeds) at the evaluations that all seeds have, and at the last of each.

    Runs with a token budget end at steps of their own: their last evaluations are one point, whatever the step.
    """
    curves = [row.curve for row in rows if row.curve and all(figure in point for point in row.curve.values())]
    if not curves:
        return []
    shared = set.intersection(*[set(points) - {max(points)} for points in curves])
    aligned = [[points[step] for points in curves] for step in sorted(shared)]
    aligned.append([points[max(points)] for points in curves])
    return [
        (spread([point["tokens"] for point in points]).mean, spread([point[figure] for point in points]))
        for points in aligned
    ]
