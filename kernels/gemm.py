"""Matrix products that keep fp32: low-precision operands, fp32 results, and no fp32 copy of a whole LM head.

Rounding logits to bf16 before a divergence puts errors of several per cent into its gradient where p ≈ q, so logits
come out of the product in fp32. CUDA has that product (`mm(out_dtype=…)`); elsewhere the head is widened by slices.
"""

import torch
from torch import Tensor

_SLICE_BYTES = 16 * 2**20  # fp32 copy of one slice of the head


def buffer(rows: int, head: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Memory for the logits of `rows` tokens, to be used chunk after chunk: a CPU spends a fifth of a product on fresh
    pages. None on CUDA, whose allocator keeps them."""
    return None if head.is_cuda else head.new_empty(rows, head.shape[0], dtype=dtype)


def logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None, dtype: torch.dtype, space: Tensor | None = None
) -> Tensor:
    """hidden `[R, H]` · head `[V, H]`ᵀ + bias `[V]` as `[R, V]` in `dtype` (fp32 or fp64), in the first rows of `space`."""
    if hidden.is_cuda and hidden.dtype != dtype == torch.float32:
        out = torch.mm(hidden, head.t(), out_dtype=torch.float32)
        return out if bias is None else out.add_(bias)
    out = hidden.new_empty(hidden.shape[0], head.shape[0], dtype=dtype) if space is None else space[: len(hidden)]
    if hidden.dtype == dtype:
        torch.mm(hidden, head.t(), out=out)
    else:
        wide = hidden.to(dtype)
        for part in _slices(head):
            torch.mm(wide, head[part].to(dtype).t(), out=out[:, part])
    return out if bias is None else out.add_(bias)


def hidden_gradient(grad: Tensor, head: Tensor) -> Tensor:
    """grad `[R, V]` (fp32/fp64) · head `[V, H]` as `[R, H]`, summed in fp32 and returned in the dtype of grad."""
    if head.dtype == grad.dtype:
        return grad @ head
    if grad.is_cuda:
        return torch.mm(grad.to(head.dtype), head, out_dtype=torch.float32)
    out = grad.new_zeros(grad.shape[0], head.shape[1])
    for part in _slices(head):
        out.addmm_(grad[:, part], head[part].to(grad.dtype))
    return out


def add_head_gradient(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total `[V, H]` (dtype of grad) += grad `[R, V]`ᵀ · hidden `[R, H]`."""
    if hidden.dtype == grad.dtype or not grad.is_cuda:
        total.addmm_(grad.t(), hidden.to(grad.dtype))
    else:
        torch.addmm(total, grad.to(hidden.dtype).t(), hidden, out_dtype=torch.float32, out=total)


def _slices(head: Tensor) -> list[slice]:
    step = max(1, _SLICE_BYTES // (4 * head.shape[1]))
    return [slice(lo, min(lo + step, head.shape[0])) for lo in range(0, head.shape[0], step)]
