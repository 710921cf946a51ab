"""Log-probabilities of given ids from hidden states and a head: `token_logprobs` without the logits of more than a few tokens.

    logits = LinearLogits(hidden, head, bias)              # no product is formed yet
    token_nll(logits, ids); sparse_divergence(logits, …); sampled_reverse_kl(logits, …); token_logprobs(logits, …)

`LinearLogits` stands for hidden · headᵀ + bias wherever these functions take a student's logits. Tokens go through in chunks under
a byte budget, in fp32; the backward pass forms each chunk's logits again (8·N·H·V FLOPs in all; with the logits kept, 6).

distill::linear_token_logprobs(hidden, head, bias, ids, …) -> (values [N, K + tail], saved [N, 2], stats [n, N])
distill::linear_token_logprobs_backward(A, B, …) -> (∂hidden, ∂head, ∂bias)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import gemm, torch_path
from .kinds import Spec
from .linear_ops import Gradients, buffers, chunks
from .token_ops import coefficients, empty_outputs, token_backend


@dataclass(frozen=True, slots=True)
class LinearLogits:
    """Logits `[..., V]` that are only formed a few rows at a time; differentiable in all three tensors.

    Attributes:
        hidden: `[..., H]`; head: `[V, H]` in the same dtype; bias: `[V]` or None.
        budget_bytes: of fp32 logits and their gradient alive at a time; None as in `linear_divergence`.
    """

    hidden: Tensor
    head: Tensor
    bias: Tensor | None = None
    budget_bytes: int | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.head.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def is_cuda(self) -> bool:
        return self.hidden.is_cuda


@torch.library.custom_op("distill::linear_token_logprobs", mutates_args=())
def linear_token_logprobs_op(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    valid: Tensor | None,
    numbers: Sequence[float],
    tail: bool,
    n_stats: int,
    path: str,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states `[N, H]`, head `[V, H]`, ids `[N, K]`, valid bool `[N]`; see the module for the results."""
    spec = Spec.from_numbers("forward_kl", list(numbers))
    dtype = torch_path.accumulation_dtype(hidden)
    count, k = ids.shape
    values = hidden.new_zeros(count, k + int(tail), dtype=dtype)
    saved = hidden.new_zeros(count, 2, dtype=dtype)
    stats = hidden.new_zeros(n_stats, count, dtype=torch.float32)
    (space,) = buffers(1, count, head, budget, dtype)
    for rows in chunks(hidden, head, valid, budget, dtype):
        logits = gemm.logits(hidden[rows], head, bias, dtype, space).unsqueeze(0)
        found = token_backend(path).token_forward(logits, ids[rows], None, spec, tail, n_stats)
        values[rows], saved[rows], stats[:, rows] = found
        del logits  # before the next chunk's are made
    return values, saved, stats


@linear_token_logprobs_op.register_fake
def _(
    hidden: Tensor,
    head: Tensor,
    bias: Any,
    ids: Tensor,
    valid: Any,
    numbers: Any,
    tail: bool,
    n_stats: int,
    path: str,
    budget: int,
) -> Any:
    return empty_outputs(hidden, ids, tail, n_stats)


@torch.library.custom_op("distill::linear_token_logprobs_backward", mutates_args=())
def linear_token_logprobs_backward_op(
    dense: Tensor,
    sparse: Tensor,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    values: Tensor,
    saved: Tensor,
    valid: Tensor | None,
    numbers: Sequence[float],
    path: str,
    budget: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(∂hidden, ∂head, ∂bias) of the logit gradient q·A + scatter(B); empty where not wanted."""
    spec = Spec.from_numbers("forward_kl", list(numbers))
    dtype = saved.dtype
    grads = Gradients.zeros(wanted, hidden, head, dtype)
    (space,) = buffers(1, hidden.shape[0], head, budget, dtype)
    for rows in chunks(hidden, head, valid, budget, dtype):
        logits = gemm.logits(hidden[rows], head, bias, dtype, space).unsqueeze(0)
        operands = (logits, ids[rows], values[rows], saved[rows], None, spec)
        grad = token_backend(path).token_backward(dense[rows], sparse[rows], *operands)
        grads.add(rows, grad[0], hidden[rows], head)
        del logits, operands, grad
    of_hidden, of_head, of_bias = grads.tensors(saved)
    return of_hidden.to(hidden.dtype), of_head.to(head.dtype), of_bias.to(head.dtype)


@linear_token_logprobs_backward_op.register_fake
def _(
    dense: Tensor,
    sparse: Tensor,
    hidden: Tensor,
    head: Tensor,
    bias: Any,
    ids: Tensor,
    values: Tensor,
    saved: Tensor,
    valid: Any,
    numbers: Any,
    path: str,
    budget: int,
    wanted: Sequence[bool],
) -> Any:
    return tuple(Gradients.zeros(wanted, hidden, head, hidden.dtype).tensors(hidden))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, head, bias, ids, valid, ctx.numbers, ctx.tail, _, ctx.path, ctx.budget = inputs
    ctx.save_for_backward(hidden, head, bias, ids, valid, output[0], output[1])


def _differentiate(ctx: Any, grad_values: Tensor, *_: Any) -> tuple[Any, ...]:
    hidden, head, bias, ids, valid, values, saved = ctx.saved_tensors
    dense, sparse = coefficients(grad_values, ids, values, ctx.tail)
    wanted = list(ctx.needs_input_grad[:3])
    formed = linear_token_logprobs_backward_op(
        dense, sparse, hidden, head, bias, ids, values, saved, valid, ctx.numbers, ctx.path, ctx.budget, wanted
    )
    return (*(x if w else None for x, w in zip(formed, wanted, strict=True)), *[None] * 7)


linear_token_logprobs_op.register_autograd(_differentiate, setup_context=_save)
