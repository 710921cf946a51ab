"""The fused-linear divergence as two torch operators: chunk, multiply, compare, and (if asked) differentiate at once.

    distill::linear_divergence(…) -> (loss [N], stats [S, N], saved [N, 5], ∂hidden, ∂head, ∂bias)

The last three are filled only where `wanted` says so (gradient="forward"): they are the gradient of Σ weights·loss.
Otherwise they are empty and the backward operator forms them from recomputed logits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import gemm, torch_path
from .kinds import Spec
from .ops import backend


@dataclass(slots=True)
class Gradients:
    """fp32 (fp64) sums over chunks; a field that is not wanted stays None."""

    hidden: Tensor | None
    head: Tensor | None
    bias: Tensor | None

    @staticmethod
    def zeros(wanted: Sequence[bool], hidden: Tensor, head: Tensor, dtype: torch.dtype) -> "Gradients":
        shapes = (hidden.shape, head.shape, head.shape[:1])
        return Gradients(
            *(hidden.new_zeros(s, dtype=dtype) if w else None for w, s in zip(wanted, shapes, strict=True))
        )

    def add(self, rows: Tensor | slice, grad: Tensor, hidden: Tensor, head: Tensor) -> None:
        """grad: ∂/∂logits `[R, V]` of the tokens `rows`, whose hidden states are `hidden` `[R, H]`."""
        if self.hidden is not None:
            self.hidden[rows] = gemm.hidden_gradient(grad, head)
        if self.head is not None:
            gemm.add_head_gradient(self.head, grad, hidden)
        if self.bias is not None:
            self.bias += grad.sum(0)

    def tensors(self, like: Tensor) -> list[Tensor]:
        return [like.new_empty(0) if x is None else x for x in (self.hidden, self.head, self.bias)]


@torch.library.custom_op("distill::linear_divergence", mutates_args=())
def linear_divergence_op(
    student_hidden: Tensor,
    student_head: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_bias: Tensor | None,
    weights: Tensor | None,
    upstream: Tensor | None,
    tokens: Tensor | None,
    kind: str,
    numbers: Sequence[float],
    top_k: int,
    n_stats: int,
    path: str,
    budget: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states `[N, H]`, heads `[V, H]`, weights, upstream and tokens `[N]`; see the module for the results."""
    spec = Spec.from_numbers(kind, list(numbers))
    dtype = torch_path.accumulation_dtype(student_hidden, teacher_hidden)
    count = student_hidden.shape[0]
    loss = student_hidden.new_zeros(count, dtype=dtype)
    saved = student_hidden.new_zeros(count, torch_path.SAVED, dtype=dtype)
    stats = student_hidden.new_zeros(n_stats, count, dtype=torch.float32)
    grads = Gradients.zeros(wanted, student_hidden, student_head, dtype)
    scales = weights if upstream is None else upstream
    space = buffers(2, count, student_head, budget, dtype)
    for rows in chunks(student_hidden, student_head, weights, budget, dtype):
        s = gemm.logits(student_hidden[rows], student_head, student_bias, dtype, space[0]).unsqueeze(0)
        t = gemm.logits(teacher_hidden[rows], teacher_head, teacher_bias, dtype, space[1]).unsqueeze(0)
        ids = None if tokens is None else tokens[rows]
        row_loss, row_saved, row_stats = backend(path).forward(s, t, None, ids, spec, top_k, n_stats)
        loss[rows], saved[rows], stats[:, rows] = row_loss, row_saved, row_stats
        if any(wanted):
            factors = torch.ones_like(row_loss) if scales is None else scales[rows].to(dtype)
            backend(path).backward(factors, s, t, row_saved, None, spec, s)
            grads.add(rows, s[0], student_hidden[rows], student_head)
        del s, t  # before the next chunk's are made
    if any(wanted) and weights is not None:
        loss *= weights
    hidden, head, bias = grads.tensors(loss)
    return loss, stats, saved, hidden, head, bias


@linear_divergence_op.register_fake
def _(
    student_hidden: Tensor,
    student_head: Tensor,
    student_bias: Any,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_bias: Any,
    weights: Any,
    upstream: Any,
    tokens: Any,
    kind: str,
    numbers: Any,
    top_k: int,
    n_stats: int,
    path: str,
    budget: int,
    wanted: Sequence[bool],
) -> Any:
    dtype = torch_path.accumulation_dtype(student_hidden, teacher_hidden)
    count = student_hidden.shape[0]
    loss = student_hidden.new_empty(count, dtype=dtype)
    stats = student_hidden.new_empty(n_stats, count, dtype=torch.float32)
    saved = student_hidden.new_empty(count, torch_path.SAVED, dtype=dtype)
    return (loss, stats, saved, *Gradients.zeros(wanted, student_hidden, student_head, dtype).tensors(loss))


