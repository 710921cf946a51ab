"""GRPO: advantages against NumPy, the clipped surrogate against its definition, and its gradient in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.errors import DataError
from distill.methods import Source, Targets, build_method
from distill.methods.base import BatchFacts, SequenceFacts
from distill.methods.grpo import GrpoConfig, advantages, clipped_losses, k3_estimate

pytestmark = pytest.mark.unit


def facts(verdicts: Sequence[Sequence[float | None]]) -> BatchFacts:
    """A global batch: one inner list of verdicts per prompt."""
    flat = [(group, verdict) for group, members in enumerate(verdicts) for verdict in members]
    return BatchFacts([SequenceFacts(i, g, Source.STUDENT, 4, 4, v) for i, (g, v) in enumerate(flat)])


def test_advantages_are_standardised_rewards() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0, 0.5]
    expected = (np.array(rewards) - np.mean(rewards)) / (np.std(rewards, ddof=1) + 1e-6)
    assert advantages(rewards, "std") == pytest.approx(expected.tolist())
    assert advantages(rewards, "none") == pytest.approx((np.array(rewards) - np.mean(rewards)).tolist())


@pytest.mark.parametrize("rewards", [[0.0] * 4, [1.0] * 4, [0.1] * 7, [1.0]])
def test_equal_rewards_have_no_advantage(rewards: list[float]) -> None:
    assert advantages(rewards, "std") == [0.0] * len(rewards)
    assert advantages(rewards, "none") == [0.0] * len(rewards)


def test_groups_are_compared_within_themselves() -> None:
    weights = build_method({"name": "grpo"}).weigh(facts([[1, 0, 0, 0], [1, 1], [1]]))
    found = [weight.advantage for weight in weights]
    assert found[:4] == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert found[4:] == [0.0, 0.0, 0.0]
    assert [weight.weight for weight in weights] == [1.0] * 7
    assert list(build_method({"name": "grpo"}).weigh(facts([]))) == []


def test_data_without_answers_are_refused_on_every_rank() -> None:
    with pytest.raises(DataError, match="sample 1 has no answer") as caught:
        build_method({"name": "grpo"}).weigh(facts([[1.0, None]]))
    assert caught.value.on_every_rank


def test_fresh_rollouts_give_the_policy_gradient(
    make_targets: Callable[..., Targets], check_against: Callable[..., None]
) -> None:
    """Ratio 1: the value is −Â, the gradient −Â·∇log q."""
    example = make_targets(40)
    at = (torch.arange(40), example.token_ids)
    example = make_targets(40, behaviour_logprobs=example.student_logits.detach().log_softmax(-1)[at])
    assert example.advantages is not None
    advantage = example.advantages.double()

    def oracle(student: Tensor) -> Tensor:
        logq = student.log_softmax(-1)[at]
        return -advantage * (1.0 + logq - logq.detach())

    check_against(build_method({"name": "grpo"}), example, oracle)


@pytest.mark.parametrize("dual", [None, 3.0])
def test_stale_rollouts_are_clipped(
    dual: float | None, make_targets: Callable[..., Targets], check_against: Callable[..., None]
) -> None:
    """All four branches: r above and below the band, for either sign of the advantage."""
    shift = torch.tensor([-2.0, -0.5, 0.0, 0.1, 0.5, 2.0, 0.3]).repeat(4)
    sign = torch.tensor([1.0, -1.0]).repeat_interleave(14)
    example = make_targets(28)
    at = (torch.arange(28), example.token_ids)
    behaviour = example.student_logits.detach().log_softmax(-1)[at] - shift
    reference = make_targets(28).reference_logits
    assert reference is not None
    example = make_targets(28, behaviour_logprobs=behaviour, advantages=sign)

    def oracle(student: Tensor) -> Tensor:
        logq = student.log_softmax(-1)[at]
        r, a = (logq - behaviour.double()).exp(), sign.double()
        surrogate = torch.minimum(r * a, r.clamp(0.8, 1.3) * a)
        if dual is not None:
            surrogate = torch.where(a < 0, torch.maximum(surrogate, dual * a), surrogate)
        u = reference.double()[:, :].log_softmax(-1)[at] - logq
        return -surrogate + 0.04 * (u.exp() - 1 - u)

    options = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": dual, "kl": 0.04}
    method = build_method({"name": "grpo", **options})
    check_against(method, example, oracle, tolerance=2e-5)
    clipped = method.token_losses(example).stats["clipped"].bool()
    outside = ((sign > 0) & (shift > 0.27)) | ((sign < 0) & (shift < -0.23))
    assert torch.equal(clipped, outside | ((sign < 0) & (shift > 1.1)) if dual else outside)


def test_text_without_behaviour_counts_as_fresh() -> None:
    advantage = torch.tensor([1.0, -1.0])
    for behaviour in (None, torch.full((2,), torch.nan)):
        logprob = torch.tensor([-1.0, -2.0], requires_grad=True)
        loss, stats = clipped_losses(logprob, behaviour, advantage, GrpoConfig())
        assert loss.tolist() == [-1.0, 1.0]
        assert stats["ratio"].tolist() == [1.0, 1.0]
        loss.sum().backward()
        assert torch.equal(logprob.grad, -advantage)  # type: ignore[arg-type]


def test_k3_is_zero_at_the_reference_and_unbiased() -> None:
    q, r = torch.randn(9, dtype=torch.float64).log_softmax(-1), torch.randn(9, dtype=torch.float64).log_softmax(-1)
    assert k3_estimate(q, q).abs().max() == 0
    torch.testing.assert_close((q.exp() * k3_estimate(q, r)).sum(), (q.exp() * (q - r)).sum())


def test_no_advantage_no_gradient(make_targets: Callable[..., Targets]) -> None:
    example = make_targets(advantages=torch.zeros(7))
    build_method({"name": "grpo"}).token_losses(example).loss.sum().backward()
    assert example.student_logits.grad is not None
    assert example.student_logits.grad.abs().max() == 0


def test_needs_and_sources(check_empty: Callable[[Any], None]) -> None:
    plain, tied = build_method({"name": "grpo", "group": 4}), build_method({"name": "grpo", "kl": 0.04})
    assert (plain.needs, tied.needs) == (frozenset(), {"reference"})
    assert (plain.samples_per_prompt, tied.samples_per_prompt) == (4, 8)
    assert plain.uses() == {Source.STUDENT}
    check_empty(plain)
    check_empty(tied)
