"""`PlannedNative`: collectives of CPU tensors by plans, behind the methods of a c10d backend.

``local.py`` calls it as it calls NCCL: flat contiguous buffers and c10d's options in, a work out. Each call
becomes a job of the group's progress thread; the engine chooses and runs the plan there. `Alone` is the same for a group
of one rank, where every collective is a copy at most.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ncclx_py.errors import Call, CollectiveError
from ncclx_py.plans.plan import Problem
from ncclx_py.runtime.basis import Membership, agree, says
from ncclx_py.runtime.choices import Decision
from ncclx_py.runtime.engine import Engine, Request
from ncclx_py.runtime.progress import Job, Progress
from ncclx_py.runtime.reduction import kind
from ncclx_py.runtime.sparse import sum_sparse
from ncclx_py.transport.executor import Executor
from ncclx_py.transport.fabric import Fabric

_GRACE = 10.0  # seconds that an aborted collective gets to notice


class _Asking(threading.local):
    """The call that this thread is about to start."""

    call: Call | None = None


class PlannedNative:
    """Collectives among the ranks of a fabric. All tensors are one-dimensional and contiguous.

    `timeout` is asked for the default of calls that do not bring their own. Whoever calls a method on behalf of a call
    says so in ``asking.call`` first.
    """

    def __init__(self, engine: Engine, fabric: Fabric, group: str, timeout: Callable[[], timedelta]) -> None:
        self.fabric = fabric
        self.asking = _Asking()
        self._engine = engine
        self._progress = Progress(group)
        self._rank, self._size = fabric.rank, fabric.size
        self._timeout = timeout

    def decisions(self) -> list[Decision]:
        return self._engine.decisions.all()

    def running(self) -> tuple[Call | None, tuple[int, int, list[int]] | None]:
        """The call that runs now and how far its plan is: steps done, steps in all, ranks waited for. From any thread."""
        return self._progress.running, self._engine.progress()

    def abort(self, reason: str) -> None:
        """Ends what runs and what waits to run, here and on the other ranks, and lets go of everything."""
        self.fabric.abort(reason)
        self.fabric.mail.close(reason)
        self.close(f"{reason}. Make a new group")

    def close(self, reason: str) -> None:
        """Ends the thread and lets go of the fabric. What runs must have ended, or been aborted, before."""
        if self._progress.close(f"This collective was not run: {reason}.", _GRACE):
            self.fabric.close()

    # Reductions

    def allreduce(self, tensors: list[Tensor], options: Any) -> Job:
        data = tensors[0]
        problem = Problem("all_reduce", self._size, data.numel())
        return self._start("all_reduce", problem, {"data": data}, options, kind(options.reduceOp))

    def allreduce_sparse(self, tensors: list[Tensor], options: Any) -> Job:
        """Raises TypeError for anything but a sum."""
        if kind(options.reduceOp) != kind(dist.ReduceOp.SUM):
            raise TypeError(f"Sparse tensors can only be summed, not reduced with {options.reduceOp}.")
        seconds = self._seconds(options)

        def gather(part: Tensor, counts: tuple[int, ...], job: Job) -> Tensor:
            landing = part.new_empty(sum(counts))
            problem = Problem("all_gather", self._size, counts=counts)
            buffers = {"input": part, "output": landing}
            self._engine.run(Request("all_reduce of sparse", problem, buffers, seconds=seconds), job)
            return landing

        def run(job: Job) -> None:
            sum_sparse(tensors[0], self._size, lambda part, counts: gather(part, counts, job))

        return self._progress.start(run, inline=not options.asyncOp, call=self.asking.call)

    def reduce(self, tensors: list[Tensor], options: Any) -> Job:
        """The result is in the root's tensor; the others' are left alone."""
        data, root = tensors[0], options.rootRank
        problem = Problem("reduce", self._size, data.numel(), root)
        buffers = {"input": data, "output": data if self._rank == root else data[:0]}
        return self._start("reduce", problem, buffers, options, kind(options.reduceOp), root)

    def _reduce_scatter_base(self, output: Tensor, source: Tensor, options: Any) -> Job:
        return self._scattered(output, source, [output.numel()] * self._size, options)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any) -> Job:
        """The inputs may differ in size."""
        sources = inputs[0]
        return self._scattered(outputs[0], _joined(sources), [part.numel() for part in sources], options)

    def barrier(self, options: Any) -> Job:
        problem = Problem("all_reduce", self._size, 1)
        return self._start("barrier", problem, {"data": torch.zeros(1)}, options, kind(dist.ReduceOp.SUM))

    # Data movement

    def broadcast(self, tensors: list[Tensor], options: Any) -> Job:
        root = options.rootRank
        problem = Problem("broadcast", self._size, tensors[0].numel(), root)
        return self._start("broadcast", problem, {"data": tensors[0]}, options, root=root)

    def _allgather_base(self, output: Tensor, source: Tensor, options: Any) -> Job:
        problem = Problem("all_gather", self._size, counts=(source.numel(),) * self._size)
        return self._start("all_gather", problem, {"input": source, "output": output}, options)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> Job:
        """The outputs may differ in size."""
        targets, source = outputs[0], inputs[0]
        problem = Problem("all_gather", self._size, counts=tuple(part.numel() for part in targets))
        landing = source.new_empty(sum(problem.counts))
        after = lambda: _hand_out(landing, targets)  # noqa: E731
        return self._start("all_gather", problem, {"input": source, "output": landing}, options, after=after)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> Job:
        source, root = inputs[0], options.rootRank
        targets = outputs[0] if outputs else []
        landing = source.new_empty(source.numel() * len(targets))
        to_root = tuple(source.numel() if rank == root else 0 for rank in range(self._size))
        problem = Problem("all_to_all", self._size, matrix=(to_root,) * self._size)
        after = lambda: _hand_out(landing, targets)  # noqa: E731
        return self._start("gather", problem, {"input": source, "output": landing}, options, root=root, after=after)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any) -> Job:
        output, root = outputs[0], options.rootRank
        whole = (output.numel(),) * self._size
        matrix = tuple(whole if rank == root else (0,) * self._size for rank in range(self._size))
        source = _joined(inputs[0]) if inputs else output[:0]
        problem = Problem("all_to_all", self._size, matrix=matrix)
        return self._start("scatter", problem, {"input": source, "output": output}, options, root=root)

    def alltoall_base(
        self, output: Tensor, source: Tensor, received: Sequence[int], sent: Sequence[int], options: Any
    ) -> Job:
        """Without `received` and `sent` (elements from and to each rank) everyone sends everyone the same number."""
        buffers = {"input": source, "output": output}
        if not received and not sent:
            matrix = ((source.numel() // self._size,) * self._size,) * self._size
            return self._start("all_to_all", Problem("all_to_all", self._size, matrix=matrix), buffers, options)
        seconds = self._seconds(options)

        def exchange(job: Job) -> None:
            matrix = self._counts(sent, received, seconds, job)
            problem = Problem("all_to_all", self._size, matrix=matrix)
            self._engine.run(Request("all_to_all", problem, buffers, seconds=seconds), job)

        return self._progress.start(exchange, inline=not options.asyncOp, call=self.asking.call)

    def counts(self, sent: Sequence[int], received: Sequence[int], options: Any) -> tuple[tuple[int, ...], ...]:
        """How much goes from each rank to each; blocks. Raises CollectiveError where two ranks do not agree."""
        found: list[tuple[tuple[int, ...], ...]] = []
        seconds = self._seconds(options)
        self._progress.start(lambda job: found.append(self._counts(sent, received, seconds, job)), inline=True).wait()
        return found[0]

    # Parts

    def _scattered(self, output: Tensor, source: Tensor, counts: list[int], options: Any) -> Job:
        problem = Problem("reduce_scatter", self._size, counts=tuple(counts))
        buffers = {"input": source, "output": output}
        return self._start("reduce_scatter", problem, buffers, options, kind(options.reduceOp))

    def _start(
        self,
        name: str,
        problem: Problem,
        buffers: dict[str, Tensor],
        options: Any,
        op: Any = None,
        root: int = -1,
        after: Callable[[], None] | None = None,
    ) -> Job:
        request = Request(name, problem, buffers, op, root, self._seconds(options))

        def run(job: Job) -> None:
            self._engine.run(request, job)
            if after is not None:
                after()

        return self._progress.start(run, inline=not getattr(options, "asyncOp", True), call=self.asking.call)

    def _seconds(self, options: Any) -> float:
        asked: float = options.timeout.total_seconds()
        return asked if asked > 0 else self._timeout().total_seconds()

    def _counts(
        self, sent: Sequence[int], received: Sequence[int], seconds: float, job: Job
    ) -> tuple[tuple[int, ...], ...]:
        """How much goes from each rank to each. Raises CollectiveError, on every rank, where two ranks do not agree."""
        size = self._size
        mine, all_ = torch.tensor([*sent, *received]), torch.empty(2 * size * size, dtype=torch.int64)
        problem = Problem("all_gather", size, counts=(2 * size,) * size)
        request = Request("counts of all_to_all", problem, {"input": mine, "output": all_}, seconds=seconds)
        self._engine.run(request, job)
        table = all_.view(size, 2, size)
        sends, expects = table[:, 0], table[:, 1].t()
        if not torch.equal(sends, expects):
            source, target = (sends != expects).nonzero()[0].tolist()
            raise CollectiveError(
                f"rank {source} sends {int(sends[source, target])} elements to rank {target}, which expects "
                f"{int(expects[source, target])}. Give split sizes that fit together on all ranks; nothing was sent."
            )
        return tuple(map(tuple, sends.tolist()))


def connect(store: Any, member: Membership, timeout: Callable[[], timedelta]) -> PlannedNative:
    """Joins all ranks of a group of two or more; every rank must call it. `timeout` is asked for the group's default,
    now and at each call. Raises CollectiveError when somebody is missing, or the ranks do not agree."""
    shared = dist.PrefixStore("plans/", store)
    fabric = Fabric.connect(shared, member.rank, member.size, timeout(), says(member.rank, os.environ))
    try:
        basis = agree(member, shared, timeout(), os.environ, fabric.host_of, fabric.rails, fabric.said)
        return PlannedNative(Engine(Executor(fabric), basis, member), fabric, member.group, timeout)
    except BaseException:
        fabric.close()
        raise


class Alone:
    """The collectives of a group of one rank: the result is a copy of the input, where it is not the same tensor."""

    def allreduce(self, tensors: list[Tensor], options: Any) -> Job:
        return _DONE

    reduce = broadcast = allreduce_sparse = allreduce

    def barrier(self, options: Any) -> Job:
        return _DONE

    def _allgather_base(self, output: Tensor, source: Tensor, options: Any) -> Job:
        return _copied(output, source)

    _reduce_scatter_base = _allgather_base

    def alltoall_base(
        self, output: Tensor, source: Tensor, received: Sequence[int], sent: Sequence[int], options: Any
    ) -> Job:
        return _copied(output, source)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> Job:
        return _copied(outputs[0][0], inputs[0])

    gather = allgather

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any) -> Job:
        return _copied(outputs[0], inputs[0][0])

    scatter = reduce_scatter


def _done() -> Job:
    job = Job(lambda job: None)
    job.carried_by("copy")
    job.work()
    job.let_go()
    return job


_DONE = _done()


def _copied(output: Tensor, source: Tensor) -> Job:
    if output.data_ptr() != source.data_ptr():
        with torch.inference_mode(output.is_inference()), torch.no_grad():
            output.copy_(source)
    return _DONE


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _hand_out(landing: Tensor, targets: list[Tensor]) -> None:
    for target, part in zip(targets, landing.split([target.numel() for target in targets])):
        with torch.inference_mode(target.is_inference()), torch.no_grad():
            target.copy_(part)
