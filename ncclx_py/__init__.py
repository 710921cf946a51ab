"""Topology-aware collective communication for torch.distributed.

``import ncclx_py`` registers the backend ``ncclx``; then, under torchrun or SLURM,

    torch.distributed.init_process_group("ncclx")

and DDP, FSDP2, DeviceMesh, functional collectives and DeepSpeed run on it unchanged: over shared memory and TCP for CPU
tensors, NCCL for CUDA tensors. A collective that fails raises `CollectiveError` (or `CollectiveTimeout`), which names the
collective, the group and the rank. `explain` tells which algorithm ran what, and why; `empty` makes tensors that the
other ranks of the host read in place. Every collective is traced (``ncclx_py.watch``): `trace_into` names the folder that
dumps go to when something goes wrong, `dump_trace` writes one, `mark_step` says how far the training is. After a rank was lost,
`survivors` agrees on who is left. ``ncclx info`` shows what is installed and what the launcher said.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncclx_py.errors import CollectiveError, CollectiveTimeout
from ncclx_py.runtime.registration import group_of, register

if TYPE_CHECKING:
    import torch

    from ncclx_py.runtime.choices import Decision

__version__ = "0.1.0"

__all__ = [
    "CollectiveError",
    "CollectiveTimeout",
    "dump_trace",
    "empty",
    "explain",
    "mark_step",
    "register",
    "survivors",
    "trace_into",
]


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


def trace_into(folder: str | Path) -> None:
    """Names the folder that dumps of the trace go to, where ``NCCLX_TRACE_DIR`` does not; for groups made from now on. It is
    made with the first dump."""
    from ncclx_py.watch import triggers

    triggers.trace_into(Path(folder))


def dump_trace(detail: str = "on demand", folder: str | Path | None = None) -> Path:
    """Writes this rank's trace now, into `folder` or the one that was named before, and returns the file's path.

    Raises ValueError where there is no folder, OSError where it cannot be written.
    """
    from ncclx_py.watch import triggers

    return triggers.dump_now(detail, Path(folder) if folder is not None else None)


def mark_step(step: int) -> None:
    """Says which training step begins, counted from 1: a dump tells, and a fault that is injected may wait for it."""
    from ncclx_py import faults
    from ncclx_py.watch.trace import TRACE

    TRACE.step = step
    faults.step(step)


def survivors(group: Any = None, seconds: float = 10.0) -> list[int]:
    """The global ranks of `group` (None: the default group) that are left after it failed, agreed between them.

    Every rank that is left must call it. Those that have not within `seconds`, or are known to be gone, are left out, and
    learn it by a CollectiveError if they come later. A new group goes on from there:

        alive = ncclx_py.survivors()
        group = torch.distributed.new_group(alive, use_local_synchronization=True)

    The group's store must still be there: that of torchrun is, one that lived in a lost rank is not. Raises CollectiveError
    where it is gone, TypeError for a group of another backend.
    """
    from ncclx_py.runtime.survivors import agree_on_survivors

    return agree_on_survivors(group_of(group), seconds)


register()
