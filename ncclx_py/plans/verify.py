"""Proves that a plan is right, symbolically, whatever built it: it trusts neither the algorithm nor the dependencies.

`verify` returns when, on every rank and for every timing that the dependencies allow, the plan ends with the right
result; otherwise it raises a `PlanError` that names the rank, the step and what is wrong. Four questions in turn:

1. structure: do spans lie in their buffers, do peers exist, do messages meet others of the same length? (here)
2. order: are any two conflicting accesses to a rank's memory ordered? (verify_order)
3. progress: does every step start in the end? (verify_run)
4. result: does each element hold what it should, each contribution exactly once? (verify_run)

After 2 the timing cannot change what a step reads, so that one execution shows 3 and 4 for all of them. Time is linear
in the number of steps; it does not depend on the number of elements.
"""

from __future__ import annotations

from collections import defaultdict

from ncclx_py.plans.errors import PlanError
from ncclx_py.plans.plan import Plan, Problem, RankPlan, Span, Step
from ncclx_py.plans.text import describe
from ncclx_py.plans.topology import Topology
from ncclx_py.plans.verify_order import check_order
from ncclx_py.plans.verify_run import check_run

NATIVES = ("all_reduce", "reduce_scatter", "all_gather")
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "reduce")


def verify(plan: Plan, topology: Topology | None = None) -> None:
    """Raises `PlanError` unless `plan` solves its problem. With `topology`, levels of messages are checked as well."""
    check_problem(plan.problem)
    size = plan.problem.size
    if [rank_plan.rank for rank_plan in plan.ranks] != list(range(size)):
        raise PlanError(f"the plan must hold ranks 0 to {size - 1} in order")
    if topology is not None and topology.size != size:
        raise PlanError(f"the topology has {topology.size} ranks, the plan {size}; they must be the same")
    for rank_plan in plan.ranks:
        _check_steps(rank_plan, plan.problem, topology)
    _check_messages(plan)
    for rank_plan in plan.ranks:
        check_order(rank_plan)
    check_run(plan)


def check_problem(problem: Problem) -> None:
    """Raises `PlanError` unless the problem's numbers fit each other."""
    size, name = problem.size, problem.collective
    if name not in COLLECTIVES:
        raise PlanError(f"there is no collective {name!r}; there are {', '.join(COLLECTIVES)}")
    if size < 1:
        raise PlanError(f"the problem is for {size} ranks; it needs at least 1")
    if not 0 <= problem.root < size:
        raise PlanError(f"the root is rank {problem.root}; it must be one of 0 to {size - 1}")
    if name in ("reduce_scatter", "all_gather") and len(problem.counts) != size:
        raise PlanError(f"{name} has {len(problem.counts)} counts for {size} ranks; it needs one for each")
    if name == "all_to_all" and [len(row) for row in problem.matrix] != [size] * size:
        raise PlanError(f"all_to_all needs a matrix of {size} rows of {size} counts")
    if min([problem.count, *problem.counts, *(count for row in problem.matrix for count in row)]) < 0:
        raise PlanError("the problem has a negative count; counts are numbers of elements")


def wrong(rank: int, index: int, step: Step, fault: str) -> PlanError:
    return PlanError(f"rank {rank}, step {index} ({describe(step)}): {fault}")


def _check_steps(rank_plan: RankPlan, problem: Problem, topology: Topology | None) -> None:
    lengths = {**problem.lengths(rank_plan.rank), "scratch": rank_plan.scratch}
    for index, step in enumerate(rank_plan.steps):
        fault = _fault(step, index, rank_plan.rank, problem.size, lengths, topology)
        if fault:
            raise wrong(rank_plan.rank, index, step, fault)


def _fault(step: Step, index: int, rank: int, size: int, lengths: dict[str, int], topology: Topology | None) -> str:
    """What is wrong with a step by itself; "" when nothing is."""
    fault = _shape_fault(step, rank, size)
    for span in (step.src, step.dst):
        if span is not None:
            fault = fault or _span_fault(span, lengths)
    if step.dst is not None and step.dst.buffer == "input" and step.dst.length:
        fault = fault or "writes to input, which is only read"
    if any(not 0 <= dep < index for dep in step.deps):
        fault = fault or f"depends on {list(step.deps)}, which are not all earlier steps"
    if step.lane < 0:
        fault = fault or f"lane {step.lane} is negative"
    if topology is not None and step.peer is not None and not fault and step.level != topology.level(rank, step.peer):
        fault = f"its level is {step.level!r}, but rank {step.peer} is {topology.level(rank, step.peer)!r}"
    return fault


