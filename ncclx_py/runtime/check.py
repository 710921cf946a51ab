"""Argument checks of collectives, on this rank alone.

NCCL trusts the caller: a wrong size hangs the group or writes past a buffer. What one rank can see by itself is
checked here before anything is sent. A mismatch *between* ranks shows when their messages meet: plans compare signatures
(``signature.py``); what NCCL carries finds it by the deadline only.
All functions raise ValueError or TypeError with the call, the value and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ncclx_py.errors import Call


def one(call: Call, tensors: Sequence[Tensor], name: str = "tensors") -> Tensor:
    """The only tensor of a c10d argument list (lists of several meant several GPUs per process, long gone)."""
    if len(tensors) != 1:
        raise ValueError(f"{call}: `{name}` must hold exactly one tensor, got {len(tensors)}.")
    return tensors[0]


def dense(call: Call, *tensors: Tensor) -> None:
    """All on one device, with ordinary memory."""
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{call}: expected tensors, got {type(tensor).__name__}.")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{call}: {tensor.layout} tensors are not supported here; call .to_dense() first.")
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"{call}: all tensors of one call must be on one device, got {tensors[0].device} and {tensor.device}."
            )


def same_dtype(call: Call, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != tensors[0].dtype:
            raise TypeError(
                f"{call}: all tensors of one call need one dtype, got {tensors[0].dtype} and {tensor.dtype}."
            )


def together(call: Call, *tensors: Tensor) -> None:
    """Dense, on one device, of one dtype."""
    dense(call, *tensors)
    same_dtype(call, *tensors)


def per_rank(call: Call, tensors: Sequence[Tensor], name: str) -> None:
    if len(tensors) != call.size:
        raise ValueError(f"{call}: `{name}` needs one tensor per rank ({call.size}), got {len(tensors)}.")


def rank(call: Call, value: int, name: str) -> None:
    """`value` is a rank of this group (group ranks, not global ranks)."""
    if not 0 <= value < call.size:
        raise ValueError(f"{call}: {name} {value} is not a rank of this group, which has ranks 0 to {call.size - 1}.")


def peer(call: Call, value: int, name: str) -> None:
    rank(call, value, name)
    if value == call.rank:
        raise ValueError(f"{call}: {name} {value} is this rank itself; copy the tensor instead.")


def tag(call: Call, value: int) -> None:
    if not 0 <= value < 1 << 32:
        raise ValueError(f"{call}: tag {value} is not from 0 to {(1 << 32) - 1}.")


def elements(call: Call, tensor: Tensor, expected: int, name: str) -> None:
    if tensor.numel() != expected:
        raise ValueError(
            f"{call}: `{name}` has {tensor.numel()} elements (shape {tuple(tensor.shape)}), but {expected} are needed "
            f"for {call.size} ranks."
        )


def same_elements(call: Call, tensors: Sequence[Tensor], expected: int, name: str) -> None:
    for index, tensor in enumerate(tensors):
        if tensor.numel() != expected:
            raise ValueError(
                f"{call}: `{name}[{index}]` has {tensor.numel()} elements, but {expected} are needed, as on every rank."
            )


def splits(call: Call, tensor: Tensor, sizes: Sequence[int], name: str) -> list[int]:
    """Rows per rank of `tensor`: the given sizes, or equal ones; always one per rank, adding up to its first dimension."""
    rows = tensor.shape[0] if tensor.dim() else 0
    if not sizes:
        if tensor.dim() == 0 or rows % call.size:
            raise ValueError(
                f"{call}: the first dimension of `{name}` (shape {tuple(tensor.shape)}) cannot be split evenly over "
                f"{call.size} ranks; pass {name}_split_sizes."
            )
        return [rows // call.size] * call.size
    if len(sizes) != call.size or sum(sizes) != rows or min(sizes) < 0:
        raise ValueError(
            f"{call}: {name}_split_sizes {list(sizes)} must be {call.size} non-negative numbers that add up to the "
            f"first dimension of `{name}`, {rows}."
        )
    return list(sizes)


def equal_length(call: Call, outputs: Sequence[object], inputs: Sequence[object]) -> None:
    if len(outputs) != len(inputs):
        raise ValueError(f"{call}: as many outputs as inputs are needed, got {len(outputs)} and {len(inputs)}.")


def nothing(call: Call, tensors: Sequence[object], name: str) -> list[Tensor]:
    """Only the root has these."""
    if tensors and tensors[0]:
        raise ValueError(f"{call}: `{name}` must be left empty on ranks other than the root.")
    return []
