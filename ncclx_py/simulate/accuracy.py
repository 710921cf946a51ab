"""Predicted against measured on emulated hosts: probes the links, times the algorithms, plays the same plans. Needs root.

python -m ncclx_py.simulate.accuracy --shapes 2x4,4x2,3x2 --rates 200mbit,1gbit --json accuracy.json

Nothing is fitted to what is compared: α, bandwidths and memory come from ``ncclx probe`` on the same cluster (single messages and
streams), the plans from the same registry. One thing is added, since emulated hosts share a machine: a rank's own work takes
ranks / cores times as long as on a machine of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ncclx_py.plans.algorithms.registry import build
from ncclx_py.plans.problems import uniform
from ncclx_py.plans.spec import resolve
from ncclx_py.plans.spec_file import read_spec
from ncclx_py.plans.table import Row, read_table
from ncclx_py.plans.topology import Topology
from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.events import play
from ncclx_py.simulate.schedule import from_plan
from ncclx_py.units import format_size, format_time

_SECONDS = 900.0  # for all measurements on one cluster


@dataclass(frozen=True)
class Point:
    """One algorithm at one size on one cluster; seconds."""

    cluster: str
    collective: str
    bytes: int
    algorithm: str
    parameters: dict[str, int]
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Share of the measured time by which the prediction is off."""
        return abs(self.predicted_s - self.measured_s) / self.measured_s


@dataclass(frozen=True)
class Summary:
    """Errors over all points, and how often the algorithm predicted to be fastest was the one measured (or within `near` of it)."""

    points: int
    median_error: float
    p90_error: float
    contests: int
    winners: int
    near_winners: int
    near: float = 0.05


def measure(shape: str, rate: str, collectives: Sequence[str], sizes: tuple[str, str, str], folder: Path) -> list[Row]:
    """Runs probe and tune on emulated hosts; leaves ``topology.toml`` and returns the table. RuntimeError when they fail."""
    begin, end, factor = sizes
    table = folder / "table.json"
    launch = [sys.executable, "-m", "ncclx_py", "launch", "emulate", shape, "--rate", rate, "--", "-m", "ncclx_py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for words in (
        ["probe", "-o", str(folder / "topology.toml")],
        ["tune", *collectives, "-b", begin, "-e", end, "-f", factor, "--hopeless", "4", "-o", str(table)],
    ):
        done = subprocess.run([*launch, *words], env=env, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words[:1])} on {shape} at {rate} failed:\n{done.stderr[-2000:]}")
    return [row for row in read_table(table).rows if row.correct]


def predict(row: Row, topology: Topology, cores: int) -> float:
    """Seconds of what a row measured, played on `topology` with its ranks on `cores` cores in all."""
    problem = uniform(row.collective, topology.size, row.bytes, 4)  # type: ignore[arg-type]
    plan = build(problem, topology, row.algorithm, row.parameters)
    crowd = max(1.0, topology.size / cores)
    cluster = Cluster(topology, slowness=dict.fromkeys(range(topology.size), crowd))
    return play(from_plan(plan, 4), cluster).seconds


def summarise(points: Sequence[Point], near: float = 0.05) -> Summary:
    """Errors of all points; winners among those of the same cluster, collective and size, where there are two or more."""
    errors = sorted(point.error for point in points)
    contests: dict[tuple[str, str, int], list[Point]] = defaultdict(list)
    for point in points:
        contests[point.cluster, point.collective, point.bytes].append(point)
    rivals = [group for group in contests.values() if len(group) > 1]
    winners = near_winners = 0
    for group in rivals:
        chosen = min(group, key=lambda point: point.predicted_s)
        best = min(group, key=lambda point: point.measured_s)
        winners += chosen is best
        near_winners += chosen.measured_s <= (1 + near) * best.measured_s
    p90 = errors[min(len(errors) - 1, int(0.9 * len(errors)))]
    return Summary(len(points), statistics.median(errors), p90, len(rivals), winners, near_winners, near)


def as_text(points: Sequence[Point], summary: Summary) -> str:
    lines = [
        f"{'cluster':<16} {'collective':<12} {'size':>8}  {'algorithm':<22} {'measured':>10} {'predicted':>10}  error"
    ]
    for point in points:
        values = "".join(f" {name}={value}" for name, value in point.parameters.items() if name != "window")
        lines.append(
            f"{point.cluster:<16} {point.collective:<12} {format_size(point.bytes):>8}  {point.algorithm + values:<22} "
            f"{format_time(point.measured_s):>10} {format_time(point.predicted_s):>10}  {100 * point.error:4.0f} %"
        )
    lines.append(
        f"{summary.points} points: median error {100 * summary.median_error:.0f} %, "
        f"90th percentile {100 * summary.p90_error:.0f} %; "
        f"the predicted winner was the fastest in {summary.winners} of {summary.contests} contests, "
        f"within {100 * summary.near:.0f} % of it in {summary.near_winners}"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shapes", default="2x4,4x2", metavar="HxG,…", help="clusters (default 2x4,4x2)")
    parser.add_argument(
        "--rates", default="200mbit,1gbit", metavar="RATE,…", help="of each NIC (default 200mbit,1gbit)"
    )
    parser.add_argument("--collectives", default="all_reduce,all_to_all", metavar="C,…")
    parser.add_argument("--sizes", default="64KiB,4MiB,8", metavar="FIRST,LAST,FACTOR", help="default 64KiB,4MiB,8")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write points and summary")
    args = parser.parse_args(argv)
    sizes = tuple(args.sizes.split(","))
    if len(sizes) != 3:
        parser.error(f"--sizes {args.sizes}: give first, last and factor, as in 64KiB,4MiB,8.")
    points: list[Point] = []
    for shape in args.shapes.split(","):
        for rate in args.rates.split(","):
            print(f"… {shape} at {rate}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    rows = measure(
                        shape, rate, args.collectives.split(","), (sizes[0], sizes[1], sizes[2]), Path(folder)
                    )
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    print(f"error: {error}", file=sys.stderr)
                    return 1
                spec = read_spec(Path(folder) / "topology.toml")
                topology = resolve(spec.host_of, 0, spec, world="probed").topology
            for row in rows:
                predicted = predict(row, topology, os.cpu_count() or 1)
                name = f"{shape} {rate}"
                points.append(
                    Point(name, row.collective, row.bytes, row.algorithm, dict(row.parameters), row.median_s, predicted)
                )
    summary = summarise(points)
    print(as_text(points, summary))
    if args.json is not None:
        found = {"summary": asdict(summary), "points": [asdict(point) for point in points]}
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