def _shape_fault(step: Step, rank: int, size: int) -> str:
    """Whether the step has the fields that its op needs, and only those."""
    has_src, has_dst, has_peer = step.src is not None, step.dst is not None, step.peer is not None
    needs = {
        "send": (True, False, True),
        "recv": (False, True, True),
        "reduce": (not has_peer, True, has_peer),
        "copy": (True, True, False),
        "native": (True, True, False),
    }
    if step.op not in needs:
        return f"there is no op {step.op!r}; there are {', '.join(needs)}"
    if (has_src, has_dst, has_peer) != needs[step.op]:
        return f"{step.op} needs other fields than these of src, dst and peer"
    if step.peer is not None and (step.peer == rank or not 0 <= step.peer < size):
        return f"the peer {step.peer} is not another one of ranks 0 to {size - 1}"
    if step.op == "native":
        return _native_fault(step, rank, size)
    if step.native or step.group:
        return f"{step.op} has no library collective and no group"
    if step.src is not None and step.dst is not None:
        if step.src.length != step.dst.length:
            return f"{step.src} and {step.dst} differ in length"
        if overlap(step.src, step.dst):
            return f"{step.src} and {step.dst} overlap"
    return ""


def _native_fault(step: Step, rank: int, size: int) -> str:
    if step.native not in NATIVES:
        return f"there is no library collective {step.native!r}; there are {', '.join(NATIVES)}"
    members = set(step.group)
    if rank not in members or len(members) != len(step.group) or not members <= set(range(size)):
        return f"the group {list(step.group)} must hold this rank, and ranks of 0 to {size - 1} once each"
    return ""


def _span_fault(span: Span, lengths: dict[str, int]) -> str:
    if span.buffer not in lengths:
        return f"there is no buffer {span.buffer!r}; there are {', '.join(lengths)}"
    if not 0 <= span.start <= span.stop <= lengths[span.buffer]:
        return f"{span} is not within the {lengths[span.buffer]} elements of {span.buffer}"
    return ""


def overlap(a: Span, b: Span) -> bool:
    return a.buffer == b.buffer and max(a.start, b.start) < min(a.stop, b.stop)


def _check_messages(plan: Plan) -> None:
    """Whether the k-th send of each channel meets a k-th recv or reduce of the same length, and the other way round."""
    sent: dict[tuple[int, int, int], list[tuple[int, Step]]] = defaultdict(list)
    taken: dict[tuple[int, int, int], list[tuple[int, Step]]] = defaultdict(list)
    for rank_plan in plan.ranks:
        for index, step in enumerate(rank_plan.steps):
            if step.peer is None:
                continue
            if step.op == "send":
                sent[(rank_plan.rank, step.peer, step.lane)].append((index, step))
            else:
                taken[(step.peer, rank_plan.rank, step.lane)].append((index, step))
    for channel in sorted({*sent, *taken}):
        _check_channel(channel, sent[channel], taken[channel])


def _check_channel(channel: tuple[int, int, int], sent: list[tuple[int, Step]], taken: list[tuple[int, Step]]) -> None:
    sender, receiver, lane = channel
    for (index, send), (other, take) in zip(sent, taken):
        assert send.src is not None
        assert take.dst is not None
        if send.src.length != take.dst.length:
            fault = f"its {send.src.length} elements meet step {other} of rank {receiver} ({describe(take)})"
            raise wrong(sender, index, send, fault)
    if len(sent) > len(taken):
        index, step = sent[len(taken)]
        raise wrong(
            sender, index, step, f"rank {receiver} takes only {len(taken)} messages of rank {sender} on lane {lane}"
        )
    if len(taken) > len(sent):
        index, step = taken[len(sent)]
        raise wrong(
            receiver, index, step, f"rank {sender} sends only {len(sent)} messages to rank {receiver} on lane {lane}"
        )
