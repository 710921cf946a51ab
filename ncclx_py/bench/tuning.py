"""Times the algorithms of a collective side by side on the real links, and checks their results: the rows of a table.

    trials = tune(("all_reduce",), (1 << 16, 1 << 20), options, report=print)     # every rank calls it; rows on all ranks

An algorithm is forced by `NCCLX_ALGO` in a group of its own, so it runs exactly as it would in a program. Those of one size
take turns, sample by sample. What the model thinks `Options.hopeless` times slower than the best is left out, and said so. An
algorithm that fails or gives wrong results makes a row with ``correct`` false, which keeps it from ever being chosen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from ncclx_py.bench.cases import Case
from ncclx_py.bench.settings import Settings
from ncclx_py.bench.timing import measure
from ncclx_py.errors import CollectiveError
from ncclx_py.plans.plan import Problem
from ncclx_py.plans.spec import topology_for
from ncclx_py.plans.table import Row, signature
from ncclx_py.plans.topology import Topology
from ncclx_py.plans.tuner import Candidate, Tuner
from ncclx_py.small_messages import gather_json
from ncclx_py.transport.identity import host_id, rail_names

_READ_BY_GROUPS = ("NCCLX_ALGO", "NCCLX_RULES", "NCCLX_TABLE", "NCCLX_PLAN", "NCCLX_DETERMINISTIC")
_FAILED = 1e9  # seconds, in the row of an algorithm that did not get to an end


@dataclass(frozen=True)
class Options:
    """`hopeless`: a prediction so many times the best one is not tried. `timeout`: of one collective, in seconds."""

    iters: int = 5
    dtype: str = "float32"
    hopeless: float = 3.0
    timeout: float = 60.0


@dataclass(frozen=True)
class Trial:
    """One algorithm at one size: what the model said (seconds), and the row that was measured (the median of `samples`) or why
    there is none."""

    collective: str
    bytes: int
    candidate: Candidate
    row: Row | None
    note: str = ""
    samples: tuple[float, ...] = ()


def tune(
    collectives: Sequence[str], sizes: Sequence[int], options: Options, report: Callable[[str], None]
) -> tuple[Topology, list[Trial]]:
    """Measures every collective at every size; `report` gets a line before each, on rank 0.

    Raises ValueError when no launcher started this process.
    """
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        raise ValueError("No launcher started this process: run it under torchrun, or with ncclx launch emulate.")
    dist.init_process_group("gloo", timeout=timedelta(seconds=options.timeout))
    try:
        topology = where_everyone_is()
        if topology.size == 1:
            raise ValueError("There is one rank, and nothing to choose between: start several.")
        trials: list[Trial] = []
        for collective in collectives:
            said = report if dist.get_rank() == 0 else lambda _: None
            trials += _Collective(collective, topology, sizes, options, said).run()
        return topology, trials
    finally:
        dist.destroy_process_group()


def where_everyone_is() -> Topology:
    """The topology of the job, from what each rank knows of its host. Every rank of the default group must call it."""
    mine = (host_id(os.environ), len(rail_names(os.environ)))
    everyone = gather_json(mine)
    names = list(dict.fromkeys(host for host, _ in everyone))
    return topology_for([names.index(host) for host, _ in everyone], mine[1], os.environ)


class _Collective:
    """The trials of one collective."""

    def __init__(
        self, collective: str, topology: Topology, sizes: Sequence[int], options: Options, report: Callable[[str], None]
    ) -> None:
        self._collective, self._topology, self._options, self._report = collective, topology, options, report
        self._settings = Settings((collective,), tuple(sizes), ("ncclx",), dtype=options.dtype, timeout=options.timeout)
        self._cases = [
            Case(collective, topology.size, dist.get_rank(), topology, size, self._settings) for size in sizes
        ]
        self._groups: dict[str, dist.ProcessGroup] = {}

    def run(self) -> list[Trial]:
        control = dist.group.WORLD
        assert control is not None
        try:
            return [trial for case in self._cases for trial in self._at(case, control)]
        finally:
            for group in self._groups.values():
                dist.destroy_process_group(group)

    def _at(self, case: Case, control: dist.ProcessGroup) -> list[Trial]:
        tried, left_out = worth_trying(self._topology, case.problem, case.dtype.itemsize, self._options.hopeless)
        self._report(f"{self._collective}, {case.bytes} bytes: {', '.join(map(str, tried))}")
        tensors = case.allocate(torch.empty)
        failures = {str(one): self._fault(case, tensors, one, control) for one in tried}
        sound = [one for one in tried if not failures[str(one)]]
        calls = [partial(case.call, tensors, self._group(one)) for one in sound]
        times = measure(calls, control, self._options.iters, 1, "cpu") if sound else []
        rows = {str(one): self._row(case, one, took.median, True) for one, took in zip(sound, times)}
        rows |= {str(one): self._row(case, one, _FAILED, False) for one in tried if failures[str(one)]}
        samples = {str(one): took.samples for one, took in zip(sound, times)}
        trials = [
            Trial(self._collective, case.bytes, one, rows[str(one)], failures[str(one)], samples.get(str(one), ()))
            for one in tried
        ]
        return trials + [Trial(self._collective, case.bytes, one, None, one.why_not) for one in left_out]

    def _fault(self, case: Case, tensors: object, one: Candidate, control: dist.ProcessGroup) -> str:
        """What is wrong with an algorithm's result, "" when nothing is: the same on every rank."""
        fault = ""
        try:
            case.fill(tensors)  # type: ignore[arg-type]
            case.call(tensors, self._group(one))  # type: ignore[arg-type]
            wrong = case.wrong(tensors)  # type: ignore[arg-type]
            if wrong:
                fault = f"rank {dist.get_rank()}: {wrong} wrong elements"
        except CollectiveError as error:
            fault = f"rank {dist.get_rank()}: {error}"
        return next(filter(None, gather_json(fault, control)), "")

    def _group(self, one: Candidate) -> dist.ProcessGroup:
        name = forced(self._collective, one)
        if name not in self._groups:
            with _environment(NCCLX_ALGO=name):
                group = dist.new_group(backend="ncclx", timeout=timedelta(seconds=self._options.timeout))
            assert isinstance(group, dist.ProcessGroup)
            self._groups[name] = group
        return self._groups[name]

    def _row(self, case: Case, one: Candidate, seconds: float, correct: bool) -> Row:
        place = signature(self._topology)
        return Row(self._collective, case.bytes, place, one.algorithm, one.parameters, seconds, correct)


