"""Predicted against measured on emulated hosts: probes the links, times the algorithms, plays the same plans. Needs root.

python -m ncclx_py.simulate.accuracy --shapes 2x4,4x2 --rates 200mbit,1gbit --json accuracy.json
python -m ncclx_py.simulate.accuracy --replay accuracy.json     # no measurement: what was recorded, predicted by today's model

Nothing is fitted to what is compared: α and bandwidths come from ``ncclx probe`` on the same cluster (single messages and
streams), what messages, calls and bytes cost the machine that all hosts share from ``bench/sharing.py`` (no collective that
moves data), the burst of shaped links is what they are told, and the plans come from the same registry.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ncclx_py.plans.algorithms.registry import build
from ncclx_py.plans.problems import uniform
from ncclx_py.plans.spec import resolve
from ncclx_py.plans.spec_file import read_spec
from ncclx_py.plans.table import Row, read_table
from ncclx_py.plans.topology import Link, Topology
from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.machine import Machine
from ncclx_py.simulate.shared import call_seconds
from ncclx_py.units import format_size, format_time

_SECONDS = 1800.0  # for all measurements on one cluster
_BURST = 128 << 10  # bytes
_CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")  # which emulated hosts take over
_REGIMES: tuple[tuple[str, Callable[[int], bool]], ...] = (
    ("up to 64 KiB", lambda size: size <= 64 << 10),
    ("between", lambda size: 64 << 10 < size < 1 << 20),
    ("1 MiB and more", lambda size: size >= 1 << 20),
)


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


@dataclass(frozen=True)
class Probed:
    """What was measured of a cluster before any collective was."""

    topology: Topology
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        return {"topology": asdict(self.topology), "machine": asdict(self.machine)}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Probed:
        known = found["topology"]
        topology = Topology(
            tuple(known["host_of"]),
            known["rails"],
            Link(**known["intra"]),
            Link(**known["inter"]),
            tuple(map(tuple, known["nics"])),
        )
        return cls(topology, Machine(**found["machine"]))


def measure(
    shape: str, rate: str, collectives: Sequence[str], sizes: Sequence[str], iters: int, folder: Path
) -> tuple[Probed, list[Row]]:
    """Probes an emulated cluster and times the algorithms on it. RuntimeError when that fails."""
    begin, end, factor = sizes
    table, links, shared = folder / "table.json", folder / "topology.toml", folder / "machine.json"
    launch = [
        sys.executable,
        "-m",
        "ncclx_py",
        "launch",
        "emulate",
        shape,
        "--rate",
        rate,
        "--burst",
        str(_BURST),
        "--",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    tune = ["tune", *collectives, "-b", begin, "-e", end, "-f", factor, "--hopeless", "4", "--iters", str(iters)]
    for words in (
        ["-m", "ncclx_py", "probe", "-o", str(links)],
        ["-m", "ncclx_py.bench.sharing", str(shared)],
        ["-m", "ncclx_py", *tune, "-o", str(table)],
    ):
        done = subprocess.run([*launch, *words], env=env, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words[1:3])} on {shape} at {rate} failed:\n{done.stderr[-2000:]}")
    spec = read_spec(links)
    topology = resolve(spec.host_of, 0, spec, world="probed").topology
    machine = Machine(**{**json.loads(shared.read_text(encoding="utf-8")), "burst": float(_BURST)})
    return Probed(topology, machine), [row for row in read_table(table).rows if row.correct]


def predict(collective: str, size: int, algorithm: str, parameters: dict[str, int], probed: Probed) -> float:
    """Seconds of a call of `size` bytes, as it is timed, on the cluster that was probed."""
    problem = uniform(collective, probed.topology.size, size, 4)  # type: ignore[arg-type]
    plan = build(problem, probed.topology, algorithm, parameters)
    return call_seconds(plan, 4, Cluster(probed.topology), probed.machine)


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
    lines.append(_told("all", summary))
    for name, belongs in _REGIMES:
        part = [point for point in points if belongs(point.bytes)]
        if part:
            lines.append(_told(name, summarise(part, summary.near)))
    return "\n".join(lines)


def _told(what: str, summary: Summary) -> str:
    return (
        f"{what + ':':<16} {summary.points:>3} points, median error {100 * summary.median_error:.0f} %, "
        f"90th percentile {100 * summary.p90_error:.0f} %; the predicted winner was the fastest in "
        f"{summary.winners} of {summary.contests} contests, within {100 * summary.near:.0f} % of it in {summary.near_winners}"
    )


def _measured(args: argparse.Namespace, sizes: Sequence[str]) -> tuple[dict[str, Probed], list[Point]]:
    clusters: dict[str, Probed] = {}
    points: list[Point] = []
    for shape in args.shapes.split(","):
        for rate in args.rates.split(","):
            name = f"{shape} {rate}"
            print(f"… {name}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                probed, rows = measure(shape, rate, args.collectives.split(","), sizes, args.iters, Path(folder))
            clusters[name] = probed
            for row in rows:
                parameters = dict(row.parameters)
                predicted = predict(row.collective, row.bytes, row.algorithm, parameters, probed)
                points.append(
                    Point(name, row.collective, row.bytes, row.algorithm, parameters, row.median_s, predicted)
                )
    return clusters, points


def _replayed(path: Path) -> tuple[dict[str, Probed], list[Point]]:
    """What a file of ``--json`` holds, predicted anew. Raises ValueError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        clusters = {name: Probed.from_json(one) for name, one in found["clusters"].items()}
        old = [Point(**one) for one in found["points"]]
        if not old:
            raise ValueError(f"--replay {path} holds no points: measure again.")
        return clusters, [
            Point(
                **{
                    **asdict(one),
                    "predicted_s": predict(
                        one.collective, one.bytes, one.algorithm, one.parameters, clusters[one.cluster]
                    ),
                }
            )
            for one in old
        ]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--replay {path} cannot be read: {error}.") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--replay {path} is not what --json writes (with the probed clusters): {error!r} is missing or wrong. "
            "Measure again."
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shapes", default="2x4,4x2", metavar="HxG,…", help="clusters (default 2x4,4x2)")
    parser.add_argument(
        "--rates", default="200mbit,1gbit", metavar="RATE,…", help="of each NIC (default 200mbit,1gbit)"
    )
    parser.add_argument("--collectives", default="all_reduce,all_to_all", metavar="C,…")
    parser.add_argument("--sizes", default="64KiB,4MiB,8", metavar="FIRST,LAST,FACTOR", help="default 64KiB,4MiB,8")
    parser.add_argument("--iters", type=int, default=9, metavar="N", help="samples of each point (default 9)")
    parser.add_argument(
        "--replay", type=Path, metavar="FILE", help="measure nothing: predict what FILE (--json) recorded"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the probed clusters, points and summary")
    args = parser.parse_args(argv)
    sizes = args.sizes.split(",")
    if len(sizes) != 3:
        parser.error(f"--sizes {args.sizes}: give first, last and factor, as in 64KiB,4MiB,8.")
    if args.iters < 1:
        parser.error(f"--iters {args.iters}: at least one.")
    try:
        clusters, points = _replayed(args.replay) if args.replay is not None else _measured(args, sizes)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    summary = summarise(points)
    print(as_text(points, summary))
    if args.json is not None:
        found = {
            "summary": asdict(summary),
            "congestion_control": _CONGESTION.read_text(encoding="utf-8").strip()
            if args.replay is None
            else "recorded",
            "clusters": {name: probed.to_json() for name, probed in clusters.items()},
            "points": [asdict(point) for point in points],
        }
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
