"""Runs plans whose steps are a library's own collectives on sub-groups: how CUDA groups that span hosts communicate.

    plans = two_levels(store, member, timeout, env, flat, connect, counts)     # None on one host: the library does it all
    plans.allreduce([tensor], options).wait()

The tuner chooses as it does for CPU tensors. Where it wants levels, the steps of ``plans/algorithms/native.py`` are
issued on sub-groups (the ranks of a host, the ranks of a rail), which are made when they are first needed; else, and
for everything else, the library's flat collective runs. `flat` and what `connect` makes are c10d backends: NCCL, or gloo
in tests.

On CUDA each lane of a plan has a stream of its own, which waits for what the plan says it must; NCCL adds one per
communicator. So inside and between hosts overlap, and neither the CPU nor the caller's stream waits for anything before
``wait``. On CPU the issuing thread waits where a step needs another one.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp
from torch.distributed.distributed_c10d import AllgatherOptions, AllreduceOptions, ReduceScatterOptions
from torch.futures import Future

from ncclx_py.errors import CollectiveError
from ncclx_py.plans.algorithms.native import NATIVE, build_native, build_native_rank, unsuitable
from ncclx_py.plans.errors import PlanError
from ncclx_py.plans.plan import INTER, Problem, RankPlan, Span, Step
from ncclx_py.plans.problems import payload
from ncclx_py.plans.tuner import Choice
from ncclx_py.plans.verify import verify
from ncclx_py.runtime.basis import Basis, Membership, agree, says
from ncclx_py.runtime.choices import Decision, Decisions
from ncclx_py.runtime.engine import separate
from ncclx_py.runtime.reduction import kind
from ncclx_py.runtime.verified import structure
from ncclx_py.transport.exchange import exchange
from ncclx_py.transport.identity import host_id, rail_names

Matrix = tuple[tuple[int, ...], ...]
Connect = Callable[[str, tuple[int, ...]], Any]
Counts = Callable[[Sequence[int], Sequence[int], Any], Matrix]

FLAT = "flat"
_CACHED = 256  # plans per group
_LEVELS = {"balanced": "two_level"}  # what the library's own form of an algorithm is called here


@dataclass(slots=True)
class _Ready:
    """What carries a problem: a plan, or, without one, the library's flat collective."""

    plan: RankPlan | None
    decision: Decision
    in_place: dict[int, bool] = field(default_factory=dict)


