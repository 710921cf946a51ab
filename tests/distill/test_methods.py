"""Each method's formula against a few lines of fp64, and what text it asks for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.config import load_config
from distill.errors import ConfigError
from distill.methods import METHODS, Source, Targets, build_method
from distill.teachers.signals import FullLogits

pytestmark = pytest.mark.unit


def targets() -> Targets:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, width, generator=generator) for width in (11, 13))
    return Targets(
        FullLogits(student.requires_grad_()), FullLogits(teacher), torch.randint(0, 11, (7,), generator=generator)
    )


def distributions(example: Targets, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Teacher p and student q over the shared vocabulary, fp64."""
    assert example.teacher_logits is not None
    p = (example.teacher_logits[:, :11].double() / temperature).softmax(-1)
    return p, (example.student_logits.detach().double() / temperature).softmax(-1)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a.log() - b.log())).sum(-1)


def check(values: dict[str, object], expected: Tensor) -> None:
    example = targets()
    losses = build_method(values).token_losses(example)
    torch.testing.assert_close(losses.loss.double(), expected, rtol=1e-5, atol=1e-6)
    losses.loss.sum().backward()
    assert example.student_logits.grad is not None
    assert example.student_logits.grad.abs().sum() > 0
    for name, figure in losses.stats.items():
        assert figure.shape == (7,), name
        assert not figure.requires_grad, name


def test_sft_is_cross_entropy() -> None:
    example = targets()
    expected = torch.nn.functional.cross_entropy(
        example.student_logits.detach().double(), example.token_ids, reduction="none"
    )
    check({"name": "sft"}, expected)


def test_off_policy_is_forward_kl_of_teacher_and_student() -> None:
    p, q = distributions(targets(), 2.0)
    check({"name": "off_policy", "divergence": {"temperature": 2.0}}, kl(p, q))


def test_on_policy_is_reverse_kl() -> None:
    p, q = distributions(targets())
    check({"name": "on_policy"}, kl(q, p))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_gkd_is_the_generalised_jsd(beta: float) -> None:
    p, q = distributions(targets())
    m = beta * p + (1 - beta) * q
    expected = {0.0: kl(p, q), 1.0: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))
    check({"name": "gkd", "divergence": {"kind": "jsd", "beta": beta}}, expected)


def test_gkd_mixes_by_sample_number_alone() -> None:
    method = build_method({"name": "gkd", "lambda_": 0.3, "text": "teacher"})
    sources = [method.source(sample, 5) for sample in range(4000)]
    assert set(sources) == {Source.STUDENT, Source.TEACHER} == method.uses()
    assert sources.count(Source.STUDENT) / 4000 == pytest.approx(0.3, abs=0.03)
    assert sources == [method.source(sample, 5) for sample in range(4000)]
    assert sources != [method.source(sample, 6) for sample in range(4000)]
    assert build_method({"name": "gkd", "lambda_": 0.0}).uses() == {Source.REFERENCE}
    assert build_method({"name": "gkd", "lambda_": 1.0}).uses() == {Source.STUDENT}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_yaml_whose_keys_are_its_options(name: str) -> None:
    method = build_method(load_config("config", [f"method={name}"]).method)
    assert isinstance(method, METHODS[name])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "gkdd"}, "did you mean 'gkd'"),
        ({"name": "gkd", "lamda_": 1}, "did you mean 'lambda_'"),
        ({"name": "gkd", "lambda_": 1.5}, "method.lambda_=1.5"),
        ({"name": "sft", "text": "student"}, "reference, teacher"),
        ({"name": "off_policy", "divergence": {"kind": "kl"}}, "forward_kl"),
        ({"name": "off_policy", "divergence": {"temperature": 0}}, "method.divergence.temperature=0"),
    ],
)
def test_wrong_options_are_named(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_method(values)
