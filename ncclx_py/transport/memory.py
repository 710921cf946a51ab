"""Memory by address: tensors and byte views of it, and copies.

A plan's steps work on addresses, because the same step reads now a user's tensor, now a neighbour's window, and because
tensors made here belong to no autograd graph and no inference mode. Nothing here keeps the memory alive: callers do.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import torch
from torch import Tensor

_ANYWHERE = ctypes.c_ubyte * (1 << 46)  # one type for every length; views take the part that they need
_REMEMBERED = 4096

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value

copy = ctypes.memmove  # (to, from, bytes); lets go of the GIL


def bytes_at(address: int, length: int) -> memoryview:
    return memoryview(_ANYWHERE.from_address(address))[:length]


def tensor_at(address: int, count: int, dtype: torch.dtype) -> Tensor:
    """A one-dimensional tensor over `count` > 0 elements at `address`."""
    with torch.inference_mode(False):
        return torch.frombuffer(_ANYWHERE.from_address(address), dtype=dtype, count=count)


class Mapping:
    """A descriptor's memory, all `size` bytes of it, shared and writable, at `address`.

    Python's own mmap keeps a copy of the descriptor, and a process that comes to more than 64 of them stands still while the
    kernel enlarges its table (100 ms and more were measured).
    """

    def __init__(self, descriptor: int) -> None:
        """`descriptor` stays open. Raises OSError where there is no room for it in the address space."""
        self.size = os.fstat(descriptor).st_size
        self.closed = False
        address = _LIBC.mmap(None, self.size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0)
        if address in (None, _MAP_FAILED):
            raise _failed(f"{self.size} bytes of shared memory cannot be mapped")
        self.address: int = address
        self.advise(mmap.MADV_DONTDUMP, 0, self.size)

    def advise(self, advice: int, start: int, length: int) -> None:
        """madvise of whole pages, `start` counted from the beginning."""
        if _LIBC.madvise(self.address + start, length, advice):
            raise _failed(f"madvise {advice} of {length} bytes of shared memory failed")

    def cut(self, start: int, stop: int) -> None:
        """Unmaps whole pages between two offsets, which nobody may do twice. Whoever reads them after that crashes: let go of
        all views first."""
        if start < stop and _LIBC.munmap(self.address + start, stop - start):
            raise _failed(f"{stop - start} bytes of shared memory cannot be unmapped")

    def close(self) -> None:
        """Unmaps all of it, once."""
        if not self.closed:
            self.closed = True
            self.cut(0, self.size)


def _failed(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


class Views:
    """Tensors of one dtype by (address, bytes): collectives come back to the same places again and again."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self._itemsize = dtype, dtype.itemsize
        self._known: dict[tuple[int, int], Tensor] = {}

    def __call__(self, address: int, length: int) -> Tensor:
        known = self._known.get((address, length))
        return known if known is not None else self._make(address, length)

    def _make(self, address: int, length: int) -> Tensor:
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        made = self._known[address, length] = tensor_at(address, length // self._itemsize, self.dtype)
        return made
