"""Launches the kernels under `token_logprobs`: the counterpart of the torch functions in `token_ops`."""

import math

import torch
import triton
from torch import Tensor

from .kinds import Spec
from .launch import launch_config
from .triton_host import at_ids, log2_factor, on
from .triton_row_kernels import dense_backward_kernel, lse_kernel


def token_forward(
    student: Tensor, ids: Tensor, valid: Tensor | None, spec: Spec, tail: bool, n_stats: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `token_ops.token_forward`; `saved` holds (m, log2 z). The tail is 1 − Σ q: absolute error near 1e-7."""
    count, k = ids.shape
    saved = torch.zeros(count, 2, dtype=torch.float32, device=student.device)
    stats = torch.zeros(n_stats, count, dtype=torch.float32, device=student.device)
    values = torch.zeros(count, k + int(tail), dtype=torch.float32, device=student.device)
    if count == 0:
        return values, saved, stats
    config = launch_config(False, student.element_size())
    with on(student.device):
        lse_kernel[(count,)](
            student, saved if valid is None else valid.view(torch.uint8), saved, stats, count, student.shape[1],
            student.stride(0), student.stride(1), student.shape[2], *_scalars(spec), WITH_STATS=n_stats > 0,
            HAS_VALID=valid is not None, CAPPED=spec.student_softcap > 0, **config.tile(), num_warps=config.warps,
        )  # fmt: skip
        values[:, :k] = at_ids(student, ids, valid, saved, spec.student_scale, spec.student_softcap, spec.temperature)
    if tail:
        values[:, k] = torch.log1p(-_probabilities(values[:, :k], ids).sum(-1).clamp_max(1.0))
        if valid is not None:
            values[:, k].masked_fill_(~valid, 0.0)
    if n_stats:
        first = values[:, 0] >= -saved[:, 1] * math.log(2.0)
        stats[2] = first if valid is None else first & valid
    return values, saved, stats


def token_backward(
    dense: Tensor, sparse: Tensor, student: Tensor, ids: Tensor, values: Tensor, saved: Tensor, valid: Tensor | None,
    spec: Spec,
) -> Tensor:  # fmt: skip
    """As `token_ops.token_backward`: q·A everywhere by the kernel, then q_j·A + B_j written over the ids."""
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    count, k = ids.shape
    if count == 0:
        return out
    config = launch_config(True, student.element_size())
    width = student.shape[2]
    segments = triton.cdiv(width, config.span)
    slope = spec.student_scale / spec.temperature
    dense = dense.float().contiguous()
    with on(student.device):
        dense_backward_kernel[(count * segments,)](
            student, out, dense, saved if valid is None else valid.view(torch.uint8), saved, student.shape[1],
            student.stride(0), student.stride(1), out.stride(0), out.stride(1), width, segments, config.span,
            *_scalars(spec), slope, HAS_VALID=valid is not None, CAPPED=spec.student_softcap > 0, **config.tile(),
            num_warps=config.warps,
        )  # fmt: skip
        _write_ids(out, student, ids, valid, _probabilities(values[:, :k], ids) * dense.unsqueeze(1) + sparse, spec)
    return out


def _write_ids(out: Tensor, student: Tensor, ids: Tensor, valid: Tensor | None, grad: Tensor, spec: Spec) -> None:
    """out at the ids of each token = grad `[N, K]` times the slope; padding ids and skipped tokens change nothing."""
    count, width = ids.shape[0], student.shape[2]
    where = ids.clamp(0, width - 1)
    grad = grad * (spec.student_scale / spec.temperature)
    if spec.student_softcap:
        raw = student.gather(-1, where.view(-1, student.shape[1], ids.shape[1])).view(ids.shape).float()
        grad = grad * (1.0 - torch.tanh(raw * (spec.student_scale / spec.student_softcap)).square())
    inside = (ids >= 0) & (ids < width)
    if valid is not None:
        inside &= valid.unsqueeze(1)
    flat = out.view(count, width)
    # Padding repeats the write of its token's first real id (or what is there): no conflict, no synchronisation.
    first = inside.int().argmax(1, keepdim=True)
    here = torch.where(
        inside.any(1, keepdim=True), grad.gather(1, first).to(out.dtype), flat.gather(1, where.gather(1, first))
    )
    where = torch.where(inside, where, where.gather(1, first))
    flat.scatter_(1, where, torch.where(inside, grad.to(out.dtype), here))


def _probabilities(values: Tensor, ids: Tensor) -> Tensor:
    """q at the ids, 0 for padding."""
    return values.exp().masked_fill(ids < 0, 0.0)


def _scalars(spec: Spec) -> tuple[float, float, float]:
    factor = log2_factor(spec.student_scale, spec.student_softcap, spec.temperature)
    return factor, spec.student_scale, spec.student_softcap
