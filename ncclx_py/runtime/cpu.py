"""CPU tensors: collectives as plans, over shared memory and TCP; messages between two ranks over ``transport/mail.py``.

Nothing here holds the GIL while it waits. Making a group connects nobody. The dtypes and operations that plans reduce are
gloo's (``reduction.gloo_recipe`` expresses the others in them).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from ncclx_py.errors import Call, CollectiveError
from ncclx_py.runtime.basis import Membership
from ncclx_py.runtime.choices import Decision
from ncclx_py.runtime.face import Face
from ncclx_py.runtime.local import Launch, LocalBackend, guarded
from ncclx_py.runtime.monitored import monitored_barrier
from ncclx_py.runtime.pending import Pending
from ncclx_py.runtime.planned import Alone, connect
from ncclx_py.runtime.progress import Job
from ncclx_py.runtime.reduction import Recipe, gloo_recipe
from ncclx_py.runtime.staging import Staging
from ncclx_py.runtime.work import CollectiveWork, MessageWork
from ncclx_py.transport.mail import Mailbox

log = logging.getLogger(__name__)


class CpuBackend(LocalBackend):
    """Collectives of CPU tensors. All ranks of the group must construct it."""

    name = "cpu"
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
        super().__init__(member.rank, member.size)
        self._face = Face(
            member, timeout
        )  # those below hold on to it, not to us: a circle would wait for the collector
        self._plans = connect(store, member, self._face.timeout) if member.size > 1 else None
        self._collectives = self._plans or Alone()
        if self._plans is not None:
            self._plans.fabric.mail.timeout = self._face.timeout
        self._batch: list[CollectiveWork] | None = None
        self._pending = Pending()

    @property
    def native(self) -> Any:
        return self._face.backend()

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
            assert isinstance(work, Job)
            work.belongs_to(call)
        if self._plans is None:  # a group of one: it is done
            call.begun()
            call.parts, call.finished_ns = 0, call.started_ns
        return self._batched(CollectiveWork(call, works, outputs, stage.finish, self._pending))

    def sparse_sum(self, tensor: Tensor, options: Any) -> Job:
        return self._collectives.allreduce_sparse([tensor], options)

    # Point to point

    def send(self, call: Call, tensor: Tensor, to: int, tag: int) -> CollectiveWork:
        stage = Staging(self.wire)
        return self._message(call, tensor, stage, stage.source(tensor), to, tag)

    def recv(self, call: Call, tensor: Tensor, source: int, tag: int) -> CollectiveWork:
        stage = Staging(self.wire)
        return self._message(call, tensor, stage, stage.target(tensor), source, tag)

    def recv_any_source(self, call: Call, tensor: Tensor, tag: int) -> CollectiveWork:
        stage = Staging(self.wire)
        return self._message(call, tensor, stage, stage.target(tensor), -1, tag)

    def monitored_barrier(self, call: Call, wait_all_ranks: bool) -> None:
        if self.size > 1:
            asked = call.timeout if call.timeout.total_seconds() > 0 else self._face.timeout()
            monitored_barrier(self._mail(call), call, asked, wait_all_ranks)

    def _message(self, call: Call, tensor: Tensor, stage: Staging, flat: Tensor, peer: int, tag: int) -> CollectiveWork:
        mail = self._mail(call)
        call.begun()
        post = mail.send if call.op == "send" else mail.receive
        return self._batched(MessageWork(call, post(flat, tensor.dtype, peer, tag, call), tensor, stage.finish))

    def _mail(self, call: Call) -> Mailbox:
        if self._plans is None:
            raise CollectiveError(
                f"{call}: this rank is alone in its group, so there is nobody to exchange messages with."
            )
        return self._plans.fabric.mail

    # Facts

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

    # Life

    def set_timeout(self, timeout: timedelta) -> None:
        self._face.set_timeout(timeout)

    def shutdown(self) -> None:
        """Waits for what still runs, as long as the group's timeout allows."""
        if not self._drained(self._face.timeout().total_seconds()):
            self.abort()
        if self._plans is not None:
            self._plans.close("the group has been destroyed")
        self._face.close()

    def abort(self) -> None:
        if self._plans is not None:
            self._plans.abort("the group has been aborted")
        self._face.close()

    def leave(self, seconds: float) -> None:
        if not self._drained(seconds):
            log.warning("Leaving with collectives or messages that other ranks never joined; aborting them.")
            self.abort()
            self._pending.drain(1.0)
        elif self._plans is not None:
            self._plans.close("the process is ending")

    def _drained(self, seconds: float) -> bool:
        """Waits until collectives and sends are through; False when `seconds` pass first."""
        until = time.monotonic() + seconds
        if not self._pending.drain(seconds):
            return False
        return self._plans is None or self._plans.fabric.mail.drain(until - time.monotonic())

    def _batched(self, work: CollectiveWork) -> CollectiveWork:
        if self._batch is not None:
            self._batch.append(work)
        return work
