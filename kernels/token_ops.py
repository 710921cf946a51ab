"""`token_logprobs` as two torch operators (formulas in `tokens`), and their torch path.

distill::token_logprobs(logits, ids, …) -> (values [N, K + tail], saved [N, 2], stats [n, N])
distill::token_logprobs_backward(A, B, …) -> gradient of the logits
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import torch_path
from .kinds import Spec

N_STATS = 3  # entropy, largest probability, 1 where the first id is (one of) the most probable


def empty_outputs(like: Tensor, ids: Tensor, tail: bool, n_stats: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the forward operators return for ids `[N, K]`, uninitialised: for tracing."""
    count, k = ids.shape
    dtype = torch_path.accumulation_dtype(like)
    return (
        like.new_empty(count, k + int(tail), dtype=dtype),
        like.new_empty(count, 2, dtype=dtype),
        like.new_empty(n_stats, count, dtype=torch.float32),
    )


@torch.library.custom_op("distill::token_logprobs", mutates_args=())
def token_logprobs_op(
    student: Tensor, ids: Tensor, valid: Tensor | None, numbers: Sequence[float], tail: bool, n_stats: int, path: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(values `[N, K + tail]`, saved `[N, 2]`, stats `[n_stats, N]`) of logits `[B, T, V]` at ids `[N, K]`."""
    return token_backend(path).token_forward(
        student, ids, valid, Spec.from_numbers("forward_kl", list(numbers)), tail, n_stats
    )


@token_logprobs_op.register_fake
def _(student: Tensor, ids: Tensor, valid: Any, numbers: Any, tail: bool, n_stats: int, path: str) -> Any:
    return empty_outputs(student, ids, tail, n_stats)


@torch.library.custom_op("distill::token_logprobs_backward", mutates_args=())
def token_logprobs_backward_op(
    dense: Tensor,
    sparse: Tensor,
    student: Tensor,
    ids: Tensor,
    values: Tensor,
    saved: Tensor,
    valid: Tensor | None,
    numbers: Sequence[float],
    path: str,
) -> Tensor:
    """q·A + scatter(B): `dense` A `[N]`, `sparse` B `[N, K]`; result in the shape and dtype of the logits."""
    spec = Spec.from_numbers("forward_kl", list(numbers))
    return token_backend(path).token_backward(dense, sparse, student, ids, values, saved, valid, spec)


@token_logprobs_backward_op.register_fake
def _(
    dense: Tensor,
    sparse: Tensor,
    student: Tensor,
    ids: Tensor,
    values: Tensor,
    saved: Tensor,
    valid: Any,
    numbers: Any,
    path: str,
) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, ids, valid, ctx.numbers, ctx.tail, _, ctx.path = inputs
    ctx.save_for_backward(student, ids, valid, output[0], output[1])


def _differentiate(ctx: Any, grad_values: Tensor, *_: Any) -> tuple[Any, ...]:
    student, ids, valid, values, saved = ctx.saved_tensors
    dense, sparse = coefficients(grad_values, ids, values, ctx.tail)
    grad = token_logprobs_backward_op(dense, sparse, student, ids, values, saved, valid, ctx.numbers, ctx.path)
    return grad, *[None] * 6


def coefficients(grad_values: Tensor, ids: Tensor, values: Tensor, tail: bool) -> tuple[Tensor, Tensor]:
    """(A `[N]`, B `[N, K]`) of the gradient q·A + scatter(B), from the upstream gradient of `values` `[N, K + tail]`."""
    k = ids.shape[1]
    sparse = grad_values[:, :k].masked_fill(ids < 0, 0.0)
    dense = -sparse.sum(-1)
    if tail:
        log_tail, grad_tail = values[:, k:], grad_values[:, k:]
        per_tail = torch.where(log_tail > -torch.inf, grad_tail * (-log_tail).exp(), 0.0)
        dense = dense + (per_tail - grad_tail).squeeze(-1)
        sparse = sparse - (values[:, :k].exp() * per_tail).masked_fill(ids < 0, 0.0)
    return dense, sparse


token_logprobs_op.register_autograd(_differentiate, setup_context=_save)


def token_forward(
    student: Tensor, ids: Tensor, valid: Tensor | None, spec: Spec, tail: bool, n_stats: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's forward pass in torch."""
    count, k = ids.shape
    dtype = torch_path.accumulation_dtype(student)
    values = student.new_zeros(count, k + int(tail), dtype=dtype)
    saved = student.new_zeros(count, 2, dtype=dtype)
    stats = student.new_zeros(n_stats, count, dtype=torch.float32)
    unit = torch_path.factor(spec.student_scale, spec.student_softcap, spec.temperature)
    for rows in torch_path.row_chunks(student, None, valid):
        s, _ = torch_path.load(student, rows, student.shape[2], spec.student_scale, spec.student_softcap, dtype)
        top = s.amax(-1, keepdim=True)
        nats = (s - top).mul_(unit)
        log_z = torch_path.exponential(nats).sum(-1, keepdim=True).log_()
        saved[rows] = torch.cat((top, log_z), -1)
        logq = nats.sub_(log_z)
        chosen = ids[rows]
        picked = torch_path.token_values(logq, chosen)
        values[rows, :k] = picked
        if n_stats:
            entropy = -torch_path.exponential(logq).mul_(logq.clamp_min(-1e30)).sum(-1)
            first = (picked[:, :1] == -log_z).to(dtype)  # the largest log-probability is 0 − log z
            stats[:, rows] = torch.stack((entropy, (-log_z).exp().squeeze(-1), first.squeeze(-1))).float()
        if tail:
            values[rows, k] = _without(logq, chosen).logsumexp(-1)
    return values, saved, stats


def token_backward(
    dense: Tensor,
    sparse: Tensor,
    student: Tensor,
    ids: Tensor,
    values: Tensor,
    saved: Tensor,
    valid: Tensor | None,
    spec: Spec,
) -> Tensor:
    """The operator's backward pass in torch; `values` serves the Triton path only."""
    dtype = saved.dtype
    out = torch.zeros(student.shape, dtype=student.dtype, device=student.device)
    unit = torch_path.factor(spec.student_scale, spec.student_softcap, spec.temperature)
    for rows in torch_path.row_chunks(student, None, valid):
        s, slope = torch_path.load(student, rows, student.shape[2], spec.student_scale, spec.student_softcap, dtype)
        top, log_z = saved[rows].unsqueeze(-1).unbind(1)
        grad = torch_path.exponential((s - top).mul_(unit)).mul_(dense[rows].unsqueeze(-1) * (-log_z).exp())
        chosen = ids[rows]
        inside = (chosen >= 0) & (chosen < grad.shape[-1])
        grad.scatter_add_(1, chosen.clamp(0, grad.shape[-1] - 1), sparse[rows] * inside)
        torch_path.store(out, rows, torch_path.scale_gradient(grad, slope, spec.student_scale, spec.temperature))
    return out


def _without(logq: Tensor, ids: Tensor) -> Tensor:
    """logq with −inf at the ids of its row (negative ids: none)."""
    inside = (ids >= 0) & (ids < logq.shape[-1])
    index = ids.clamp(0, logq.shape[-1] - 1)
    removed = torch.zeros_like(logq).scatter_add_(1, index, inside.to(logq.dtype)) > 0
    return logq.masked_fill(removed, -torch.inf)


def token_backend(path: str) -> Any:
    """A module with `token_forward` and `token_backward`."""
    if path == "triton":
        from . import triton_tokens

        return triton_tokens
    return sys.modules[__name__]
