"""Topology-aware collective communication for torch.distributed.

``import ncclx_py`` registers the backend ``ncclx``; then, under torchrun or SLURM,

    torch.distributed.init_process_group("ncclx")

and DDP, FSDP2, DeviceMesh, functional collectives and DeepSpeed run on it unchanged: over shared memory and TCP for CPU
tensors, NCCL for CUDA tensors. A collective that fails raises `CollectiveError` (or `CollectiveTimeout`), which names the
collective, the group and the rank. `explain` tells which algorithm ran what, and why; `empty` makes tensors that the
other ranks of the host read in place. ``ncclx info`` shows what is installed and what the launcher said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ncclx_py.errors import CollectiveError, CollectiveTimeout
from ncclx_py.runtime.registration import group_of, register

if TYPE_CHECKING:
    import torch

    from ncclx_py.runtime.choices import Decision

__version__ = "0.1.0"

__all__ = ["CollectiveError", "CollectiveTimeout", "empty", "explain", "register"]


def explain(group: Any = None) -> list[Decision]:
    """What carried the collectives of a group (None: the default group) on this rank, in the order of first use.

    Each entry has the collective, its bytes, the algorithm and its parameters, the reason for it, the predicted time and
    the lower bound in seconds, and the number of calls; ``str`` makes a line of it. Where nothing but a library was at
    work (one rank, or CUDA tensors on one host) there are none. Raises TypeError for a group of another backend.
    """
    return group_of(group).decisions()


def empty(shape: int | Sequence[int], dtype: torch.dtype | None = None, group: Any = None) -> torch.Tensor:
    """An uninitialised CPU tensor that the ranks of `group` (None: the default group) on this host read in place.

    Collectives over such tensors copy nothing into shared memory first; otherwise it is an ordinary tensor, and may be
    part of a model. `dtype` is torch's default where left out. Raises MemoryError when there is no room, TypeError for a
    group of another backend.
    """
    import torch

    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    return group_of(group).empty(sizes, dtype or torch.get_default_dtype())


register()
