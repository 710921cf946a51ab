"""G-OPD: the interpolated and extrapolated target in fp64, its optimum, and the two forms against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.methods import Source, Targets, build_method
from distill.methods.gopd import extrapolated

pytestmark = pytest.mark.unit


def log_target(example: Targets, lambda_: float) -> Tensor:
    """log of p^λ·r^(1−λ), normalised, fp64."""
    assert example.teacher_logits is not None
    assert example.reference_logits is not None
    p, r = (x[:, :11].double().softmax(-1) for x in (example.teacher_logits, example.reference_logits))
    unnormalised = p**lambda_ * r ** (1 - lambda_)
    return (unnormalised / unnormalised.sum(-1, keepdim=True)).log()


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0, 1.25])
def test_full_form(lambda_: float, make_targets: Callable[..., Targets], check_against: Callable[..., None]) -> None:
    example = make_targets()
    target = log_target(example, lambda_)

    def oracle(student: Tensor) -> Tensor:
        logq = student.log_softmax(-1)
        return (logq.exp() * (logq - target)).sum(-1)

    check_against(build_method({"name": "gopd", "lambda_": lambda_}), example, oracle)


@pytest.mark.parametrize("behaviour", [False, True])
def test_sampled_form(
    behaviour: bool, make_targets: Callable[..., Targets], check_against: Callable[..., None]
) -> None:
    """Loss r·(log q − 1.25·log p + 0.25·log r), gradient that times ∇log q; r from the rollout's own log-probabilities."""
    example = make_targets(behaviour_logprobs=torch.linspace(-3, -1, 7) if behaviour else None)
    assert example.teacher_logits is not None
    assert example.reference_logits is not None
    at = (torch.arange(7), example.token_ids)
    logp, logr = (x.double().log_softmax(-1)[at] for x in (example.teacher_logits, example.reference_logits))

    def oracle(student: Tensor) -> Tensor:
        logq = student.log_softmax(-1)[at]
        cost = (logq - 1.25 * logp + 0.25 * logr).detach()
        ratio = 1.0 if example.behaviour_logprobs is None else (logq.detach() - example.behaviour_logprobs).exp()
        return ratio * cost * (1.0 + logq - logq.detach())

    check_against(build_method({"name": "gopd", "form": "sampled"}), example, oracle)


def test_lambda_one_is_plain_on_policy_distillation(make_targets: Callable[..., Targets]) -> None:
    method, plain = build_method({"name": "gopd", "lambda_": 1.0}), build_method({"name": "on_policy"})
    assert method.needs == {"teacher"}
    example, other = make_targets(reference_logits=None), make_targets()
    losses, expected = method.token_losses(example), plain.token_losses(other)
    assert torch.equal(losses.loss, expected.loss)
    losses.loss.sum().backward()
    expected.loss.sum().backward()
    assert example.student_logits.grad is not None
    assert other.student_logits.grad is not None
    assert torch.equal(example.student_logits.grad, other.student_logits.grad)


def test_optimum_is_the_product_of_powers(make_targets: Callable[..., Targets]) -> None:
    optimum = log_target(make_targets(), 1.25).float()
    example = make_targets(student_logits=optimum)
    losses = build_method({"name": "gopd"}).token_losses(example)
    losses.loss.sum().backward()
    assert losses.loss.abs().max() < 1e-6
    assert example.student_logits.grad is not None
    assert example.student_logits.grad.abs().max() < 1e-5


@pytest.mark.parametrize("form", ["full", "sampled"])
def test_three_equal_models_have_no_gradient(form: str, make_targets: Callable[..., Targets]) -> None:
    same = make_targets().student_logits.detach().clone()
    example = make_targets(teacher_logits=same, reference_logits=same)
    losses = build_method({"name": "gopd", "form": form}).token_losses(example)
    losses.loss.sum().backward()
    assert losses.loss.abs().max() < 1e-5
    assert example.student_logits.grad is not None
    assert example.student_logits.grad.abs().max() < 1e-5


def test_both_forms_have_the_same_expected_gradient(make_targets: Callable[..., Targets]) -> None:
    """One context, every token in turn, weighed by its probability under the student."""
    context = make_targets(1)
    assert context.teacher_logits is not None
    assert context.reference_logits is not None
    vocabulary = 11
    every = make_targets(
        vocabulary,
        student_logits=context.student_logits.detach().repeat(vocabulary, 1),
        teacher_logits=context.teacher_logits[:, :vocabulary].repeat(vocabulary, 1),
        reference_logits=context.reference_logits[:, :vocabulary].repeat(vocabulary, 1),
        token_ids=torch.arange(vocabulary),
    )
    build_method({"name": "gopd"}).token_losses(context).loss.sum().backward()
    probabilities = context.student_logits.detach().softmax(-1).squeeze(0)
    losses = build_method({"name": "gopd", "form": "sampled"}).token_losses(every)
    (probabilities * losses.loss).sum().backward()
    assert context.student_logits.grad is not None
    assert every.student_logits.grad is not None
    torch.testing.assert_close(
        every.student_logits.grad.sum(0, keepdim=True), context.student_logits.grad, rtol=1e-4, atol=1e-5
    )


def test_an_id_that_one_model_excludes_stays_excluded() -> None:
    teacher, reference = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert extrapolated(teacher, reference, 1.25).tolist() == [[0.0, -torch.inf, -torch.inf]]


def test_sources_and_needs(check_empty: Callable[[Any], None]) -> None:
    for form in ("full", "sampled"):
        method = build_method({"name": "gopd", "form": form})
        assert method.needs == {"teacher", "reference"}
        assert method.uses() == {Source.STUDENT}
        check_empty(method)
