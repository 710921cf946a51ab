"""What a collective takes on a cluster of any size: the best algorithm, its time, its bound, and how that was worked out.

    prediction = predict("all_reduce", cluster, size=1 << 30)
    prediction.algorithm, prediction.seconds, prediction.bound_s, prediction.method

All algorithms are estimated in closed form. The most promising are then played: for one rank of each class where all ranks are
alike (representative.py), else rank by rank where there are not too many steps. The best of those is the answer; where none can
be played, the closed form is, which knows nothing of tiers and faults, and the answer says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ncclx_py.plans.algorithms.registry import ALGORITHMS, build
from ncclx_py.plans.bounds import Bound, even_all_to_all_bound, lower_bound
from ncclx_py.plans.cost import Estimator, estimator
from ncclx_py.plans.cost_all_to_all import MODELS, Traffic
from ncclx_py.plans.plan import Collective
from ncclx_py.plans.problems import uniform
from ncclx_py.plans.tuner import Candidate
from ncclx_py.plans.uniform import LARGE, is_uniform, wires
from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.events import INSTANT, Outcome, play
from ncclx_py.simulate.representative import applies, play_classes
from ncclx_py.simulate.schedule import Schedule, from_plan
from ncclx_py.simulate.symmetry import Symmetry, find_symmetry

CLASSES, EVENTS, CLOSED = "one rank per class", "all ranks", "closed form"
_CLASS_STEPS = 6_000  # of one rank: more take too long to build and compare
_ALL_STEPS = 12_000_000
_BUILT_STEPS = 400_000  # of all ranks, where each plan has to be built
_TRIED = 3
_CHUNKS, _SHORTEST = (1, 2, 4, 8, 16, 32, 64), 64 << 10  # bytes of the vector in a chunk
_ROUNDS = 50_000  # instants that a cluster with faults is played in


@dataclass(frozen=True)
class Prediction:
    """`seconds` by `algorithm`; `method` is how they were found, and `outcome` what was played (None: closed form).

    `estimates` has the closed form's seconds of every algorithm, `played` the seconds of those that were played; `note` says
    what the answer leaves out. `plan_s` went into choosing and building, `play_s` into playing.
    """

    collective: str
    ranks: int
    size: int
    algorithm: str
    parameters: dict[str, int]
    seconds: float
    bound: Bound
    method: str
    note: str = ""
    outcome: Outcome | None = None
    estimates: dict[str, float] = field(default_factory=dict)
    played: dict[str, float] = field(default_factory=dict)
    plan_s: float = 0.0
    play_s: float = 0.0


Progress = Callable[[str], None]


def predict(
    collective: Collective,
    cluster: Cluster,
    size: int,
    itemsize: int = 4,
    algorithm: str = "",
    every_rank: bool = False,
    progress: Progress | None = None,
) -> Prediction:
    """For `size` bytes: the whole vector, or all blocks of one rank. `algorithm` forces one; `every_rank` plays all ranks.

    Raises ValueError where the algorithm does not apply, or all ranks are asked for and there are too many steps.
    """
    begun = time.perf_counter()
    tell = progress or (lambda text: None)
    found = _candidates(collective, cluster, size, itemsize)
    if algorithm:
        found = _only(found, algorithm, collective)
    best: dict[str, Candidate] = {}
    for one in sorted((one for one in found if one.predicted_s is not None), key=lambda one: one.predicted_s or 0.0):
        best.setdefault(one.algorithm, one)
    estimates = {name: one.predicted_s or 0.0 for name, one in best.items()}
    bound = _bound(collective, cluster, size, itemsize)
    spent, results = 0.0, []
    for one in list(best.values())[:_TRIED]:
        tell(f"playing {one}")
        job = _Job(collective, cluster, size, itemsize, one, every_rank)
        started = time.perf_counter()
        played = job.play()
        spent += time.perf_counter() - started
        if played is not None:
            results.append((played[0].seconds, one, *played))
    plan_s = time.perf_counter() - begun - spent
    if results:
        seconds, one, outcome, method = min(results, key=lambda result: result[0])
        played_s = {str(each): value for value, each, *_ in results}
        note = ""
    elif every_rank:
        raise ValueError(
            f"{cluster.topology.size} ranks have too many steps to play them all: leave out what asks for it."
        )
    else:
        one = next(iter(best.values()))
        seconds, outcome, method, played_s = one.predicted_s or 0.0, None, CLOSED, {}
        note = "" if cluster.is_healthy and not cluster.tiers else "tiers, failed links and stragglers are not counted"
    return Prediction(
        collective,
        cluster.topology.size,
        size,
        one.algorithm,
        dict(one.parameters),
        seconds,
        bound,
        method,
        note,
        outcome,
        estimates,
        played_s,
        plan_s,
        spent,
    )


def _candidates(collective: Collective, cluster: Cluster, size: int, itemsize: int) -> list[Candidate]:
    """Every algorithm with its closed form; in as many chunks as may be worth it, whatever the tuner finds worth it here."""
    topology = cluster.topology
    if collective == "all_to_all" and topology.size >= LARGE:
        if not is_uniform(topology):
            raise ValueError(f"An all-to-all among {topology.size} ranks needs hosts that are alike; they differ.")
        net, traffic = wires(topology), Traffic.even(size / topology.size, topology)
        estimated: Estimator = lambda name, parameters: MODELS[name](net, traffic, parameters)  # noqa: E731
        refusals = dict.fromkeys(ALGORITHMS[collective], "")
    else:
        problem = uniform(collective, topology.size, size, itemsize)
        estimated = estimator(problem, topology, itemsize)
        refusals = {name: known.refuses(problem, topology) for name, known in ALGORITHMS[collective].items()}
    found = []
    for name, known in ALGORITHMS[collective].items():
        if refusals[name]:
            found.append(Candidate(name, {}, why_not=refusals[name]))
            continue
        counts = [chunks for chunks in _CHUNKS if chunks == 1 or size // chunks >= _SHORTEST]
        for parameters in [{"chunks": chunks} for chunks in counts] if "chunks" in known.parameters else [{}]:
            values = {**known.parameters, **parameters}
            found.append(Candidate(name, values, estimated(name, values), "model"))
    return found


def _only(found: list[Candidate], algorithm: str, collective: str) -> list[Candidate]:
    """Those of one algorithm. Raises ValueError where there are none, or it does not apply."""
    chosen = [one for one in found if one.algorithm == algorithm]
    if not chosen:
        raise ValueError(f"There is no algorithm {algorithm!r} of {collective}: {', '.join(ALGORITHMS[collective])}.")
    if chosen[0].predicted_s is None:
        raise ValueError(f"{algorithm} does not apply to this {collective}: {chosen[0].why_not}.")
    return chosen


def _bound(collective: Collective, cluster: Cluster, size: int, itemsize: int) -> Bound:
    topology = cluster.topology
    if collective == "all_to_all" and topology.size >= LARGE:
        return even_all_to_all_bound(size / topology.size, topology)
    return lower_bound(uniform(collective, topology.size, size, itemsize), topology, itemsize)


@dataclass(frozen=True)
class _Job:
    """One algorithm to be played."""

    collective: Collective
    cluster: Cluster
    size: int
    itemsize: int
    candidate: Candidate
    every_rank: bool

    def play(self) -> tuple[Outcome, str] | None:
        """The outcome and the method; None where it would take too long."""
        ranks = self.cluster.topology.size
        steps = rough_steps(self.candidate.algorithm, self.cluster, self.candidate.parameters)
        by_class = steps <= _CLASS_STEPS and not self._has_matrix_too_large()
        symmetry = self._symmetry() if by_class else None
        if symmetry is not None and applies(symmetry, self.cluster) and not self.every_rank:
            return play_classes(symmetry, self.cluster, self.itemsize), CLASSES
        schedule = self._schedule(symmetry, steps * ranks)
        if schedule is None:
            return None
        grain = INSTANT
        if not self.cluster.is_healthy and schedule.steps > 50_000:
            grain = (self.candidate.predicted_s or 0.0) / _ROUNDS
        return play(schedule, self.cluster, grain), EVENTS

    def _has_matrix_too_large(self) -> bool:
        return self.collective == "all_to_all" and self.cluster.topology.size > 4 * LARGE

    def _symmetry(self) -> Symmetry | None:
        topology = self.cluster.topology
        problem = uniform(self.collective, topology.size, self.size, self.itemsize)
        return find_symmetry(problem, topology, self.candidate.algorithm, self.candidate.parameters)

    def _schedule(self, symmetry: Symmetry | None, steps: int) -> Schedule | None:
        if symmetry is not None:
            return symmetry.schedule(self.itemsize) if symmetry.steps <= _ALL_STEPS else None
        if steps > _BUILT_STEPS or self._has_matrix_too_large():
            return None
        topology = self.cluster.topology
        problem = uniform(self.collective, topology.size, self.size, self.itemsize)
        plan = build(problem, topology, self.candidate.algorithm, self.candidate.parameters)
        return from_plan(plan, self.itemsize)


def rough_steps(algorithm: str, cluster: Cluster, parameters: Mapping[str, int]) -> int:
    """About how many steps a rank has, so that nothing is built that would take minutes."""
    topology = cluster.topology
    ranks, hosts, width = topology.size, len(topology.hosts), topology.widest
    chunks, deep = parameters.get("chunks", 1), max(1, (ranks - 1).bit_length())
    if algorithm in ("halving_doubling", "halving", "doubling", "bruck", "tree"):
        return 6 * deep
    if algorithm in ("double_tree", "chain"):
        return 8 * chunks
    if algorithm == "leader":
        return 2 * width + 4 * deep
    if algorithm in ("hierarchical", "pipelined"):
        return 4 * chunks * (hosts + width)
    if algorithm in ("two_level", "balanced"):
        return 3 * hosts * width * chunks
    return 4 * ranks
