"""The arena: memory for tensors that the other ranks of the host read in place, so that sending them copies nothing.

A tensor of the arena is an ordinary tensor. Its memory is free again when the last tensor over it is collected.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import mmap
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ncclx_py.transport.memory import Mapping
from ncclx_py.transport.window import PAGE

_ALIGNMENT = 256  # bytes


class _Owner(ctypes.c_ubyte * (1 << 46)):  # type: ignore[misc]
    """What the storage of a tensor holds on to; as it goes, the memory is free. One type for every length."""


class Arena:
    """One rank's arena as mapped here, by its owner (who allocates) or by a neighbour (who reads)."""

    def __init__(self, memory: Mapping, start: int, size: int) -> None:
        """`size` bytes of `memory` from `start` on."""
        self._map, self.start = memory, start
        self.size, self.address = size, memory.address + start
        self._free = [(0, self.size)]  # (start, stop), ascending, never touching
        self._used = 0
        self._closed = self._unmapped = False
        self._lock = threading.RLock()  # a collection inside `allocate` may call `_release`

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor with undefined contents. Raises MemoryError when the arena has no room, RuntimeError once closed."""
        count = math.prod(shape)
        length = -(-max(1, count * dtype.itemsize) // _ALIGNMENT) * _ALIGNMENT
        start = self._take(length)
        owner = _Owner.from_address(self.address + start)
        weakref.finalize(owner, self._release, start, length).atexit = False
        with torch.inference_mode(False):
            whole = torch.frombuffer(owner, dtype=torch.uint8, count=length)
            return whole[: count * dtype.itemsize].view(dtype).view(tuple(shape))

    def offset(self, address: int) -> int:
        """Where in the arena an address lies; −1 for one outside."""
        return address - self.address if self.address <= address < self.address + self.size else -1

    def close(self) -> None:
        """Unmaps the arena, as soon as none of its tensors is left."""
        with self._lock:
            self._closed = True
            self._unmap()

    def _take(self, length: int) -> int:
        with self._lock:
            if self._closed:
                raise RuntimeError("The group of this arena has been destroyed: allocate from a living group.")
            for index, (start, stop) in enumerate(self._free):
                if stop - start >= length:
                    self._free[index : index + 1] = [(start + length, stop)] if stop - start > length else []
                    self._used += 1
                    return start
        raise MemoryError(
            f"The arena of {self.size} bytes has no {length} bytes in one piece left: free tensors of it."
        )

    def _release(self, start: int, length: int) -> None:
        """Takes back a piece, and returns its whole pages to the system."""
        with self._lock:
            first, last = -(-start // PAGE) * PAGE, (start + length) // PAGE * PAGE
            if first < last:
                self._map.advise(mmap.MADV_REMOVE, self.start + first, last - first)
            self._used -= 1
            at = bisect.bisect(self._free, (start,))
            stop = start + length
            if at < len(self._free) and self._free[at][0] == stop:
                stop = self._free.pop(at)[1]
            if at and self._free[at - 1][1] == start:
                at -= 1
                start = self._free.pop(at)[0]
            self._free.insert(at, (start, stop))
            if self._closed:
                self._unmap()

    def _unmap(self) -> None:
        if not self._used and not self._unmapped:
            self._unmapped = True
            self._map.cut(self.start, self.start + self.size)
