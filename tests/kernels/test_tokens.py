"""Token log-probabilities, their loss, sparse teachers and the policy-gradient form."""

import pytest
import torch
import torch.nn.functional as F
from distill.kernels import (
    KINDS,
    divergence,
    divergence_oracle,
    sampled_reverse_kl,
    sparse_divergence,
    token_logprobs,
    token_nll,
)
from torch.autograd import gradcheck

pytestmark = pytest.mark.unit


def example(v=50, k=3):
    torch.manual_seed(0)
    x = torch.randn(2, 5, v, dtype=torch.float64, requires_grad=True)
    ids = torch.stack([torch.randperm(v)[:k] for _ in range(10)]).view(2, 5, k)
    ids[0, 0, 2] = -1
    return x, ids


def test_token_nll_is_cross_entropy():
    x, ids = example()
    targets, weights = ids[..., 0].clone(), torch.rand(2, 5, dtype=torch.float64)
    targets[1, 1], weights[1, 2] = -100, 0
    out = token_nll(x, targets, weights, 2.0, stats=True)
    expected = F.cross_entropy((x / 2).view(-1, 50), targets.view(-1), reduction="none", ignore_index=-100).view(2, 5)
    torch.testing.assert_close(out.loss, expected * weights)
    (grad,) = torch.autograd.grad(out.loss.sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad((expected * weights).sum(), x)[0])
    live = (targets >= 0) & (weights != 0)
    logq = (x.detach() / 2).log_softmax(-1)
    torch.testing.assert_close(out.stats["student_entropy"][live], (-logq.exp() * logq).sum(-1)[live].float())
    torch.testing.assert_close(out.stats["student_max_prob"][live], logq.amax(-1).exp()[live].float())
    assert torch.equal(out.stats["top1_agreement"][live], (logq.argmax(-1) == targets)[live].float())
    assert token_nll(x, logq.argmax(-1), stats=True).stats["top1_agreement"].min() == 1
    assert gradcheck(lambda y: token_nll(y, targets, student_softcap=3.0, student_scale=0.5).loss, (x,))


def test_token_logprobs_and_tail():
    x, ids = example()
    values, tail = token_logprobs(x, ids, 1.5, tail=True)
    logq = (x.detach() / 1.5).log_softmax(-1)
    expected = logq.gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, 0.0)
    torch.testing.assert_close(values.detach(), expected)
    kept = expected.exp().masked_fill(ids < 0, 0.0).sum(-1)
    torch.testing.assert_close(tail.detach().exp(), 1 - kept)
    assert gradcheck(lambda y: token_logprobs(y, ids, 1.5, tail=True), (x,))
    whole = torch.arange(50).expand(2, 5, 50)
    assert (token_logprobs(x, whole, tail=True)[1] == -torch.inf).all()


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_divergence_is_the_divergence_of_the_coarsened_distributions(kind, tail):
    x, ids = example()
    logp = torch.randn(2, 5, 50, dtype=torch.float64).log_softmax(-1)
    given = logp.gather(-1, ids.clamp_min(0))
    out = sparse_divergence(x, ids, given, kind, tail=tail, stats=True)

    def coarse(full):
        kept = full.gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
        rest = torch.log1p(-kept.exp().sum(-1, keepdim=True))
        return torch.cat((kept, rest), -1) if tail == "bucket" else kept

    expected, stats = divergence_oracle(coarse(x.detach().log_softmax(-1)), coarse(logp), kind)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.stats["forward_kl"].double(), stats["forward_kl"], rtol=1e-5, atol=1e-6)
    assert gradcheck(lambda y: sparse_divergence(y, ids, given, kind, tail=tail).loss, (x,))


def test_sparse_divergence_with_every_id_is_the_full_divergence():
    x, _ = example()
    logp = torch.randn(2, 5, 50, dtype=torch.float64).log_softmax(-1)
    every = torch.arange(50).expand(2, 5, 50)
    for kind in ("forward_kl", "jsd"):
        sparse = sparse_divergence(x, every, logp, kind, temperature=1.0).loss
        torch.testing.assert_close(sparse, divergence(x, logp, kind).loss)


def test_ids_that_the_student_lacks_are_left_over():
    x, ids = example()
    logp = torch.randn(2, 5, 50, dtype=torch.float64).log_softmax(-1).gather(-1, ids.clamp_min(0))
    wider = ids.clone()
    wider[..., 1] = 50
    found = sparse_divergence(x, wider, logp, "forward_kl").loss
    assert found.isfinite().all()
    torch.testing.assert_close(found, sparse_divergence(x, wider.where(wider < 50, -1), logp, "forward_kl").loss)


def test_sparse_divergence_skips_tokens_of_weight_zero():
    x, ids = example()
    x = x.detach().float()
    x[0, 1] = torch.nan
    x.requires_grad_()
    weights = torch.ones(2, 5)
    weights[0, 1] = 0
    out = sparse_divergence(x, ids, torch.full((2, 5, 3), -2.0), weights=weights)
    out.loss.sum().backward()
    assert out.loss[0, 1] == 0
    assert out.loss.isfinite().all()
    assert not x.grad[0, 1].any()


def test_sampled_reverse_kl_is_unbiased():
    """Averaged over y ~ q, value and gradient are those of KL(q‖p): summed exactly over all y, not sampled."""
    torch.manual_seed(0)
    x = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    logp = torch.randn(1, 6, dtype=torch.float64).log_softmax(-1)
    logq = x.detach().log_softmax(-1)
    behaviour = torch.randn(1, 6, dtype=torch.float64).log_softmax(-1)
    reference = divergence(x, logp, "reverse_kl").loss
    (expected,) = torch.autograd.grad(reference.sum(), x)
    rows, ids = x.expand(6, 6), torch.arange(6)
    on_policy = sampled_reverse_kl(rows, ids, logp[0], weights=logq.exp()[0]).loss.sum()
    off = sampled_reverse_kl(rows, ids, logp[0], weights=behaviour.exp()[0], behaviour_logprobs=behaviour[0]).loss.sum()
    for value in (on_policy, off):
        torch.testing.assert_close(value, reference.sum())
        torch.testing.assert_close(torch.autograd.grad(value, x, retain_graph=True)[0], expected)


def test_importance_ratios_are_bounded():
    x, ids = example()
    out = sampled_reverse_kl(
        x, ids[..., 0], torch.zeros(2, 5), behaviour_logprobs=torch.full((2, 5), -20.0), max_ratio=2.0
    )
    assert out.stats["importance_ratio"].max() == 2.0


def test_errors_name_the_shapes():
    x, ids = example()
    with pytest.raises(ValueError, match=r"'drop'.*bucket, renormalise"):
        sparse_divergence(x, ids, torch.zeros(2, 5, 3), tail="drop")
    with pytest.raises(ValueError, match=r"\(2, 5, 3\) and teacher_logprobs \(2, 5, 2\)"):
        sparse_divergence(x, ids, torch.zeros(2, 5, 2))
    with pytest.raises(ValueError, match=r"\(2, 5\) \+ \(K,\), got \(3, 3\)"):
        token_logprobs(x, ids.view(-1, 3)[:3])
