"""`LinearLogits`: token losses from hidden states are those of the logits, whoever uses them, and a few rows exist at a time."""

import pytest
import torch
from distill.kernels import LinearLogits, sampled_reverse_kl, sparse_divergence, token_logprobs, token_nll
from torch.autograd import gradcheck

pytestmark = pytest.mark.unit
N, V, H, K = 11, 37, 5, 4
BUDGET = 2 * 8 * V * 3  # three tokens at a time in fp64


def operands() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, head and bias; token ids, one of them padding; K ids per token and the teacher's log-probabilities there."""
    torch.manual_seed(0)
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((N, H), (V, H), (V,))]
    ids = torch.randint(V, (N,))
    ids[3] = -100
    several = torch.stack([torch.randperm(V)[:K] for _ in range(N)])
    known = torch.randn(N, V, dtype=torch.float64).log_softmax(-1).gather(-1, several)
    return leaves, ids, several, known


USES = {
    "nll": lambda x, ids, several, known: token_nll(x, ids, stats=True, student_scale=0.7, student_softcap=3.0),
    "sparse": lambda x, ids, several, known: sparse_divergence(x, several, known, "jsd", 1.3, stats=True),
    "weighted": lambda x, ids, several, known: token_nll(x, ids.clamp_min(0), torch.arange(N).remainder(3), stats=True),
    "sampled": lambda x, ids, several, known: sampled_reverse_kl(x, ids, known[:, 0]),
}


@pytest.mark.parametrize("use", USES)
def test_equals_the_same_function_of_the_logits(use: str) -> None:
    leaves, *rest = operands()
    hidden, head, bias = leaves
    upstream = torch.rand(N, dtype=torch.float64)
    results = []
    for logits in (hidden @ head.t() + bias, LinearLogits(hidden, head, bias, BUDGET)):
        out = USES[use](logits, *rest)
        grads = torch.autograd.grad((out.loss * upstream).sum(), leaves)
        results.append([out.loss, *out.stats.values(), *grads])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected)


def test_gradcheck_frozen_heads_no_tokens_and_compile() -> None:
    (hidden, head, bias), _, several, _ = operands()

    def logq(*x: torch.Tensor) -> torch.Tensor:
        values, rest = token_logprobs(LinearLogits(*x, BUDGET), several, 1.5, tail=True)
        return values.sum(-1) + rest

    assert gradcheck(logq, (hidden, head, bias))
    frozen = LinearLogits(hidden, head.detach(), None, BUDGET)
    assert torch.autograd.grad(token_nll(frozen, several[:, 0]).loss.sum(), hidden)[0].shape == (N, H)
    assert token_nll(LinearLogits(hidden[:0], head), several[:0, 0]).loss.shape == (0,)
    compiled = torch.compile(logq, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden, head, bias), logq(hidden, head, bias))


def test_bf16_operands_keep_fp32_logits_and_errors_name_the_place() -> None:
    torch.manual_seed(1)
    hidden, head = torch.randn(64, 32).bfloat16(), (torch.randn(500, 32) / 4).bfloat16()
    ids = torch.randint(500, (64,))
    exact = -(hidden.double() @ head.double().t()).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    torch.testing.assert_close(token_nll(LinearLogits(hidden, head), ids).loss.double(), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match=r"hidden states are torch.bfloat16 but its head is torch.float32"):
        token_nll(LinearLogits(hidden, head.float()), ids)
    with pytest.raises(ValueError, match="gather it first"):
        token_nll(LinearLogits(hidden, head.new_empty(0)), ids)
