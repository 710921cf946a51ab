"""ACE: the factor of each rollout from a loop over its tokens; everything else as in GRPO."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.methods import Targets, build_method

pytestmark = pytest.mark.unit


def factors(example: Targets, alpha: float, clip: float | None, per_length: bool) -> list[float]:
    """The factor of every token's advantage."""
    assert example.reference_logits is not None
    assert example.sequence_index is not None
    assert example.advantages is not None
    log_ratios: dict[int, list[float]] = {}
    for t, (sequence, token) in enumerate(
        zip(example.sequence_index.tolist(), example.token_ids.tolist(), strict=True)
    ):
        q, r = (
            x.detach()[t].double().log_softmax(-1)[token] for x in (example.student_logits, example.reference_logits)
        )
        log_ratios.setdefault(sequence, []).append((q - r).item())
    found = []
    for sequence, advantage in zip(example.sequence_index.tolist(), example.advantages.tolist(), strict=True):
        c = sum(log_ratios[sequence]) / (len(log_ratios[sequence]) if per_length else 1)
        c = c if clip is None else min(max(c, -clip), clip)
        found.append(1 + alpha * math.log1p(math.exp(c)) if advantage < 0 else 1.0)
    return found


@pytest.mark.parametrize(("alpha", "clip", "per_length"), [(1.0, None, False), (0.5, 2.0, False), (2.0, None, True)])
def test_loss_and_gradient(
    alpha: float,
    clip: float | None,
    per_length: bool,
    make_targets: Callable[..., Targets],
    check_against: Callable[..., None],
) -> None:
    sequences = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    advantages = torch.tensor([0.9, -1.2, -0.4])[sequences]
    example = make_targets(9, sequence_index=sequences, advantages=advantages)
    scaled = torch.tensor(factors(example, alpha, clip, per_length), dtype=torch.float64) * advantages
    assert scaled[0] == pytest.approx(0.9)

    def oracle(student: Tensor) -> Tensor:
        logq = student.log_softmax(-1)[torch.arange(9), example.token_ids]
        return -scaled * (1.0 + logq - logq.detach())  # c carries no gradient

    options = {"alpha": alpha, "c_clip": clip, "per_length": per_length}
    check_against(build_method({"name": "ace", **options}), example, oracle)


def test_without_alpha_it_is_grpo(make_targets: Callable[..., Targets]) -> None:
    ace, grpo = build_method({"name": "ace", "alpha": 0.0}), build_method({"name": "grpo"})
    expected = grpo.token_losses(make_targets(reference_logits=None)).loss
    assert torch.equal(ace.token_losses(make_targets()).loss, expected)


def test_a_policy_at_its_reference_has_the_same_factor_everywhere(make_targets: Callable[..., Targets]) -> None:
    same = make_targets().student_logits.detach().clone()
    losses = build_method({"name": "ace"}).token_losses(make_targets(reference_logits=same))
    expected = torch.where(torch.arange(7) >= 3, 0.7 * (1 + math.log(2)), -1.3)
    torch.testing.assert_close(losses.loss.detach(), expected)


def test_the_reference_is_always_needed(check_empty: Callable[[Any], None]) -> None:
    method = build_method({"name": "ace", "group": 4})
    assert method.needs == {"reference"}
    assert method.samples_per_prompt == 4
    check_empty(method)
