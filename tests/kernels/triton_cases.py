"""The Triton kernels against the oracle and the torch path. Run by `test_triton.py`, interpreted on CPU or on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton_cases.py       # any machine
    python -m pytest tests/kernels/triton_cases.py                          # with a GPU

A separate process, because TRITON_INTERPRET must be set before triton's decorators run. The interpreter truncates when it
stores bf16 where a GPU rounds, hence one unit in the last place of tolerance there.
"""

import os

import pytest
import torch
from distill.kernels import divergence, linear_divergence, sparse_divergence, token_logprobs, token_nll

from .kernel_cases import IDS, KINDS, logits, oracle

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
V = 2 * 2048 + 3  # two full tiles and a remainder, no multiple of 16


def check(student, teacher, kind, kw, atol=1e-6, grad_rtol=2e-5, **options):
    """Loss, statistics and gradient of the Triton path for fp32-representable inputs."""
    student, teacher = student.to(DEVICE), teacher.to(DEVICE)
    leaf = student.clone().requires_grad_()
    upstream = torch.linspace(0.5, 2, student.shape[0], device=DEVICE)
    out = divergence(leaf, teacher, kind, path="triton", stats=True, **kw, **options)
    (out.loss * upstream).sum().backward()
    loss, stats, grad = oracle(student, teacher, kind, upstream, **kw, **options)
    assert out.path == "triton"
    torch.testing.assert_close(out.loss.double(), loss, rtol=2e-5, atol=atol)
    unit = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(student.dtype, 0.0)
    scale = 1 + (loss.max() if loss.isfinite().all() else 0)
    assert (leaf.grad.double() - grad).norm() <= (grad_rtol + unit) * grad.norm() + 3e-7 * scale
    for name, values in stats.items():
        torch.testing.assert_close(out.stats[name].double(), values, rtol=2e-5, atol=4e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("kind", "kw"), KINDS, ids=IDS)
def test_kinds_and_dtypes(kind, kw, dtype):
    student, teacher = (x.to(dtype) for x in logits("far", 2, V if kw == {} else V - 2048))
    check(student, teacher, kind, {"temperature": 1.5, **kw}, token_ids=torch.tensor([5, -1], device=DEVICE), top_k=5)


@pytest.mark.parametrize("regime", ["close", "peaked", "flat", "ties", "huge", "masked"])
@pytest.mark.parametrize(("kind", "kw"), [KINDS[i] for i in (0, 1, 2, 4, 6)], ids=[IDS[i] for i in (0, 1, 2, 4, 6)])
def test_regimes(kind, kw, regime):
    check(*logits(regime, 2, 700), kind, kw, atol=3e-7 if regime in ("close", "flat") else 2e-5, grad_rtol=3e-4)


def test_mixed_dtypes_and_divisible_vocabulary():
    student, teacher = logits("far", 2, 4096 + 64)
    check(student.bfloat16(), teacher, "jsd", {})


@pytest.mark.parametrize(("kind", "kw"), KINDS, ids=IDS)
def test_equal_inputs_give_exactly_zero(kind, kw):
    teacher = logits("far", 3, V)[1].to(DEVICE)
    leaf = teacher.clone().requires_grad_()
    out = divergence(leaf, teacher, kind, 0.7, path="triton", **kw)
    out.loss.sum().backward()
    assert torch.equal(out.loss, torch.zeros_like(out.loss))
    assert not leaf.grad.any()


def test_excluded_ids_are_infinitely_far():
    student, teacher = torch.zeros(1, 20, device=DEVICE), torch.zeros(1, 20, device=DEVICE)
    student[0, 0] = -torch.inf
    assert divergence(student, teacher, "forward_kl", path="triton").loss.item() == torch.inf
    assert divergence(student, teacher, "reverse_kl", path="triton").loss.item() == pytest.approx(0.05129329, rel=1e-4)
    assert divergence(teacher, student, "reverse_kl", path="triton").loss.item() == torch.inf
    for kind, kw in KINDS[2:]:
        assert divergence(student, teacher, kind, path="triton", **kw).loss.isfinite().all()


def test_nan_logits_are_not_swallowed():
    student, teacher = (x.to(DEVICE) for x in logits("far", 2, 300))
    student[0, 3] = torch.nan
    for kind, kw in KINDS:
        assert divergence(student, teacher, kind, path="triton", **kw).loss.isnan().tolist() == [True, False]


