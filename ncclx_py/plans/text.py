"""Plans for people: a step in one line, a rank's steps, a whole plan."""

from __future__ import annotations

from collections.abc import Sequence

from ncclx_py.plans.plan import Plan, Problem, RankPlan, Step


def describe(step: Step) -> str:
    """One step in a few words, e.g. ``reduce data[0:8] with data from rank 3, lane 1``."""
    words = {
        "send": f"send {step.src} to rank {step.peer}",
        "recv": f"recv {step.dst} from rank {step.peer}",
        "reduce": f"reduce {step.dst} with " + (f"{step.src}" if step.peer is None else f"data from rank {step.peer}"),
        "copy": f"copy {step.src} to {step.dst}",
        "native": f"native {step.native} {step.src} to {step.dst} among {_ranks(step.group)}",
    }
    return f"{words.get(step.op, step.op)}, lane {step.lane}"


def _ranks(ranks: Sequence[int]) -> str:
    """``ranks 0-3`` for consecutive ones, else each of them."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return "ranks " + ",".join(str(rank) for rank in ranks)


def describe_problem(problem: Problem) -> str:
    """What is asked for, e.g. ``all_reduce of 4096 elements among 8 ranks``."""
    if problem.collective == "all_to_all":
        amount = f"{sum(map(sum, problem.matrix))} elements"
    elif problem.collective in ("reduce_scatter", "all_gather"):
        amount = f"{sum(problem.counts)} elements"
    else:
        amount = f"{problem.count} elements"
    root = f", root {problem.root}" if problem.collective in ("broadcast", "reduce") else ""
    return f"{problem.collective} of {amount} among {problem.size} ranks{root}"


def plan_text(plan: Plan, ranks: Sequence[int] | None = None) -> str:
    """The plan's phases, and all steps of `ranks` (all ranks unless given)."""
    shown = range(plan.problem.size) if ranks is None else ranks
    return "\n".join([phases_text(plan), *(rank_text(plan.ranks[rank]) for rank in shown)])


def phases_text(plan: Plan) -> str:
    """One line for the plan, and one for what each lane carries at each level."""
    parameters = ", ".join(f"{name} {value}" for name, value in plan.parameters.items())
    steps = sum(len(rank_plan.steps) for rank_plan in plan.ranks)
    lines = [
        f"{describe_problem(plan.problem)}: {plan.algorithm}{f' ({parameters})' if parameters else ''}, {steps} steps"
    ]
    kinds = {(step.lane, step.level, _kind(step)) for rank_plan in plan.ranks for step in rank_plan.steps}
    for lane, level, kind in sorted(kinds):
        number, elements = [], []
        for rank_plan in plan.ranks:
            found = [step for step in rank_plan.steps if (step.lane, step.level, _kind(step)) == (lane, level, kind)]
            number.append(len(found))
            elements.append(sum(_length(step) for step in found))
        lines.append(f"  lane {lane}, {level}: {kind} {_range(number)} per rank, {_range(elements)} elements")
    return "\n".join(lines)


def rank_text(rank_plan: RankPlan) -> str:
    """All steps of a rank, one a line, with the steps that they wait for."""
    lines = [f"rank {rank_plan.rank}: {len(rank_plan.steps)} steps, {rank_plan.scratch} elements of scratch"]
    for index, step in enumerate(rank_plan.steps):
        after = f", after {', '.join(map(str, step.deps))}" if step.deps else ""
        lines.append(f"  {index:4}  {step.level}  chunk {step.chunk}  {describe(step)}{after}")
    return "\n".join(lines)


def _kind(step: Step) -> str:
    return f"native {step.native}" if step.op == "native" else step.op


def _length(step: Step) -> int:
    span = step.src or step.dst
    return span.length if span is not None else 0


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
