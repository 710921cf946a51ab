"""The dense divergence as two torch operators: torch.compile, autocast and checkpointing see opaque, typed calls.

    distill::divergence(student, teacher, …) -> (loss [N], saved [N, 5], stats [S, N])
    distill::divergence_backward(grad_loss, …) -> gradient of the student's logits

Internal: `dense.divergence` checks arguments and gives the results their shape.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import torch_path
from .kinds import Spec


@torch.library.custom_op("distill::divergence", mutates_args=())
def divergence_op(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    tokens: Tensor | None,
    kind: str,
    numbers: Sequence[float],
    top_k: int,
    n_stats: int,
    path: str,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and meaning as in `torch_path.forward`; `numbers` is `Spec.numbers()`."""
    spec = Spec.from_numbers(kind, list(numbers))
    return backend(path).forward(student, teacher, valid, tokens, spec, top_k, n_stats)


@divergence_op.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    valid: Any,
    tokens: Any,
    kind: str,
    numbers: Any,
    top_k: int,
    n_stats: int,
    path: str,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count = student.shape[0] * student.shape[1]
    dtype = torch_path.accumulation_dtype(student, teacher)
    return (
        student.new_empty(count, dtype=dtype),
        student.new_empty(count, torch_path.SAVED, dtype=dtype),
        student.new_empty(n_stats, count, dtype=torch.float32),
    )


@torch.library.custom_op("distill::divergence_backward", mutates_args=())
def divergence_backward_op(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    saved: Tensor,
    valid: Tensor | None,
    kind: str,
    numbers: Sequence[float],
    path: str,
) -> Tensor:
    """∂(Σ grad_loss·loss)/∂student: fresh, contiguous, in the student's dtype."""
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    spec = Spec.from_numbers(kind, list(numbers))
    backend(path).backward(grad_loss, student, teacher, saved, valid, spec, out)
    return out


@divergence_backward_op.register_fake
def _(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, saved: Tensor, valid: Any, kind: str, numbers: Any, path: str
) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, valid, _, ctx.kind, ctx.numbers, _, _, ctx.path, ctx.inplace = inputs
    ctx.save_for_backward(student, teacher, output[1], valid)


def _differentiate(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    student, teacher, saved, valid = ctx.saved_tensors
    if ctx.inplace and not torch.compiler.is_compiling():
        spec = Spec.from_numbers(ctx.kind, list(ctx.numbers))
        grad = student.detach()
        backend(ctx.path).backward(grad_loss, student, teacher, saved, valid, spec, grad)
    else:
        grad = divergence_backward_op(grad_loss, student, teacher, saved, valid, ctx.kind, ctx.numbers, ctx.path)
    return grad, *[None] * 9


divergence_op.register_autograd(_differentiate, setup_context=_save)


def backend(path: str) -> Any:
    if path == "triton":
        from . import triton_path

        return triton_path
    return torch_path
