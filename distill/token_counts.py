"""Tokens that a run has spent since its start, summed over ranks: the currency of ``train.token_budget`` and ``distill compare``.

``tokens/NAME`` in the metrics, cumulative after the step:

- ``student_generated``: tokens that the student decoded, PACED's probes and discarded spans included.
- ``teacher_generated``: tokens that the teacher decoded, kept or not.
- ``teacher_read``: tokens that the teacher took in and did not decode there: prompt and response of every sequence that it scores
  for the loss (behind its own prompt where the method gives it one), the prompt of every text that it writes or monitors, and
  the student's steps that it judges. A self-teacher counts like any other; a prompt that several rows share counts for each.
- ``trained``: supervised tokens in the loss.

``spent``, what the budget bounds, is the sum of the first three. Not counted: padding, the student's own training passes
(every method has one of each trained sequence), a reference model's scoring, and evaluation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class TokenCounts:
    """Running sums; part of a checkpoint, so that a resumed run counts every token once."""

    student_generated: float = 0.0
    teacher_generated: float = 0.0
    teacher_read: float = 0.0
    trained: float = 0.0

    def add(self, **tokens: float) -> None:
        """Take in the tokens of one step, by the names above."""
        for name, value in tokens.items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def spent(self) -> float:
        return self.student_generated + self.teacher_generated + self.teacher_read

    def state(self) -> dict[str, float]:
        """For a checkpoint and for ``summary.json``."""
        return asdict(self)

    def figures(self) -> dict[str, float]:
        """For the metrics."""
        return {f"tokens/{name}": value for name, value in asdict(self).items()}
