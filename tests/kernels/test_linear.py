"""`linear_divergence`: the same numbers as `divergence` on materialised logits, in bounded memory."""

import subprocess
import sys

import pytest
import torch
from distill.kernels import divergence, divergence_oracle, linear_divergence
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.unit
N, V, H, H_T = 9, 37, 5, 4
BUDGET = 2 * 8 * (V - 2) * 3  # three tokens per chunk in fp64


def operands(dtype=torch.float64):
    torch.manual_seed(0)
    hidden, head, bias = torch.randn(N, H), torch.randn(V, H), torch.randn(V)
    other, teacher_head, teacher_bias = torch.randn(N, H_T), torch.randn(V - 2, H_T), torch.randn(V - 2)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, head, bias)]
    return leaves, [x.to(dtype) for x in (other, teacher_head, teacher_bias)]


WEIGHTS = torch.tensor([1, 0, 0.5, 2, 0, 1, 1, 0.1, 3], dtype=torch.float64)


def run(leaves, teacher, kind="jsd", weights=WEIGHTS, **kw):
    hidden, head, bias = leaves
    return linear_divergence(
        hidden, head, teacher[0], teacher[1], kind, 2.0, weights, student_bias=bias, teacher_bias=teacher[2], **kw
    )


@pytest.mark.parametrize("gradient", ["recompute", "forward"])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "skew_reverse_kl"])
def test_equals_the_divergence_of_the_logits(kind, gradient):
    leaves, teacher = operands()
    ids = torch.arange(N)
    out = run(leaves, teacher, kind, gradient=gradient, budget_bytes=BUDGET, stats=True, token_ids=ids, top_k=3)
    grads = torch.autograd.grad(out.loss.sum() * 0.25, leaves)
    hidden, head, bias = leaves
    logits = (hidden @ head.t() + bias, teacher[0] @ teacher[1].t() + teacher[2])
    dense = divergence(*logits, kind, 2.0, WEIGHTS, stats=True, token_ids=ids, top_k=3)
    torch.testing.assert_close(out.loss, dense.loss)
    for actual, expected in zip(grads, torch.autograd.grad(dense.loss.sum() * 0.25, leaves), strict=True):
        torch.testing.assert_close(actual, expected)
    for name, values in dense.stats.items():
        torch.testing.assert_close(out.stats[name], values, msg=name)


def test_gradcheck_with_any_upstream():
    leaves, teacher = operands()
    assert gradcheck(lambda *x: run(x, teacher, budget_bytes=BUDGET).loss, leaves)
    assert gradcheck(lambda *x: run(x, teacher, budget_bytes=BUDGET, gradient="forward").loss.sum() * 3, leaves)


def test_gradient_in_forward_refuses_different_upstream_gradients():
    leaves, teacher = operands()
    out = run(leaves, teacher, gradient="forward")
    with pytest.raises(ValueError, match=r"one upstream gradient.*weights="):
        (out.loss * torch.arange(N)).sum().backward()
    with pytest.raises(ValueError, match=r"cannot differentiate in the weights"):
        run(leaves, teacher, weights=torch.ones(N, requires_grad=True), gradient="forward")


def test_gradient_in_forward_takes_multiples_of_the_upstream_it_was_told():
    """Unlike weights, `upstream` changes no loss and skips no token."""
    leaves, teacher = operands()
    upstream = torch.linspace(0, 2, N, dtype=torch.float64)
    told = run(leaves, teacher, weights=None, gradient="forward", upstream=upstream, budget_bytes=BUDGET)
    plain = run(leaves, teacher, weights=None)
    torch.testing.assert_close(told.loss, plain.loss)
    found, expected = (torch.autograd.grad((out.loss * upstream).sum() * 3 / 7, leaves) for out in (told, plain))
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    for wrong in (upstream.flip(0), upstream + 1e-6):
        out = run(leaves, teacher, weights=None, gradient="forward", upstream=upstream)
        with pytest.raises(ValueError, match="multiple of upstream="):
            (out.loss * wrong).sum().backward()
    with pytest.raises(ValueError, match=r"upstream= is for gradient='forward' without weights="):
        run(leaves, teacher, gradient="forward", upstream=upstream)


