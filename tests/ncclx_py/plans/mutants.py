"""Plans with one thing wrong, and how many of them the verifier finds: ``kill_rate(seed)``.

A mutant that `verify` accepts is run by brute force many times over: when every run is right, the mutation changed
nothing that matters (a dependency that others imply, say) and the mutant counts as equivalent, otherwise as survived.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from harness import load

from ncclx_py.plans.algorithms.registry import build
from ncclx_py.plans.errors import PlanError
from ncclx_py.plans.plan import Plan, Span, Step
from ncclx_py.plans.verify import verify

brute = load(Path(__file__).with_name("brute.py"), "plan_brute")
cases = load(Path(__file__).with_name("cases.py"), "plan_cases")

Steps = list[Step]
Mutation = Callable[[random.Random, Steps, int, int], Steps | None]  # (random, steps, index, size) → steps or None


def kill_rate(seed: int, topologies: int = 40, each: int = 2, runs: int = 40) -> dict[str, Counter[str]]:
    """Kind of mutation → how many mutants were "killed", are "equivalent", have "survived"."""
    random_ = random.Random(seed)
    tally: dict[str, Counter[str]] = {}
    for case in cases.cases(seed, topologies, worlds=[2, 3, 4, 5, 6, 8], largest=48):
        plan = build(case.problem, case.topology, case.algorithm.name, case.parameters)
        for kind, mutation in MUTATIONS.items():
            for _ in range(each):
                mutant = mutated(random_, plan, mutation)
                if mutant is not None:
                    tally.setdefault(kind, Counter())[fate(mutant, random_, runs)] += 1
    return tally


def fate(mutant: Plan, random_: random.Random, runs: int) -> str:
    try:
        verify(mutant)
    except PlanError:
        return "killed"
    return "equivalent" if all(brute.is_right(mutant, random_) for _ in range(runs)) else "survived"


def mutated(random_: random.Random, plan: Plan, mutation: Mutation) -> Plan | None:
    """`plan` with one step of one rank changed; None where the mutation does not apply to the step that was drawn."""
    ranks = [rank_plan for rank_plan in plan.ranks if rank_plan.steps]
    if not ranks:
        return None
    chosen = random_.choice(ranks)
    steps = mutation(random_, list(chosen.steps), random_.randrange(len(chosen.steps)), plan.problem.size)
    if steps is None or tuple(steps) == chosen.steps:
        return None
    changed = list(plan.ranks)
    changed[chosen.rank] = replace(chosen, steps=tuple(steps))
    return replace(plan, ranks=tuple(changed))


def _reindexed(steps: Steps, new: dict[int, int | None]) -> Steps:
    """The steps with their dependencies renumbered; None: the step is gone."""
    return [
        replace(step, deps=tuple(sorted(place for dep in step.deps if (place := new.get(dep, dep)) is not None)))
        for step in steps
    ]


def drop(random_: random.Random, steps: Steps, index: int, size: int) -> Steps:
    """The step is gone; what depended on it depends on what it depended on."""
    gone = steps.pop(index)
    inherited = [replace(step, deps=tuple({*step.deps, *gone.deps})) if index in step.deps else step for step in steps]
    new: dict[int, int | None] = {old: old - 1 for old in range(index + 1, len(steps) + 1)}
    return _reindexed(inherited, {**new, index: None})


def double(random_: random.Random, steps: Steps, index: int, size: int) -> Steps:
    """The step is there twice, the second after the first."""
    again = replace(steps[index], deps=(*steps[index].deps, index))
    new: dict[int, int | None] = {old: old + 1 for old in range(index, len(steps))}
    return [*steps[: index + 1], again, *_reindexed(steps[index + 1 :], new)]


def misdirect(random_: random.Random, steps: Steps, index: int, size: int) -> Steps | None:
    if steps[index].peer is None or size < 3:
        return None
    steps[index] = replace(
        steps[index], peer=random_.choice([peer for peer in range(size) if peer != steps[index].peer])
    )
    return steps


def shift(random_: random.Random, steps: Steps, index: int, size: int) -> Steps | None:
    """A span is off by one."""
    name = random_.choice([name for name in ("src", "dst") if getattr(steps[index], name) is not None])
    span: Span = getattr(steps[index], name)
    by = random_.choice([-1, 1])
    moved = Span(span.buffer, span.start + by, span.stop + by)
    steps[index] = replace(steps[index], **{name: moved})
    return steps


def shorten(random_: random.Random, steps: Steps, index: int, size: int) -> Steps:
    """The spans lack their last element."""
    shorter = {
        name: Span(span.buffer, span.start, span.stop - 1)
        for name in ("src", "dst")
        if (span := getattr(steps[index], name)) is not None
    }
    steps[index] = replace(steps[index], **shorter)
    return steps


def undep(random_: random.Random, steps: Steps, index: int, size: int) -> Steps | None:
    """A dependency is missing."""
    deps = steps[index].deps
    if not deps:
        return None
    gone = random_.choice(deps)
    steps[index] = replace(steps[index], deps=tuple(dep for dep in deps if dep != gone))
    return steps


def undep_all(random_: random.Random, steps: Steps, index: int, size: int) -> Steps | None:
    steps[index] = replace(steps[index], deps=())
    return steps


def swap(random_: random.Random, steps: Steps, index: int, size: int) -> Steps | None:
    """Two neighbours of one lane change places; dependencies of one on the other are given up."""
    later = next((at for at in range(index + 1, len(steps)) if steps[at].lane == steps[index].lane), None)
    if later is None:
        return None
    steps[index], steps[later] = steps[later], steps[index]
    renamed = _reindexed(steps, {index: later, later: index})
    return [replace(step, deps=tuple(dep for dep in step.deps if dep < at)) for at, step in enumerate(renamed)]


def relane(random_: random.Random, steps: Steps, index: int, size: int) -> Steps | None:
    steps[index] = replace(steps[index], lane=steps[index].lane + random_.choice([1, 2]))
    return steps


def store(random_: random.Random, steps: Steps, index: int, size: int) -> Steps | None:
    """A reduce becomes a recv or a copy, and the other way round."""
    step = steps[index]
    if step.op == "send":
        return None
    other = "reduce" if step.op != "reduce" else "recv" if step.peer is not None else "copy"
    steps[index] = replace(step, op=other)
    return steps


MUTATIONS: dict[str, Mutation] = {
    "dropped step": drop,
    "doubled step": double,
    "wrong peer": misdirect,
    "shifted span": shift,
    "shortened span": shorten,
    "removed dependency": undep,
    "removed dependencies": undep_all,
    "swapped steps": swap,
    "wrong lane": relane,
    "reduce for store": store,
}
