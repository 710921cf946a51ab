"""Loss aggregation against a few lines of exact arithmetic, empty sequences included, and what each kind is for."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from distill.aggregation import aggregation_scales
from distill.config import AggregationSpec

pytestmark = pytest.mark.unit

KINDS = ("token_mean", "sequence_mean", "constant", "delta_l")


def coefficients(kind: str, lengths: list[int], constant: float = 50.0, alpha: float = 1.0) -> list[float]:
    scales = aggregation_scales(AggregationSpec(kind=kind, alpha=alpha), lengths, constant)
    return [relative / scales.denominator for relative in scales.relative]


def by_definition(kind: str, lengths: list[int], constant: float, alpha: float) -> list[float]:
    """The table of the module's docstring, in fractions wherever it allows it."""
    real = [Fraction(length) for length in lengths if length]
    if kind == "token_mean":
        return [float(1 / sum(real)) if length else 0.0 for length in lengths]
    if kind == "sequence_mean":
        return [float(1 / (len(real) * Fraction(length))) if length else 0.0 for length in lengths]
    if kind == "constant":
        return [1 / (len(real) * constant) if length else 0.0 for length in lengths]
    powers = sum(float(length) ** -alpha for length in real)
    return [float(length) ** -alpha / powers / constant if length else 0.0 for length in lengths]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[3, 1, 9, 40], [5, 0, 2, 0], [0, 7], [30000, 20]])
@pytest.mark.parametrize("alpha", [0.75, 1.0])
def test_coefficients_by_definition(kind: str, lengths: list[int], alpha: float) -> None:
    expected = by_definition(kind, lengths, 50.0, alpha)
    assert coefficients(kind, lengths, 50.0, alpha) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_supervised_gives_nothing_and_no_division_by_zero(kind: str) -> None:
    assert coefficients(kind, [0, 0]) == [0.0, 0.0]
    assert coefficients(kind, []) == []


def test_delta_l_is_as_unbiased_as_the_constant_and_less_noisy() -> None:
    """Gradients of a token sum with mean µ and Var(g_i) = V·L_i: Σ c_i = 1/C for both, and E of the estimate is µ/C."""
    draw = random.Random(0)
    lengths = [4, 4, 8, 32, 96, 200]
    estimates: dict[str, list[float]] = {"constant": [], "delta_l": [], "sequence_mean": []}
    for _ in range(20_000):
        gradients = [2.0 + draw.gauss(0.0, 1.0) * length**0.5 for length in lengths]
        for kind, values in estimates.items():
            values.append(sum(c * g for c, g in zip(coefficients(kind, lengths), gradients, strict=True)))
    for kind in ("constant", "delta_l"):
        assert sum(coefficients(kind, lengths)) == pytest.approx(1 / 50)
        assert sum(estimates[kind]) / 20_000 == pytest.approx(2.0 / 50, rel=0.05)
    variance = {kind: sum((v - 0.04) ** 2 for v in estimates[kind]) / 20_000 for kind in ("constant", "delta_l")}
    exact = {kind: sum(c * c * n for c, n in zip(coefficients(kind, lengths), lengths)) for kind in variance}
    assert variance == pytest.approx(exact, rel=0.05)
    least = 1 / sum(1 / n for n in lengths) / 50**2  # Cauchy–Schwarz, over all c with Σ c = 1/C
    assert exact["delta_l"] == pytest.approx(least, rel=1e-12)
    assert exact["constant"] > 3 * exact["delta_l"]
    assert coefficients("delta_l", lengths, alpha=0.0) == pytest.approx(coefficients("constant", lengths))


def test_statistics_of_a_rank_would_be_biased() -> None:
    """Why every coefficient needs the global batch: shares of two ranks, averaged, are something else."""
    lengths = [2, 4, 50, 90]
    for kind in ("token_mean", "delta_l"):
        halves = [c / 2 for half in (lengths[:2], lengths[2:]) for c in coefficients(kind, half)]
        assert halves != pytest.approx(coefficients(kind, lengths), rel=0.1)
