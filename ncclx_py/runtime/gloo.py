"""CPU tensors: collectives as plans, over shared memory and TCP; messages, sparse tensors and monitored barriers by gloo.

Nothing here holds the GIL while it waits. The dtypes and operations that plans reduce are gloo's
(``reduction.gloo_recipe`` expresses the others in them), so that sparse tensors reduce alike.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
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
from ncclx_py.runtime.meeting import MeetingStore
from ncclx_py.runtime.pending import Pending
from ncclx_py.runtime.planned import Alone, connect
from ncclx_py.runtime.progress import Job
from ncclx_py.runtime.reduction import Recipe, gloo_recipe
from ncclx_py.runtime.staging import Staging
from ncclx_py.runtime.work import CollectiveWork, PeerWork

log = logging.getLogger(__name__)

_ABORT_TAG = 0x7E57AB  # no message carries it


class GlooBackend(LocalBackend):
    """Collectives of CPU tensors. Constructing it connects all ranks of the group: every rank must do so."""

    name = "gloo"
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

    def __init__(self, store: Any, member: Membership, timeout: timedelta) -> None:
        where = MeetingStore(store, member.rank, member.size, timeout) if member.size > 1 else store
        native: Any = dist.ProcessGroupGloo(where, member.rank, member.size, timeout)
        native.options.global_ranks_in_group = list(member.ranks)
        native.options.group_name = member.group
        native._set_sequence_number_for_group()
        super().__init__(native, member.rank, member.size)
        self._meeting = where  # gloo's own reference does not keep a store of Python's alive
        # It holds on to gloo, not to us: in a circle, gloo's connections would stay open until the garbage collector comes.
        self._timeout = partial(_default_timeout, native)
        self._plans = connect(store, member, self._timeout) if member.size > 1 else None
        self._collectives = self._plans or Alone()
        self._batch: list[CollectiveWork] | None = None
        self._pending = Pending()

    @property
    def collectives(self) -> Any:
        return self._collectives

    def counts(self, sent: Sequence[int], received: Sequence[int], options: Any) -> tuple[tuple[int, ...], ...]:
        """How much goes from each rank to each in an all_to_all, from what each rank sends and expects; blocks."""
        assert self._plans is not None
        return self._plans.counts(sent, received, options)

    def recipe(self, op: Any, dtype: torch.dtype) -> Recipe:
        return gloo_recipe(op, dtype, self.size)

    def contribution(self, stage: Staging, tensor: Tensor, recipe: Recipe) -> Tensor:
        return stage.source(tensor, recipe)

    def start_batch(self) -> None:
        self._batch = []

    def end_batch(self, call: Call) -> CollectiveWork | None:
        works, self._batch = self._batch or [], None
        return CollectiveWork(call, works, []) if works else None

    def launch(self, call: Call, launches: Sequence[Launch], outputs: list[Any], stage: Staging) -> CollectiveWork:
        call.parts = len(launches)
        if self._plans is not None:
            self._plans.asking.call = call
        works = [guarded(call, launch) for launch in launches]
        for work in works:
            if isinstance(work, Job):
                work.belongs_to(call)
            else:
                self.unended.add(call, work)
        if self._plans is None:  # a group of one: it is done
            call.begun()
            call.parts, call.finished_ns = 0, call.started_ns
        return self._batched(CollectiveWork(call, works, outputs, stage.finish, self._pending))

    def exchange(self, call: Call, launch: Launch, tensor: Tensor, stage: Staging) -> CollectiveWork:
        call.begun()
        native = guarded(call, launch)
        return self._batched(PeerWork(call, native, tensor, stage.finish, self._pending, sends=call.op == "send"))

    def decisions(self) -> list[Decision]:
        return self._plans.decisions() if self._plans is not None else []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that the other ranks of this host read in place."""
        return self._plans.fabric.arena.allocate(shape, dtype) if self._plans else torch.empty(*shape, dtype=dtype)

    def running(self) -> tuple[Call | None, tuple[int, int, list[int]] | None]:
        return self._plans.running() if self._plans is not None else (None, None)

    def look(self) -> str:
        return self._plans.fabric.look_aside() if self._plans is not None else ""

    def peers(self) -> dict[int, str]:
        return self._plans.fabric.peers() if self._plans is not None else {}

    def links(self) -> list[dict[str, int]]:
        return self._plans.fabric.links() if self._plans is not None else []

    def shutdown(self) -> None:
        """Waits for what still runs, as long as the group's timeout allows."""
        if not self._pending.drain(self._timeout().total_seconds()):
            self.abort()
        if self._plans is not None:
            self._plans.close("the group has been destroyed")
        super().shutdown()

    def abort(self) -> None:
        """Ends the plans that run, and closes every connection of gloo, here and so on the peers: gloo does that when a
        receive times out."""
        if self._plans is not None:
            self._plans.abort("the group has been aborted")
        if self.size > 1:
            peer = (self.rank + 1) % self.size
            with contextlib.suppress(RuntimeError):
                self.native.recv([torch.empty(1, dtype=torch.uint8)], peer, _ABORT_TAG).wait(timedelta(milliseconds=1))
        super().abort()

    def leave(self, seconds: float) -> None:
        if not self._pending.drain(seconds):
            log.warning("Leaving with collectives that other ranks never joined; aborting them.")
            self.abort()
            self._pending.drain(1.0)
        elif self._plans is not None:
            self._plans.close("the process is ending")

    def _batched(self, work: CollectiveWork) -> CollectiveWork:
        if self._batch is not None:
            self._batch.append(work)
        return work


def _default_timeout(native: Any) -> timedelta:
    """gloo keeps the group's default: torch sets it there (``_set_pg_timeout``), past this group."""
    timeout: timedelta = native.options._timeout
    return timeout
