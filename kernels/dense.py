"""`divergence`: per-token divergence of two models from their logits, with its gradient and monitoring figures."""

import os
from typing import Any

import torch
from torch import Tensor

from .kinds import PATHS, DivergenceOutput, make_spec, stat_names
from .ops import divergence_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    weights: Tensor | None = None,
    path: str = "auto",
    stats: bool = False,
    *,
    beta: float = 0.5,
    alpha: float | None = None,
    token_ids: Tensor | None = None,
    top_k: int = 20,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    temperature_squared: bool = False,
    inplace: bool = False,
) -> DivergenceOutput:
    """Divergence between teacher and student for every token, unreduced; differentiable in the student's logits.

    Args:
        student_logits: `[..., V_s]`, fp32, bf16, fp16 (fp64: torch path only). Arithmetic is fp32 (fp64 for fp64).
        teacher_logits: `[..., V_t]`, same leading shape and device; dtype may differ. Receives no gradient.
            Where V_s ≠ V_t the shared prefix of the vocabulary counts: surplus ids have probability 0 on both sides
            and gradient 0.
        kind: one of `KINDS`; formulas, `beta`, `alpha` and end points in `distill.kernels.kinds`.
        temperature: T; both logits are divided by it. The loss is that of the softened distributions and the gradient
            its true derivative (it carries 1/T); multiply by T² yourself, or set `temperature_squared` (Hinton).
        weights: leading shape; float or bool. Multiplies the loss. A token of weight 0 is skipped altogether: its
            logits are never read, its loss, gradient and statistics are exactly 0 (even where logits are NaN).
        path: "triton", "torch", or "auto" (Triton on CUDA where it can run, else torch). `DivergenceOutput.path` tells.
        stats: also return the per-token statistics of `kinds.stat_names`, computed in the same pass, at temperature T.
        token_ids: leading shape, integer; adds `student_logprob` and `teacher_logprob` of that id (0 for negative ids).
        top_k: k of the top-k statistics (clipped to V); 0 leaves them out.
        student_scale, teacher_scale, student_softcap, teacher_softcap: value = c·tanh(scale·x/c) before temperature.
        vocab_size: ids from here on are padding on both sides (probability 0).
        inplace: the backward pass overwrites `student_logits` with their gradient instead of allocating it; nothing
            else may read them afterwards. (Under torch.compile it allocates.)

    Returns:
        `DivergenceOutput`; `loss` is fp32 (fp64 for fp64 inputs) of the leading shape.

    Raises:
        ValueError: unknown kind, path, parameter out of range, shapes or devices that do not fit.
        TypeError: a dtype that no path, or not the chosen one, supports.
    """
    spec = make_spec(
        kind,
        beta=beta,
        alpha=alpha,
        temperature=temperature,
        student_scale=student_scale,
        teacher_scale=teacher_scale,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
    )
    lead = student_logits.shape[:-1]
    check_logits(student_logits, teacher_logits)
    chosen = choose_path(path, student_logits, teacher_logits)
    student, teacher = (as_rows(clip_vocabulary(x, vocab_size)) for x in (student_logits, teacher_logits))
    tokens = None if token_ids is None or not stats else check_tokens(token_ids, lead, student).reshape(-1)
    scaled = None if weights is None else check_weights(weights, lead, student)
    valid = None if scaled is None else scaled.detach().reshape(-1) != 0
    names = stat_names(top_k, tokens is not None) if stats else ()
    loss, _, rows = divergence_op(
        student, teacher.detach(), valid, tokens, spec.kind, spec.numbers(), top_k, len(names), chosen, inplace
    )
    loss = loss.reshape(lead)
    if temperature_squared:
        loss = loss * temperature**2
    if scaled is not None:
        loss = loss * scaled
    rows = rows.detach()
    return DivergenceOutput(loss, {name: rows[i].reshape(lead) for i, name in enumerate(names)}, chosen)


def choose_path(path: str, *tensors: Any) -> str:
    """ "triton" or "torch" for these inputs.

    Raises:
        ValueError: an unknown path, or Triton asked for where it cannot run.
        TypeError: a dtype the path does not support.
    """
    if path not in PATHS:
        raise ValueError(f"unknown path {path!r}; choose one of {', '.join(PATHS)}")
    for x in tensors:
        if x.dtype not in DTYPES:
            raise TypeError(f"dtype {x.dtype} is not supported; use one of {', '.join(map(str, DTYPES))}")
    wide = any(x.dtype == torch.float64 for x in tensors)
    if path == "triton":
        if wide:
            raise TypeError("the triton path computes in fp32 and does not take torch.float64; use path='torch'")
        if not (tensors[0].is_cuda or _interpreted()):
            raise ValueError(
                f"the triton path needs CUDA tensors, got device {tensors[0].device}; use path='torch' or 'auto'"
                " (tests set TRITON_INTERPRET=1 before triton is imported)"
            )
        return "triton"
    if path == "auto" and tensors[0].is_cuda and not wide and _has_triton():
        return "triton"
    return "torch"


def as_rows(logits: Tensor) -> Tensor:
    """`[..., V]` as `[B, T, V]` with unit stride in V: a view for up to two leading dimensions, shifted slices too."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.dim() == 3:
        return logits
    return logits.unsqueeze(0) if logits.dim() == 2 else logits.reshape(1, -1, logits.shape[-1])


def clip_vocabulary(logits: Tensor, vocab_size: int | None) -> Tensor:
    if vocab_size is None:
        return logits
    if vocab_size < 1:
        raise ValueError(f"vocab_size must be above 0, got {vocab_size}")
    return logits[..., :vocab_size]


def check_tokens(token_ids: Tensor, lead: torch.Size, like: Any) -> Tensor:
    """int64 token ids of the leading shape, on the device of the logits."""
    _check_shape("token_ids", token_ids, lead)
    if token_ids.is_floating_point() or token_ids.dtype == torch.bool:
        raise TypeError(f"token_ids must be integers, got {token_ids.dtype}")
    return token_ids.to(device=like.device, dtype=torch.int64)


def check_weights(weights: Tensor, lead: torch.Size, like: Any) -> Tensor:
    """Weights of the leading shape in the dtype of the loss, on the device of the logits; keeps their graph."""
    _check_shape("weights", weights, lead)
    return weights.to(device=like.device, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def check_logits(student: Tensor, teacher: Tensor) -> None:
    """Raises ValueError unless both are `[..., V]` on one device, with equal leading shapes and V ≥ 1."""
    if student.dim() < 1 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student and teacher logits must agree in all but the last (vocabulary) dimension: "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if min(student.shape[-1], teacher.shape[-1]) == 0:
        raise ValueError(f"the vocabulary is empty: got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if student.device != teacher.device:
        raise ValueError(f"student and teacher logits are on different devices: {student.device} and {teacher.device}")


def _check_shape(name: str, x: Tensor, lead: torch.Size) -> None:
    if x.shape != lead:
        raise ValueError(f"{name} must have the leading shape of the logits, {tuple(lead)}; got {tuple(x.shape)}")


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
