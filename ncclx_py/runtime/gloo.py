"""CPU tensors: collectives over gloo.

gloo runs each call on a thread of its own pool and completes a future; nothing here holds the GIL while it waits. It
lacks several dtypes and operations (``reduction.gloo_recipe``), uneven list collectives, a real reduce-scatter, and
coalescing, which are composed here.
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
from torch.distributed.distributed_c10d import AllToAllOptions, BroadcastOptions

from ncclx_py.runtime.errors import Call
from ncclx_py.runtime.local import Launch, LocalBackend, build_options, guarded
from ncclx_py.runtime.pending import Pending
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

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, group: str, ranks: list[int]) -> None:
        native: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
        native.options.global_ranks_in_group = ranks
        native.options.group_name = group
        native._set_sequence_number_for_group()
        super().__init__(native, rank, size)
        self._batch: list[CollectiveWork] | None = None
        self._pending = Pending()
        self._timeout = timeout

    def recipe(self, op: Any, dtype: torch.dtype) -> Recipe:
        return gloo_recipe(op, dtype, self.size)

    def all_gather(self, call: Call, outputs: list[Tensor], source: Tensor) -> CollectiveWork | None:
        """gloo gathers equal sizes only: uneven ones are one broadcast per rank."""
        if len({tensor.numel() for tensor in outputs}) == 1:
            return super().all_gather(call, outputs, source)
        stage = Staging(self.wire)
        buffers = [stage.target(tensor) for tensor in outputs]
        buffers[self.rank].copy_(stage.source(source))
        launches = [
            partial(self.native.broadcast, [buffer], build_options(BroadcastOptions, call, stage, root=root))
            for root, buffer in enumerate(buffers)
        ]
        return self.launch(call, launches, [outputs], stage)

    def reduce_scatter(self, call: Call, output: Tensor, inputs: list[Tensor], op: Any) -> CollectiveWork:
        stage = Staging(self.wire)
        recipe = self.recipe(op, output.dtype)
        flat = torch.cat([stage.source(tensor, recipe) for tensor in inputs])
        parts = [tensor.numel() for tensor in inputs]
        return self.launch(call, [self._scattered(call, stage, recipe, output, flat, parts)], [output], stage)

    def reduce_scatter_single(self, call: Call, outputs: list[Tensor], inputs: list[Tensor], op: Any) -> CollectiveWork:
        stage = Staging(self.wire)
        launches = []
        for output, source in zip(outputs, inputs):
            recipe = self.recipe(op, output.dtype)
            flat = stage.source(source, recipe)
            launches.append(self._scattered(call, stage, recipe, output, flat, [output.numel()] * self.size))
        return self.launch(call, launches, outputs, stage)

    def _scattered(
        self, call: Call, stage: Staging, recipe: Recipe, output: Tensor, flat: Tensor, parts: list[int]
    ) -> Launch:
        """gloo's own reduce-scatter reduces everything everywhere, and copies its part out only when somebody waits.
        Here each rank sends each other rank its part, once, and reduces what it receives."""
        landing = stage.contributions(output, recipe, self.size)
        width = flat.numel() // max(1, sum(parts))  # complex numbers travel as two
        sent = [part * width for part in parts]
        received = [sent[self.rank]] * self.size
        options = build_options(AllToAllOptions, call, stage)
        return partial(self.native.alltoall_base, landing, flat, received, sent, options)

    def start_batch(self) -> None:
        self._batch = []

    def end_batch(self, call: Call) -> CollectiveWork | None:
        works, self._batch = self._batch or [], None
        return CollectiveWork(call, works, []) if works else None

    def launch(self, call: Call, launches: Sequence[Launch], outputs: list[Any], stage: Staging) -> CollectiveWork:
        works = [guarded(call, launch) for launch in launches]
        return self._batched(CollectiveWork(call, works, outputs, stage.finish, self._pending))

    def exchange(self, call: Call, launch: Launch, tensor: Tensor, stage: Staging) -> CollectiveWork:
        native = guarded(call, launch)
        return self._batched(PeerWork(call, native, tensor, stage.finish, self._pending, sends=call.op == "send"))

    def shutdown(self) -> None:
        """Waits for what still runs, as long as the group's timeout allows."""
        if not self._pending.drain(self._timeout.total_seconds()):
            self.abort()
        super().shutdown()

    def abort(self) -> None:
        """Closes every connection, here and so on the peers: gloo does that when a receive times out."""
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

    def _batched(self, work: CollectiveWork) -> CollectiveWork:
        if self._batch is not None:
            self._batch.append(work)
        return work
