"""Executes a plan on symbolic contents: does every step start in the end, and is the result right?

One execution, which starts whatever can start, is enough to show both. No step that has started or completed makes
another one unable to start (the system is confluent), so all executions get equally far. And `verify_order` and the
first-in-first-out channels leave no choice about what a step reads.

A send counts as complete when the other rank has taken its message, the latest that an executor may do so: a plan that
would only work with messages buffered on the way is refused.
"""

from __future__ import annotations

from collections import defaultdict, deque
from itertools import accumulate

from ncclx_py.plans.contents import DOUBLED, Contents, Undefined, Value, combined
from ncclx_py.plans.errors import PlanError
from ncclx_py.plans.plan import Plan, Problem, Span, Step
from ncclx_py.plans.text import describe


def check_run(plan: Plan) -> None:
    """Raises `PlanError` when the plan stops half-way, reads what was never written, or ends with a wrong result."""
    run = _Run(plan)
    run.go()
    run.check_done()
    for rank in range(plan.problem.size):
        _check_result(plan.problem, rank, run.memory[rank])


class _Run:
    """The state of the execution: what each rank's memory holds, which steps have started, which messages wait."""

    def __init__(self, plan: Plan) -> None:
        self.problem = plan.problem
        self.steps = [rank_plan.steps for rank_plan in plan.ranks]
        self.memory = [_initial(plan.problem, rank) for rank in range(plan.problem.size)]
        self.complete = [[False] * len(steps) for steps in self.steps]
        self.lanes = [_lanes(steps) for steps in self.steps]  # steps not yet started, by lane
        self.posted: dict[tuple[int, int, int], deque[tuple[int, list[Value]]]] = defaultdict(deque)
        self.arrived: dict[tuple[tuple[int, ...], int], dict[int, int]] = defaultdict(
            dict
        )  # native group, lane → steps
        self.waiting: dict[tuple[int, int], list[int]] = defaultdict(list)  # (rank, step) → lanes that wait for it
        self.ready = deque((rank, lane) for rank, lanes in enumerate(self.lanes) for lane in lanes)

    def go(self) -> None:
        """Runs until nothing can start."""
        while self.ready:
            rank, lane = self.ready.popleft()
            queue = self.lanes[rank][lane]
            while queue and self._start(rank, queue[0]):
                queue.popleft()

    def check_done(self) -> None:
        for rank, lanes in enumerate(self.lanes):
            for queue in lanes.values():
                if queue:
                    step = self.steps[rank][queue[0]]
                    raise PlanError(
                        f"rank {rank}, step {queue[0]} ({describe(step)}): never runs, {self._why(rank, step)}"
                    )

    def _why(self, rank: int, step: Step) -> str:
        late = [dep for dep in step.deps if not self.complete[rank][dep]]
        if late:
            return f"because step {late[0]}, which it depends on, never completes: the ranks wait for each other"
        return "because its message never comes: the ranks wait for each other"

    def _start(self, rank: int, index: int) -> bool:
        """Starts a step if it can; a step that is not a send also completes. Whether the lane may go on."""
        step = self.steps[rank][index]
        for dep in step.deps:
            if not self.complete[rank][dep]:
                self.waiting[(rank, dep)].append(step.lane)
                return False
        if step.op == "native":
            return self._native(rank, index, step)
        if step.op == "send":
            assert step.src is not None
            assert step.peer is not None
            channel = (rank, step.peer, step.lane)
            self.posted[channel].append((index, self._read(rank, index, step.src)))
            self.ready.append((step.peer, step.lane))
            return True
        if step.peer is None:
            assert step.src is not None
            self._store(rank, index, self._read(rank, index, step.src))
        else:
            channel = (step.peer, rank, step.lane)
            if not self.posted[channel]:
                return False
            sent, values = self.posted[channel].popleft()
            self._store(rank, index, values)
            self._completed(step.peer, sent)
        self._completed(rank, index)
        return True

    def _native(self, rank: int, index: int, step: Step) -> bool:
        """A library collective completes on all its members when the last one has come.

        The k-th one of a group on a lane meets the k-th of the other members.
        """
        key = (step.group, step.lane)
        arrived = self.arrived[key]
        if self.complete[rank][index]:
            return True
        arrived[rank] = index
        if len(arrived) < len(step.group):
            return False
        members = [(member, arrived[member]) for member in step.group]
        self.arrived[key] = {}
        self._check_native(members)
        inputs = [self._read(member, at, _src(self.steps[member][at])) for member, at in members]
        for position, (member, at) in enumerate(members):
            self._overwrite(member, _dst(self.steps[member][at]), self._native_result(members, inputs, position))
            self._completed(member, at)
            self.ready.append((member, step.lane))
        return True

    def _native_result(self, members: list[tuple[int, int]], inputs: list[list[Value]], position: int) -> list[Value]:
        kind = self.steps[members[0][0]][members[0][1]].native
        if kind == "all_gather":
            return [value for values in inputs for value in values]
        total = inputs[0]
        for values in inputs[1:]:
            total = combined(total, values)
        if kind == "all_reduce":
            return total
        lengths = [_dst(self.steps[member][at]).length for member, at in members]
        whole = Contents()
        whole.write(0, sum(lengths), total)
        start = sum(lengths[:position])
        return whole.read(start, start + lengths[position])

    def _check_native(self, members: list[tuple[int, int]]) -> None:
        """Whether the members mean the same collective, with lengths that fit."""
        steps = [self.steps[member][at] for member, at in members]
        shares = sum(_dst(step).length for step in steps), sum(_src(step).length for step in steps)
        for (member, at), step in zip(members, steps):
            src, dst = _src(step).length, _dst(step).length
            fits = {
                "all_reduce": src == dst == _src(steps[0]).length,
                "reduce_scatter": src == shares[0],
                "all_gather": dst == shares[1],
            }
            if step.native != steps[0].native or not fits[step.native]:
                rank, other = members[0]
                raise PlanError(
                    f"rank {member}, step {at} ({describe(step)}): does not fit step {other} of rank {rank} "
                    f"({describe(steps[0])}), in kind or in length"
                )
        for position, ((member, at), step) in enumerate(zip(members, steps)):
            shorter = _dst if step.native == "reduce_scatter" else _src
            before = sum(shorter(other).length for other in steps[:position])
            if not _may_share(step, before):
                raise PlanError(
                    f"rank {member}, step {at} ({describe(step)}): src and dst overlap other than as the library's "
                    "in-place form: the same span, or this member's own part of the longer one"
                )

    def _read(self, rank: int, index: int, span: Span) -> list[Value]:
        if not span.length:
            return []
        try:
            return self.memory[rank].setdefault(span.buffer, Contents()).read(span.start, span.stop)
        except Undefined as undefined:
            step = describe(self.steps[rank][index])
            raise PlanError(
                f"rank {rank}, step {index} ({step}): reads element {undefined.args[0]} of {span.buffer} "
                "before anything was written there"
            ) from None

    def _store(self, rank: int, index: int, values: list[Value]) -> None:
        """Ends a recv, reduce or copy with the values that have come."""
        step = self.steps[rank][index]
        dst = _dst(step)
        if step.op == "reduce":
            values = combined(self._read(rank, index, dst), values)
        self._overwrite(rank, dst, values)

    def _overwrite(self, rank: int, span: Span, values: list[Value]) -> None:
        self.memory[rank].setdefault(span.buffer, Contents()).write(span.start, span.stop, values)

    def _completed(self, rank: int, index: int) -> None:
        self.complete[rank][index] = True
        self.ready.extend((rank, lane) for lane in self.waiting.pop((rank, index), ()))