def worth_trying(
    topology: Topology, problem: Problem, itemsize: int, hopeless: float
) -> tuple[list[Candidate], list[Candidate]]:
    """(what to measure, the best by the model first; what to leave out, with the reason in `why_not`).

    Of an algorithm with chunks, the number that the model likes best is tried, with half and twice as many.
    """
    known = Tuner(topology).candidates(problem, itemsize)
    able = [one for one in known if one.predicted_s is not None]
    least = min((one.predicted_s or 0.0 for one in able if one.algorithm != "ordered"), default=0.0)
    tried: list[Candidate] = []
    left_out: list[Candidate] = [one for one in known if one.predicted_s is None]
    likes: dict[str, int] = {}
    for one in sorted(able, key=lambda one: one.predicted_s or 0.0):
        chunks = one.parameters.get("chunks", 1)
        best = likes.setdefault(one.algorithm, chunks)
        reason = ""
        if one.algorithm == "ordered":
            reason = "only where results shall be deterministic"
        elif (one.predicted_s or 0.0) > hopeless * least:
            reason = f"predicted {(one.predicted_s or 0.0) / least:.1f} × the best"
        elif not best <= 2 * chunks <= 4 * best:
            reason = f"the model likes {best} chunks better"
        if reason:
            left_out.append(Candidate(one.algorithm, one.parameters, one.predicted_s, one.source, reason))
        else:
            tried.append(one)
    return tried, left_out


def forced(collective: str, one: Candidate) -> str:
    """What `NCCLX_ALGO` must be for this candidate."""
    values = ",".join(f"{name}={value}" for name, value in one.parameters.items())
    return f"{collective}={one.algorithm}" + (f"({values})" if values else "")


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Sets variables, and clears what else would decide for a group, while a group is made."""
    before = {name: os.environ.pop(name, None) for name in _READ_BY_GROUPS}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