class NativePlans:
    """Collectives of a group that spans hosts; tensors are one-dimensional and contiguous, of one device type."""

    def __init__(self, flat: Any, connect: Connect, counts: Counts, basis: Basis, member: Membership) -> None:
        """`connect` makes the library's group of some group ranks, by a name that no other has; `counts` exchanges the
        numbers of elements that each rank sends and expects, and returns the matrix."""
        self.flat = flat
        self.decisions = Decisions(member.group, basis.settings.log and member.rank == 0)
        self._connect, self._counts = connect, counts
        self._basis, self._rank, self._size = basis, member.rank, member.size
        self._groups: dict[tuple[int, ...], Any] = {}
        self._streams: dict[int, Any] = {}
        self._ready: OrderedDict[tuple[Problem, int], _Ready] = OrderedDict()
        self._verified: set[tuple[Any, ...]] = set()

    def natives(self) -> list[Any]:
        """The sub-groups made so far."""
        return list(self._groups.values())

    def __getattr__(self, name: str) -> Any:
        """Collectives without a plan of levels are the library's."""
        return getattr(self.flat, name)

    def allreduce(self, tensors: list[Tensor], options: Any) -> Any:
        problem = Problem("all_reduce", self._size, tensors[0].numel())
        return self._run(problem, {"data": tensors[0]}, options) or self.flat.allreduce(tensors, options)

    def _reduce_scatter_base(self, output: Tensor, source: Tensor, options: Any) -> Any:
        problem = Problem("reduce_scatter", self._size, counts=(output.numel(),) * self._size)
        buffers = {"input": source, "output": output}
        return self._run(problem, buffers, options) or self.flat._reduce_scatter_base(output, source, options)

    def _allgather_base(self, output: Tensor, source: Tensor, options: Any) -> Any:
        problem = Problem("all_gather", self._size, counts=(source.numel(),) * self._size)
        buffers = {"input": source, "output": output}
        return self._run(problem, buffers, options) or self.flat._allgather_base(output, source, options)

    def alltoall_base(
        self, output: Tensor, source: Tensor, received: Sequence[int], sent: Sequence[int], options: Any
    ) -> Any:
        """Uneven counts are exchanged first, unless the hosts do not allow for levels anyway."""
        matrix: Matrix = ((source.numel() // self._size,) * self._size,) * self._size
        if (received or sent) and not unsuitable(
            Problem("all_to_all", self._size, matrix=matrix), self._basis.topology
        ):
            matrix = self._counts(sent, received, options)
        problem = Problem("all_to_all", self._size, matrix=matrix)
        buffers = {"input": source, "output": output}
        return self._run(problem, buffers, options) or self.flat.alltoall_base(output, source, received, sent, options)

    def _run(self, problem: Problem, buffers: dict[str, Tensor], options: Any) -> NativeWork | None:
        """Issues the plan for a problem; None where the flat collective is to carry it."""
        tensor = next(iter(buffers.values()))
        key = (problem, tensor.element_size())
        ready = self._ready.get(key)
        if ready is None:
            ready = self._ready[key] = self._prepare(problem, tensor.element_size())
            if len(self._ready) > _CACHED:
                self._ready.popitem(last=False)
        ready.decision.calls += 1
        if ready.plan is None:
            return None
        return _Issue(self, ready.plan, separate(buffers, ready.plan, ready.in_place), options).work()

    def _prepare(self, problem: Problem, itemsize: int) -> _Ready:
        topology = self._basis.topology
        choice = self._basis.tuner.choose(problem, itemsize)
        name = _LEVELS.get(choice.algorithm, choice.algorithm)
        reason, plan = choice.reason, None
        if name not in NATIVE.get(problem.collective, {}):
            name = FLAT
        elif unfit := unsuitable(problem, topology):
            name, reason = FLAT, f"{unfit}; {choice.algorithm} would be chosen otherwise"
        else:
            self._admit(problem, Choice(name, choice.parameters))
            plan = build_native_rank(problem, topology, name, self._rank, choice.parameters)
        decision = Decision(
            problem.collective, payload(problem, itemsize), name, dict(choice.parameters) if plan else {}, reason
        )
        return _Ready(plan, self.decisions.note(decision))

    def _admit(self, problem: Problem, choice: Choice) -> None:
        """Every rank verifies the plans of all, which are short: they agree without a message."""
        how, key = self._basis.settings.verify, structure(problem, choice)
        if how == "never" or (how == "first" and key in self._verified):
            return
        try:
            topology = self._basis.topology
            verify(build_native(problem, topology, choice.algorithm, choice.parameters), topology)
        except PlanError as error:
            raise CollectiveError(
                f"the plan {choice.algorithm} failed its verification and was not run: {error}. Choose another algorithm with "
                "a rule file (NCCLX_RULES), and report this one."
            ) from error
        self._verified.add(key)

    def group(self, step: Step) -> Any:
        """The sub-group of a step, made at its first use, on all of its members alike."""
        known = self._groups.get(step.group)
        if known is None:
            known = self._groups[step.group] = self._connect(f"{step.level}-{min(step.group)}", step.group)
        return known

    def stream(self, lane: int, device: torch.device) -> Any:
        """The stream of a lane."""
        known = self._streams.get(lane)
        if known is None:
            known = self._streams[lane] = torch.cuda.Stream(device)
        return known


class NativeWork:
    """The part of a c10d work that `CollectiveWork` asks for, of several works that make up one collective."""

    def __init__(self, works: list[Any], outputs: list[Tensor], tail: Any) -> None:
        """`tail`: on CUDA the stream that is ordered after all of them, else None."""
        self._works, self._outputs, self._tail = works, outputs, tail
        self._event = tail.record_event() if tail is not None else None

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self._event is not None:
            torch.cuda.current_stream(self._outputs[0].device).wait_event(self._event)
            return True
        for work in self._works:
            work.wait(timeout) if timeout else work.wait()
        return True

    def is_completed(self) -> bool:
        if self._event is not None:
            return bool(self._event.query())
        return all(work.is_completed() for work in self._works)

    def get_future(self) -> Future[Any]:
        if self._tail is None:
            return torch.futures.collect_all([work.get_future() for work in self._works])
        future: Future[Any] = Future(devices=[self._outputs[0].device])
        with torch.cuda.stream(self._tail):
            future.set_result(self._outputs)
        return future


class _Issue:
    """Issues one plan, step by step."""

    def __init__(self, plans: NativePlans, plan: RankPlan, buffers: Mapping[str, Tensor], options: Any) -> None:
        self._plans, self._plan, self._options = plans, plan, options
        first = next(iter(buffers.values()))
        self._outputs = [buffers.get("data", buffers.get("output", first))]
        self._buffers = {**buffers, "scratch": first.new_empty(plan.scratch)}
        self._device = first.device
        self._works: list[Any] = [None] * len(plan.steps)
        self._inner: set[Any] = set()  # works that others have waited for
        self._used: dict[int, Any] = {}

    def work(self) -> NativeWork:
        steps, at = self._plan.steps, 0
        last: dict[int, int] = {}
        while at < len(steps):
            end = self._together(at)
            with self._lane(steps[at].lane):
                for index in range(at, end):
                    self._await([*steps[index].deps, *([last[steps[index].lane]] if steps[index].lane in last else [])])
                work = self._launch(steps[at:end])
                self._works[at:end] = [work] * (end - at)
            last.update({step.lane: index for index, step in enumerate(steps[at:end], at)})
            at = end
        return self._finished()

    def _together(self, at: int) -> int:
        """Where the run of steps ends that go out at once: the messages of a phase, copies in a row, or one step."""
        steps, first = self._plan.steps, self._plan.steps[at]
        end = at + 1
        if first.op == "native":
            return end
        messages = first.op != "copy"
        while end < len(steps) and steps[end].op != "native" and (steps[end].op != "copy") == messages:
            if steps[end].chunk != first.chunk:
                break
            end += 1
        return end

    def _await(self, indexes: Sequence[int]) -> None:
        """Waits on the current lane. On CPU once is enough, and all that gloo bears: its reduce-scatter copies its result
        out again at each wait."""
        for index in indexes:
            work = self._works[index]
            if work is not None and (self._device.type == "cuda" or work not in self._inner):
                work.wait()
                self._inner.add(work)

    def _launch(self, steps: Sequence[Step]) -> Any:
        if steps[0].op == "native":
            return self._native(steps[0])
        if steps[0].op == "copy":
            pairs = [(self._view(step.dst), self._view(step.src)) for step in steps]
            torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])
            return _Marked() if self._device.type == "cuda" else None
        return self._messages(steps)

    def _native(self, step: Step) -> Any:
        group, source, target = self._plans.group(step), self._view(step.src), self._view(step.dst)
        if step.native == "all_reduce":
            return group.allreduce([target], self._asynchronous(AllreduceOptions, self._reduction(step)))
        if step.native == "reduce_scatter":
            options = self._asynchronous(ReduceScatterOptions, self._reduction(step))
            return group._reduce_scatter_base(target, source, options)
        return group._allgather_base(target, source, self._asynchronous(AllgatherOptions))

    def _reduction(self, step: Step) -> Any:
        """A mean of means is the mean, as all hosts hold equally many ranks; but a factor is for one level only."""
        op = self._options.reduceOp
        return ReduceOp.SUM if step.level == INTER and kind(op) == ReduceOp.PREMUL_SUM else op

    def _messages(self, steps: Sequence[Step]) -> Any:
        """All messages of a phase at once: no rank waits in one for another."""
        flat = self._plans.flat
        grouped = self._device.type == "cuda"
        if grouped:
            flat._start_coalescing()
        works = []
        try:
            for step in steps:
                if step.op == "send":
                    works.append(flat.send([self._view(step.src)], step.peer, 0))
                else:
                    works.append(flat.recv([self._view(step.dst)], step.peer, 0))
        finally:
            work = flat._end_coalescing() if grouped else _All(works)
        return work

    def _finished(self) -> NativeWork:
        works = [work for work in dict.fromkeys(self._works) if work is not None and work not in self._inner]
        if self._device.type != "cuda":
            return NativeWork(works, self._outputs, None)
        with self._lane(-1):
            for work in works:
                work.wait()
        tail = self._used[-1]
        for tensor in self._buffers.values():  # may be let go of before the streams are done with it
            tensor.record_stream(tail)
        return NativeWork(works, self._outputs, tail)

    def _lane(self, lane: int) -> Any:
        """The stream of a lane as the current one; at its first use it waits for the caller's."""
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        if lane not in self._used:
            self._used[lane] = self._plans.stream(lane, self._device)
            self._used[lane].wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._used[lane])

    def _view(self, span: Span | None) -> Tensor:
        assert span is not None
        return self._buffers[span.buffer][span.start : span.stop]

    def _asynchronous(self, form: Any, op: Any = None) -> Any:
        options = form()
        options.timeout, options.asyncOp = self._options.timeout, True
        if op is not None:
            options.reduceOp = op
        return options