def _src(step: Step) -> Span:
    assert step.src is not None
    return step.src


def _dst(step: Step) -> Span:
    assert step.dst is not None
    return step.dst


def _may_share(step: Step, before: int) -> bool:
    """Whether src and dst of a library collective are apart or lie as for its in-place form.

    `before` is the length of the parts of the members before this one, in the tensor that holds all parts.
    """
    src, dst = _src(step), _dst(step)
    if src.buffer != dst.buffer or src.stop <= dst.start or dst.stop <= src.start:
        return True
    if step.native == "all_reduce":
        return src == dst
    whole, part = (src, dst) if step.native == "reduce_scatter" else (dst, src)
    return part.start == whole.start + before


def _lanes(steps: tuple[Step, ...]) -> dict[int, deque[int]]:
    lanes: dict[int, deque[int]] = defaultdict(deque)
    for index, step in enumerate(steps):
        lanes[step.lane].append(index)
    return lanes


def _initial(problem: Problem, rank: int) -> dict[str, Contents]:
    """What the caller's buffers hold at the start. For movements an identity is a place in all ranks' inputs together."""
    name, lengths = problem.collective, problem.lengths(rank)
    buffer = "data" if name in ("all_reduce", "broadcast") else "input"
    contents = Contents()
    if name != "broadcast" or rank == problem.root:
        first = 0
        if name == "all_gather":
            first = sum(problem.counts[:rank])
        elif name == "all_to_all":
            first = sum(sum(row) for row in problem.matrix[:rank])
        contents.write(0, lengths[buffer], [Value(lengths[buffer], first, 1 << rank)])
    return {buffer: contents}


