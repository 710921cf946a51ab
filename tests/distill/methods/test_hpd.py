"""HPD's loss token by token in fp64, and the second token that it draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.methods import Targets, build_method
from distill.methods.hpd import draw_tokens, hpd_losses

pytestmark = pytest.mark.unit


def coefficients(q: list[float], p: list[float], y: int, second: int) -> tuple[float, float]:
    """A and Â of one position, as the paper's code defines them."""
    k = (math.log(p[y]) - math.log(q[y])) * q[y]
    k_hat = (math.log(p[second]) - math.log(q[second])) * q[second]
    pull = k + p[y] if k > 0 else k
    if k > 0 and k_hat < 0:
        pull += p[y]
    return pull, k_hat if k_hat < 0 and second != y else 0.0


def oracle(teacher: Tensor, ids: Tensor, second: Tensor) -> Callable[[Tensor], Tensor]:
    p = teacher[:, :11].double().softmax(-1).tolist()

    def loss(student: Tensor) -> Tensor:
        logq, rows = student.log_softmax(-1), []
        for t, (y, other) in enumerate(zip(ids.tolist(), second.tolist(), strict=True)):
            pull, push = coefficients(logq[t].exp().tolist(), p[t], y, other)
            rows.append(-pull * logq[t, y] - push * logq[t, other])
        return torch.stack(rows)

    return loss


def test_greedy_second_token(make_targets: Callable[..., Targets], check_against: Callable[..., None]) -> None:
    example = make_targets(60)
    assert example.teacher_logits is not None
    second = example.student_logits.argmax(-1)
    assert (second == example.token_ids).any()
    method = build_method({"name": "hpd", "second": "greedy"})
    check_against(method, example, oracle(example.teacher_logits, example.token_ids, second))


def test_sampled_second_token(make_targets: Callable[..., Targets], check_against: Callable[..., None]) -> None:
    example = make_targets(60)
    assert example.teacher_logits is not None
    assert example.draws is not None
    cumulative = example.student_logits.detach().double().softmax(-1).cumsum(-1)
    second = (cumulative <= example.draws.double()[:, None]).sum(-1)
    method = build_method({"name": "hpd"})
    assert method.draws
    check_against(method, example, oracle(example.teacher_logits, example.token_ids, second))


def test_draws_follow_the_students_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    drawn = draw_tokens(logits.expand(20_000, 5), uniform)
    shares = torch.bincount(drawn, minlength=5) / 20_000
    torch.testing.assert_close(shares, logits.softmax(-1), atol=1e-4, rtol=0.0)
    edge = draw_tokens(torch.tensor([[-torch.inf, 0.0, -torch.inf]] * 2), torch.tensor([0.0, 1.0 - 2.0**-24]))
    assert edge.tolist() == [1, 1], "an id of probability 0 must not be drawn"


def test_teacher_equal_to_student_has_neither_loss_nor_gradient(make_targets: Callable[..., Targets]) -> None:
    same = make_targets().student_logits.detach().clone()
    example = make_targets(teacher_logits=same)
    losses = build_method({"name": "hpd"}).token_losses(example)
    losses.loss.sum().backward()
    assert losses.loss.abs().max() == 0
    assert example.student_logits.grad is not None
    assert example.student_logits.grad.abs().max() == 0


def test_a_token_that_only_one_side_knows_is_left_out(make_targets: Callable[..., Targets]) -> None:
    example = make_targets()
    assert example.teacher_logits is not None
    ids = example.token_ids.clone()
    narrow = example.teacher_logits[:, :9]
    ids[2] = 10
    losses = build_method({"name": "hpd"}).token_losses(
        make_targets(teacher_logits=narrow, token_ids=ids.clamp_max(10), student_logits=example.student_logits.detach())
    )
    assert losses.loss[ids >= 9].abs().max() == 0
    assert losses.loss.isfinite().all()
    inside = ids < 9
    again = hpd_losses(example.student_logits[:, :9], narrow, ids, torch.zeros_like(ids))
    assert again.loss[inside].abs().min() > 0


def test_equal_tokens_have_no_push(make_targets: Callable[..., Targets]) -> None:
    example = make_targets()
    assert example.teacher_logits is not None
    losses = hpd_losses(example.student_logits, example.teacher_logits[:, :11], example.token_ids, example.token_ids)
    assert losses.stats["hpd_push_active"].sum() == 0
    assert losses.stats["hpd_second_differs"].sum() == 0


def test_no_targets(check_empty: Callable[[Any], None]) -> None:
    for second in ("sampled", "greedy"):
        check_empty(build_method({"name": "hpd", "second": second}))
