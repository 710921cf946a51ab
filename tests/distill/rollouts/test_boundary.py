"""The formulas of the boundary against plain Python sums, and the paper's cases one by one."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from distill.rollouts.boundary import boundaries, breaches, steepest_drop, step_values, top_k_entropy

pytestmark = pytest.mark.unit


def plain_value(kind: str, teacher: list[float], student: list[float]) -> float:
    if not teacher:
        return 1.0
    if kind == "geometric_mean":
        return math.prod(math.exp(x) for x in teacher) ** (1 / len(teacher))
    if kind == "minimum":
        return min(math.exp(x) for x in teacher)
    mean = [sum(math.exp(x) for x in side) / len(side) for side in (teacher, student)]
    return mean[0] / mean[1]


@pytest.mark.parametrize("kind", ["geometric_mean", "minimum", "student_ratio"])
def test_values_of_ragged_steps(kind: str) -> None:
    rng = random.Random(0)
    counts = [3, 0, 1, 7, 0, 2]
    teacher, student = ([[-5 * rng.random() for _ in range(n)] for n in counts] for _ in range(2))
    flat = [np.array([x for step in side for x in step]) for side in (teacher, student)]
    got = step_values(kind, flat[0], flat[1], np.array(counts))
    assert got == pytest.approx([plain_value(kind, a, b) for a, b in zip(teacher, student)], rel=1e-12)


def test_a_token_that_the_teacher_excludes() -> None:
    teacher, student = np.array([-np.inf, -1.0, -1.0]), np.array([-1.0, -1.0, -1.0])
    counts = np.array([2, 1])
    assert step_values("geometric_mean", teacher, student, counts)[0] == 0.0
    assert step_values("minimum", teacher, student, counts)[0] == 0.0
    assert step_values("student_ratio", teacher, student, counts) == pytest.approx([0.5, 1.0])


@pytest.mark.parametrize("k", [1, 3, 20, 500])
def test_entropy_of_the_renormalised_top_k(k: int) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(k)) * 3
    for row, got in zip(logits.double().tolist(), top_k_entropy(logits, k)):
        weights = sorted((math.exp(x) for x in row), reverse=True)[:k]
        shares = [w / sum(weights) for w in weights]
        assert got == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-6, abs=1e-12)


def test_entropy_where_tokens_are_impossible() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0], [5.0, -math.inf, -math.inf]])
    assert top_k_entropy(logits, 3) == pytest.approx([math.log(2), 0.0])


def test_boundary_yields_to_an_undecided_teacher() -> None:
    assert boundaries(np.array([0.0, 1.0, 2.0]), 0.2, 0.5) == pytest.approx([0.2, 0.2 / math.e**0.5, 0.2 / math.e])
    assert boundaries(np.array([0.0, 9.0]), 0.9, 0.0) == pytest.approx([0.9, 0.9])


def test_a_value_on_the_boundary_is_accepted_but_not_by_the_ratio() -> None:
    values, limits = np.array([0.1, 0.2, 0.3]), np.full(3, 0.2)
    assert breaches("geometric_mean", values, limits).tolist() == [True, False, False]
    assert breaches("student_ratio", values, limits).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("values", "limits", "expected"),
    [
        ([], [], 0),
        ([0.1], [0.2], 0),
        ([0.9, 0.1], [0.2, 0.2], 1),
        ([0.9, 0.5, 0.4, 0.1], [0.2] * 4, 1),  # the steepest fall lies before the breach
        ([0.9, 0.8, 0.75, 0.1], [0.2] * 4, 3),
        ([0.3, 0.9, 0.15], [0.2] * 3, 2),
        ([0.5, 0.7, 0.6, 0.5], [0.9, 0.2, 0.2, 0.9], 2),  # equal falls: the earlier one; step 1 has no good predecessor
        ([0.9, 0.1, 0.9, 0.5], [0.95, 0.2, 0.2, 0.6], 3),  # the steepest fall follows a step that was not acceptable
        ([0.3, 0.1, 0.2], [0.4] * 3, 1),  # judged again with a stricter boundary: no candidate, hence the lowest value
    ],
)
def test_where_to_go_back_to(values: list[float], limits: list[float], expected: int) -> None:
    assert steepest_drop(np.array(values), np.array(limits)) == expected


def test_steepest_drop_agrees_with_equation_9_written_out() -> None:
    rng = random.Random(1)
    for _ in range(500):
        count = rng.randrange(2, 8)
        values, limits = ([rng.random() for _ in range(count)] for _ in range(2))
        candidates = {k: values[k] - values[k - 1] for k in range(1, count) if values[k - 1] >= limits[k - 1]}
        table = candidates or dict(enumerate(values))
        assert steepest_drop(np.array(values), np.array(limits)) == min(table, key=lambda k: table[k])