def _check_result(problem: Problem, rank: int, memory: dict[str, Contents]) -> None:
    buffer = "data" if problem.collective in ("all_reduce", "broadcast") else "output"
    contents = memory.get(buffer, Contents())
    position = 0
    for expected in _expected(problem, rank):
        try:
            found = contents.read(position, position + expected.length)
        except Undefined as undefined:
            fault = "is never written"
            raise PlanError(f"rank {rank}: element {undefined.args[0]} of {buffer} {fault}") from None
        first = expected.first
        for value in found:
            if value.ranks != expected.ranks or value.first != first:
                raise PlanError(f"rank {rank}: {buffer}[{position}] {_difference(problem, value, expected, first)}")
            position += value.length
            first += value.length


def _expected(problem: Problem, rank: int) -> list[Value]:
    """The right contents of this rank's result, in order."""
    name, size = problem.collective, problem.size
    everyone = (1 << size) - 1
    if name == "all_reduce" or (name == "reduce" and rank == problem.root):
        return [Value(problem.count, 0, everyone)]
    if name == "reduce":
        return []
    if name == "broadcast":
        return [Value(problem.count, 0, 1 << problem.root)]
    if name == "reduce_scatter":
        return [Value(problem.counts[rank], sum(problem.counts[:rank]), everyone)]
    if name == "all_gather":
        starts = accumulate(problem.counts, initial=0)
        return [Value(count, start, 1 << source) for source, (count, start) in enumerate(zip(problem.counts, starts))]
    starts = accumulate((sum(row) for row in problem.matrix), initial=0)
    return [
        Value(row[rank], start + sum(row[:rank]), 1 << source)
        for source, (row, start) in enumerate(zip(problem.matrix, starts))
    ]


def _difference(problem: Problem, found: Value, expected: Value, first: int) -> str:
    if found.ranks == DOUBLED:
        return "holds the contribution of a rank more than once"
    if found.ranks < 0:
        return "holds a combination of different elements"
    if found.first != first:
        return f"holds element {found.first} (counted over all inputs) instead of element {first}"
    missing = [rank for rank in range(problem.size) if (expected.ranks & ~found.ranks) >> rank & 1]
    return f"lacks the contributions of ranks {missing}" if missing else "holds contributions that do not belong there"
