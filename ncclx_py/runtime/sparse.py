"""The sum of sparse tensors: everyone gathers everyone's indices and values, and adds them up in order of rank.

All ranks end with the same bits: a coalesced tensor with an entry wherever some rank had one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ncclx_py.errors import CollectiveError

Gather = Callable[[Tensor, tuple[int, ...]], Tensor]

_DTYPES = sorted({str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)})
_DIMENSIONS = 16  # at most, of a tensor; what is said of it has a fixed length


def sum_sparse(tensor: Tensor, size: int, gather: Gather) -> None:
    """Replaces `tensor`, sparse in COO form, by the sum over `size` ranks.

    `gather(part, counts)` lays the flat parts of all ranks end to end, of which rank r's has ``counts[r]`` elements. Raises
    CollectiveError, on every rank, where their shapes or dtypes differ.
    """
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        mine = tensor.detach().coalesce()
        indices, values = mine.indices().contiguous(), mine.values().contiguous()
        facts = _facts(mine, values)
        table = gather(facts, (facts.numel(),) * size).view(size, -1)
        _compare(table)
        counts = table[:, 0].tolist()
        width = math.prod(values.shape[1:]) * values.element_size()
        all_indices = gather(indices.t().reshape(-1), tuple(count * mine.sparse_dim() for count in counts))
        all_values = gather(values.reshape(-1).view(torch.uint8), tuple(count * width for count in counts))
        total = torch.sparse_coo_tensor(
            all_indices.view(-1, mine.sparse_dim()).t(),
            all_values.view(values.dtype).view(-1, *values.shape[1:]),
            tensor.shape,
            check_invariants=False,
        ).coalesce()
        tensor.copy_(total)  # not its detached twin, which would take the new indices for itself


def _facts(tensor: Tensor, values: Tensor) -> Tensor:
    if tensor.dim() > _DIMENSIONS:
        raise CollectiveError(f"a sparse tensor of {tensor.dim()} dimensions: at most {_DIMENSIONS} can be summed.")
    shape = [*tensor.shape, *[-1] * (_DIMENSIONS - tensor.dim())]
    return torch.tensor(
        [values.shape[0], _DTYPES.index(str(values.dtype)), tensor.sparse_dim(), *shape], dtype=torch.int64
    )


def _compare(table: Tensor) -> None:
    for rank, row in enumerate(table[:, 1:].tolist()):
        first = table[0, 1:].tolist()
        if row != first:
            raise CollectiveError(
                f"rank 0 gives {_described(first)} and rank {rank} gives {_described(row)}: sparse tensors must have one "
                "shape and dtype on all ranks. Nothing was summed."
            )


def _described(row: list[int]) -> str:
    name, shape = _DTYPES[row[0]].removeprefix("torch."), [length for length in row[2:] if length >= 0]
    return f"a sparse {name} of shape {shape} with {row[1]} sparse dimensions"
