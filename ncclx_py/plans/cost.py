"""What a collective costs by each algorithm: closed forms in α, β and γ per level, as in the literature.

    estimate(Problem("all_reduce", 8, count=1 << 22), topology, itemsize=4, algorithm="pipelined", parameters={"chunks": 8})

Notation: P ranks on N hosts, G on the largest; n bytes; α1, β1 inside a host, α2 and the NICs between hosts. The forms assume
that all ranks of a host are busy at once and share its NICs; with unequal hosts the slowest decides. replay.py plays the actual
plan and is what the tests compare them with. A measured table corrects what they leave out (table.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ncclx_py.plans import cost_all_reduce, cost_all_to_all, cost_blocks, cost_rooted
from ncclx_py.plans.cost_all_to_all import Traffic
from ncclx_py.plans.cost_blocks import Blocks
from ncclx_py.plans.plan import Problem
from ncclx_py.plans.topology import Topology
from ncclx_py.plans.uniform import wires

Estimator = Callable[[str, Mapping[str, int]], float]


def estimate(
    problem: Problem, topology: Topology, itemsize: int, algorithm: str, parameters: Mapping[str, int]
) -> float:
    """Seconds. Raises ValueError for an algorithm without a formula."""
    return estimator(problem, topology, itemsize)(algorithm, parameters)


def estimator(problem: Problem, topology: Topology, itemsize: int) -> Estimator:
    """`estimate` for several algorithms of one problem; what they share is worked out once."""
    net, n = wires(topology), problem.count * itemsize
    models: Mapping[str, Callable[[Mapping[str, int]], float]]
    if problem.collective == "all_reduce":
        models = {name: _bind(model, net, n) for name, model in cost_all_reduce.MODELS.items()}
    elif problem.collective in ("broadcast", "reduce"):
        models = {name: _bind(model, net, n) for name, model in cost_rooted.MODELS[problem.collective].items()}
    elif problem.collective == "all_to_all":
        traffic = Traffic.of(problem, topology, itemsize)
        models = {name: _bind(model, net, traffic) for name, model in cost_all_to_all.MODELS.items()}
    else:
        blocks = Blocks.of(problem, itemsize)
        models = {name: _bind(model, net, blocks) for name, model in cost_blocks.MODELS[problem.collective].items()}

    def estimated(algorithm: str, parameters: Mapping[str, int]) -> float:
        if algorithm not in models:
            raise ValueError(f"There is no cost formula for {problem.collective} by {algorithm!r}.")
        return models[algorithm](parameters)

    return estimated


def _bind(model: Callable[..., float], *first: object) -> Callable[[Mapping[str, int]], float]:
    return lambda parameters: model(*first, parameters)