class _Marked:
    """What has been put on a CUDA stream up to here, as a work."""

    def __init__(self) -> None:
        self._event = torch.cuda.current_stream().record_event()

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


class _All:
    """Several works as one."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self, *timeout: timedelta) -> None:
        for work in self._works:
            work.wait(*timeout)

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


def two_levels(
    store: Any,
    member: Membership,
    timeout: timedelta,
    env: Mapping[str, str],
    flat: Any,
    connect: Connect,
    counts: Counts,
) -> NativePlans | None:
    """The plans of a group that spans hosts; None for one that does not. Every rank must call it.

    Raises CollectiveError where the ranks' settings are wrong or differ.
    """
    if member.size == 1:
        return None
    shared = dist.PrefixStore("plans/", store)
    hosts = [row[0] for row in exchange(shared, "hosts", member.rank, member.size, [host_id(env)], timeout)]
    if len(set(hosts)) == 1:
        return None
    said = exchange(shared, "settings", member.rank, member.size, says(member.rank, env, gpus=True), timeout)
    numbers = list(dict.fromkeys(hosts))
    host_of = tuple(numbers.index(host) for host in hosts)
    rails = max(1, len(rail_names(env)))
    basis = agree(member, shared, timeout, env, host_of, rails, said)
    return NativePlans(flat, connect, counts, basis, member)
