"""The part of the `ncclx` process group that is not a collective: identity, life, errors, recording.

torch asks a Python process group for much through private names; each is here for the caller named beside it.
"""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import profiler

from ncclx_py.errors import UNSET_TIMEOUT, Call, CollectiveError, FirstFailure
from ncclx_py.runtime import nan_check
from ncclx_py.runtime.basis import Membership
from ncclx_py.runtime.choices import Decision
from ncclx_py.runtime.cpu import CpuBackend
from ncclx_py.runtime.devices import Devices, device_types
from ncclx_py.runtime.local import LocalBackend, guarded
from ncclx_py.runtime.work import CollectiveWork
from ncclx_py.watch import triggers
from ncclx_py.watch.trace import TRACE

GRACE = 5.0  # seconds that running collectives get when the process ends normally

_open_groups: weakref.WeakSet[GroupBase] = weakref.WeakSet()


_ProcessGroup: Any = dist.ProcessGroup  # torch's stubs know one signature per method where its callers use several


class GroupBase(_ProcessGroup):
    """This rank's part in a group, with `store` its rendezvous and `options` the caller's ``pg_options``."""

    def __init__(self, store: Any, member: Membership, timeout: timedelta, options: Any) -> None:
        super().__init__(member.rank, member.size)
        self._store = store
        self._group_name = member.group
        self._group_desc = "undefined"
        self._sequence = 0
        self._messages: dict[tuple[str, int], int] = {}  # by direction and peer
        self._ended = ""
        self._checks_nan = nan_check.wanted(os.environ)
        self._facts = TRACE.join(member.group, member.rank, member.ranks, member.world, self)
        self._history = FirstFailure(told=self._failed)
        triggers.start(member.group, member.size)
        call = Call("connecting", member.group, member.rank, member.size, 0, history=self._history)
        TRACE.scheduled(call, [])
        call.begun()
        self._devices = guarded(call, lambda: Devices(store, member, timeout, options))
        call.over()
        _open_groups.add(self)

    # One call

    def ask(self, op: str, opts: Any = None, timeout: timedelta | None = None) -> Call:
        """Opens a call: takes its timeout from the options or the argument, and the next number, which is its own once it
        has been started."""
        return Call(
            op,
            self._facts.name,
            self.rank(),
            self.size(),
            self._sequence + 1,
            timeout=timeout if timeout is not None else getattr(opts, "timeout", UNSET_TIMEOUT),
            async_op=getattr(opts, "asyncOp", True),
            history=self._history,
        )

    def message(self, op: str, peer: int = -1, tag: int = 0) -> Call:
        """Opens a message to a peer or from one (-1: any). It is numbered among those of this direction between the two, so
        that the number is the same at both ends."""
        sequence = self._messages.get((op, peer), 0) + 1
        me = self._facts.name, self.rank(), self.size()
        return Call(op, *me, sequence, history=self._history, message=True, peer=peer, tag=tag)

    def start(
        self,
        call: Call,
        inputs: Tensor | torch.device | list[Tensor],
        run: Callable[[LocalBackend], CollectiveWork | None],
        outputs: Tensor | list[Tensor] | None = None,
    ) -> CollectiveWork | None:
        """Runs a checked call on the local backend of the device of `inputs`, which it overwrites where there are no
        `outputs`."""
        if isinstance(inputs, list) and not inputs:
            raise ValueError(f"{call}: needs at least one tensor.")
        where = inputs[0] if isinstance(inputs, list) else inputs
        self._count(call)
        TRACE.scheduled(call, inputs, outputs)
        if self._checks_nan:
            nan_check.check(call, inputs)
        local = self._local(call, where.device if isinstance(where, Tensor) else where)
        if not profiler._is_profiler_enabled:
            return run(local)
        with profiler.record_function(f"ncclx::{call.op}"):
            return run(local)

    def joined(self, call: Call, works: Sequence[CollectiveWork | None], outputs: list[Any]) -> CollectiveWork | None:
        """One work for several; None inside a batch of NCCL's."""
        started = [work for work in works if work is not None]
        return CollectiveWork(call, started, outputs) if started else None

    def monitored(self, call: Call, wait_all_ranks: bool) -> None:
        self._count(call)
        TRACE.scheduled(call, [])
        local = self._local(call, torch.device("cpu"))
        assert isinstance(local, CpuBackend)
        call.begun()
        guarded(call, lambda: local.monitored_barrier(call, wait_all_ranks))
        call.over()

    def _count(self, call: Call) -> None:
        """A call that was refused before it was started has no number: other ranks may not have made it."""
        if call.message:
            self._messages[call.op, call.peer] = call.sequence
        else:
            self._sequence = call.sequence

    def _local(self, call: Call, device: torch.device) -> LocalBackend:
        """The local backend of a device, noted in the call. Raises `CollectiveError` when the group has ended."""
        if self._ended:
            error = CollectiveError(f"{call} refused: the group has been {self._ended}. Make a new group.")
            call.failed(error)
            raise error
        local = guarded(call, lambda: self._devices.backend(device.type))
        call.engine = local.name
        return local

    # Batches: torch's coalescing manager, and batch_isend_irecv where torch batches for subclasses

    def _start_coalescing(self, device: torch.device) -> None:
        self._local(self.ask("batch"), torch.device(device)).start_batch()

    def _end_coalescing(self, device: torch.device) -> CollectiveWork | None:
        call = self.ask("batch")
        return self._local(call, torch.device(device)).end_batch(call)

    # Identity: FSDP2, DeviceMesh and functional collectives find a group by its name

    def getBackendName(self) -> str:
        return "ncclx"

    def getGroupName(self) -> str:
        return self._group_name

    def setGroupName(self, name: str) -> None:
        self._group_name = name

    def getGroupDesc(self) -> str:
        return self._group_desc

    def setGroupDesc(self, description: str) -> None:
        self._group_desc = self._facts.desc = description

    def get_group_store(self) -> Any:
        return self._store

    @property
    def _device_types(self) -> list[torch.device]:
        """Object collectives use CPU tensors where "cpu" is among these."""
        return [torch.device(kind) for kind in device_types()]

    def _get_backend(self, device: torch.device) -> Any:
        """The c10d backend of a device, for callers that ask what it can do (``batch_isend_irecv``, FSDP2's
        allocator, ``_set_pg_timeout``). RuntimeError where there is none."""
        kind = torch.device(device).type
        if self._ended or kind not in device_types():
            raise RuntimeError(f"No backend type associated with device type {kind}")
        return self._devices.backend(kind).native

    def _set_sequence_number_for_group(self) -> None:
        """Ranks of a group make the same calls, so the numbers agree without an exchange."""

    def _get_sequence_number_for_group(self) -> int:
        return self._sequence

    def _has_hooks(self) -> bool:
        return False

    # Trace

    def running(self) -> list[tuple[Call, tuple[int, int, list[int]] | None]]:
        """The calls that plans carry out now, and how far they are; what a library alone can tell is noted in its calls."""
        found = []
        for local in self._made():
            local.unended.look()
            call, progress = local.running()
            if call is not None:
                found.append((call, progress))
        return found

    def look(self) -> str:
        """Why this group has been aborted, here or on another rank; "" while it has not. From any thread."""
        for local in self._made():
            self._facts.reason = self._facts.reason or local.look()
        return self._facts.reason

    def late(self) -> str:
        """What is about to pass its deadline in a library that then ends the process; "" where nothing is. From any thread."""
        return next((text for local in self._made() if (text := local.late())), "")

    @property
    def global_ranks(self) -> tuple[int, ...]:
        """The global rank of each rank of this group."""
        return self._facts.ranks

    @property
    def ended(self) -> str:
        """ "destroyed", "aborted" or "left"; "" while the group lives."""
        return self._ended

    def peers(self) -> dict[int, str]:
        """What is known of the processes of other global ranks: "alive", "stopped" or "gone"."""
        known = {rank: state for local in self._made() for rank, state in local.peers().items()}
        return {self._facts.ranks[rank]: state for rank, state in known.items()}

    def links(self) -> list[dict[str, int]]:
        """What the kernel knows of this rank's data connections to ranks of other hosts; `peer` is a global rank."""
        found = [link for local in self._made() for link in local.links()]
        return [{**link, "peer": self._facts.ranks[link["peer"]]} for link in found]

    def _made(self) -> list[LocalBackend]:
        devices: Devices | None = getattr(self, "_devices", None)  # not there yet while the group is being connected
        return devices.made() if devices is not None else []

    def _failed(self, call: Call, cause: BaseException) -> None:
        self._facts.reason = self._facts.reason or call.error
        triggers.failed(call.group, cause)

    # Plans

    def decisions(self) -> list[Decision]:
        """Which algorithms carried this group's collectives on this rank, and why; see ``ncclx_py.explain``."""
        return [decision for local in self._made() for decision in local.decisions()]

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See ``ncclx_py.empty``."""
        local = self._local(self.ask("empty"), torch.device("cpu"))
        assert isinstance(local, CpuBackend)
        return local.empty(shape, dtype)

    # Life

    def set_timeout(self, timeout: timedelta) -> None:
        self._devices.set_timeout(timeout)

    _set_default_timeout = set_timeout

    def shutdown(self) -> None:
        """Ends the group in good order; what is still running is waited for by the library. Again: nothing."""
        self._end("destroyed", lambda local: local.shutdown())

    def abort(self) -> None:
        """Ends the group now: what is still running fails on this rank, and soon on the others."""
        self._end("aborted", lambda local: local.abort())

    def _end(self, how: str, end: Callable[[LocalBackend], None]) -> None:
        if not self._ended:
            self._ended = how
            self._devices.close(end)

    def _leave(self, seconds: float) -> None:
        self._end("left", lambda local: local.leave(seconds))


@atexit.register
def _leave_all() -> None:
    """A collective that is still running when Python ends would call back into it, and crash the process."""
    seconds = 0.0 if hasattr(sys, "last_value") else GRACE  # set by an uncaught exception: nothing more will be joined
    for group in list(_open_groups):
        group._leave(seconds)