@pytest.mark.parametrize("gradient", ["recompute", "forward"])
def test_frozen_and_tied_heads(gradient):
    leaves, teacher = operands()
    hidden, head, bias = leaves[0], leaves[1].detach(), None
    out = run((hidden, head, bias), teacher, gradient=gradient)
    out.loss.sum().backward()
    assert hidden.grad is not None
    assert head.grad is None
    tied = leaves[1].detach().requires_grad_()
    other = hidden.detach() + 0.1
    loss = linear_divergence(hidden, tied, other, tied, gradient=gradient).loss
    loss.sum().backward()  # the teacher's use of the same matrix is a constant
    reference = tied.detach().clone().requires_grad_()
    divergence(hidden.detach() @ reference.t(), other @ tied.detach().t()).loss.sum().backward()
    torch.testing.assert_close(tied.grad, reference.grad)


@pytest.mark.parametrize("gradient", ["recompute", "forward"])
def test_bf16_operands_keep_fp32_logits(gradient):
    """p ≈ q: logits rounded to bf16 would put tens of per cent into this gradient."""
    torch.manual_seed(1)
    hidden = torch.randn(64, 32).bfloat16().requires_grad_()
    head = (torch.randn(500, 32) / 4).bfloat16().requires_grad_()
    teacher_head = (head.detach().float() + 0.004 * torch.randn(500, 32)).bfloat16()
    out = linear_divergence(hidden, head, hidden.detach(), teacher_head, gradient=gradient)
    out.loss.sum().backward()
    wide = hidden.detach().double()
    leaf, matrix = wide.clone().requires_grad_(), head.detach().double().requires_grad_()
    loss, _ = divergence_oracle(leaf @ matrix.t(), wide @ teacher_head.double().t())
    loss.sum().backward()
    assert loss.mean() < 1e-3
    torch.testing.assert_close(out.loss.double(), loss.detach(), rtol=1e-3, atol=1e-8)
    for actual, expected in ((hidden.grad, leaf.grad), (head.grad, matrix.grad)):
        assert actual.dtype == torch.bfloat16
        assert ((actual.double() - expected).norm() / expected.norm()) < 5e-3


def test_autocast_compile_and_checkpointing_agree_with_eager():
    leaves, teacher = operands(torch.float32)
    weights = WEIGHTS.float()

    def plain(*x):
        return run(x, teacher, weights=weights, gradient="forward").loss

    def grads(function):
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    expected = grads(plain)
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    for function in (compiled, lambda *x: checkpoint(plain, *x, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(grads(function), expected, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        loss = plain(*leaves)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain(*leaves), rtol=0.1, atol=0.02)


def test_no_tokens_and_nothing_valid():
    leaves, teacher = operands()
    out = run(leaves, teacher, weights=torch.zeros(N), stats=True)
    out.loss.sum().backward()
    assert not out.loss.any()
    assert not leaves[1].grad.any()
    none = torch.zeros(0, H, dtype=torch.float64)
    assert linear_divergence(none, leaves[1], none[:, :H_T], teacher[1]).loss.shape == (0,)


def test_errors_name_the_place():
    leaves, teacher = operands()
    with pytest.raises(ValueError, match=r"student_head must be \[V, 5\], got \(0, 5\)|gather it first"):
        run((leaves[0], torch.zeros(0), None), teacher)
    with pytest.raises(TypeError, match=r"student's hidden states are torch.float64 but its head is torch.float32"):
        run((leaves[0], leaves[1].float(), None), teacher)
    with pytest.raises(ValueError, match=r"'backward'.*recompute, forward"):
        run(leaves, teacher, gradient="backward")
    with pytest.raises(ValueError, match=r"teacher_bias must be \[35\]"):
        run(leaves, [*teacher[:2], torch.zeros(3)])


PEAK = """
import torch
from distill.kernels import linear_divergence
from distill.kernels.bench_memory import peak_above

torch.set_num_threads(1)
n, v, h = 512, 50000, 32
hidden, head = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
teacher = torch.randn(v, h)
hidden.grad, head.grad = torch.zeros_like(hidden), torch.zeros_like(head)

def step():
    linear_divergence(hidden, head, hidden.detach(), teacher, gradient=GRADIENT, budget_bytes=2**25).loss.sum().backward()

linear_divergence(hidden[:2], head[:9], hidden[:2].detach(), teacher[:9]).loss.sum().backward()  # loads the libraries
print(peak_above(step))
"""


@pytest.mark.parametrize("gradient", ["recompute", "forward"])
def test_peak_memory_is_the_budget_not_the_logits(gradient):
    """fp32 logits of both models would take 195 MiB, their softmaxes as much again."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK.replace("GRADIENT", repr(gradient))], capture_output=True, text=True, check=True
    )
    peak = int(done.stdout.split()[-1])
    assert (
        2**20 < peak < {"recompute": 90, "forward": 64}[gradient] * 2**20
    )  # the allocator keeps some of what was freed
