"""AKL's weights by a loop over sorted probabilities, its loss and gradient in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.methods import Targets, build_method
from distill.methods.akl import head_share

pytestmark = pytest.mark.unit


def weight(p: list[float], q: list[float], mu: float) -> float:
    """The head's share of Σ|p − q|, id by id."""
    cumulative, head, total = 0.0, 0.0, 0.0
    for rank, k in enumerate(sorted(range(len(p)), key=lambda k: -p[k])):
        cumulative += p[k]
        gap = abs(p[k] - q[k])
        total += gap
        head += gap if rank == 0 or cumulative <= mu else 0.0
    return head / total if total else 0.5


def oracle(teacher: Tensor, mu: float, temperature: float) -> Callable[[Tensor], Tensor]:
    logp = (teacher[:, :11].double() / temperature).log_softmax(-1)

    def loss(student: Tensor) -> Tensor:
        logq = (student / temperature).log_softmax(-1)
        pairs = zip(logp.exp().tolist(), logq.exp().tolist(), strict=True)
        h = torch.tensor([weight(p, q, mu) for p, q in pairs], dtype=torch.float64)
        return h * (logp.exp() * (logp - logq)).sum(-1) + (1 - h) * (logq.exp() * (logq - logp)).sum(-1)

    return loss


@pytest.mark.parametrize(("mu", "temperature"), [(0.5, 1.0), (0.9, 2.0), (0.0, 1.0), (0.2, 0.5)])
def test_loss_and_gradient(
    mu: float, temperature: float, make_targets: Callable[..., Targets], check_against: Callable[..., None]
) -> None:
    method = build_method({"name": "akl", "mu": mu, "temperature": temperature})
    example = make_targets(40)
    assert example.teacher_logits is not None
    check_against(method, example, oracle(example.teacher_logits, mu, temperature))


def test_a_sure_teacher_has_a_head_of_one_id() -> None:
    """p_1 = 0.9 > μ: the first id is the head although it alone exceeds μ."""
    p, q = torch.tensor([[0.9, 0.07, 0.03]]), torch.tensor([[0.5, 0.3, 0.2]])
    expected = 0.4 / (0.4 + 0.23 + 0.17)
    assert head_share(q.log(), p.log(), 0.5, 1.0).item() == pytest.approx(expected, rel=1e-5)


def test_a_head_of_everything_is_forward_kl(make_targets: Callable[..., Targets]) -> None:
    losses = build_method({"name": "akl", "mu": 1.0}).token_losses(make_targets(40))
    torch.testing.assert_close(losses.loss, build_method({"name": "off_policy"}).token_losses(make_targets(40)).loss)


def test_teacher_equal_to_student_has_neither_loss_nor_gradient(make_targets: Callable[..., Targets]) -> None:
    example = make_targets()
    same: Any = example.student_logits.detach().clone()
    example = make_targets(teacher_logits=same)
    losses = build_method({"name": "akl"}).token_losses(example)
    losses.loss.sum().backward()
    assert losses.loss.abs().max() == 0
    assert example.student_logits.grad is not None
    assert example.student_logits.grad.abs().max() == 0
    assert losses.stats["akl_forward_weight"].tolist() == [0.5] * 7


def test_long_batches_are_cut_into_chunks(
    monkeypatch: pytest.MonkeyPatch, make_targets: Callable[..., Targets]
) -> None:
    example = make_targets(50)
    assert example.teacher_logits is not None
    whole = head_share(example.student_logits, example.teacher_logits, 0.5, 1.0)
    monkeypatch.setattr("distill.methods.parts.ROW_BUDGET", 35)
    torch.testing.assert_close(head_share(example.student_logits, example.teacher_logits, 0.5, 1.0), whole)


def test_no_targets(check_empty: Callable[[Any], None]) -> None:
    check_empty(build_method({"name": "akl"}))
