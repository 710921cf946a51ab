"""Micro-batches made of random logits, for tests of one method's formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.methods import Targets
from distill.teachers.signals import FullLogits

SHARED = 11  # ids that student, teacher and reference all know


def random_targets(tokens: int = 7, **fields: Any) -> Targets:
    """Logits of widths 11, 13 and 12; the first 3 tokens belong to sequence 0, the rest to sequence 1."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, reference = (
        3 * torch.randn(tokens, width, generator=generator) for width in (SHARED, SHARED + 2, SHARED + 1)
    )
    values: dict[str, Any] = {
        "student_logits": student,
        "teacher_logits": teacher,
        "reference_logits": reference,
        "token_ids": torch.randint(0, SHARED, (tokens,), generator=generator),
        "sequence_index": (torch.arange(tokens) >= 3).long(),
        "advantages": torch.where(torch.arange(tokens) >= 3, -0.7, 1.3),
        "draws": torch.rand(tokens, generator=generator),
    }
    values |= fields
    values["student_logits"].requires_grad_()
    for who in ("student", "teacher", "reference"):
        logits = values.pop(f"{who}_logits")
        values[who] = None if logits is None else FullLogits(logits)
    return Targets(**values)


@pytest.fixture
def make_targets() -> Callable[..., Targets]:
    """``make_targets(tokens, **fields)``: see `random_targets`."""
    return random_targets


@pytest.fixture
def check_against() -> Callable[..., None]:
    """Compares a method's loss and gradient with an fp64 oracle: a differentiable function of the student's logits."""

    def check(method: Any, example: Targets, oracle: Callable[[Tensor], Tensor], tolerance: float = 1e-5) -> None:
        exact = example.student_logits.detach().double().requires_grad_()
        expected = oracle(exact)
        losses = method.token_losses(example)
        torch.testing.assert_close(losses.loss.detach().double(), expected.detach(), rtol=tolerance, atol=tolerance)
        scale = torch.linspace(0.5, 1.5, len(example.token_ids))  # tokens must not be mixed up
        (losses.loss * scale).sum().backward()
        (expected * scale.double()).sum().backward()
        assert example.student_logits.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(example.student_logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)
        for name, figure in losses.stats.items():
            assert figure.shape == losses.loss.shape, name
            assert not figure.requires_grad, name
            assert figure.isfinite().all(), name

    return check


@pytest.fixture
def check_empty() -> Callable[[Any], None]:
    """A micro-batch without targets: no loss, no figures, and a backward pass all the same."""

    def check(method: Any) -> None:
        example = random_targets(0)
        losses = method.token_losses(example)
        assert losses.loss.shape == (0,)
        assert all(figure.shape == (0,) for figure in losses.stats.values())
        (losses.loss.sum() + 0.0 * example.student_logits.sum()).backward()
        one = method.token_losses(random_targets(1))
        assert one.loss.shape == (1,)
        assert one.loss.isfinite().all()

    return check