@torch.library.custom_op("distill::linear_divergence_backward", mutates_args=())
def linear_divergence_backward_op(
    grad_loss: Tensor,
    student_hidden: Tensor,
    student_head: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_bias: Tensor | None,
    weights: Tensor | None,
    saved: Tensor,
    kind: str,
    numbers: Sequence[float],
    path: str,
    budget: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(∂hidden, ∂head, ∂bias) for the upstream gradient `[N]`, from recomputed logits; empty where not wanted."""
    spec = Spec.from_numbers(kind, list(numbers))
    dtype = saved.dtype
    grads = Gradients.zeros(wanted, student_hidden, student_head, dtype)
    space = buffers(2, student_hidden.shape[0], student_head, budget, dtype)
    for rows in chunks(student_hidden, student_head, weights, budget, dtype):
        s = gemm.logits(student_hidden[rows], student_head, student_bias, dtype, space[0]).unsqueeze(0)
        t = gemm.logits(teacher_hidden[rows], teacher_head, teacher_bias, dtype, space[1]).unsqueeze(0)
        backend(path).backward(grad_loss[rows], s, t, saved[rows], None, spec, s)
        grads.add(rows, s[0], student_hidden[rows], student_head)
        del s, t
    hidden, head, bias = grads.tensors(saved)
    return hidden.to(student_hidden.dtype), head.to(student_head.dtype), bias.to(student_head.dtype)


@linear_divergence_backward_op.register_fake
def _(
    grad_loss: Tensor,
    student_hidden: Tensor,
    student_head: Tensor,
    student_bias: Any,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_bias: Any,
    weights: Any,
    saved: Tensor,
    kind: str,
    numbers: Any,
    path: str,
    budget: int,
    wanted: Sequence[bool],
) -> Any:
    return tuple(Gradients.zeros(wanted, student_hidden, student_head, student_hidden.dtype).tensors(student_hidden))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, weights, upstream, _, ctx.kind, ctx.numbers, _, _, ctx.path, ctx.budget, ctx.wanted = inputs
    ctx.count = len(operands)
    if any(ctx.wanted):
        ctx.dtypes = [operands[0].dtype, operands[1].dtype, operands[1].dtype]
        ctx.save_for_backward(*output[3:], upstream)
    else:
        ctx.save_for_backward(*operands, weights, output[2])


def _differentiate(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    if any(ctx.wanted):
        *formed, upstream = ctx.saved_tensors
        factor = _common_factor(grad_loss, upstream)
        grads = [
            _scaled(x, factor, dtype) if w else None for x, dtype, w in zip(formed, ctx.dtypes, ctx.wanted, strict=True)
        ]
    else:
        *operands, weights, saved = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        formed = linear_divergence_backward_op(
            grad_loss, *operands, weights, saved, ctx.kind, ctx.numbers, ctx.path, ctx.budget, wanted
        )
        grads = [x if w else None for x, w in zip(formed, wanted, strict=True)]
    return (*grads, *[None] * 13)


linear_divergence_op.register_autograd(_differentiate, setup_context=_save)


def _common_factor(grad_loss: Tensor, upstream: Tensor | None) -> Tensor:
    """c of grad_loss = c·upstream (None: ones); raises where there is none (on CUDA by an assertion on the device)."""
    if grad_loss.numel() == 0:
        return grad_loss.new_zeros(())
    message = (
        "gradient='forward' needs one upstream gradient for all tokens (a sum or mean of the losses), or a multiple of"
        " upstream=; put other per-token factors into weights=, or use gradient='recompute'"
    )
    if upstream is None:
        factor, same = grad_loss[0], (grad_loss == grad_loss[0]).all()
    else:
        largest = upstream.abs().argmax()
        factor = torch.where(upstream[largest] == 0, 0.0, grad_loss[largest] / upstream[largest])
        expected = factor * upstream
        # Each side has been rounded a few times on its way.
        same = ((grad_loss - expected).abs() <= 8 * torch.finfo(expected.dtype).eps * expected.abs()).all()
    if same.device.type == "cpu":
        if not torch.compiler.is_compiling() and not bool(same):
            raise ValueError(message)
    else:
        torch._assert_async(same, message)
    return factor


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x·factor in `dtype`, without an fp32 copy of the whole where `dtype` is narrower."""
    out = torch.empty_like(x, dtype=dtype)
    return torch.mul(x, factor, out=out) if x.dtype == dtype else _scaled_in_parts(x, factor, out)


def _scaled_in_parts(x: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    for source, target in zip(x.view(-1).split(2**24), out.view(-1).split(2**24), strict=True):
        target.copy_(source * factor)
    return out


def chunk_rows(head: Tensor, budget: int, dtype: torch.dtype) -> int:
    """Tokens whose logits of two models take `budget` bytes; at least one."""
    return max(1, budget // (2 * head.shape[0] * dtype.itemsize))


def buffers(models: int, count: int, head: Tensor, budget: int, dtype: torch.dtype) -> list[Tensor | None]:
    """`gemm.buffer` for the chunks of `count` tokens, one per model."""
    rows = min(count, chunk_rows(head, budget, dtype))
    return [gemm.buffer(rows, head, dtype) for _ in range(models)]


def chunks(
    hidden: Tensor, head: Tensor, weights: Tensor | None, budget: int, dtype: torch.dtype
) -> Iterator[slice | Tensor]:
    """Token numbers per chunk: as many as `budget` bytes of both models' logits allow, tokens of weight 0 left out."""
    step = chunk_rows(head, budget, dtype)
    count = hidden.shape[0]
    if weights is None:
        yield from (slice(lo, min(lo + step, count)) for lo in range(0, count, step))
    else:
        yield from (weights != 0).nonzero().squeeze(1).split(step)
