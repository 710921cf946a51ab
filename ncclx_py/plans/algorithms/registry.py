"""All algorithms by collective and name, and the way to build a plan with one.

plan = build(Problem("all_reduce", 8, count=1 << 20), topology, "pipelined", {"chunks": 8})
mine = build_rank(problem, topology, "pipelined", rank=3, parameters={"chunks": 8})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ncclx_py.plans.algorithms import (
    all_gather,
    all_reduce,
    all_to_all,
    balanced,
    broadcast,
    levels,
    reduce,
    reduce_scatter,
    two_level,
)
from ncclx_py.plans.algorithms.exchanges import is_power_of_two
from ncclx_py.plans.errors import PlanError
from ncclx_py.plans.plan import Collective, Plan, Problem, RankPlan
from ncclx_py.plans.topology import Topology


def _applies(problem: Problem, topology: Topology) -> str:
    return ""


def _odd_size(problem: Problem, topology: Topology) -> str:
    return "" if is_power_of_two(problem.size) else f"{problem.size} ranks are not a power of two"


@dataclass(frozen=True)
class Algorithm:
    """One way to carry out a collective.

    - `build` (problem, topology, rank, **parameters) returns that rank's steps.
    - `parameters` are the integers that it takes, at least 1, with their defaults.
    - `refuses` (problem, topology) says why the algorithm does not apply; "" when it does.
    """

    name: str
    collective: Collective
    build: Callable[..., RankPlan]
    parameters: dict[str, int] = field(default_factory=dict)
    refuses: Callable[[Problem, Topology], str] = _applies


_ALL = [
    Algorithm("direct", "all_reduce", levels.direct, {"chunks": 1}),
    Algorithm("ring", "all_reduce", all_reduce.ring),
    Algorithm("halving_doubling", "all_reduce", all_reduce.halving_doubling),
    Algorithm("double_tree", "all_reduce", all_reduce.double_tree, {"chunks": 8}),
    Algorithm("leader", "all_reduce", all_reduce.leader),
    Algorithm("hierarchical", "all_reduce", levels.hierarchical),
    Algorithm("pipelined", "all_reduce", levels.pipelined, {"chunks": 8}),
    Algorithm("ordered", "all_reduce", all_reduce.ordered),
    Algorithm("direct", "reduce_scatter", reduce_scatter.direct),
    Algorithm("ring", "reduce_scatter", reduce_scatter.ring),
    Algorithm("halving", "reduce_scatter", reduce_scatter.halving, {}, _odd_size),
    Algorithm("hierarchical", "reduce_scatter", reduce_scatter.hierarchical, {"chunks": 1}),
    Algorithm("ordered", "reduce_scatter", reduce_scatter.ordered),
    Algorithm("direct", "all_gather", all_gather.direct),
    Algorithm("ring", "all_gather", all_gather.ring),
    Algorithm("bruck", "all_gather", all_gather.bruck),
    Algorithm("doubling", "all_gather", all_gather.doubling, {}, _odd_size),
    Algorithm("hierarchical", "all_gather", all_gather.hierarchical, {"chunks": 1}),
    Algorithm("pairwise", "all_to_all", all_to_all.pairwise, {"window": 8}),
    Algorithm("bruck", "all_to_all", all_to_all.bruck, {}, all_to_all.not_uniform),
    Algorithm("two_level", "all_to_all", two_level.two_level, {"window": 8}),
    Algorithm("balanced", "all_to_all", balanced.balanced, {"chunks": 4, "window": 8}),
    Algorithm("tree", "broadcast", broadcast.tree),
    Algorithm("hierarchical", "broadcast", broadcast.hierarchical, {"chunks": 4}),
    Algorithm("chain", "broadcast", broadcast.chain, {"chunks": 8}),
    Algorithm("tree", "reduce", reduce.tree),
    Algorithm("hierarchical", "reduce", reduce.hierarchical, {"chunks": 4}),
]

ALGORITHMS: dict[str, dict[str, Algorithm]] = {}
for _algorithm in _ALL:
    ALGORITHMS.setdefault(_algorithm.collective, {})[_algorithm.name] = _algorithm


def names(collective: str) -> list[str]:
    """The names of the algorithms of a collective. Raises `PlanError` for one that is unknown."""
    if collective not in ALGORITHMS:
        raise PlanError(f"there is no collective {collective!r}; there are {', '.join(ALGORITHMS)}")
    return list(ALGORITHMS[collective])


def find(collective: str, name: str) -> Algorithm:
    """The algorithm called `name`. Raises `PlanError` with the names that exist."""
    known = names(collective)
    if name not in known:
        raise PlanError(f"{collective} has no algorithm {name!r}; it has {', '.join(known)}")
    return ALGORITHMS[collective][name]


def build_rank(
    problem: Problem, topology: Topology, algorithm: str, rank: int, parameters: Mapping[str, int] | None = None
) -> RankPlan:
    """The steps of `rank`; what `parameters` leaves out has its default.

    Raises `PlanError` when the algorithm is unknown, does not apply, or does not have a parameter of that name or value.
    """
    chosen = find(problem.collective, algorithm)
    if not 0 <= rank < problem.size:
        raise PlanError(f"rank {rank} is not one of the {problem.size} ranks of the problem")
    return chosen.build(problem, topology, rank, **_checked(chosen, problem, topology, parameters or {}))


def build(problem: Problem, topology: Topology, algorithm: str, parameters: Mapping[str, int] | None = None) -> Plan:
    """The plans of all ranks; raises as `build_rank`."""
    chosen = find(problem.collective, algorithm)
    values = _checked(chosen, problem, topology, parameters or {})
    ranks = tuple(chosen.build(problem, topology, rank, **values) for rank in range(problem.size))
    return Plan(problem, algorithm, ranks, values)


def _checked(
    algorithm: Algorithm, problem: Problem, topology: Topology, parameters: Mapping[str, int]
) -> dict[str, int]:
    title = f"{algorithm.collective} by {algorithm.name}"
    if topology.size != problem.size:
        raise PlanError(f"the topology has {topology.size} ranks, the problem {problem.size}; they must be the same")
    unknown = [name for name in parameters if name not in algorithm.parameters]
    if unknown:
        takes = ", ".join(algorithm.parameters) or "none"
        raise PlanError(f"{title} has no parameter {unknown[0]!r}; its parameters: {takes}")
    values = {**algorithm.parameters, **parameters}
    for name, value in values.items():
        if value < 1:
            raise PlanError(f"{title}: {name} is {value}; it must be at least 1")
    reason = algorithm.refuses(problem, topology)
    if reason:
        raise PlanError(f"{title} does not apply: {reason}")
    return values
