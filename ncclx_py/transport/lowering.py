"""Lowers a rank's plan to operations: names become addresses, peers become channels, and all that can be known before
the tensors are there is worked out once.

- Lengths become bytes, so there is one `Program` per item size.
- Dependencies that the order of a lane meets anyway are dropped.
- Sends of the same span share one copy in the window, where nothing writes to that span between them.
- Reductions from several neighbours into one span, in a row, become one operation that goes over them block by block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ncclx_py.plans.plan import RankPlan, Span, Step
from ncclx_py.transport.channels import Outbox
from ncclx_py.transport.fabric import Fabric
from ncclx_py.transport.local_operations import LocalCombine, LocalCopy, LocalReceive, LocalReduce, LocalSend
from ncclx_py.transport.operations import Operation
from ncclx_py.transport.remote_operations import RemoteReceive, RemoteReduce, RemoteSend
from ncclx_py.transport.window import LANES

BUFFERS = {"data": 0, "input": 1, "output": 2, "scratch": 3}
SCRATCH = BUFFERS["scratch"]
_ALIGNMENT = 64  # bytes; of copies in the window


@dataclass(frozen=True, slots=True)
class Program:
    """A rank's plan for one item size. `by_index` has the operation of each step, `lanes` those of each lane, in order.

    `scratch` and `mirror` are bytes of the window; `copies` counts the places in the mirror, and one for
    signals; `outboxes` are all that
    it sends to on this host; `remote` says whether it needs other hosts.
    """

    by_index: list[Operation]
    lanes: list[list[Operation]]
    scratch: int
    mirror: int
    copies: int
    outboxes: list[Outbox]
    remote: bool


class Schedule:
    """A rank's plan bound to a fabric, for caller's buffers of the given `lengths` (elements by name).

    `round_once`: see `Executor.lower`.
    """

    def __init__(self, fabric: Fabric, plan: RankPlan, lengths: Mapping[str, int], round_once: bool = False) -> None:
        self.plan = plan
        self._round_once = round_once
        self.lengths = dict(lengths)
        _check(fabric, plan, {**lengths, "scratch": plan.scratch})
        self._fabric = fabric
        local_sends = [
            index
            for index, step in enumerate(plan.steps)
            if step.op == "send" and step.peer is not None and fabric.is_local(step.peer)
        ]
        self._shares = _shared_copies(plan.steps, local_sends)
        self._deps = _needed_deps(plan.steps)
        self._programs: dict[int, Program] = {}

    def program(self, itemsize: int) -> Program:
        known = self._programs.get(itemsize)
        if known is None:
            known = self._programs[itemsize] = self._lower(itemsize)
        return known

    def _lower(self, itemsize: int) -> Program:
        places, mirror = self._places(itemsize)
        operations = [self._operation(index, itemsize, places) for index in range(len(self.plan.steps))]
        for operation, deps in zip(operations, self._deps):
            operation.deps = deps
        lanes: dict[int, list[int]] = {}
        for index, step in enumerate(self.plan.steps):
            lanes.setdefault(step.lane, []).append(index)
        outboxes = {
            (step.peer, step.lane): self._fabric.outbox(step.peer, step.lane)
            for step in self.plan.steps
            if step.op == "send" and step.peer is not None and self._fabric.is_local(step.peer)
        }
        return Program(
            operations,
            [self._fused(lane, operations, itemsize) for lane in lanes.values()],
            _aligned(self.plan.scratch * itemsize),
            mirror,
            len(places) + 1,
            list(outboxes.values()),
            any(step.peer is not None and not self._fabric.is_local(step.peer) for step in self.plan.steps),
        )

    def _places(self, itemsize: int) -> tuple[dict[int, tuple[int, int]], int]:
        """The number and the offset of each copy in the mirror, by the first step that makes it; and their bytes."""
        places: dict[int, tuple[int, int]] = {}
        total = 0
        for index, first in self._shares.items():
            span = self.plan.steps[index].src
            if index == first and span is not None:
                places[first] = len(places), total
                total += _aligned(span.length * itemsize)
        return places, total

    def _operation(self, index: int, itemsize: int, places: dict[int, tuple[int, int]]) -> Operation:
        step = self.plan.steps[index]
        buffer, start, length = _extent(step.src if step.op == "send" else step.dst, itemsize)
        if step.peer is None:
            source, source_start, _ = _extent(step.src, itemsize)
            kind = LocalCombine if step.op == "reduce" else LocalCopy
            return kind(index, buffer, start, source, source_start, length)
        if self._fabric.is_local(step.peer):
            if step.op == "send":
                fill, mirror = places.get(self._shares.get(index, -1), (len(places), 0))  # the last place: no bytes
                outbox = self._fabric.outbox(step.peer, step.lane)
                return LocalSend(index, outbox, buffer, start, length, fill, mirror)
            inbox = self._fabric.inbox(step.peer, step.lane)
            if step.op == "recv":
                return LocalReceive(index, inbox, buffer, start, length)
            return LocalReduce([index], [inbox], False, buffer, start, length)
        remote = {"send": RemoteSend, "recv": RemoteReceive, "reduce": RemoteReduce}[step.op]
        return remote(index, step.peer, step.lane, buffer, start, length)

    def _fused(self, lane: list[int], operations: list[Operation], itemsize: int) -> list[Operation]:
        """The operations of a lane, with reductions from several neighbours into one span taken together."""
        steps = self.plan.steps
        result: list[Operation] = []
        at = 0
        while at < len(lane):
            chain = [lane[at]]
            if isinstance(operations[lane[at]], LocalReduce):
                while at + len(chain) < len(lane) and self._joins(lane[at + len(chain)], chain, operations):
                    chain.append(lane[at + len(chain)])
            operation = operations[chain[0]]
            if len(chain) > 1:
                inboxes = [self._fabric.inbox(_peer(steps[index]), steps[index].lane) for index in chain]
                operation = LocalReduce(chain, inboxes, self._round_once, *_extent(steps[chain[0]].dst, itemsize))
                operation.deps = self._deps[chain[0]]
            result.append(operation)
            at += len(chain)
        return result

    def _joins(self, index: int, chain: list[int], operations: list[Operation]) -> bool:
        """Whether a step may be taken together with the reductions before it in its lane."""
        same = self.plan.steps[index].dst == self.plan.steps[chain[0]].dst
        late = set(self._deps[index]) - set(self._deps[chain[0]])
        return same and not late and isinstance(operations[index], LocalReduce)


def _check(fabric: Fabric, plan: RankPlan, lengths: Mapping[str, int]) -> None:
    """Refuses what this executor cannot run and what would reach outside the buffers. ValueError names the step."""
    for index, step in enumerate(plan.steps):
        where = f"Step {index} of the plan for rank {plan.rank}"
        if step.op == "native":
            raise ValueError(
                f"{where} is a native step ({step.native}): the CPU executor runs none, choose another plan."
            )
        if not 0 <= step.lane < LANES:
            raise ValueError(f"{where} is in lane {step.lane}: lanes are 0 to {LANES - 1}.")
        if step.peer is not None and (not 0 <= step.peer < fabric.size or step.peer == fabric.rank):
            raise ValueError(
                f"{where} has the peer {step.peer}, which is no other rank of this group of {fabric.size}."
            )
        if any(not 0 <= dep < index for dep in step.deps):
            raise ValueError(f"{where} depends on {step.deps}: a step may depend only on earlier ones.")
        for span in (step.src, step.dst):
            if span is not None and not 0 <= span.start <= span.stop <= lengths.get(span.buffer, -1):
                raise ValueError(f"{where} uses {span}, but the buffers have {dict(lengths)} elements.")


def _needed_deps(steps: tuple[Step, ...]) -> list[tuple[int, ...]]:
    """The dependencies of each step that the order of its lane does not meet: a lane waits for all but sends."""
    return [
        tuple(dep for dep in step.deps if steps[dep].op == "send" or steps[dep].lane != step.lane) for step in steps
    ]


def _shared_copies(steps: tuple[Step, ...], sends: list[int]) -> dict[int, int]:
    """The first of `sends` with whose copy each of them (that needs one) can make do.

    Two sends of a span can share one when every write to the span is over before both start, or starts after both have.
    """
    before = _before(steps)
    result: dict[int, int] = {}
    leaders: dict[Span, list[int]] = {}
    for index in sends:
        span = steps[index].src
        if span is None or not span.length or span.buffer == "scratch":
            continue
        known = leaders.setdefault(span, [])
        result[index] = next((first for first in known if _same_contents(steps, before, first, index)), index)
        if result[index] == index:
            known.append(index)
    return result


def _same_contents(steps: tuple[Step, ...], before: list[int], first: int, second: int) -> bool:
    span = steps[first].src
    assert span is not None
    for index, step in enumerate(steps):
        if step.dst is None or step.dst.buffer != span.buffer:
            continue
        if step.dst.start < span.stop and span.start < step.dst.stop:
            earlier = before[first] >> index & 1 and before[second] >> index & 1
            later = before[index] >> first & 1 and before[index] >> second & 1
            if not (earlier or later):
                return False
    return True


def _before(steps: tuple[Step, ...]) -> list[int]:
    """For each step the set, as bits, of steps that are over (sends: started) when it starts."""
    before: list[int] = []
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        found = 0
        for earlier in (*step.deps, *([last[step.lane]] if step.lane in last else [])):
            found |= before[earlier] | 1 << earlier
        before.append(found)
        last[step.lane] = index
    return before


def _extent(span: Span | None, itemsize: int) -> tuple[int, int, int]:
    """The number of the buffer, and start and length in bytes."""
    assert span is not None
    return BUFFERS[span.buffer], span.start * itemsize, span.length * itemsize


def _peer(step: Step) -> int:
    assert step.peer is not None
    return step.peer


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT
