"""Turns what a group is asked for into plans that run: choose, build, verify, lower, remember, execute.

    engine = Engine(executor, basis, member)
    engine.run(Request("all_reduce", problem, {"data": tensor}, op=ReduceOp.SUM, seconds=60), job)

All ranks of a group make the same calls, so they choose the same plans, and verify the same ones at the same time: rank 0
verifies the plans of all ranks and tells the others, before any of them moves a byte of the caller's, unless it has told them
when the group was made (``verified.py``). Plans that were built for another group of this process are taken from there. An
engine is used by one thread at a time (``progress.py``); `explain` may be called from any.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ncclx_py.errors import CollectiveError
from ncclx_py.plans.algorithms.registry import build, build_rank, find
from ncclx_py.plans.aliasing import survives
from ncclx_py.plans.errors import PlanError
from ncclx_py.plans.plan import Plan, Problem, Program, RankPlan, Span
from ncclx_py.plans.problems import payload
from ncclx_py.plans.topology import Topology
from ncclx_py.plans.tuner import Choice
from ncclx_py.plans.verify import verify
from ncclx_py.runtime.basis import Basis, Membership
from ncclx_py.runtime.choices import Decision, Decisions
from ncclx_py.runtime.progress import Job
from ncclx_py.runtime.recent import Recent
from ncclx_py.runtime.verified import VERIFIED, mark_of
from ncclx_py.transport.signature import Signature

SLICE = 32 << 20  # bytes
_CACHED = 256  # plans per group; the one unused for longest goes first
_VERDICT_BYTES = 1024


_plans: Recent[tuple[Any, ...], RankPlan] = Recent(_CACHED)  # of all groups


class _Refused(CollectiveError):
    """A plan failed its verification, as all ranks know."""


@dataclass(slots=True)
class Request:
    """One collective: `name` as its caller knows it, the caller's flat buffers as the plan names them, and `op`, a
    ``ReduceOp.RedOpType`` or None where nothing is reduced."""

    name: str
    problem: Problem
    buffers: dict[str, Tensor]
    op: Any = None
    root: int = -1
    seconds: float = 1800.0


@dataclass(slots=True)
class _Ready:
    """A plan that may run, as the executor wants it. `in_place` remembers which overlaps of buffers it survives."""

    plan: RankPlan
    schedule: Any
    decision: Decision
    in_place: dict[int, bool] = field(default_factory=dict)


class Engine:
    """The plans of one group, on one rank."""

    def __init__(self, executor: Any, basis: Basis, member: Membership) -> None:
        self.topology = basis.topology
        self.decisions = Decisions(member.group, basis.settings.log and member.rank == 0)
        self._executor = executor
        self._tuner = basis.tuner
        self._rank = member.rank
        self._verify = basis.settings.verify
        self._outside = basis.outside
        self._ready: OrderedDict[tuple[str, Problem, int], _Ready] = OrderedDict()
        self._verified = set(basis.verified)
        self._sequence = 0
        self._verdicts: Any = None

    def run(self, request: Request, job: Job) -> None:
        """Blocks until this rank's part is done. Raises CollectiveError, or PlanError when no plan can be made.

        Inside one host long vectors run in slices, whose copies in shared memory stay in use from one to the next.
        """
        try:
            self._run_in_slices(request, job, time.monotonic() + request.seconds)
        except BaseException:
            if self._executor.stuck is not None:
                job.stuck_at(self._executor.stuck)
            raise

    def _run_in_slices(self, request: Request, job: Job, deadline: float) -> None:
        tensor = next(iter(request.buffers.values()))
        length = SLICE // tensor.element_size()
        if request.problem.count <= length or len(self.topology.hosts) > 1 or self._from_file(request.problem):
            self._run(request, job, deadline)
            return
        for start in range(0, request.problem.count, length):
            stop = min(start + length, request.problem.count)
            buffers = {name: buffer[start:stop] for name, buffer in request.buffers.items()}
            self._run(
                replace(request, problem=replace(request.problem, count=stop - start), buffers=buffers), job, deadline
            )

    def _run(self, request: Request, job: Job, deadline: float) -> None:
        tensor = next(iter(request.buffers.values()))
        key = (request.name, request.problem, tensor.element_size())
        ready = self._ready.get(key)
        if ready is None:
            ready = self._prepared(request, tensor, deadline)
            self._ready[key] = ready
            if len(self._ready) > _CACHED:
                self._ready.popitem(last=False)
        else:
            self._ready.move_to_end(key)
        job.carried_by(ready.decision.algorithm, ready.decision)
        buffers = separate(request.buffers, ready.plan, ready.in_place)
        signature = self._sign(request.name, tensor.dtype, _elements(request.problem), request.root, request.op)
        self._execute(ready.schedule, buffers, request.op, signature, deadline)
        ready.decision.calls += 1

    def progress(self) -> tuple[int, int, list[int]] | None:
        """How far the plan that runs now is: steps done, steps in all, ranks waited for. From any thread."""
        found: tuple[int, int, list[int]] | None = self._executor.progress()
        return found

    def _prepared(self, request: Request, tensor: Tensor, deadline: float) -> _Ready:
        """`_prepare`; what goes wrong on this rank alone ends the call on the others at once, not at their deadline."""
        try:
            return self._prepare(request, tensor, deadline)
        except _Refused:
            raise
        except BaseException as error:
            self._executor.abort(f"{request.name}: no plan could be prepared: {str(error) or type(error).__name__}")
            raise

    def _prepare(self, request: Request, tensor: Tensor, deadline: float) -> _Ready:
        problem, itemsize = request.problem, tensor.element_size()
        outside = self._from_file(problem)
        if outside is not None:
            choice = Choice(outside.algorithm, outside.parameters, "the plan file NCCLX_PLAN")
            plan = outside.ranks[self._rank]
        else:
            choice = self._tuner.choose(problem, itemsize)
            plan = self._plan(problem, choice)
            self._admit(request, choice, tensor.dtype, deadline)
        # The order of ranks alone decides the bits of `ordered`, whoever shares a host.
        schedule = self._executor.lower(plan, problem.lengths(self._rank), round_once=choice.algorithm != "ordered")
        decision = Decision(
            request.name,
            payload(problem, itemsize),
            choice.algorithm,
            dict(choice.parameters),
            choice.reason,
            choice.predicted_s,
            choice.bound_s,
        )
        return _Ready(plan, schedule, self.decisions.note(decision))

    def _plan(self, problem: Problem, choice: Choice) -> RankPlan:
        """This rank's plan. Those of all_to_all are not kept: each call may bring other counts, for all pairs of ranks."""
        algorithm, parameters = find(problem.collective, choice.algorithm), choice.parameters

        def make() -> RankPlan:
            return build_rank(problem, self.topology, choice.algorithm, self._rank, parameters)

        if problem.collective == "all_to_all":
            return make()
        key = (problem, self.topology, algorithm.name, algorithm.build, self._rank, *sorted(parameters.items()))
        return _plans.get(key, make)

    def _from_file(self, problem: Problem) -> Plan | None:
        return self._outside if self._outside is not None and self._outside.problem == problem else None

    def _admit(self, request: Request, choice: Choice, dtype: torch.dtype, deadline: float) -> None:
        """Raises CollectiveError on all ranks when the chosen plan is wrong."""
        if self._verify == "never":
            return
        mark, once = mark_of(self.topology, request.problem, choice), self._verify == "first"
        told = once and mark in self._verified
        if self._rank == 0:
            known = once and mark in VERIFIED
            verdict = "" if told or known else self._judge(request.problem, choice)
        else:
            verdict = ""
        if not told:
            verdict = self._announce(verdict, request, dtype, deadline)
        if verdict:
            raise _Refused(
                f"The plan {choice.algorithm} of {request.name} failed its verification and was not run: {verdict}. Choose "
                "another algorithm with a rule file (NCCLX_RULES), and report this one."
            )
        self._verified.add(mark)
        if self._rank == 0:
            VERIFIED.add(mark)

    def _judge(self, problem: Problem, choice: Choice) -> str:
        """What is wrong with the plans of all ranks, "" when nothing is."""
        try:
            verify(build(problem, self.topology, choice.algorithm, choice.parameters), self.topology)
        except PlanError as error:
            return str(error).rstrip(".") or "it is wrong"
        return ""

    def _announce(self, verdict: str, request: Request, dtype: torch.dtype, deadline: float) -> str:
        """Rank 0's verdict on every rank: one message to each, simple enough to need no verification."""
        text = verdict.encode()[:_VERDICT_BYTES]
        data = torch.zeros(_VERDICT_BYTES, dtype=torch.uint8)
        if text:
            data[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        if self._verdicts is None:
            plan = _from_rank_zero(self._rank, self.topology)
            self._verdicts = self._executor.lower(plan, {"data": _VERDICT_BYTES})
        name = f"verification of {request.name}"
        signature = self._sign(name, dtype, _elements(request.problem), request.root, request.op)
        self._execute(self._verdicts, {"data": data}, None, signature, deadline)
        return bytes(data.tolist()).rstrip(b"\0").decode(errors="replace")

    def _execute(
        self, schedule: Any, buffers: dict[str, Tensor], op: Any, signature: Signature, deadline: float
    ) -> None:
        try:
            self._executor.run(schedule, buffers, op, signature, deadline)
        except CollectiveError as error:  # the call that is told about it names itself
            before = f"{signature} failed on rank {self._rank} of {self.topology.size}: "
            raise type(error)(str(error).removeprefix(before)) from error.__cause__

    def _sign(self, name: str, dtype: torch.dtype, elements: int, root: int, op: Any) -> Signature:
        self._sequence += 1
        return Signature(self._sequence, name, dtype, elements, root, "" if op is None else op.name)


def _from_rank_zero(rank: int, topology: Topology) -> RankPlan:
    program, data = Program(rank), Span("data", 0, _VERDICT_BYTES)
    if rank:
        program.recv(data, 0, level=topology.level(0, rank))
    else:
        for peer in range(1, topology.size):
            program.send(data, peer, level=topology.level(0, peer))
    return program.finish()


def _elements(problem: Problem) -> int:
    """A number of elements that is equal on all ranks."""
    return problem.count or sum(problem.counts) or sum(map(sum, problem.matrix))


def separate(buffers: dict[str, Tensor], plan: RankPlan, known: dict[int, bool]) -> dict[str, Tensor]:
    """The buffers, with `input` copied where it shares memory with `output` in a way that the plan does not survive.

    `known` remembers, by distance, which ways it survives.
    """
    source, output = buffers.get("input"), buffers.get("output")
    if source is None or output is None:
        return buffers
    distance = output.data_ptr() - source.data_ptr()
    size = source.element_size()
    if distance >= source.numel() * size or -distance >= output.numel() * size:
        return buffers
    offset, rest = divmod(distance, size)
    if not rest:
        if offset not in known:
            known[offset] = survives(plan, offset)
        if known[offset]:
            return buffers
    return {**buffers, "input": source.clone()}
