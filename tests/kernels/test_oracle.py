"""The oracle itself, against numbers worked out by hand and PyTorch's own kl_div."""

import math

import pytest
import torch
import torch.nn.functional as F
from distill.kernels import divergence_oracle

pytestmark = pytest.mark.unit

P, Q = (0.75, 0.25), (0.5, 0.5)


def mean_log(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def mixture(weight):
    return tuple(weight * p + (1 - weight) * q for p, q in zip(P, Q, strict=True))


EXPECTED = [
    ("forward_kl", {}, mean_log(P, Q)),
    ("reverse_kl", {}, mean_log(Q, P)),
    ("jsd", {"beta": 0.25}, 0.25 * mean_log(P, mixture(0.25)) + 0.75 * mean_log(Q, mixture(0.25))),
    ("skew_kl", {"alpha": 0.1}, mean_log(P, mixture(0.1))),
    ("skew_reverse_kl", {"alpha": 0.1}, mean_log(Q, mixture(0.9))),
    ("alpha", {"alpha": 0.5}, 4 * (1 - math.sqrt(0.375) - math.sqrt(0.125))),
    ("tvd", {}, 0.25),
]


@pytest.mark.parametrize(("kind", "kw", "value"), EXPECTED, ids=[e[0] for e in EXPECTED])
def test_two_outcomes_by_hand(kind, kw, value):
    student, teacher = torch.tensor([Q]).log(), torch.tensor([P]).log()
    loss, _ = divergence_oracle(student.double(), teacher.double(), kind, **kw)
    assert loss.item() == pytest.approx(value, abs=1e-7)


def test_forward_kl_is_torchs():
    student, teacher = torch.randn(5, 40, dtype=torch.float64), torch.randn(5, 40, dtype=torch.float64)
    expected = F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(divergence_oracle(student, teacher, temperature=2.0)[0], expected)


def test_statistics_by_hand():
    student, teacher = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.6, 0.1, 0.3]]).log()
    _, stats = divergence_oracle(student, teacher, token_ids=torch.tensor([1]), top_k=2)
    p = 0.6 / 0.9
    assert stats["topk_agreement"].item() == 0.5
    assert stats["top1_agreement"].item() == 1.0
    assert stats["teacher_topk_entropy"].item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-6)
    assert stats["student_logprob"].item() == pytest.approx(math.log(0.3), abs=1e-6)
    assert stats["teacher_max_prob"].item() == pytest.approx(0.6, abs=1e-6)
    assert stats["cross_entropy"].item() == pytest.approx(
        -0.6 * math.log(0.5) - 0.1 * math.log(0.3) - 0.3 * math.log(0.2), abs=1e-6
    )
