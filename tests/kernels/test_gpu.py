"""What only a GPU can show: 64-bit indexing, fp32 products, graph capture by Inductor, memory, determinism."""

import pytest
import torch
from distill.kernels import divergence, divergence_oracle, linear_divergence, token_nll
from distill.kernels.bench_memory import peak_above

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GIB = 2**30


def needs(gib: float) -> None:
    if torch.cuda.mem_get_info()[0] < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free device memory")


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_more_than_two_to_the_31_elements(kind):
    needs(20)
    n, v = 16400, 131072
    assert n * v > 2**31
    student = torch.empty(n, v, dtype=torch.bfloat16, device="cuda").normal_()
    teacher = torch.empty_like(student).normal_()
    student.requires_grad_()
    out = divergence(student, teacher, kind, stats=True, top_k=4)
    out.loss.sum().backward()
    last = student.detach()[-2:].clone().requires_grad_()
    loss, stats = divergence_oracle(last, teacher[-2:], kind, top_k=4)
    loss.sum().backward()
    torch.testing.assert_close(out.loss[-2:].double(), loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(student.grad[-2:], last.grad, rtol=2**-7, atol=1e-9)
    torch.testing.assert_close(
        out.stats["student_topk_entropy"][-2:].double(), stats["student_topk_entropy"], rtol=1e-4, atol=0
    )
    nll = token_nll(student.detach(), torch.full((n,), v - 1, device="cuda"))
    expected = -last.detach().double().log_softmax(-1)[:, -1]
    torch.testing.assert_close(nll.loss[-2:].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("gradient", ["recompute", "forward"])
def test_bf16_products_keep_fp32_logits(gradient):
    torch.manual_seed(0)
    hidden = torch.randn(300, 256, device="cuda").bfloat16().requires_grad_()
    head = (torch.randn(5000, 256, device="cuda") / 10).bfloat16().requires_grad_()
    teacher = (head.detach().float() + 0.002 * torch.randn(5000, 256, device="cuda")).bfloat16()
    bias = torch.randn(5000, device="cuda").bfloat16().requires_grad_()
    out = linear_divergence(
        hidden, head, hidden.detach(), teacher, student_bias=bias, teacher_bias=bias.detach(), gradient=gradient,
        budget_bytes=8 * 5000 * 64,
    )  # fmt: skip
    out.loss.mean().backward()
    leaves = [x.detach().double().requires_grad_() for x in (hidden, head, bias)]
    logits = hidden.detach().double() @ teacher.double().t() + bias.detach().double()
    loss, _ = divergence_oracle(leaves[0] @ leaves[1].t() + leaves[2], logits)
    loss.mean().backward()
    assert out.path == "triton"
    torch.testing.assert_close(out.loss.double(), loss, rtol=5e-3, atol=1e-6)
    for got, want in zip((hidden, head, bias), leaves, strict=True):
        assert (got.grad.double() - want.grad).norm() < 1e-2 * want.grad.norm()


def test_inductor_captures_the_whole_graph():
    student = torch.randn(64, 1000, device="cuda", requires_grad=True)
    teacher = torch.randn(64, 1000, device="cuda")

    def loss(x: torch.Tensor) -> torch.Tensor:
        return divergence(x * 1.5, teacher, "jsd", stats=True).loss.mean()

    (expected,) = torch.autograd.grad(loss(student), student)
    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(student), student)
    torch.testing.assert_close(actual, expected)


def test_two_runs_are_equal_to_the_bit():
    student = torch.randn(512, 32000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(512, 32000, device="cuda", dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        student.grad = None
        out = divergence(student, teacher, "jsd", stats=True)
        out.loss.mean().backward()
        runs.append((out.loss, student.grad, *out.stats.values()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("gradient", ["recompute", "forward"])
def test_fused_linear_memory_at_real_size(gradient):
    needs(20)
    n, v, h = 8192, 128256, 4096
    hidden, other = (torch.randn(n, h, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    head, teacher = (torch.randn(v, h, device="cuda", dtype=torch.bfloat16) / h**0.5 for _ in range(2))
    hidden.requires_grad_()
    head.requires_grad_()
    hidden.grad, head.grad = torch.zeros_like(hidden), torch.zeros_like(head)

    def step() -> None:
        linear_divergence(hidden, head, other, teacher, gradient=gradient).loss.mean().backward()

    step()
    above = peak_above(step, "cuda")
    gradients = (n * h + v * h) * (4 + 2)  # the fp32 sums, and their bf16 copies on the way to .grad
    assert above - gradients < 4 * GIB
