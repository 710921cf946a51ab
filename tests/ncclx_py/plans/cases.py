"""Random problems, topologies and parameters, from a seed: what the tests of the plan layer run over."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from ncclx_py.plans.algorithms.registry import ALGORITHMS, Algorithm
from ncclx_py.plans.plan import Problem
from ncclx_py.plans.topology import Topology

WORLDS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 17, 24, 31, 32, 33, 47, 48, 61, 64]


class Case(NamedTuple):
    problem: Problem
    topology: Topology
    algorithm: Algorithm
    parameters: dict[str, int]


def cases(seed: int, number: int, worlds: list[int] = WORLDS, largest: int = 5000) -> Iterator[Case]:
    """`number` topologies of a size in `worlds`, with a problem for every algorithm that applies."""
    random_ = random.Random(seed)
    for _ in range(number):
        topology = some_topology(random_, random_.choice(worlds))
        for collective in ALGORITHMS:
            problem = some_problem(random_, collective, topology.size, largest)
            for algorithm in ALGORITHMS[collective].values():
                if not algorithm.refuses(problem, topology):
                    values = [1, 2, 3, 5, 8] if topology.size <= 16 else [1, 2]
                    parameters = {name: random_.choice(values) for name in algorithm.parameters}
                    yield Case(problem, topology, algorithm, parameters)


def some_topology(random_: random.Random, size: int) -> Topology:
    """`size` ranks on one, equal or unequal hosts; placed in blocks, cyclically or anyhow; with or without rails."""
    kind = random_.choice(["one", "equal", "unequal", "unequal"])
    divisors = [number for number in range(1, min(size, 8) + 1) if size % number == 0]
    hosts = {"one": 1, "equal": random_.choice(divisors)}.get(kind, random_.randint(1, min(size, 8)))
    sizes = [size // hosts] * hosts
    for _ in range(size - sum(sizes)):
        sizes[random_.randrange(hosts)] += 1
    if kind == "unequal":  # one host gives ranks to another
        giver, taker = random_.randrange(hosts), random_.randrange(hosts)
        moved = random_.randrange(sizes[giver])
        sizes[giver], sizes[taker] = (
            (sizes[giver] - moved, sizes[taker] + moved) if giver != taker else (sizes[giver], sizes[taker])
        )
    return placed(random_, sizes, random_.choice(["block", "cyclic", "any"]))


def placed(random_: random.Random, sizes: list[int], placement: str) -> Topology:
    host_of = [host for host, ranks in enumerate(sizes) for _ in range(ranks)]
    if placement == "cyclic":
        host_of = [host for turn in range(max(sizes)) for host, ranks in enumerate(sizes) if turn < ranks]
    elif placement == "any":
        random_.shuffle(host_of)
    seen = list(dict.fromkeys(host_of))  # hosts are numbered in the order of their first rank
    rails = random_.choice([1, 1, 2, 4])
    nics = tuple(tuple(random_.choice([1e8, 1e9, 3e9]) for _ in range(rails)) for _ in seen)
    return Topology(tuple(seen.index(host) for host in host_of), rails, nics=nics if random_.random() < 0.4 else ())


def some_problem(random_: random.Random, collective: str, size: int, largest: int) -> Problem:
    """Counts from nothing over fewer elements than ranks to `largest`; equal, unequal, and with gaps."""
    if collective in ("all_reduce", "broadcast", "reduce"):
        count = random_.choice([0, 1, size // 2, size, largest // 3, largest])
        return Problem(collective, size, count=count, root=random_.randrange(size))
    amounts = random_.choice([[0], [1], [7], [largest // size + 1], [0, 0, 1, 5], [0, 2, largest // size + 1]])
    if collective == "all_to_all":
        matrix = tuple(tuple(random_.choice(amounts) for _ in range(size)) for _ in range(size))
        return Problem(collective, size, matrix=matrix)
    return Problem(collective, size, counts=tuple(random_.choice(amounts) for _ in range(size)))
