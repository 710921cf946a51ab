"""One collective on one device type: staged, started, wrapped.

`LocalBackend` holds everything that CPU and CUDA tensors share: stage the tensors, build the options, start the
operation, wrap its work. The subclasses in ``cpu.py`` and ``nccl.py`` state what differs, and what carries the
collectives: plans (``planned.py``, ``native_plans.py``) or a c10d library itself. Arguments have been checked by the
caller (``process_group.py``); ranks are group ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    AllToAllOptions,
    BarrierOptions,
    BroadcastOptions,
    GatherOptions,
    ReduceOptions,
    ReduceScatterOptions,
    ScatterOptions,
)

from ncclx_py.errors import Call, failure
from ncclx_py.runtime.choices import Decision
from ncclx_py.runtime.pending import Unended
from ncclx_py.runtime.reduction import Recipe
from ncclx_py.runtime.staging import Staging
from ncclx_py.runtime.work import CollectiveWork

Launch = Callable[[], Any]
Options = TypeVar("Options")


class LocalBackend:
    """Collectives of `size` ranks of which this is `rank`."""

    name: ClassVar[str]
    wire: ClassVar[frozenset[torch.dtype]]
    synchronous_calls_have_futures: ClassVar[bool] = True

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.unended = Unended()

    # What a subclass decides

    @property
    def native(self) -> Any:
        """The ``c10d::Backend`` that torch sees where it asks the group for one."""
        raise NotImplementedError

    @property
    def collectives(self) -> Any:
        """What carries collectives, with the methods of a ``c10d::Backend``."""
        raise NotImplementedError

    def recipe(self, op: Any, dtype: torch.dtype) -> Recipe:
        """How this library reduces `dtype` with `op`; raises TypeError where it cannot."""
        raise NotImplementedError

    def contribution(self, stage: Staging, tensor: Tensor, recipe: Recipe) -> Tensor:
        """What a rank that is not the root gives to `reduce`. A library may overwrite it."""
        return stage.scratch(tensor, recipe)

    def start_batch(self) -> None:
        """From now to `end_batch`, calls belong to one batch (c10d's coalescing)."""
        raise NotImplementedError

    def end_batch(self, call: Call) -> CollectiveWork | None:
        """A work that completes with all calls of the batch; None where there were none."""
        raise NotImplementedError

    def launch(
        self, call: Call, launches: Sequence[Launch], outputs: list[Any], stage: Staging
    ) -> CollectiveWork | None:
        """Starts the library's operations of one call; one work for all of them, None inside a batch of NCCL's."""
        raise NotImplementedError

    def sparse_sum(self, tensor: Tensor, options: Any) -> Any:
        """Starts the sum of sparse tensors; its work."""
        raise NotImplementedError

    def send(self, call: Call, tensor: Tensor, to: int, tag: int) -> CollectiveWork | None:
        raise NotImplementedError

    def recv(self, call: Call, tensor: Tensor, source: int, tag: int) -> CollectiveWork | None:
        raise NotImplementedError

    def recv_any_source(self, call: Call, tensor: Tensor, tag: int) -> CollectiveWork | None:
        raise NotImplementedError

    def set_timeout(self, timeout: timedelta) -> None:
        """The default of calls from now on."""
        raise NotImplementedError

    def shutdown(self) -> None:
        """Ends everything in good order."""
        raise NotImplementedError

    def abort(self) -> None:
        """Ends everything now: whatever runs fails."""
        raise NotImplementedError

    def running(self) -> tuple[Call | None, tuple[int, int, list[int]] | None]:
        """The call that a plan carries out now, and how far it is (``planned.py``); None where that is not known."""
        return None, None

    def look(self) -> str:
        """Why the connections of this group have been aborted, here or by a peer; "" while they have not, or where only the
        library knows. From any thread, without waiting."""
        return ""

    def late(self) -> str:
        """What is about to pass its deadline in a library that then ends the process; "" where nothing is. From any thread."""
        return ""

    def peers(self) -> dict[int, str]:
        """What is known of the processes of the other ranks: "alive", "stopped" or "gone". From any thread."""
        return {}

    def links(self) -> list[dict[str, int]]:
        """Figures of the connections that carry this rank's data to other hosts (`Fabric.links`). From any thread."""
        return []

    def decisions(self) -> list[Decision]:
        """Which plans carried what; empty where none are used."""
        return []

    def leave(self, seconds: float) -> None:
        """The process ends: what runs gets `seconds` to complete, then fails, so that no thread outlives Python."""

    # Reductions

    def all_reduce(self, call: Call, tensor: Tensor, op: Any) -> CollectiveWork | None:
        stage = Staging(self.wire)
        if tensor.is_sparse:
            options = self.options(AllreduceOptions, call, stage, op)
            return self.launch(call, [partial(self.sparse_sum, tensor, options)], [tensor], stage)
        return self.launch(call, [self._all_reduce(call, stage, [tensor], op)], [tensor], stage)

    def all_reduce_coalesced(self, call: Call, tensors: list[Tensor], op: Any) -> CollectiveWork | None:
        """One reduction per dtype, over all tensors of it laid end to end."""
        stage = Staging(self.wire)
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        launches = [self._all_reduce(call, stage, same, op) for same in by_dtype.values()]
        return self.launch(call, launches, tensors, stage)

    def reduce(self, call: Call, tensor: Tensor, root: int, op: Any) -> CollectiveWork | None:
        """Ranks other than the root keep their tensor as it was."""
        stage = Staging(self.wire)
        recipe = self.recipe(op, tensor.dtype)
        buffer = stage.both(tensor, recipe) if self.rank == root else self.contribution(stage, tensor, recipe)
        options = self.options(ReduceOptions, call, stage, recipe.op, root)
        return self.launch(call, [partial(self.collectives.reduce, [buffer], options)], [tensor], stage)

    def reduce_scatter(self, call: Call, output: Tensor, inputs: list[Tensor], op: Any) -> CollectiveWork | None:
        """`inputs` holds one tensor per rank, all of the size of `output`."""
        stage = Staging(self.wire)
        recipe = self.recipe(op, output.dtype)
        sources = [stage.source(tensor, recipe) for tensor in inputs]
        target = stage.target(output, recipe)
        options = self.options(ReduceScatterOptions, call, stage, recipe.op)
        launch = partial(self.collectives.reduce_scatter, [target], [sources], options)
        return self.launch(call, [launch], [output], stage)

    def reduce_scatter_single(
        self, call: Call, outputs: list[Tensor], inputs: list[Tensor], op: Any
    ) -> CollectiveWork | None:
        stage = Staging(self.wire)
        launches = []
        for output, source in zip(outputs, inputs):
            recipe = self.recipe(op, output.dtype)
            flat, target = stage.source(source, recipe), stage.target(output, recipe)
            options = self.options(ReduceScatterOptions, call, stage, recipe.op)
            launches.append(partial(self.collectives._reduce_scatter_base, target, flat, options))
        return self.launch(call, launches, outputs, stage)

    # Data movement

    def broadcast(self, call: Call, tensor: Tensor, root: int) -> CollectiveWork | None:
        stage = Staging(self.wire)
        buffer = stage.source(tensor) if self.rank == root else stage.target(tensor)
        options = self.options(BroadcastOptions, call, stage, root=root)
        return self.launch(call, [partial(self.collectives.broadcast, [buffer], options)], [tensor], stage)

    def all_gather(self, call: Call, outputs: list[Tensor], source: Tensor) -> CollectiveWork | None:
        """`outputs` holds one tensor per rank, all of the size of `source`."""
        stage = Staging(self.wire)
        flat, targets = stage.source(source), [stage.target(tensor) for tensor in outputs]
        options = self.options(AllgatherOptions, call, stage)
        launch = partial(self.collectives.allgather, [targets], [flat], options)
        return self.launch(call, [launch], [outputs], stage)

    def all_gather_single(self, call: Call, outputs: list[Tensor], inputs: list[Tensor]) -> CollectiveWork | None:
        stage = Staging(self.wire)
        launches = []
        for output, source in zip(outputs, inputs):
            flat, target = stage.source(source), stage.target(output)
            options = self.options(AllgatherOptions, call, stage)
            launches.append(partial(self.collectives._allgather_base, target, flat, options))
        return self.launch(call, launches, outputs, stage)

    def all_to_all_single(
        self, call: Call, output: Tensor, source: Tensor, output_rows: list[int], input_rows: list[int]
    ) -> CollectiveWork | None:
        """`output_rows`, `input_rows`: how many rows (first dimension) come from and go to each rank; empty for equal
        numbers on all ranks."""
        stage = Staging(self.wire)
        flat, target = stage.source(source), stage.target(output)
        sent, received = _per_row(flat, source, input_rows), _per_row(target, output, output_rows)
        options = self.options(AllToAllOptions, call, stage)
        launch = partial(self.collectives.alltoall_base, target, flat, received, sent, options)
        return self.launch(call, [launch], [output], stage)

    def all_to_all(self, call: Call, outputs: list[Tensor], inputs: list[Tensor]) -> CollectiveWork | None:
        """One tensor per rank and direction, of any sizes: laid end to end, exchanged, and taken apart."""
        stage = Staging(self.wire)
        flat, target = stage.source(torch.cat([tensor.reshape(-1) for tensor in inputs])), stage.landing(outputs)
        ratio = inputs[0].element_size() // flat.element_size()
        sent = [tensor.numel() * ratio for tensor in inputs]
        received = [tensor.numel() * ratio for tensor in outputs]
        options = self.options(AllToAllOptions, call, stage)
        launch = partial(self.collectives.alltoall_base, target, flat, received, sent, options)
        return self.launch(call, [launch], outputs, stage)

    def gather(self, call: Call, outputs: list[Tensor], source: Tensor, root: int) -> CollectiveWork | None:
        """`outputs` is empty except on the root."""
        stage = Staging(self.wire)
        flat, targets = stage.source(source), [stage.target(tensor) for tensor in outputs]
        options = self.options(GatherOptions, call, stage, root=root)
        launch = partial(self.collectives.gather, [targets] if targets else [], [flat], options)
        return self.launch(call, [launch], [outputs] if outputs else [], stage)

    def scatter(self, call: Call, output: Tensor, inputs: list[Tensor], root: int) -> CollectiveWork | None:
        """`inputs` is empty except on the root."""
        stage = Staging(self.wire)
        sources, target = [stage.source(tensor) for tensor in inputs], stage.target(output)
        options = self.options(ScatterOptions, call, stage, root=root)
        launch = partial(self.collectives.scatter, [target], [sources] if sources else [], options)
        return self.launch(call, [launch], [output], stage)

    def barrier(self, call: Call, device: torch.device) -> CollectiveWork | None:
        stage = Staging(self.wire)
        options = self.options(BarrierOptions, call, stage)
        options.device = device
        if device.index is not None:
            options.device_ids = [device.index]
        return self.launch(call, [partial(self.collectives.barrier, options)], [], stage)

    def _all_reduce(self, call: Call, stage: Staging, tensors: list[Tensor], op: Any) -> Launch:
        recipe = self.recipe(op, tensors[0].dtype)
        buffer = stage.both(tensors[0], recipe) if len(tensors) == 1 else stage.packed(tensors, recipe)
        return partial(self.collectives.allreduce, [buffer], self.options(AllreduceOptions, call, stage, recipe.op))

    def options(
        self, kind: type[Options], call: Call, stage: Staging, op: Any = None, root: int | None = None
    ) -> Options:
        """c10d options of `kind` for a call. NCCL runs synchronous calls on the caller's stream and then has no future
        to chain steps to that follow the collective: there, what is staged must be asynchronous."""
        options: Any = kind()
        options.timeout = call.timeout
        options.asyncOp = call.async_op or (stage.finish is not None and not self.synchronous_calls_have_futures)
        if op is not None:
            options.reduceOp = op
        if root is not None:
            options.rootRank = root
        return options


def guarded(call: Call, launch: Launch) -> Any:
    """Runs `launch`; what the library refuses becomes an error that names the call."""
    try:
        return launch()
    except RuntimeError as error:
        raise failure(call, error) from error


def _per_row(flat: Tensor, tensor: Tensor, rows: list[int]) -> list[int]:
    """Row counts of `tensor` in elements of its buffer `flat`."""
    width = tensor[0].numel() if tensor.shape[0] else 0
    ratio = tensor.element_size() // flat.element_size()
    return [count * width * ratio for count in rows]
