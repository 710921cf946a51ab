"""Launches the Triton kernels: same functions, arguments and meaning as `torch_path`, for CUDA tensors.

Under `TRITON_INTERPRET=1` (set before triton is imported) the same code runs on CPU tensors, slowly: that is how it is
tested without a GPU. Kernels are compiled per kind, dtype and set of options, not per shape.
"""

import math

import torch
import triton
from torch import Tensor

from . import torch_path
from .kinds import BASE_STATS, TOPK_STATS, Spec
from .launch import launch_config
from .triton_host import at_ids, log2_factor, on, transform
from .triton_kernels import backward_kernel, forward_kernel, terms_kernel
from .triton_topk import agreement, renormalised_entropy, topk

SAVED = torch_path.SAVED


def forward(
    student: Tensor, teacher: Tensor, valid: Tensor | None, tokens: Tensor | None, spec: Spec, top_k: int, n_stats: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_path.forward`; `saved` is private to this path (its units differ)."""
    count = student.shape[0] * student.shape[1]
    loss = torch.zeros(count, dtype=torch.float32, device=student.device)
    saved = torch.zeros(count, SAVED, dtype=torch.float32, device=student.device)
    stats = torch.zeros(n_stats, count, dtype=torch.float32, device=student.device)
    if count == 0:
        return loss, saved, stats
    shared = min(student.shape[-1], teacher.shape[-1])
    config = launch_config(False, max(student.element_size(), teacher.element_size()))
    scalars = _scalars(spec)
    with on(student.device):
        forward_kernel[(count,)](
            student, teacher, loss if valid is None else valid.view(torch.uint8), loss, saved, stats, count, student.shape[1],
            student.stride(0), student.stride(1), teacher.stride(0), teacher.stride(1), shared,
            *scalars, spec.mix, KIND=spec.kind, WITH_STATS=n_stats > 0, HAS_VALID=valid is not None,
            S_CAPPED=spec.student_softcap > 0, T_CAPPED=spec.teacher_softcap > 0, **config.tile(), num_warps=config.warps,
        )  # fmt: skip
        if n_stats:
            _extra_statistics(stats, student[..., :shared], teacher[..., :shared], valid, tokens, saved, spec, top_k)
    return loss, saved, stats


def backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, saved: Tensor, valid: Tensor | None, spec: Spec, out: Tensor
) -> None:
    """As `torch_path.backward`."""
    count = student.shape[0] * student.shape[1]
    shared = min(student.shape[-1], teacher.shape[-1])
    out[..., shared:] = 0
    if count == 0:
        return
    config = launch_config(True, max(student.element_size(), teacher.element_size()))
    segments = triton.cdiv(shared, config.span)
    with on(student.device):
        backward_kernel[(count * segments,)](
            student, teacher, out, grad_loss.float().contiguous(), saved if valid is None else valid.view(torch.uint8), saved,
            student.shape[1], student.stride(0), student.stride(1), teacher.stride(0), teacher.stride(1),
            out.stride(0), out.stride(1), shared, segments, config.span,
            *_scalars(spec), spec.student_scale / spec.temperature, spec.mix,
            KIND=spec.kind, HAS_VALID=valid is not None, S_CAPPED=spec.student_softcap > 0,
            T_CAPPED=spec.teacher_softcap > 0, **config.tile(), num_warps=config.warps,
        )  # fmt: skip


def partial_terms(student: Tensor, teacher: Tensor, valid: Tensor | None, saved: Tensor, spec: Spec) -> Tensor:
    """As `torch_path.partial_terms`."""
    count = student.shape[0] * student.shape[1]
    out = torch.zeros(2, count, dtype=torch.float32, device=student.device)
    if count == 0:
        return out
    config = launch_config(False, max(student.element_size(), teacher.element_size()))
    with on(student.device):
        terms_kernel[(count,)](
            student, teacher, saved if valid is None else valid.view(torch.uint8), saved, out, count,
            student.shape[1], student.stride(0), student.stride(1), teacher.stride(0), teacher.stride(1),
            min(student.shape[-1], teacher.shape[-1]), *_scalars(spec), spec.mix, KIND=spec.kind,
            HAS_VALID=valid is not None, S_CAPPED=spec.student_softcap > 0, T_CAPPED=spec.teacher_softcap > 0,
            **config.tile(), num_warps=config.warps,
        )  # fmt: skip
    return out


def units(spec: Spec) -> tuple[float, float, float]:
    """Nats per unit of the saved m_s, m_t and log z."""
    c_s, c_t = _scalars(spec)[:2]
    return c_s * math.log(2.0), c_t * math.log(2.0), math.log(2.0)


def _scalars(spec: Spec) -> tuple[float, ...]:
    """c_s, c_t, s_scale, s_cap, t_scale, t_cap."""
    return (
        log2_factor(spec.student_scale, spec.student_softcap, spec.temperature),
        log2_factor(spec.teacher_scale, spec.teacher_softcap, spec.temperature),
        spec.student_scale,
        spec.student_softcap,
        spec.teacher_scale,
        spec.teacher_softcap,
    )


def _extra_statistics(
    stats: Tensor,
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    tokens: Tensor | None,
    saved: Tensor,
    spec: Spec,
    top_k: int,
) -> None:
    """Fills the rows after `BASE_STATS`: a second sweep for the top-k, one gather for the given ids."""
    row = len(BASE_STATS)
    if top_k:
        k = min(top_k, student.shape[-1])
        (s_values, s_ids), (t_values, t_ids) = topk(student, valid, k), topk(teacher, valid, k)
        s_values = transform(s_values, spec.student_scale, spec.student_softcap, spec.temperature)
        t_values = transform(t_values, spec.teacher_scale, spec.teacher_softcap, spec.temperature)
        entropies = (
            renormalised_entropy(values.masked_fill(ids < 0, -torch.inf))
            for values, ids in ((s_values, s_ids), (t_values, t_ids))
        )
        found = (agreement(s_ids, t_ids), *entropies)
        stats[row : row + len(TOPK_STATS)] = torch.stack(found)
        row += len(TOPK_STATS)
    if tokens is not None:
        ids = tokens.unsqueeze(1)
        stats[row] = at_ids(
            student, ids, valid, saved[:, :2], spec.student_scale, spec.student_softcap, spec.temperature
        )[:, 0]
        stats[row + 1] = at_ids(
            teacher, ids, valid, saved[:, 2:4], spec.teacher_scale, spec.teacher_softcap, spec.temperature
        )[:, 0]
