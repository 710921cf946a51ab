"""How a reduction that a library lacks is expressed in one that it has.

A `Recipe` says in which dtype the bytes travel, which operation the library runs, and what is multiplied before or
divided after. Rules, for CPU tensors (NCCL has nearly all of it natively, see ``nccl.py``):

- AVG is SUM, then one division by the group's size; integers are refused, as a rounded mean is nobody's intention.
- PREMUL_SUM multiplies by the factor on each rank, then SUM.
- bool: SUM and MAX are "any", PRODUCT and MIN are "all", computed on bytes 0 and 1 (gloo's own SUM leaves a byte 2).
- int16, uint16 and uint32 travel as the next wider integer; wrapping on overflow is unchanged.
- float8 travels as float32 and is rounded once, at the end.
- complex: SUM, AVG and PREMUL_SUM only, as two real parts.
- Half precision is summed in single precision and rounded once per rank that combines: once in all inside a host where
  an algorithm combines everything at once (``direct``), and once per hop of a ring or a level.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

_WIDER: dict[torch.dtype, torch.dtype] = {
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.float8_e4m3fn: torch.float32,
    torch.float8_e4m3fnuz: torch.float32,
    torch.float8_e5m2: torch.float32,
    torch.float8_e5m2fnuz: torch.float32,
}
_GLOO_REDUCES = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.complex64,
        torch.complex128,
    }
)
_BITWISE = frozenset({ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR})
_BOOL_AS_BYTES = {ReduceOp.SUM: ReduceOp.MAX, ReduceOp.PRODUCT: ReduceOp.MIN}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One reduction in terms of another: `factor` multiplies before, `divisor` divides after, `carrier` is the dtype
    in between (None: the tensor's own)."""

    op: Any
    carrier: torch.dtype | None = None
    factor: float | Tensor | None = None
    divisor: int | None = None


def kind(op: Any) -> Any:
    """The plain operation (``ReduceOp.RedOpType``) of a `ReduceOp`, which may carry a factor."""
    return getattr(op, "op", op)


def factor_of(op: Any) -> float | Tensor:
    """The factor of a PREMUL_SUM."""
    return op.__getstate__()[1]


def gloo_recipe(op: Any, dtype: torch.dtype, size: int) -> Recipe:
    """The recipe for `op` over tensors of `dtype` in a group of `size` ranks.

    Raises TypeError where the operation has no meaning for the dtype, or none that gloo can compute.
    """
    what = kind(op)
    recipe = _plain_gloo_recipe(what, dtype, size)
    return replace(recipe, factor=factor_of(op)) if what == ReduceOp.PREMUL_SUM else recipe


@cache
def _plain_gloo_recipe(what: Any, dtype: torch.dtype, size: int) -> Recipe:
    _refuse(what, dtype)
    if dtype == torch.bool:
        return Recipe(_BOOL_AS_BYTES.get(what, what))  # cpu.py leaves bool out of `wire`: it travels as bytes
    carrier = _WIDER.get(dtype)
    if what == ReduceOp.AVG:
        return Recipe(ReduceOp.SUM, carrier, divisor=size if size > 1 else None)
    return Recipe(ReduceOp.SUM if what == ReduceOp.PREMUL_SUM else what, carrier)


def nccl_recipe(op: Any, dtype: torch.dtype, size: int) -> Recipe:
    """Like `gloo_recipe`, for NCCL: only what it has no dtype for is changed, and its AVG over one rank, which is
    documented as unreliable."""
    what = kind(op)
    if what in _BITWISE:
        raise TypeError(f"{what.name} of CUDA tensors is not supported by NCCL: reduce CPU copies instead.")
    if dtype == torch.bool:
        return Recipe(_BOOL_AS_BYTES.get(what, what))
    if what == ReduceOp.AVG and size == 1:
        return Recipe(ReduceOp.SUM)
    return Recipe(op, _WIDER.get(dtype))


def _refuse(what: Any, dtype: torch.dtype) -> None:
    integral = not (dtype.is_floating_point or dtype.is_complex)
    if what in (ReduceOp.AVG, ReduceOp.PREMUL_SUM) and integral:
        raise TypeError(
            f"{what.name} of {dtype} would have to round: reduce with SUM and divide as you mean it, or cast to a float."
        )
    if what in _BITWISE and not integral:
        raise TypeError(f"{what.name} works on integers and bool, not on {dtype}: use SUM, AVG, PRODUCT, MIN or MAX.")
    if dtype.is_complex and what not in (ReduceOp.SUM, ReduceOp.AVG, ReduceOp.PREMUL_SUM):
        raise TypeError(f"{what.name} has no meaning for {dtype}: use SUM or AVG, or torch.view_as_real.")
    if dtype not in _GLOO_REDUCES and dtype not in _WIDER and dtype != torch.bool:
        raise TypeError(f"Reductions of {dtype} are not supported on CPU: cast to a wider or a signed dtype first.")
