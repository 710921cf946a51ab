"""Runs plans on tensors in CPU memory.

    executor = Executor(fabric)
    schedule = executor.lower(rank_plan, {"data": 1000})            # once; keep it
    executor.run(schedule, {"data": tensor}, ReduceOp.SUM, signature, time.monotonic() + 60)

A run goes round the lanes and advances each as far as it goes, until all are through. It blocks, without holding the GIL
while it waits. A run that fails leaves messages behind that nobody will take, so it aborts the whole group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ncclx_py.errors import CollectiveError
from ncclx_py.plans.plan import RankPlan
from ncclx_py.transport.channels import IN_ARENA
from ncclx_py.transport.fabric import Fabric
from ncclx_py.transport.local_operations import LocalSend
from ncclx_py.transport.lowering import BUFFERS, SCRATCH, Program, Schedule
from ncclx_py.transport.memory import Views
from ncclx_py.transport.operations import DONE, PENDING, STARTED, Mismatch, Operation, Run, combiner, widens
from ncclx_py.transport.signature import Signature, digest
from ncclx_py.transport.waiting import Waiting, aborted, failed
from ncclx_py.transport.window import ASLEEP

Progress = tuple[int, int, list[int]]  # steps done, steps in all, ranks waited for

_DIFFERENT = "Check that every rank of the group makes the same calls in the same order, with the same arguments."


class Executor:
    """Runs the plans of one rank over a fabric, one at a time."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._views: dict[torch.dtype, Views] = {}
        self._current: _Current | None = None
        self.stuck: Progress | None = None  # how far the last run came, if it failed

    def progress(self) -> Progress | None:
        """How far the run that is being carried out is; None while there is none. From any thread."""
        current = self._current
        try:
            return current.progress() if current is not None else None
        except (RuntimeError, ValueError, IndexError, AttributeError):  # it went on, or ended, while we looked
            return None

    def abort(self, reason: str) -> None:
        """Ends the group, because a call could not even begin here."""
        self._fabric.abort(reason)

    def lower(self, plan: RankPlan, lengths: Mapping[str, int], round_once: bool = False) -> Schedule:
        """Prepares a plan for buffers of these lengths (elements by name); the dtype may change from run to run.

        A plan rounds at every step. With `round_once`, sums and products in half precision of what several ranks of
        this host bring are kept in single precision until the last: nearer to the truth, but the bits then depend on
        which ranks share a host.

        Raises ValueError, which names the step, for a plan that cannot run here.
        """
        return Schedule(self._fabric, plan, lengths, round_once)

    def run(
        self,
        schedule: Schedule,
        buffers: Mapping[str, Tensor],
        reduction: Any,
        signature: Signature,
        deadline: float,
    ) -> None:
        """Carries out this rank's part of a call, until its buffers hold the result and may be changed again.

        `buffers` are one-dimensional, contiguous and of one dtype, with the lengths that the schedule was made for.
        `reduction` is a ``ReduceOp`` kind, or None where nothing is reduced. `deadline` is a time.monotonic().

        Raises CollectiveError, or CollectiveTimeout past the deadline, with the rank that is to blame where it is
        known. The group is aborted then; the contents of the buffers are undefined.
        """
        self.stuck = None
        dtype = _checked(schedule, buffers)
        fabric = self._fabric
        with fabric.lock:
            if not fabric.reason:
                fabric.look_at_neighbours()
            if fabric.reason:
                raise aborted(fabric, signature)
            current = self._current = _Current(fabric, schedule, dtype.itemsize, signature, deadline)
            try:
                current.prepare(buffers, self._views_of(dtype), reduction)
                current.drive()
                current.settle()
            except Mismatch as error:
                self.stuck = self.progress()
                fabric.adopt(f"rank {fabric.rank}: {error}")
                raise CollectiveError(failed(fabric, signature, str(error), _DIFFERENT)) from None
            except BaseException as error:
                self.stuck = self.progress()
                fabric.adopt(f"rank {fabric.rank}: {str(error) or type(error).__name__}")
                raise
            finally:
                self._current = None
                fabric.me.window.words[ASLEEP] = 0
                if fabric.reason:
                    fabric.tell()

    def _views_of(self, dtype: torch.dtype) -> Views:
        known = self._views.get(dtype)
        if known is None:
            known = self._views[dtype] = Views(dtype)
        return known


class _Current:
    """The call that is being carried out."""

    def __init__(
        self, fabric: Fabric, schedule: Schedule, itemsize: int, signature: Signature, deadline: float
    ) -> None:
        self._fabric, self._schedule = fabric, schedule
        self._program: Program = schedule.program(itemsize)
        self._waiting = Waiting(fabric, signature, deadline, self._program.remote)
        self._position = [0] * len(self._program.lanes)
        self._run = Run()
        self._record = signature.record()
        self._holding = False  # until there is room in the window

    def prepare(self, buffers: Mapping[str, Tensor], views: Views, reduction: Any) -> None:
        """Finds a place in the window and the addresses of everything; waits for room if need be."""
        fabric, program, run = self._fabric, self._program, self._run
        window, arena = fabric.me.window, fabric.arena
        run.idle = 0
        run.call = fabric.calls
        start = self._room(program.scratch + program.mirror)
        fabric.calls += 1
        run.address, run.shown = [0] * len(BUFFERS), [-1] * len(BUFFERS)
        for name, buffer in buffers.items():
            address = run.address[BUFFERS[name]] = buffer.data_ptr()
            offset = arena.offset(address)
            if offset >= 0:
                run.shown[BUFFERS[name]] = offset + IN_ARENA
        run.window = window.address
        run.address[SCRATCH], run.shown[SCRATCH] = window.address + start, start
        run.mirror = start + program.scratch
        run.record, run.digest = self._record, digest(self._record)
        if reduction is not None:
            run.combine, run.widens = combiner(reduction), widens(reduction, views.dtype)
        run.views = views
        run.done = bytearray(len(program.by_index))
        run.filled = bytearray(program.copies)
        run.target = [0] * len(program.by_index)
        run.network, run.senders = fabric.network, set()
        window.set_call(run.call, self._record)

    def progress(self) -> Progress:
        """Steps done, steps in all, and the ranks that are waited for."""
        steps = len(self._program.by_index)
        done = 0 if self._holding else steps - self._run.done.count(PENDING)
        return done, steps, sorted(self._awaited())

    def drive(self) -> None:
        """Goes round the lanes until all are through."""
        run, lanes, position = self._run, self._program.lanes, self._position
        active = list(range(len(lanes)))
        while active:
            run.moved = finished = False
            for lane in active:
                reached = self._advance(lanes[lane], position[lane])
                if reached != position[lane]:
                    position[lane] = reached
                    run.moved = True
                    finished = finished or reached == len(lanes[lane])
            if finished:
                active = [lane for lane in active if position[lane] < len(lanes[lane])]
            self._end_round()

    def _advance(self, operations: list[Operation], at: int) -> int:
        """Gets on with the operations of a lane from place `at`; the place of the first that cannot start or end yet."""
        run, by_index = self._run, self._program.by_index
        done, end = run.done, len(operations)
        while at < end:
            operation = operations[at]
            for dep in operation.deps:
                if done[dep] != DONE and not (done[dep] == STARTED and by_index[dep].complete(run)):
                    return at
            if not operation.advance(run):
                return at
            at += 1
        return at

    def settle(self) -> None:
        """Waits until the caller's memory is no longer needed, and notes what the window is still needed for."""
        run, program = self._run, self._program
        while not self._settled():
            run.moved = False
            self._end_round()
        targets = tuple((outbox, outbox.count) for outbox in program.outboxes)
        start = run.address[SCRATCH] - run.window
        self._fabric.segments.use(start, program.scratch + program.mirror, run.call, targets)

    def _settled(self) -> bool:
        return not self._run.senders and not any(box.backlog for box in self._program.outboxes) and not self._reading()

    def _reading(self) -> list[Operation]:
        """The sends whose receivers still read the caller's memory."""
        run = self._run
        shown = [buffer for buffer in range(SCRATCH) if run.shown[buffer] >= 0]
        if not shown:
            return []
        sends = [send for send in self._program.by_index if isinstance(send, LocalSend) and send.reads(shown)]
        return [send for send in sends if run.done[send.index] == STARTED and not send.complete(run)]

    def _end_round(self) -> None:
        """The end of a round: gets on with what did not fit into a ring or a socket; pauses where nothing has moved."""
        run = self._run
        if self._program.remote:
            self._fabric.poller.poll()
        for outbox in self._program.outboxes:
            if outbox.backlog and outbox.drain():
                run.moved = True
        for sender in list(run.senders):
            if sender.flush():
                run.moved = True
            if sender.idle():
                run.senders.discard(sender)
        if run.moved:
            run.idle = 0
        else:
            self._pause()

    def _room(self, length: int) -> int:
        self._holding = True
        while (start := self._fabric.segments.find(length, self._run.call)) < 0:
            self._pause()
        self._holding = False
        self._run.idle = 0
        return start

    def _pause(self) -> None:
        self._run.idle += 1
        self._waiting.pause(self._run.idle, self._awaited)

    def _awaited(self) -> dict[int, str]:
        """The ranks that this call waits for, and the steps that do."""
        if self._holding:
            return dict.fromkeys(self._fabric.segments.blockers(), "to take what earlier calls sent")
        run, program, steps = self._run, self._program, self._schedule.plan.steps
        found: dict[int, str] = {}
        for lane, at in zip(program.lanes, self._position):
            waiting = self._blocking(lane[at]) if at < len(lane) else []
            for operation in waiting:
                if operation.peer is not None:
                    step = steps[operation.index]
                    found.setdefault(
                        operation.peer, f"lane {step.lane}, step {operation.index} of {len(steps)}: {step.op}"
                    )
        for sender in run.senders:
            found.setdefault(sender.peer, "to take what was sent")
        for send in self._reading():
            if send.peer is not None:
                found.setdefault(send.peer, "to take what was sent")
        return found

    def _blocking(self, head: Operation) -> list[Operation]:
        """What keeps the first step of a lane: sends that are not through, or else its own peer."""
        run, by_index = self._run, self._program.by_index
        states = [(dep, run.done[dep]) for dep in head.deps if run.done[dep] != DONE]
        if not states:
            return [head]
        return [by_index[dep] for dep, state in states if state == STARTED and not by_index[dep].complete(run)]


def _checked(schedule: Schedule, buffers: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of the buffers, which must be what the schedule was made for."""
    if buffers.keys() != schedule.lengths.keys():
        raise ValueError(f"This plan needs the buffers {sorted(schedule.lengths)}, got {sorted(buffers)}.")
    dtypes = {buffer.dtype for buffer in buffers.values()}
    if len(dtypes) != 1:
        raise TypeError(f"The buffers of one plan need one dtype, got {sorted(map(str, dtypes))}.")
    for name, buffer in buffers.items():
        if buffer.dim() != 1 or not buffer.is_contiguous() or buffer.device.type != "cpu":
            raise ValueError(f"Buffer {name!r} must be one-dimensional, contiguous and on the CPU, got {buffer.shape}.")
        if buffer.numel() != schedule.lengths[name]:
            raise ValueError(
                f"Buffer {name!r} has {buffer.numel()} elements; this plan was made for {schedule.lengths[name]}."
            )
    return dtypes.pop()
