"""Which algorithm runs a problem, and why: the model, corrected by a measured table, overridden by rules.

    tuner = Tuner(topology)                                  # or Tuner.from_environment(topology, os.environ)
    choice = tuner.choose(problem, itemsize=4)
    choice.algorithm, choice.parameters, choice.reason       # "pipelined", {"chunks": 8}, "predicted 709 ms, …"

A choice is a pure function of the topology, the table, the rules and the problem: ranks that share these agree without
asking one another, and `digest` lets them check that they do. In this order: an algorithm that is forced, `deterministic`,
the first rule that fits and applies, the least predicted time. Predictions within `MARGIN` of each other count as equal; then
the order of `_PREFERENCE` decides, and fewer chunks, since short steps cost what the model leaves out. The exception is the
pipelined all-reduce and the balanced all-to-all, which take as many chunks as are long enough: their overlap hides more
than the model knows of. An all-to-all of short blocks is Bruck's as long as messages cost more than bytes (`SHORT_BLOCK`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ncclx_py.plans.algorithms.registry import ALGORITHMS
from ncclx_py.plans.bounds import Bound, lower_bound
from ncclx_py.plans.cost import Estimator, estimator
from ncclx_py.plans.plan import Problem
from ncclx_py.plans.problems import payload
from ncclx_py.plans.rules import Rule, forced_rules, read_rules
from ncclx_py.plans.table import Corrections, Table, read_table
from ncclx_py.plans.topology import Topology
from ncclx_py.units import format_size, format_time

MARGIN = 0.005
# Bytes of the whole vector: shorter chunks cost more in steps than they hide (measured on CPU clusters).
CHUNK = 2 << 20
# What must be gained, by the model alone, over the best of the others. Balancing moves bytes twice more inside hosts; in a ring
# every rank waits for every other one, so that their delays add up; in halving and doubling partners change from round to
# round, and NICs that several ranks share were measured to idle meanwhile.
WORTH = {"balanced": 0.9, "ring": 0.9, "halving_doubling": 0.9, "direct": 0.9}
# Between hosts, blocks of up to so many bytes cost by the message: each keeps its rank's thread busy for longer than OVERHEAD
# says, and threads share cores. Bruck's few messages then win, as long as what it sends twice costs less than MESSAGE·α for
# every message that it saves (measured on CPU clusters of 4x2, 2x4 and 8x1 hosts x ranks, 200 Mbit/s to 10 Gbit/s).
SHORT_BLOCK = 8 << 10
MESSAGE = 3
MOST_CHUNKS = 64
_REMEMBERED = 4096  # choices
_ORDERED = ("all_reduce", "reduce_scatter")
_PREFERENCE = {
    "all_reduce": ("direct", "leader", "pipelined", "hierarchical", "halving_doubling", "ring", "double_tree"),
    "reduce_scatter": ("direct", "hierarchical", "halving", "ring"),
    "all_gather": ("direct", "hierarchical", "doubling", "bruck", "ring"),
    "all_to_all": ("pairwise", "two_level", "balanced", "bruck"),
    "broadcast": ("tree", "hierarchical", "chain"),
    "reduce": ("tree", "hierarchical"),
}
# With one rank per host, sending to everyone at once floods receivers, and halving and doubling was measured to lose up to
# 1.2 times to rings, in chunks or whole: those come first.
_PREFERENCE_FLAT = {"all_reduce": ("leader", "pipelined", "ring", "halving_doubling", "direct", "double_tree")}


@dataclass(frozen=True)
class Choice:
    """What runs a problem, and why. Times are seconds."""

    algorithm: str
    parameters: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    predicted_s: float = 0.0
    bound_s: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """An algorithm with parameters: its predicted time in seconds and where that is from, or why it is out."""

    algorithm: str
    parameters: dict[str, int]
    predicted_s: float | None = None
    source: str = ""
    why_not: str = ""

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value}" for name, value in self.parameters.items() if name != "window")
        return f"{self.algorithm} ({values})" if values else self.algorithm


class Tuner:
    """Chooses for the groups of one topology. Raises ValueError where a rule can never apply."""

    def __init__(
        self,
        topology: Topology,
        table: Table | None = None,
        rules: Sequence[Rule] | None = None,
        deterministic: bool = False,
    ) -> None:
        self.topology = topology
        self.deterministic = deterministic
        self.table = table
        self.rules = tuple(rules or ())
        self._corrections = Corrections(table, topology) if table else None
        self._chosen: dict[tuple[Problem, int], Choice] = {}
        for rule in self.rules:
            rule.check(topology)
            if rule.forced and deterministic and rule.collective in _ORDERED and rule.algorithm != "ordered":
                raise ValueError(f"{rule.name} contradicts deterministic, which needs ordered for {rule.collective}.")

    @classmethod
    def from_environment(cls, topology: Topology, env: Mapping[str, str]) -> Tuner:
        """Reads `NCCLX_TABLE` and `NCCLX_RULES` (files), `NCCLX_ALGO` and `NCCLX_DETERMINISTIC` (0 or 1).

        Raises ValueError naming the variable or the file that is wrong.
        """
        deterministic = env.get("NCCLX_DETERMINISTIC") or "0"
        if deterministic not in ("0", "1"):
            raise ValueError(f"NCCLX_DETERMINISTIC={deterministic!r}: set it to 0 or 1.")
        rules = forced_rules(env["NCCLX_ALGO"]) if env.get("NCCLX_ALGO") else ()
        rules += read_rules(env["NCCLX_RULES"]) if env.get("NCCLX_RULES") else ()
        table = read_table(env["NCCLX_TABLE"]) if env.get("NCCLX_TABLE") else None
        return cls(topology, table, rules, deterministic == "1")

    def choose(self, problem: Problem, itemsize: int) -> Choice:
        """The algorithm for `problem` with elements of `itemsize` bytes. Raises ValueError when a forced one does not apply."""
        key = (problem, itemsize)
        known = self._chosen.get(key)
        if known is None:
            if len(self._chosen) >= _REMEMBERED:
                self._chosen.clear()
            known = self._chosen[key] = self._choose(problem, itemsize)
        return known

    def candidates(self, problem: Problem, itemsize: int) -> list[Candidate]:
        """All algorithms of the collective with their predicted times, the best first; those that are out come last."""
        found = self._candidates(problem, itemsize, estimator(problem, self.topology, itemsize))
        return sorted(found, key=lambda one: (one.predicted_s is None, bool(one.why_not), one.predicted_s or 0.0))

    def digest(self) -> str:
        """Equal on ranks that will choose alike."""
        parts = (self.topology, self.deterministic, self.rules, self.table.rows if self.table else ())
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _choose(self, problem: Problem, itemsize: int) -> Choice:
        bound = lower_bound(problem, self.topology, itemsize)
        estimated = estimator(problem, self.topology, itemsize)
        per_rank = payload(problem, itemsize) / problem.size
        passed_over: list[str] = []

        def by_order(algorithm: str, parameters: Mapping[str, int], why: str) -> Choice:
            values = {**ALGORITHMS[problem.collective][algorithm].parameters, **parameters}
            seconds = estimated(algorithm, values)
            reason = "; ".join([why, *passed_over])
            return Choice(algorithm, values, reason, seconds, bound.seconds)

        for rule in self.rules:
            if rule.collective != problem.collective or per_rank not in rule.bytes_per_rank:
                continue
            if not rule.fits(self.topology):
                continue
            if self.deterministic and problem.collective in _ORDERED and not rule.forced:
                passed_over.append(f"{rule.name} passed over, as results shall be deterministic")
                break
            refusal = ALGORITHMS[rule.collective][rule.algorithm].refuses(problem, self.topology)
            if not refusal:
                return by_order(rule.algorithm, rule.parameters, "forced by " + rule.name if rule.forced else rule.name)
            if rule.forced:
                raise ValueError(f"{rule.name}: {rule.algorithm} does not apply to this {rule.collective}: {refusal}.")
            passed_over.append(f"{rule.name} passed over: {rule.algorithm} does not apply, {refusal}")
        if self.deterministic and problem.collective in _ORDERED:
            return by_order("ordered", {}, "deterministic: every sum in the order of ranks")
        return self._best(problem, self._candidates(problem, itemsize, estimated), bound, passed_over)

    def _best(
        self, problem: Problem, candidates: Sequence[Candidate], bound: Bound, passed_over: Sequence[str]
    ) -> Choice:
        able = [one for one in candidates if not one.why_not and one.predicted_s is not None]
        if not able:
            reasons = "; ".join(f"{one}: {one.why_not}" for one in candidates)
            raise ValueError(f"No algorithm can run this {problem.collective}: {reasons}.")
        least = min(one.predicted_s or 0.0 for one in able)
        # The candidates are in the order of preference.
        best = next(one for one in able if (one.predicted_s or 0.0) <= least * (1 + MARGIN))
        seconds = best.predicted_s or 0.0
        reason = f"predicted {format_time(seconds)} ({best.source})"
        if bound.seconds:
            reason += f", {seconds / bound.seconds:.2f} × the bound ({bound.name})"
        others = [one for one in able if one.algorithm != best.algorithm]
        if others:
            second = min(others, key=lambda one: one.predicted_s or 0.0)
            reason += f"; next {second} {format_time(second.predicted_s or 0.0)}"
        wrong = [f"{one.algorithm} {one.why_not}" for one in candidates if one.why_not.startswith("gave wrong")]
        return Choice(
            best.algorithm, dict(best.parameters), "; ".join([reason, *wrong, *passed_over]), seconds, bound.seconds
        )

    def _candidates(self, problem: Problem, itemsize: int, estimated: Estimator) -> list[Candidate]:
        size = payload(problem, itemsize)
        found: list[Candidate] = []
        for name in self._order(problem.collective):
            known = ALGORITHMS[problem.collective][name]
            refusal = known.refuses(problem, self.topology)
            variants = _variants(problem.collective, name, size)
            if refusal or not variants:
                why_not = refusal or f"below {format_size(CHUNK)} there is nothing to cut"
                found.append(Candidate(name, {}, why_not=why_not))
                continue
            why_not = self._why_not(name, problem.collective, size)
            for parameters in variants:
                seconds, source = estimated(name, parameters), "model"
                ratio = self._corrections and self._corrections.ratio(problem.collective, name, parameters, size)
                if ratio:
                    seconds, source = seconds * ratio, "model × measured"
                found.append(Candidate(name, parameters, seconds, source, why_not))
        found = self._without_vain(found)
        return self._without_busy(size, found) if problem.collective == "all_to_all" else found

    def _without_vain(self, found: Sequence[Candidate]) -> list[Candidate]:
        """Rules out what gains less than `WORTH`: where all links are alike, not rings, and elsewhere not `direct`."""
        flat = self.topology.widest == 1
        doubted = WORTH.keys() - {"ring" if flat else "direct"}
        others = [one for one in found if one.algorithm not in doubted and not one.why_not]
        best = min(others, key=lambda one: one.predicted_s or 0.0, default=None)
        if best is None:
            return list(found)
        limit = best.predicted_s or 0.0
        return [
            replace(one, why_not=f"gains too little on {best} for the model alone to say so")
            if one.algorithm in doubted
            and one.source == "model"
            and not one.why_not
            and (one.predicted_s or 0.0) > WORTH[one.algorithm] * limit
            else one
            for one in found
        ]

    def _without_busy(self, size: int, found: list[Candidate]) -> list[Candidate]:
        """Of an all-to-all of `size` bytes per rank: rules out what sends more messages than Bruck, where that pays."""
        bruck = next((one for one in found if one.algorithm == "bruck" and not one.why_not), None)
        several, ranks = len(self.topology.hosts) > 1, self.topology.size
        if bruck is None or bruck.source != "model" or not several or not 0 < size <= SHORT_BLOCK * ranks:
            return found
        # All others handle a message for each other rank, straight or by way of a neighbour.
        saved = ranks - 1 - (ranks - 1).bit_length()
        least = (bruck.predicted_s or 0.0) - saved * MESSAGE * self.topology.inter.alpha
        return [
            replace(one, why_not=f"takes {saved} messages more than bruck, which cost more than they save")
            if one is not bruck and not one.why_not and (one.predicted_s or 0.0) > least
            else one
            for one in found
        ]

    def _order(self, collective: str) -> list[str]:
        flat = self.topology.widest == 1
        preferred = (_PREFERENCE_FLAT if flat else _PREFERENCE).get(collective, _PREFERENCE[collective])
        return [*preferred, *(name for name in ALGORITHMS[collective] if name not in preferred)]

    def _why_not(self, name: str, collective: str, size: int) -> str:
        """Why an algorithm that could run the problem is not to be chosen, or ""."""
        several = len(self.topology.hosts) > 1
        if name == "ordered":
            return "only where results shall be deterministic, or by rule"
        if self._corrections:
            wrong = self._corrections.wrong(collective, name)
            if wrong:
                return wrong
            if self._corrections.covers(collective):
                return self._corrections.unmeasured(collective, name, size)
        if name in ("hierarchical", "pipelined", "two_level", "balanced"):
            if not several:
                return "one host: there is one level"
            if self.topology.widest == 1 and name != "balanced":
                return "one rank per host: there is one level"
        if collective == "all_reduce" and not several and name != "direct":
            return "one host: considered only where measured"
        return ""


def _variants(collective: str, name: str, size: int) -> list[dict[str, int]]:
    """The parameters worth trying for `size` bytes, in the order of preference."""
    defaults = ALGORITHMS[collective][name].parameters
    if "chunks" not in defaults or (collective, name) == ("all_reduce", "direct"):
        return [dict(defaults)]
    chunks = [] if name == "pipelined" else [1]
    if size >= CHUNK:
        chunks.append(2)
    while chunks and chunks[-1] < MOST_CHUNKS and size >= 2 * chunks[-1] * CHUNK:
        chunks.append(2 * chunks[-1])
    if name in ("pipelined", "balanced"):
        chunks.reverse()
    return [{**defaults, "chunks": number} for number in chunks]
