"""What a run watches besides its loss: text figures, the noise of the gradient, and alarms.

Every step, from what is there anyway (the divergences add KL both ways, entropies and agreement as ``monitor/…``):

- ``monitor/response_length``: mean tokens of a response; ``rollout/…``: length, pass rate of text written for the step.
- ``monitor/epistemic_count`` and ``monitor/epistemic_density``: words of doubt per response and per 1,000 tokens of the
  student's own text, also apart for correct and incorrect responses. Distillation that shortens answers can work by
  suppressing them (Kim et al., arXiv 2603.24472; from about 182 to 9 per response there). The list is that of a replication.
- ``monitor/grad_snr``: m² / (v − m²) with m, v moving averages of the gradient norm and of its square. It tells how much
  the norm varies from step to step, a cheap stand-in for the signal-to-noise ratio of the gradient vector; low is noisy.

Alarms are a line in the log when they begin and ``alarm/NAME`` = 1 in the metrics while they last:

- ``epistemic_density``: on held-out problems, words of doubt fell by ``density_drop`` since the first evaluation while pass@1
  is ``accuracy_drop`` below its best.
- ``entropy_collapse``: on its rollouts the student's entropy is below ``entropy_share`` of its teacher's there, or of its own
  in the first steps where no teacher is scored. Text from elsewhere is left out: there, low entropy is a good fit.
- ``teacher_is_student``: over the last steps the divergence from the teacher was below ``same_divergence``: there is nothing to
  learn from a teacher that is the student. `same_weights` tells before the first step, where both are in one process.
- ``length_blow_up``: rollouts are ``length_growth`` times as long as in the first steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from distill.config import MonitorSection
from distill.methods.base import BatchFacts, SequenceFacts, Source

SAME_STEPS = 3  # before "the teacher is the student" is said
BY_STUDENT = (Source.STUDENT, Source.MONITORED)


class WordCounter:
    """Counts whole words of a list, whatever their case."""

    def __init__(self, words: Sequence[str]) -> None:
        self._pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE) if words else None

    def count(self, text: str) -> int:
        return sum(1 for _ in self._pattern.finditer(text)) if self._pattern else 0


def text_figures(facts: BatchFacts) -> dict[str, float]:
    """``monitor/…`` of the texts of a step, and ``sample/NAME`` for every note that its sequences carry."""
    sequences = facts.sequences
    if not sequences:
        return {}
    figures = {"monitor/response_length": sum(s.length for s in sequences) / len(sequences)}
    written = [s for s in sequences if s.source in BY_STUDENT]
    for suffix, part in (
        ("", written),
        ("_correct", [s for s in written if s.correct == 1.0]),
        ("_incorrect", [s for s in written if s.correct == 0.0]),
    ):
        if part:
            figures[f"monitor/epistemic_count{suffix}"] = sum(s.words for s in part) / len(part)
            figures[f"monitor/epistemic_density{suffix}"] = density(part)
    rates = [s.probed for s in sequences if s.probed is not None]
    if rates:
        figures["monitor/probed_pass_rate"] = sum(rates) / len(rates)
    for name in sorted({name for s in sequences for name in s.notes}):
        values = [s.notes[name] for s in sequences if name in s.notes]
        figures[f"sample/{name}"] = sum(values) / len(values)
    return figures


def density(sequences: Iterable[SequenceFacts]) -> float:
    """Epistemic words per 1,000 tokens over several responses together."""
    words, tokens = map(sum, zip(*((s.words, s.length) for s in sequences), strict=True))
    return 1000.0 * words / max(tokens, 1)


class Average:
    """A moving average of one figure, free of the start's bias, and the plain mean of its first values."""

    def __init__(self, smoothing: float, baseline_steps: int) -> None:
        self.smoothing, self.baseline_steps = smoothing, baseline_steps
        self.count, self.weighted, self.first = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        self.weighted = self.smoothing * self.weighted + (1.0 - self.smoothing) * value
        if self.count < self.baseline_steps:
            self.first += value
        self.count += 1

    @property
    def value(self) -> float:
        """NaN before the first value."""
        return self.weighted / (1.0 - self.smoothing**self.count) if self.count else math.nan

    @property
    def baseline(self) -> float | None:
        """Mean of the first ``baseline_steps`` values, once they are there."""
        return self.first / self.baseline_steps if self.count >= self.baseline_steps else None