def same_as_torch(student, teacher, kind="jsd", **options):
    """Loss, statistics and gradient of both paths; the student's logits may be a view of a leaf."""
    results = []
    for path in ("torch", "triton"):
        leaf = student.detach().clone().requires_grad_()
        out = divergence(leaf[:, :-1], teacher[:, 1:], kind, path=path, stats=True, **options)
        out.loss.sum().backward()
        results.append((out.loss.detach(), leaf.grad, out.stats))
    (loss, grad, stats), (other_loss, other_grad, other_stats) = results
    torch.testing.assert_close(other_loss, loss, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(other_grad, grad, rtol=1e-4, atol=1e-7)
    for name, values in stats.items():
        torch.testing.assert_close(other_stats[name], values, rtol=2e-5, atol=4e-6, msg=name)


def test_shifted_slices_masks_surplus_ids_softcap_and_scale():
    student, teacher = (x.view(2, 4, 600).to(DEVICE) for x in logits("far", 8, 600))
    student, teacher = torch.cat((student, student[..., :9]), -1), teacher
    weights = torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 1.0]], device=DEVICE)
    student[0, 1] = torch.nan  # weight 0
    options = {"student_softcap": 5.0, "teacher_softcap": 3.0, "student_scale": 0.8, "teacher_scale": 1.2}
    same_as_torch(student, teacher, temperature=1.3, weights=weights, top_k=7, **options)
    same_as_torch(
        student, teacher, "reverse_kl", temperature=1.3, weights=weights, teacher_scale=1.2, student_scale=0.8
    )


def test_one_id_no_tokens_and_in_place():
    for n, v in ((3, 1), (0, 7)):
        leaf = torch.randn(n, v, device=DEVICE, requires_grad=True)
        out = divergence(leaf, torch.randn(n, v, device=DEVICE), "jsd", path="triton", stats=True)
        out.loss.sum().backward()
        assert out.loss.shape == (n,)
        assert not leaf.grad.any()
    student, teacher = (x.to(DEVICE) for x in logits("far", 2, 100))
    leaf = student.clone().requires_grad_()
    hidden = leaf * 1.0
    divergence(hidden, teacher, "jsd", path="triton", inplace=True).loss.sum().backward()
    reference = student.clone().requires_grad_()
    divergence(reference, teacher, "jsd", path="triton").loss.sum().backward()
    assert torch.equal(leaf.grad, reference.grad)
    assert torch.equal(hidden.detach(), reference.grad)


def test_token_functions_agree_with_torch():
    logit = logits("far", 6, V)[0].view(2, 3, V).to(DEVICE)
    ids = torch.stack([torch.randperm(V)[:4] for _ in range(6)]).view(2, 3, 4).to(DEVICE)
    ids[0, 0, 2], ids[1, 1] = -1, -1
    ids[1, 2] = torch.tensor([0, -1, 1, 2])
    valid = torch.tensor([[True, True, False], [True, True, True]], device=DEVICE)
    for softcap in (None, 5.0):
        results = []
        for path in ("torch", "triton"):
            leaf = logit.clone().requires_grad_()
            values, tail = token_logprobs(leaf, ids, 1.5, path, valid=valid, tail=True, student_softcap=softcap)
            (values.sum(-1) * torch.arange(6, device=DEVICE).view(2, 3) + 2 * tail).sum().backward()
            nll = token_nll(leaf, ids[..., 0], path=path, stats=True)
            teacher = values.detach().roll(1, -1)
            sparse = sparse_divergence(leaf, ids, teacher, "jsd", path=path)
            assert nll.path == sparse.path == path
            results.append((values, tail, leaf.grad, nll.loss, *nll.stats.values(), sparse.loss))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=3e-6)


def test_linear_divergence_uses_the_kernels():
    hidden, head = torch.randn(5, 8, device=DEVICE), torch.randn(300, 8, device=DEVICE)
    other, teacher = torch.randn(5, 6, device=DEVICE), torch.randn(310, 6, device=DEVICE)
    results = []
    for path in ("torch", "triton"):
        for gradient in ("recompute", "forward"):
            h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
            budget = 300 * 2 * 4 * 2
            out = linear_divergence(h, w, other, teacher, "jsd", path=path, gradient=gradient, budget_bytes=budget)
            out.loss.sum().backward()
            assert out.path == path
            results.append((out.loss.detach(), h.grad, w.grad))
    for result in results[1:]:
        for expected, actual in zip(results[0], result, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_offsets_beyond_two_to_the_31():
    """Three rows 2³⁰ + 8 elements apart, as N·V > 2³¹ has them; between them lie pages that nobody touches."""
    apart, v = 2**30 + 8, 300
    student, teacher = (x.half().to(DEVICE) for x in logits("far", 3, v))
    storage = torch.empty(2 * apart + v, dtype=torch.float16, device=DEVICE)
    far = storage.as_strided((3, v), (apart, 1))
    far.copy_(student)
    ids = torch.tensor([1, 2, v - 1], device=DEVICE)
    results = []
    for x in (student, far):
        leaf = x.detach().requires_grad_()
        out = divergence(leaf, teacher, "jsd", path="triton", stats=True, top_k=3, token_ids=ids)
        loss = out.loss + token_nll(leaf, ids, path="triton").loss
        results.append((loss, *out.stats.values(), *torch.autograd.grad(loss.sum(), leaf)))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)
