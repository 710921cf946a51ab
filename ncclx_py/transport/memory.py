"""Memory by address: tensors and byte views of it, and copies.

A plan's steps work on addresses, because the same step reads now a user's tensor, now a neighbour's window, and because
tensors made here belong to no autograd graph and no inference mode. Nothing here keeps the memory alive: callers do.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

_ANYWHERE = ctypes.c_ubyte * (1 << 46)  # one type for every length; views take the part that they need
_REMEMBERED = 4096

copy = ctypes.memmove  # (to, from, bytes); lets go of the GIL


def bytes_at(address: int, length: int) -> memoryview:
    return memoryview(_ANYWHERE.from_address(address))[:length]


def tensor_at(address: int, count: int, dtype: torch.dtype) -> Tensor:
    """A one-dimensional tensor over `count` > 0 elements at `address`."""
    with torch.inference_mode(False):
        return torch.frombuffer(_ANYWHERE.from_address(address), dtype=dtype, count=count)


def address_of(buffer: Any) -> int:
    """The address of a writable buffer (an mmap)."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


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
