"""Makes ``init_process_group("ncclx")`` known to torch.distributed.

It happens at ``import ncclx_py``, not through torch's ``torch.backends`` entry points, though those would save the
import: with one, a checkout that was moved or removed makes ``import torch`` itself fail in that environment; and as soon
as any third-party backend is registered, torch leaves plain ``cpu:gloo`` groups without a default backend (their name
becomes "undefined"), which programs that never asked for us should not see.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ncclx_py.faults.inject import armed

BACKEND = "ncclx"

_part: tuple[str, tuple[int, ...]] = ("", ())  # see `number_ranks`


def register() -> None:
    """Registers the backend for CPU and CUDA tensors; calling it again changes nothing.

    Raises RuntimeError where torch has no distributed package, or another package has taken the name.
    """
    if not dist.is_available():
        raise RuntimeError("This torch was built without torch.distributed (USE_DISTRIBUTED=0); install a full build.")
    plugin = dist.Backend._plugins.get(BACKEND.upper())
    if plugin is None:
        dist.Backend.register_backend(BACKEND, make_group, extended_api=True, devices=["cpu", "cuda"])
    elif plugin.creator_fn is not make_group:
        raise RuntimeError(
            f"The backend name {BACKEND!r} is already taken by {plugin.creator_fn.__module__}: import only one of the two."
        )


def number_ranks(part: str, numbers: Sequence[int]) -> None:
    """Says that the default group is one `part` of those that a launcher's job is split into: its rank r is rank ``numbers[r]``
    of the job, in traces, verdicts, injected faults and topology files, where its groups are named ``PART/NAME``. For groups made
    from now on; ("", ()) takes it back."""
    global _part
    _part = (part, tuple(numbers))


def make_group(how: Any, options: Any) -> Any:
    """Called by torch for each group that this rank is a member of; `how` are c10d's ``_DistributedBackendOptions``."""
    everyone = not how.global_ranks_in_group
    ranks = tuple(how.global_ranks_in_group) or tuple(range(how.group_size))
    part, numbers = _part
    if not part:
        return join_group(how.store, how.group_id, ranks, how.group_rank, how.timeout, options, everyone)
    ranks = tuple(numbers[rank] for rank in ranks)
    return join_group(how.store, f"{part}/{how.group_id}", ranks, how.group_rank, how.timeout, options)


def join_group(
    store: Any, name: str, ranks: Sequence[int], rank: int, timeout: timedelta, options: Any = None, world: bool = False
) -> Any:
    """This rank's part, number `rank`, in a new group of the job's `ranks`, which torch need not know; every member calls it
    with a store for this group alone. `world`: these are all ranks of the job."""
    from ncclx_py.runtime.basis import Membership  # not needed before a group is made, like what it imports
    from ncclx_py.runtime.process_group import NcclxProcessGroup

    member = Membership(name, rank, tuple(ranks), world)
    injector = armed(os.environ)
    if injector is not None:
        from ncclx_py.faults.group import make

        return make(injector, store, member, timeout, options)
    return NcclxProcessGroup(store, member, timeout, options)


def group_of(group: Any) -> Any:
    """`group`, or the default group for None. Raises TypeError when it is not ours, ValueError when there is none."""
    from ncclx_py.runtime.group_base import GroupBase

    found = group if group is not None else dist.group.WORLD
    if found is None:
        raise ValueError("There is no default process group: call init_process_group first, or name a group.")
    if not isinstance(found, GroupBase):
        raise TypeError(f"The group is a {type(found).__name__}, not one of the backend {BACKEND!r}.")
    return found
