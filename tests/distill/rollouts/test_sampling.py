"""Draws against a brute-force fp64 distribution; randomness against an integer reimplementation."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from distill.rollouts.sampling import SamplingParams, draw, seed_keys, uniforms

pytestmark = pytest.mark.unit


def brute_force(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities in plain Python: temperature, then top-k, then top-p on what is left."""
    values = [float(x) / temperature for x in logits]
    ranked = sorted(range(len(values)), key=lambda i: -values[i])
    if top_k:
        ranked = ranked[:top_k]
    weights = [np.exp(values[i] - values[ranked[0]]) for i in ranked]
    weights = [w / sum(weights) for w in weights]
    kept, total = [], 0.0
    for weight in weights:
        kept.append(weight)
        total += weight
        if total >= top_p:
            break
    result = np.zeros(len(values))
    result[ranked[: len(kept)]] = np.array(kept) / sum(kept)
    return result


CASES = [
    (1.0, 0, 1.0),
    (0.6, 0, 1.0),
    (2.5, 0, 1.0),
    (1.0, 5, 1.0),
    (1.0, 0, 0.8),
    (0.7, 0, 0.95),
    (1.3, 7, 0.6),
    (1.0, 999, 1.0),
]


@pytest.mark.parametrize(("vocabulary", "scale"), [(12, 2.0), (200, 2.0), (200, 0.2)])
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CASES)
def test_draw_has_the_exact_distribution(
    vocabulary: int, scale: float, temperature: float, top_k: int, top_p: float
) -> None:
    # A grid of uniforms instead of random ones: counts then differ from N·p by at most 1 per interval.
    count = 40_000
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * scale
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = torch.cat([draw(logits.expand(len(part), -1), params, part)[0] for part in grid.split(5000)])
    expected = brute_force(logits.numpy(), temperature, top_k, top_p)
    got = np.bincount(tokens.numpy(), minlength=vocabulary) / count
    assert np.abs(got - expected).max() < 3 / count + 1e-6
    assert not got[expected == 0].any()


def test_logprobs_are_untempered_log_softmax() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(1)).bfloat16() * 4
    params = SamplingParams(temperature=0.5, top_p=0.9, top_k=10)
    tokens, logprobs = draw(logits, params, torch.rand(50, dtype=torch.float64))
    expected = logits.double().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=0)


def test_greedy_takes_the_largest_logit_and_ignores_truncation() -> None:
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(2))
    tokens, _ = draw(logits, SamplingParams(temperature=0.0, top_p=0.1, top_k=3), None)
    assert torch.equal(tokens, logits.argmax(-1))
    with pytest.raises(ValueError, match="one uniform number per row"):
        draw(logits, SamplingParams(), None)


def test_extreme_uniforms_stay_inside_the_support() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    edge = torch.tensor([0.0, 1.0 - 2.0**-52], dtype=torch.float64)
    for params in (SamplingParams(), SamplingParams(top_p=0.999), SamplingParams(top_k=3)):
        tokens, _ = draw(logits, params, edge)
        assert set(tokens.tolist()) == {1, 2}, params


def test_uniforms_match_plain_integer_arithmetic() -> None:
    mask, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    seeds, positions = [0, 1, -1, 2**63, 12345678901234567890123], [0, 1, 7, 40_000, 2**31]
    expected = [
        [(mix(mix(mix((s + golden) & mask)) ^ mix(((p + 1) * golden) & mask)) >> 12) / 2**52 for p in positions]
        for s in seeds
    ]
    got = uniforms(seed_keys(seeds)[:, None], np.array(positions)[None])
    assert got.tolist() == expected


def test_uniforms_are_uniform_and_independent_across_seeds_and_positions() -> None:
    table = uniforms(seed_keys(range(400))[:, None], np.arange(500)[None])
    assert table.min() >= 0.0
    assert table.max() < 1.0
    bins = np.bincount((table.ravel() * 64).astype(int), minlength=64)
    expected = table.size / 64
    chi_square = ((bins - expected) ** 2 / expected).sum()
    assert 25 < chi_square < 115  # 63 degrees of freedom: about 1e-5 on either side
    centred = table - 0.5
    for other in (
        centred[1:, :] * centred[:-1, :],
        centred[:, 1:] * centred[:, :-1],
        centred[1:, 1:] * centred[:-1, :-1],
    ):
        assert abs(other.mean()) * 12 < 5 / np.sqrt(other.size)  # correlation within 5 standard errors
    assert len(np.unique(table)) == table.size


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("stop", ("",)),
        ("stop", "abc"),
    ],
)
def test_bad_parameters_are_named(field: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=f"sampling: {field} must be .*, not {value!r}".replace("(", r"\(").replace(")", r"\)")
    ):
        SamplingParams(**{field: value})


def test_parameters_are_frozen_and_keep_stop_as_a_tuple() -> None:
    params = SamplingParams(stop=["a"])  # type: ignore[arg-type]
    assert params.stop == ("a",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]
