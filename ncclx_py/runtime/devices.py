"""The local backends of one group: which library serves which device, made when it is needed.

NCCL connects nothing when it is constructed, so it is made when the first CUDA tensor comes. What serves CPU tensors asks all
ranks who and where they are when it is constructed, so all must construct it together. Where there is no CUDA device it is
needed for sure, and is made with the group, where all ranks are. Where there is one, a group may live without it: it is
made at the first collective on CPU tensors (or barrier, or object collective). There, and only there, a send or receive
of CPU tensors that comes before any collective waits until all ranks of the group have used CPU tensors.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ncclx_py.runtime.basis import Membership
from ncclx_py.runtime.cpu import CpuBackend
from ncclx_py.runtime.local import LocalBackend
from ncclx_py.runtime.native_plans import NativePlans, two_levels
from ncclx_py.runtime.nccl import NcclBackend, nccl_connector, part_connector


class Devices:
    """Local backends by device type, for this rank's part in a group.

    `options` are the caller's ``pg_options`` (NCCL's, or None).
    """

    def __init__(self, store: Any, member: Membership, timeout: timedelta, options: Any) -> None:
        self._store = store
        self._member = member
        self._timeout = timeout
        self._options = options
        self._made: dict[str, LocalBackend] = {}
        self._lock = threading.Lock()
        if "cuda" not in device_types():
            self.backend("cpu")

    def backend(self, device_type: str) -> LocalBackend:
        """The local backend of a device type; RuntimeError where no library serves it."""
        made = self._made.get(device_type)
        if made is not None:
            return made
        with self._lock:
            if device_type not in self._made:
                self._made[device_type] = self._make(device_type)
            return self._made[device_type]

    def has(self, device_type: str) -> bool:
        return device_type in self._made

    def made(self) -> list[LocalBackend]:
        """The local backends made so far."""
        return list(self._made.values())

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout
        for local in self._made.values():
            local.set_timeout(timeout)

    def close(self, end: Callable[[LocalBackend], None]) -> None:
        """Ends every library with `end` and lets go of it."""
        with self._lock:
            locals_, self._made = list(self._made.values()), {}
        for local in locals_:
            end(local)

    def _make(self, device_type: str) -> LocalBackend:
        if device_type == "cpu":
            return CpuBackend(dist.PrefixStore("cpu/", self._store), self._member, self._timeout)
        if device_type == "cuda":
            what = self._store, self._member, self._timeout, self._options
            return NcclBackend(nccl_connector(*what), self._member.rank, self._member.size, self._levels)
        raise RuntimeError(
            f"No backend type associated with device type {device_type}: ncclx serves cpu and cuda tensors. "
            f"Move the tensor, or use a group of another backend for {device_type}."
        )

    def _levels(self, flat: Any) -> NativePlans | None:
        """The plans of CUDA tensors; the numbers of elements of an all_to_all are exchanged on the CPU."""
        store = dist.PrefixStore("levels/", self._store)
        parts = part_connector(store, self._member, self._timeout, self._options)
        return two_levels(store, self._member, self._timeout, os.environ, flat, parts, self._counts)

    def _counts(self, sent: Sequence[int], received: Sequence[int], options: Any) -> tuple[tuple[int, ...], ...]:
        local = self.backend("cpu")
        assert isinstance(local, CpuBackend)
        return local.counts(sent, received, options)


def device_types() -> list[str]:
    """Device types that collectives work on here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() and dist.is_nccl_available() else ["cpu"]
