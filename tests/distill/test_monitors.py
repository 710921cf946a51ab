"""Word counts, densities split by verdict, moving averages by definition, and each alarm at its threshold."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from distill.config import MonitorSection
from distill.methods.base import BatchFacts, SequenceFacts, Source
from distill.monitors import Average, Monitors, WordCounter, same_weights, text_figures

pytestmark = pytest.mark.unit


def fact(length: int, words: int = 0, correct: float | None = None, **more: Any) -> SequenceFacts:
    values = {"source": Source.STUDENT, "correct": correct, "words": words, **more}
    return SequenceFacts(sample=0, group=0, tokens=length, length=length, **values)


def test_words_are_counted_whole_and_in_any_case() -> None:
    counter = WordCounter(["wait", "hmm", "check"])
    assert counter.count("Wait, hmm... I await a checkbox. CHECK! wait-wait") == 5
    assert counter.count("") == 0
    assert WordCounter([]).count("wait") == 0


def test_densities_are_split_by_verdict_and_count_the_student_s_text_only() -> None:
    facts = [
        fact(100, 3, 1.0),
        fact(300, 1, 0.0, notes={"breach": 1.0}),
        fact(100, 2, None, notes={"breach": 0.0}),
        fact(700, 50, source=Source.REFERENCE),
    ]
    figures = text_figures(BatchFacts(facts))
    assert figures == pytest.approx({
        "monitor/response_length": 300.0, "monitor/epistemic_count": 2.0, "monitor/epistemic_density": 12.0,
        "monitor/epistemic_count_correct": 3.0, "monitor/epistemic_density_correct": 30.0,
        "monitor/epistemic_count_incorrect": 1.0, "monitor/epistemic_density_incorrect": 1000 / 300, "sample/breach": 0.5,
    })  # fmt: skip
    assert text_figures(BatchFacts([])) == {}


def test_pass_rates_come_from_probes_or_else_from_the_group() -> None:
    rows = [(4, 1.0, None), (4, 0.0, None), (5, 1.0, 0.25), (6, None, None)]
    facts = BatchFacts([SequenceFacts(i, g, Source.STUDENT, 1, 1, c, p) for i, (g, c, p) in enumerate(rows)])
    assert facts.groups() == {4: [0, 1], 5: [2], 6: [3]}
    assert facts.pass_rates() == [0.5, 0.5, 0.25, None]


def test_average_by_definition() -> None:
    average, values = Average(0.8, 3), [4.0, 1.0, 7.0, 2.0]
    assert math.isnan(average.value)
    for value in values:
        average.add(value)
    shares = [0.8 ** (3 - i) for i in range(4)]
    assert average.value == pytest.approx(sum(s * v for s, v in zip(shares, values)) / sum(shares))
    assert average.baseline == 4.0
    assert Average(0.8, 3).baseline is None


def step(
    monitors: Monitors, length: int = 10, norm: float = 1.0, **figures: float
) -> tuple[dict[str, float], list[str]]:
    row = {"train/grad_norm": norm, **{f"monitor/{name}": value for name, value in figures.items()}}
    return row, monitors.after_step(row, BatchFacts([fact(length)]))


def test_gradient_noise_of_a_known_sequence() -> None:
    monitors = Monitors(MonitorSection(smoothing=0.999))
    for i in range(4000):
        row, _ = step(monitors, norm=3.0 + (-1) ** i)  # mean 3, standard deviation 1
    assert row["monitor/grad_snr"] == pytest.approx(9.0, rel=0.02)
    assert step(Monitors(MonitorSection()))[0].keys() == {"train/grad_norm"}
    steady = Monitors(MonitorSection())
    assert [math.isfinite(step(steady)[0].get("monitor/grad_snr", 0.0)) for _ in range(3)] == [True] * 3


def test_entropy_alarm_begins_once_lasts_and_ends() -> None:
    monitors = Monitors(MonitorSection(smoothing=0.0, entropy_share=0.5))
    assert step(monitors, student_entropy=0.6, teacher_entropy=1.0)[1] == []
    row, lines = step(monitors, student_entropy=0.4, teacher_entropy=1.0)
    assert row["alarm/entropy_collapse"] == 1.0
    assert len(lines) == 1
    assert "0.4 nats where its teacher has 1" in lines[0]
    row, lines = step(monitors, student_entropy=0.4, teacher_entropy=1.0)
    assert (row["alarm/entropy_collapse"], lines) == (1.0, [])
    assert "alarm/entropy_collapse" not in step(monitors, student_entropy=0.7, teacher_entropy=1.0)[0]
    row = {"train/grad_norm": 1.0, "monitor/student_entropy": 1e-9}
    monitors.after_step(row, BatchFacts([fact(3, source=Source.REFERENCE)]))
    assert "alarm/entropy_collapse" not in row, "low entropy on text from elsewhere is a good fit"


def test_without_a_teacher_entropy_is_compared_with_the_start() -> None:
    monitors = Monitors(MonitorSection(smoothing=0.0, entropy_share=0.5, baseline_steps=2))
    for entropy in (1.0, 0.6):
        assert step(monitors, student_entropy=entropy)[1] == []
    assert step(monitors, student_entropy=0.41)[1] == []
    assert "in the first steps 0.8" in step(monitors, student_entropy=0.39)[1][0]


def test_length_alarm() -> None:
    monitors = Monitors(MonitorSection(smoothing=0.0, baseline_steps=2, length_growth=2.0))
    assert [step(monitors, length=length)[1] for length in (10, 30, 40)] == [[], [], []]
    assert "41 tokens, up from 20" in step(monitors, length=41)[1][0]


def test_density_alarm_needs_both_falls_and_survives_a_checkpoint() -> None:
    monitors = Monitors(MonitorSection(density_drop=0.5, accuracy_drop=0.02))

    def evaluate(density: float, accuracy: float) -> list[str]:
        return monitors.after_evaluation({"eval/epistemic_density": density, "eval/pass_at_1": accuracy})

    assert [evaluate(8.0, 0.5), evaluate(3.0, 0.6), evaluate(8.0, 0.4), evaluate(3.0, 0.59)] == [[], [], [], []]
    kept = monitors.state()
    monitors = Monitors(MonitorSection(density_drop=0.5, accuracy_drop=0.02))
    monitors.restore(kept)
    assert "from 8 to 3 per 1,000 held-out tokens" in evaluate(3.0, 0.57)[0]
    assert monitors.after_evaluation({"eval/pass_at_1": 0.1}) == [], "it has begun already"
    assert Monitors(MonitorSection()).after_evaluation({"eval/pass_at_1": 0.0}) == []


def test_state_is_complete() -> None:
    """Continuing from a state gives the same rows as never stopping."""
    options = MonitorSection(baseline_steps=3, entropy_share=0.9, length_growth=1.1)
    whole, rows = Monitors(options), []
    for i in range(12):
        rows.append(step(whole, length=5 + i, norm=1.0 + i % 3, student_entropy=1.0 - 0.05 * i))
        if i == 5:
            saved = json.dumps(whole.state())
    other = Monitors(options)
    other.restore(json.loads(saved))
    again = [step(other, length=5 + i, norm=1.0 + i % 3, student_entropy=1.0 - 0.05 * i) for i in range(6, 12)]
    assert again == rows[6:]
    assert any("alarm/length_blow_up" in row for row, _ in again)


@pytest.mark.parametrize("name", ["forward_kl", "logprobs"])
def test_a_teacher_that_says_what_the_student_says_is_reported(name: str) -> None:
    def step(distance: float) -> tuple[list[str], dict[str, float]]:
        figures = {"train/grad_norm": 1.0, "monitor/student_logprob": -2.0, "monitor/teacher_logprob": -2.0 - distance}
        if name == "forward_kl":
            figures |= {"monitor/forward_kl": distance, "monitor/teacher_logprob": -3.0}
        return monitors.after_step(figures, BatchFacts([])), figures

    monitors = Monitors(MonitorSection(same_divergence=1e-6, smoothing=0.5))
    assert [step(0.0)[0] for _ in range(2)] == [[], []]
    lines, figures = step(0.0)
    assert "is the teacher the student? Look at model.teacher.path" in lines[0]
    assert figures["alarm/teacher_is_student"] == 1.0
    assert step(0.0)[0] == []
    assert "alarm/teacher_is_student" not in step(1e-3)[1]
    silent = Monitors(MonitorSection())
    assert all(silent.after_step({"train/grad_norm": 1.0}, BatchFacts([])) == [] for _ in range(5))  # no teacher at all


def test_same_weights_are_known_whatever_their_dtype() -> None:
    import copy

    import torch
    from torch import nn

    torch.manual_seed(0)
    student = nn.Linear(3, 4)
    assert same_weights(student, copy.deepcopy(student))
    assert same_weights(student, copy.deepcopy(student).bfloat16())
    other = copy.deepcopy(student)
    with torch.no_grad():
        other.weight[1, 2] += 1e-3
    assert not same_weights(student, other)
    assert not same_weights(student, nn.Linear(3, 4, bias=False))
    assert not same_weights(student, nn.Linear(4, 4))
