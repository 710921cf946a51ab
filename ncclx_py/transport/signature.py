"""What a rank says about its call, so that ranks that called different things find out instead of mixing their data.

A digest of it travels with every message; the text travels too, and is read only when the digests differ.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

RECORD_BYTES = 104  # of the text, cut where it is longer


@dataclass(frozen=True, slots=True)
class Signature:
    """The properties of a call that must be equal on all ranks of a group.

    `sequence` counts the group's calls. `elements` and `root` are whatever is equal on every rank of `op`: 0 and −1
    where nothing is. `reduction` is the name of the reduction, "" where there is none.
    """

    sequence: int
    op: str
    dtype: torch.dtype
    elements: int
    root: int = -1
    reduction: str = ""

    def __str__(self) -> str:
        root = f"root {self.root}" if self.root >= 0 else ""
        details = ", ".join(part for part in (self.reduction, root) if part)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} of {self.elements} x {dtype}{f' ({details})' if details else ''} as call {self.sequence}"

    def record(self) -> bytes:
        return str(self).encode()[:RECORD_BYTES]


def digest(record: bytes) -> int:
    """64 bits that differ where two records differ; the same in every process."""
    return int.from_bytes(hashlib.blake2b(record, digest_size=8).digest(), "little")
