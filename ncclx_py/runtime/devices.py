"""The local backends of one group: which library serves which device, made when it is needed.

NCCL connects nothing when it is constructed, so it is made when the first CUDA tensor comes. gloo connects every rank
to every other when it is constructed, so all ranks must construct it together. Where there is no CUDA device it is
needed for sure, and is made with the group, where all ranks are. Where there is one, a group may live without it: it is
made at the first collective on CPU tensors (or barrier, or object collective). There, and only there, a send or receive
of CPU tensors that comes before any collective waits until all ranks of the group have used CPU tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ncclx_py.runtime.gloo import GlooBackend
from ncclx_py.runtime.local import LocalBackend
from ncclx_py.runtime.nccl import NcclBackend, nccl_connector


class Devices:
    """Local backends by device type, for a group of `size` ranks of which this is `rank`.

    `ranks` are the global ranks of the group, `options` the caller's ``pg_options`` (NCCL's, or None).
    """

    def __init__(
        self, store: Any, rank: int, size: int, timeout: timedelta, group: str, ranks: list[int], options: Any
    ) -> None:
        self._store = store
        self._rank, self._size = rank, size
        self._timeout = timeout
        self._group, self._ranks, self._options = group, ranks, options
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

    def natives(self) -> list[Any]:
        """The c10d backends made so far."""
        return [native for local in self._made.values() for native in local.natives()]

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout
        for native in self.natives():
            native._set_default_timeout(timeout)

    def close(self, end: Callable[[LocalBackend], None]) -> None:
        """Ends every library with `end` and lets go of it."""
        with self._lock:
            locals_, self._made = list(self._made.values()), {}
        for local in locals_:
            end(local)

    def _make(self, device_type: str) -> LocalBackend:
        if device_type == "cpu":
            store = dist.PrefixStore("cpu/", self._store)
            return GlooBackend(store, self._rank, self._size, self._timeout, self._group, self._ranks)
        if device_type == "cuda":
            connect = nccl_connector(
                self._store, self._rank, self._size, self._timeout, self._group, self._ranks, self._options
            )
            return NcclBackend(connect, self._rank, self._size)
        raise RuntimeError(
            f"No backend type associated with device type {device_type}: ncclx serves cpu and cuda tensors. "
            f"Move the tensor, or use a group of another backend for {device_type}."
        )


def device_types() -> list[str]:
    """Device types that collectives work on here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() and dist.is_nccl_available() else ["cpu"]
