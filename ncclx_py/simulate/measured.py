"""Measures emulated hosts for ``accuracy.py``: what the model is told of them, and the algorithms that it predicts. Needs root.

    bench = Bench("reno", Path(folder))
    machine = bench.machine("2x4")                                       # links not shaped: α, and calls for calibrate.py
    cluster = bench.cluster("2x4", "200mbit")                            # shaped: what NICs carry
    points = bench.points("2x4", "200mbit", ["all_reduce"], [65536], 9)  # shaped: what is predicted

Each is a job of ``ncclx launch emulate``. What others take of the processor meanwhile is measured too: it is not modelled.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ncclx_py.plans.algorithms.registry import build
from ncclx_py.plans.plan import Plan
from ncclx_py.plans.problems import uniform
from ncclx_py.plans.spec import resolve
from ncclx_py.plans.spec_file import read_spec
from ncclx_py.plans.topology import Link, Topology
from ncclx_py.simulate.calibrate import Shot, calibrate
from ncclx_py.simulate.machine import Machine
from ncclx_py.simulate.score import Point

BURST = 128 << 10  # bytes
_SECONDS = 1800.0  # for one job
_COLLECTIVES = ("all_reduce", "all_to_all")  # that the machine is calibrated with
_SIZES = (16 << 10, 128 << 10, 1 << 20)
_ITERS = 9
_ALL = 20.0  # an algorithm that is predicted so many times slower than the best is not timed
_HOPELESS = 4.0
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Hosts:
    """What was measured between links that are not shaped: where the ranks are, α, and timed calls."""

    topology: Topology
    cores: int
    calls: tuple[Point, ...]

    def calibrated(self) -> Machine:
        """The machine that explains the calls."""
        shots = [Shot(plan_of(call, self.topology), call.measured_s) for call in self.calls]
        return calibrate(shots, self.topology, self.cores)

    def with_calls_of(self, other: Hosts) -> Hosts:
        """The same hosts, with the samples of both measurements of each call."""
        return replace(self, calls=merged((*self.calls, *other.calls)))

    def to_json(self) -> dict[str, Any]:
        return {
            "topology": asdict(self.topology),
            "cores": self.cores,
            "calls": [asdict(call) for call in self.calls],
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Hosts:
        known = found["topology"]
        links = Link(**known["intra"]), Link(**known["inter"])
        topology = Topology(tuple(known["host_of"]), known["rails"], *links, tuple(map(tuple, known["nics"])))
        return cls(topology, int(found["cores"]), tuple(map(point_from_json, found["calls"])))


@dataclass(frozen=True)
class Links:
    """What was measured of shaped links (bench/sharing.py): (streams per NIC, bytes per second of a NIC), fewest streams first,
    and how unevenly streams share one."""

    hosts: str
    burst: int
    carried: tuple[tuple[int, float], ...]
    spread: float

    def between(self, topology: Topology, machine: Machine) -> tuple[Topology, Machine]:
        """Those hosts and that machine with these links."""
        whole = self.carried[0][1]
        sharing = tuple((streams, min(1.0, rate / whole)) for streams, rate in self.carried)
        inter = replace(topology.inter, bandwidth=whole)
        shaped = replace(machine, burst=float(self.burst), sharing=sharing, spread=self.spread)
        return replace(topology, inter=inter, nics=()), shaped

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Links:
        carried = tuple((int(streams), float(rate)) for streams, rate in found["carried"])
        if not carried:
            raise KeyError("carried")
        return cls(found["hosts"], int(found["burst"]), carried, float(found["spread"]))


def mean_rates(several: Sequence[Links]) -> Links:
    """The same links, with the mean of what each measurement found. KeyError where they are not the same links."""
    if len({(links.hosts, links.burst, tuple(streams for streams, _ in links.carried)) for links in several}) > 1:
        raise KeyError("links")
    rates = zip(*([rate for _, rate in links.carried] for links in several))
    streams = [count for count, _ in several[0].carried]
    spread = statistics.fmean(links.spread for links in several)
    return replace(several[0], carried=tuple(zip(streams, map(statistics.fmean, rates))), spread=spread)


def merged(points: Iterable[Point]) -> tuple[Point, ...]:
    """Each point once, with all of its runs."""
    found: dict[object, Point] = {}
    for point in points:
        known = found.get(point.key)
        found[point.key] = point if known is None else replace(known, runs=known.runs + point.runs)
    return tuple(found.values())


def point_from_json(found: dict[str, Any]) -> Point:
    return Point(**{**found, "runs": tuple(map(tuple, found["runs"]))})


def plan_of(point: Point, topology: Topology) -> Plan:
    problem = uniform(point.collective, topology.size, point.bytes, 4)  # type: ignore[arg-type]
    return build(problem, topology, point.algorithm, point.parameters)


class Bench:
    """Jobs on emulated hosts whose TCP uses `congestion` (as ``ncclx launch emulate`` takes it), with files in `folder`."""

    def __init__(self, congestion: str, folder: Path) -> None:
        self._congestion, self._folder = congestion, folder
        self._began, self._busy = time.monotonic(), _busy()
        self._ours = _children()

    def machine(self, shape: str) -> Hosts:
        """Raises RuntimeError when a job fails."""
        file = self._folder / "topology.toml"
        self._run(shape, None, ["-m", "ncclx_py", "probe", "-o", str(file)])
        spec = read_spec(file)
        topology = resolve(spec.host_of, 0, spec, world="probed").topology
        calls = self._timed(shape, None, _COLLECTIVES, _SIZES, _ITERS, _ALL)
        return Hosts(topology, os.cpu_count() or 1, tuple(calls))

    def cluster(self, shape: str, rate: str) -> Links:
        """Raises RuntimeError when a job fails."""
        file = self._folder / "carried.json"
        self._run(shape, rate, ["-m", "ncclx_py.bench.sharing", str(file)])
        return Links.from_json({"hosts": shape, "burst": BURST, **json.loads(file.read_text(encoding="utf-8"))})

    def points(
        self, shape: str, rate: str, collectives: Sequence[str], sizes: Sequence[int], iters: int
    ) -> list[Point]:
        """Raises RuntimeError when a job fails."""
        return self._timed(shape, rate, collectives, sizes, iters, _HOPELESS)

    def others(self) -> float:
        """Share of the machine's processor time that went to anything but these jobs so far."""
        spent = time.monotonic() - self._began
        theirs = _busy() - self._busy - (_children() - self._ours)
        return max(0.0, theirs / (spent * (os.cpu_count() or 1)))

    def _timed(
        self,
        shape: str,
        rate: str | None,
        collectives: Sequence[str],
        sizes: Sequence[int],
        iters: int,
        hopeless: float,
    ) -> list[Point]:
        file = self._folder / "samples.json"
        what = [",".join(collectives), ",".join(map(str, sizes)), "--iters", str(iters), "--hopeless", str(hopeless)]
        self._run(shape, rate, ["-m", "ncclx_py.bench.contests", str(file), *what])
        name = shape if rate is None else f"{shape} {rate}"
        rows = json.loads(file.read_text(encoding="utf-8"))
        return [Point(cluster=name, runs=(tuple(row.pop("samples")),), **row) for row in rows]

    def _run(self, shape: str, rate: str | None, words: Sequence[str]) -> None:
        launch = [sys.executable, "-m", "ncclx_py", "launch", "emulate", shape]
        launch += ["--rate", rate, "--burst", str(BURST)] if rate is not None else []
        launch += ["--congestion", self._congestion]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*launch, "--", *words], env=env, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        if done.returncode:
            where = f"{shape} at {rate}" if rate is not None else f"{shape}, links not shaped,"
            raise RuntimeError(f"{' '.join(words[1:3])} on {where} failed:\n{done.stderr[-2000:]}")


def _busy() -> float:
    """Seconds of processor time that this machine has spent on processes, and that its own host kept back."""
    words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    user, nice, system, steal = (int(words[index]) for index in (1, 2, 3, 8))
    return (user + nice + system + steal) / _TICK


def _children() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime
