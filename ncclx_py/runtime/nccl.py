"""CUDA tensors: collectives over NCCL: directly in a group on one host, as plans of levels in one that spans hosts.

All stream semantics are ProcessGroupNCCL's: a call orders NCCL's stream after the caller's, ``wait`` orders the
caller's stream after NCCL's, and the CPU blocks in neither. Several operations of one call, and all calls of a batch,
are issued as one NCCL group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ncclx_py.errors import Call
from ncclx_py.runtime.basis import Membership
from ncclx_py.runtime.choices import Decision
from ncclx_py.runtime.local import Launch, LocalBackend, guarded
from ncclx_py.runtime.native_plans import NativePlans
from ncclx_py.runtime.reduction import Recipe, nccl_recipe
from ncclx_py.runtime.staging import Staging
from ncclx_py.runtime.work import CollectiveWork

_BEFORE = 5.0  # seconds before its deadline, from which on a call counts as hung

Levels = Callable[[Any], NativePlans | None]


class NcclBackend(LocalBackend):
    """Collectives of CUDA tensors. Nothing is connected before the first one.

    Two process groups serve it: point-to-point messages to a lower rank have one of their own. torch batches a send
    with a receive only for its own ProcessGroup class, not for subclasses, so ``batch_isend_irecv`` reaches us as single
    operations; on one communicator two ranks that first send and then receive would wait for each other for ever.
    """

    name = "nccl"
    synchronous_calls_have_futures = False
    wire = frozenset(
        {
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int8,
            torch.uint8,
        }
    )

    def __init__(
        self, connect: Callable[[str], Any], rank: int, size: int, levels: Levels = lambda native: None
    ) -> None:
        """`connect` makes a ProcessGroupNCCL in a name space of the group's store. `levels` is asked at the first
        collective, on all ranks, for what carries them instead; None for NCCL itself."""
        super().__init__(rank, size)
        self._native = connect("cuda")
        self._levels = levels
        self._plans: NativePlans | None = None
        self._collectives: Any = None
        self._connect = connect
        self._downward: Any = None
        self._batch: list[Callable[[], None]] | None = None
        self._calls: list[Call] = []  # of the batch
        self._outputs: list[Any] = []

    @property
    def native(self) -> Any:
        return self._native

    @property
    def collectives(self) -> Any:
        if self._collectives is None:
            self._plans = self._levels(self.native)
            self._collectives = self._plans or self.native
        return self._collectives if self._batch is None else self.native

    def decisions(self) -> list[Decision]:
        return self._plans.decisions.all() if self._plans is not None else []

    def recipe(self, op: Any, dtype: torch.dtype) -> Recipe:
        return nccl_recipe(op, dtype, self.size)

    def start_batch(self) -> None:
        self._batch, self._outputs, self._calls = [], [], []
        self.native._start_coalescing()

    def end_batch(self, call: Call) -> CollectiveWork | None:
        finishes, outputs = self._batch or [], self._outputs
        self._batch, self._outputs = None, []
        work = guarded(call, self.native._end_coalescing)
        if not work:
            return None
        for batched in self._calls:
            self.unended.add(batched, work)
        return CollectiveWork(call, [work], outputs, partial(_run, finishes) if finishes else None)

    def launch(
        self, call: Call, launches: Sequence[Launch], outputs: list[Any], stage: Staging
    ) -> CollectiveWork | None:
        if self._batch is not None:
            for launch in launches:
                guarded(call, launch)
            self._defer(call, outputs, stage)
            return None
        if (
            len(launches) == 1 or self._plans is not None
        ):  # steps of plans wait for one another: they cannot be one group
            call.parts = len(launches)
            return self._handle(call, [guarded(call, launch) for launch in launches], outputs, stage)
        self.native._start_coalescing()
        try:
            for launch in launches:
                guarded(call, launch)
        finally:  # NCCL's group must be closed, also when a part of it was refused
            work = guarded(call, self.native._end_coalescing)
        return self._handle(call, [work], outputs, stage)

    def send(self, call: Call, tensor: Tensor, to: int, tag: int) -> CollectiveWork | None:
        stage = Staging(self.wire)
        channel = self._channel(downward=to < self.rank)
        return self.exchange(call, partial(channel.send, [stage.source(tensor)], to, tag), tensor, stage)

    def recv(self, call: Call, tensor: Tensor, source: int, tag: int) -> CollectiveWork | None:
        stage = Staging(self.wire)
        channel = self._channel(downward=source > self.rank)
        return self.exchange(call, partial(channel.recv, [stage.target(tensor)], source, tag), tensor, stage)

    def recv_any_source(self, call: Call, tensor: Tensor, tag: int) -> CollectiveWork | None:
        stage = Staging(self.wire)
        launch = partial(self.native.recv_anysource, [stage.target(tensor)], tag)
        return self.exchange(call, launch, tensor, stage)

    def sparse_sum(self, tensor: Tensor, options: Any) -> Any:
        return self.native.allreduce([tensor], options)

    def exchange(self, call: Call, launch: Launch, tensor: Tensor, stage: Staging) -> CollectiveWork | None:
        """Starts one send or receive."""
        if self._batch is not None:
            guarded(call, launch)
            self._defer(call, [tensor], stage)
            return None
        return self._handle(call, [guarded(call, launch)], [tensor], stage)

    def late(self) -> str:
        """NCCL's watchdog in torch ends the process at the deadline: the trace must be written before."""
        seconds = self.native.options._timeout.total_seconds()
        call = self.unended.older_than(max(seconds - _BEFORE, seconds / 2))
        return f"{call} has not ended, and its deadline of {seconds:g} s is near" if call is not None else ""

    def set_timeout(self, timeout: timedelta) -> None:
        for native in self.natives():
            native._set_default_timeout(timeout)

    def shutdown(self) -> None:
        for native in self.natives():
            native.shutdown()

    def abort(self) -> None:
        for native in self.natives():
            native.abort()

    def natives(self) -> list[Any]:
        """All process groups in use."""
        made = [self.native] if self._downward is None else [self.native, self._downward]
        return made if self._plans is None else [*made, *self._plans.natives()]

    def _channel(self, downward: bool) -> Any:
        """The process group for messages in one direction; inside a batch there is only one."""
        if self._batch is not None or not downward:
            return self.native
        if self._downward is None:
            self._downward = self._connect("cuda-downward")
        return self._downward

    def _handle(self, call: Call, works: list[Any], outputs: list[Any], stage: Staging) -> CollectiveWork:
        for work in works:
            self.unended.add(call, work)
        return CollectiveWork(call, works, outputs, stage.finish)

    def _defer(self, call: Call, outputs: list[Any], stage: Staging) -> None:
        self._calls.append(call)
        self._outputs.extend(outputs)
        if stage.finish is not None and self._batch is not None:
            self._batch.append(stage.finish)


def nccl_connector(store: Any, member: Membership, timeout: timedelta, options: Any) -> Callable[[str], Any]:
    """A function that makes a ProcessGroupNCCL; `options` are the caller's ``pg_options``, or None.

    Raises RuntimeError where torch was built without NCCL, TypeError where `options` are not NCCL's.
    """
    if not dist.is_nccl_available():
        raise RuntimeError("This torch was built without NCCL: CUDA tensors need a CUDA build of torch.")
    native = dist.ProcessGroupNCCL
    if options is not None and not isinstance(options, native.Options):
        raise TypeError(
            f"pg_options of the ncclx backend must be ProcessGroupNCCL.Options, got {type(options).__name__}."
        )

    def connect(prefix: str) -> Any:
        chosen: Any = options if options is not None else native.Options()
        chosen._timeout = timeout
        chosen.global_ranks_in_group = list(member.ranks)
        chosen.group_name = member.group
        made = native(dist.PrefixStore(f"{prefix}/", store), member.rank, member.size, chosen)
        made._set_sequence_number_for_group()
        return made

    return connect


def part_connector(
    store: Any, member: Membership, timeout: timedelta, options: Any
) -> Callable[[str, tuple[int, ...]], Any]:
    """A function that makes a ProcessGroupNCCL of some of the group's ranks, of which this is one."""

    def connect(name: str, ranks: tuple[int, ...]) -> Any:
        mine: Any = None
        if options is not None:
            mine = dist.ProcessGroupNCCL.Options()
            mine.is_high_priority_stream = options.is_high_priority_stream
        part = Membership(
            f"{member.group}/{name}", ranks.index(member.rank), tuple(member.ranks[rank] for rank in ranks), world=False
        )
        return nccl_connector(store, part, timeout, mine)(name)

    return connect


def _run(finishes: list[Callable[[], None]]) -> None:
    for finish in finishes:
        finish()
