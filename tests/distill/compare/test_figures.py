"""Intervals, curves and cells: the arithmetic of the report, against tables in print and counts by hand."""

from __future__ import annotations

import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest

from distill.compare.report import cell
from distill.compare.results import RunRow, differences, mean_curve, spendings
from distill.compare.statistics import Spread, central_probability, spread, t_quantile

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("freedom", "confidence", "printed"),
    # Fisher & Yates, Statistical Tables (1963), table III
    [
        (1, 0.95, 12.706),
        (2, 0.95, 4.303),
        (3, 0.95, 3.182),
        (4, 0.95, 2.776),
        (9, 0.95, 2.262),
        (30, 0.95, 2.042),
        (5, 0.99, 4.032),
    ],
)
def test_quantiles_are_those_in_print(freedom: int, confidence: float, printed: float) -> None:
    assert t_quantile(freedom, confidence) == pytest.approx(printed, abs=5e-4)


@pytest.mark.parametrize("freedom", range(1, 9))
def test_probabilities_against_integration_of_the_density(freedom: int) -> None:
    x = np.linspace(-1.3, 1.3, 20_001)
    constant = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    density = constant * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    assert central_probability(1.3, freedom) == pytest.approx(float(np.trapezoid(density, x)), abs=1e-8)


def test_spread() -> None:
    values = [0.91, 0.95, 0.90, 0.97, 0.93]
    found = spread(values)
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.half_width == pytest.approx(2.7764451 * statistics.stdev(values) / math.sqrt(5), rel=1e-6)
    assert spread([0.5]) == Spread(0.5, None, 1)
    assert spread([3.0, 3.0]) == Spread(3.0, 0.0, 2)
    assert [cell(found, ".3f"), cell(Spread(0.5, None, 1), ".3f"), cell(None, ".3f")] == ["0.932 ± 0.036", "0.500", "–"]
    assert cell(Spread(123456.7, 890.1, 5), ",.0f") == "123,457 ± 890"


def test_differences_pair_the_seeds() -> None:
    def run(seed: int, **figures: float) -> RunRow:
        return RunRow(job=SimpleNamespace(seed=seed), figures=figures)  # type: ignore[arg-type]

    base = [run(0, a=0.1, b=1.0), run(1, a=0.5, b=1.0), run(2, a=0.9), run(3)]
    ours = [run(2, a=0.95, b=2.0), run(0, a=0.11, b=4.0), run(1, a=0.53), run(3, a=0.7)]
    found = differences(ours, base)
    assert found["a"].mean == pytest.approx(0.03)
    assert found["a"].half_width == pytest.approx(4.302653 * 0.02 / math.sqrt(3), rel=1e-5)
    assert found["b"] == Spread(3.0, None, 1)
    assert [cell(found["a"], "+.3f"), cell(Spread(-1.5, 0.25, 2), "+.1f")] == ["+0.030 ± 0.050", "-1.5 ± 0.2"]


def row(points: dict[int, tuple[float, float]]) -> RunRow:
    curve = {step: {"tokens": tokens, "eval/pass_at_1": accuracy} for step, (tokens, accuracy) in points.items()}
    return RunRow(job=None, curve=curve)  # type: ignore[arg-type]


def test_curves_meet_where_all_seeds_were_measured_and_at_their_ends() -> None:
    first = row({0: (0, 0.1), 10: (100, 0.3), 20: (200, 0.5), 23: (230, 0.6)})  # the budget was spent at step 23
    second = row({0: (0, 0.2), 10: (140, 0.5), 20: (235, 0.8)})
    points = mean_curve([first, second], "eval/pass_at_1")
    assert [(tokens, round(y.mean, 9), y.count) for tokens, y in points] == [
        (0, 0.15, 2),
        (120, 0.4, 2),
        (232.5, 0.7, 2),
    ]
    assert mean_curve([RunRow(job=None, failure="no")], "eval/pass_at_1") == []  # type: ignore[arg-type]


def test_spendings_are_those_of_the_last_row_and_all_seconds() -> None:
    tokens = {
        "tokens/student_generated": 5,
        "tokens/teacher_read": 7,
        "tokens/teacher_generated": 11,
        "tokens/trained": 13,
    }
    rows = [
        {"step": 0, **dict.fromkeys(tokens, 0)},
        {"step": 1, **tokens, "perf/step_s": 0.5},
        {"step": 2, **tokens, "perf/step_s": 0.25},
    ]
    assert spendings(rows) == {
        "steps": 2, "student_tokens": 5, "teacher_tokens": 18, "spent_tokens": 23, "trained_tokens": 13, "seconds": 0.75,
    }  # fmt: skip