class Monitors:
    """Moving averages and alarms of one run. Every rank keeps the same: all they see are global figures."""

    WATCHED = ("grad_norm", "grad_norm_squared", "student_entropy", "teacher_entropy", "length", "divergence")

    def __init__(self, options: MonitorSection) -> None:
        self.options = options
        self._averages = {name: Average(options.smoothing, options.baseline_steps) for name in self.WATCHED}
        self._first_density: float | None = None
        self._best_accuracy = -math.inf
        self._raised: set[str] = set()

    def state(self) -> dict[str, object]:
        """For a checkpoint."""
        averages = {name: (a.count, a.weighted, a.first) for name, a in self._averages.items()}
        return {
            "averages": averages,
            "first_density": self._first_density,
            "best_accuracy": self._best_accuracy,
            "raised": sorted(self._raised),
        }

    def restore(self, state: dict[str, object]) -> None:
        averages, raised = state["averages"], state["raised"]
        assert isinstance(averages, dict)
        assert isinstance(raised, list)
        for name, (count, weighted, first) in averages.items():
            average = self._averages[name]
            average.count, average.weighted, average.first = count, weighted, first
        self._first_density = state["first_density"]  # type: ignore[assignment]
        self._best_accuracy = state["best_accuracy"]  # type: ignore[assignment]
        self._raised = set(raised)

    def after_step(self, figures: dict[str, float], facts: BatchFacts) -> list[str]:
        """Adds ``monitor/grad_snr`` and alarms to a step's figures; returns a line for each alarm that begins."""
        norm, square = self._averages["grad_norm"], self._averages["grad_norm_squared"]
        norm.add(figures["train/grad_norm"])
        square.add(figures["train/grad_norm"] ** 2)
        if norm.count > 1:
            variance = max(
                square.value - norm.value**2, 1e-6 * square.value, 1e-300
            )  # rounding can leave nothing, or less
            figures["monitor/grad_snr"] = norm.value**2 / variance
        lengths = [s.length for s in facts.sequences if s.source in BY_STUDENT]
        if lengths:
            self._averages["length"].add(sum(lengths) / len(lengths))
            for name in ("student_entropy", "teacher_entropy"):
                if f"monitor/{name}" in figures:
                    self._averages[name].add(figures[f"monitor/{name}"])
        if (distance := _distance(figures)) is not None:
            self._averages["divergence"].add(distance)
        return [*self._entropy(figures), *self._length(figures), *self._same(figures)]

    def after_evaluation(self, figures: dict[str, float]) -> list[str]:
        """The same for the figures ``eval/…`` of an evaluation."""
        density, accuracy = figures.get("eval/epistemic_density", 0.0), figures["eval/pass_at_1"]
        if self._first_density is None:
            self._first_density = density
        self._best_accuracy = max(self._best_accuracy, accuracy)
        fallen = density < (1.0 - self.options.density_drop) * self._first_density
        wrong = fallen and accuracy < self._best_accuracy - self.options.accuracy_drop
        return self._alarm(
            figures,
            "epistemic_density",
            wrong,
            f"words of doubt fell from {self._first_density:.3g} to {density:.3g} per 1,000 held-out tokens while pass@1 fell from "
            f"{self._best_accuracy:.3g} to {accuracy:.3g}: the student may be learning to sound sure",
        )

    def _entropy(self, figures: dict[str, float]) -> list[str]:
        ours, theirs = self._averages["student_entropy"], self._averages["teacher_entropy"]
        yardstick = theirs.value if theirs.count else ours.baseline
        wrong = ours.count > 0 and yardstick is not None and ours.value < self.options.entropy_share * yardstick
        what = "its teacher has" if theirs.count else "it had in the first steps"
        return self._alarm(
            figures,
            "entropy_collapse",
            wrong,
            f"the student's entropy on its rollouts is {ours.value:.3g} nats where {what} {yardstick or 0.0:.3g}",
        )

    def _length(self, figures: dict[str, float]) -> list[str]:
        length = self._averages["length"]
        wrong = length.baseline is not None and length.value > self.options.length_growth * length.baseline
        return self._alarm(
            figures,
            "length_blow_up",
            wrong,
            f"rollouts have {length.value:.4g} tokens, up from {length.baseline or 0.0:.4g} in the first steps",
        )

    def _same(self, figures: dict[str, float]) -> list[str]:
        distance = self._averages["divergence"]
        wrong = distance.count >= SAME_STEPS and distance.value < self.options.same_divergence
        return self._alarm(
            figures,
            "teacher_is_student",
            wrong,
            f"student and teacher say the same (divergence {distance.value:.3g} nats per token): is the teacher the student? "
            "Look at model.teacher.path, teacher.many and model.student.path",
        )

    def _alarm(self, figures: dict[str, float], name: str, wrong: bool, text: str) -> list[str]:
        begins = wrong and name not in self._raised
        if wrong:
            figures[f"alarm/{name}"] = 1.0
            self._raised.add(name)
        else:
            self._raised.discard(name)
        return [f"alarm {name}: {text}"] if begins else []


def _distance(figures: dict[str, float]) -> float | None:
    """How far a step's student was from its teacher, in nats per token; None where the method does not compare them."""
    if "monitor/forward_kl" in figures:
        return figures["monitor/forward_kl"]
    known = [figures.get(f"monitor/{who}_logprob") for who in ("student", "teacher")]
    return None if None in known else abs(known[0] - known[1])  # type: ignore[operator]


def same_weights(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether the teacher has the very weights that the student starts from."""
    ours, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    return ours.keys() == theirs.keys() and all(
        theirs[name].shape == p.shape and torch.equal(theirs[name], p.to(theirs[name])) for name, p in ours.items()
    )
