"""The steps of a plan, lowered: each knows its addresses, its channel, and how to get on.

`advance` does what can be done now and says whether the step is over (a send: started). Nothing here waits. Which
operation a step becomes depends on where its peer is: `local_operations` over shared memory, `remote_operations` over TCP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ncclx_py.transport.memory import Views
from ncclx_py.transport.tcp import HEADER, MAGIC, Network, Sender

PENDING, DONE, STARTED = 0, 1, 2  # STARTED: a send whose source is still needed

Combine = Callable[[Tensor, Tensor], Any]


class Mismatch(Exception):
    """A peer sent something that this rank's call has no place for."""


class Run:
    """One execution of a schedule: where everything lies, and how far it is.

    `address` has the address of each buffer here, `shown` where the neighbours find it (−1: they cannot, and get a
    copy in the window). `done` has the state of each step, `target` what a send waits for, `filled` which copies have
    been made. `idle` counts the rounds in which nothing moved.
    """

    __slots__ = (
        "address",
        "call",
        "combine",
        "digest",
        "done",
        "filled",
        "idle",
        "mirror",
        "moved",
        "network",
        "record",
        "senders",
        "shown",
        "target",
        "views",
        "widens",
        "window",
    )

    address: list[int]
    shown: list[int]
    mirror: int  # offset of the copies in the window
    window: int  # address of the window
    call: int
    digest: int
    record: bytes
    combine: Combine
    widens: bool  # whether single precision can hold more than the dtype, and the reduction would show it
    views: Views
    done: bytearray
    filled: bytearray
    target: list[int]
    network: Network | None
    senders: set[Sender]
    moved: bool
    idle: int

    def head(self, length: int) -> bytes:
        """The header of a message of `length` bytes."""
        return HEADER.pack(MAGIC, self.call & 0xFFFFFFFF, self.digest, length, self.record)


class Operation:
    """A step: `index` in the plan, `deps` that are not met by the order of its lane, `peer` (None: none)."""

    __slots__ = ("deps", "index", "peer")

    def __init__(self, index: int, peer: int | None) -> None:
        self.index, self.peer = index, peer
        self.deps: tuple[int, ...] = ()

    def advance(self, run: Run) -> bool:
        raise NotImplementedError

    def complete(self, run: Run) -> bool:
        """Whether nobody needs the source of this send any more, once it has been started."""
        raise NotImplementedError


def difference(peer: int, theirs: str, digest: int, found: int, run: Run, expected: int) -> str:
    """How a message differs from what was expected."""
    mine = run.record.decode(errors="replace")
    if digest != run.digest:
        return f"rank {peer} called {theirs}; this rank called {mine}"
    return (
        f"rank {peer} sent {found} bytes where this rank's plan for {mine} expects {expected}: the ranks run different "
        "plans"
    )


def combiner(reduction: Any) -> Combine:
    """The function that combines a second tensor into a first, for a ``ReduceOp`` kind. KeyError for any other."""
    return _COMBINERS[getattr(reduction, "op", reduction)]


def widens(reduction: Any, dtype: torch.dtype) -> bool:
    """Whether the order of rounding matters: sums and products in half precision."""
    return dtype in (torch.float16, torch.bfloat16) and getattr(reduction, "op", reduction) in (
        _KINDS.SUM,
        _KINDS.PRODUCT,
    )


def _in_place(function: Callable[..., Tensor]) -> Combine:
    return lambda target, source: function(target, source, out=target)


_KINDS = torch.distributed.ReduceOp
_COMBINERS: dict[Any, Combine] = {
    _KINDS.SUM: Tensor.add_,
    _KINDS.PRODUCT: Tensor.mul_,
    _KINDS.MIN: _in_place(torch.minimum),
    _KINDS.MAX: _in_place(torch.maximum),
    _KINDS.BAND: Tensor.bitwise_and_,
    _KINDS.BOR: Tensor.bitwise_or_,
    _KINDS.BXOR: Tensor.bitwise_xor_,
}
