"""Predicted against measured on emulated hosts: probes them, times the algorithms, plays the same plans. Needs root.

python -m ncclx_py.simulate.accuracy --shapes 2x4,4x2 --rates 200mbit,1gbit --json accuracy.json
python -m ncclx_py.simulate.accuracy --replay accuracy.json     # no measurement: what was recorded, predicted by today's model

Nothing is fitted to what is compared. What calls, messages and bytes cost the machine is fitted to calls between links that are
not shaped, at other sizes (calibrate.py). What shaped NICs carry is measured with raw streams (bench/sharing.py); their burst is
what they are told. The plans come from the same registry as those that ran.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ncclx_py.bench.settings import sizes_between
from ncclx_py.launch.shape import CONGESTION
from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.machine import Machine
from ncclx_py.simulate.measured import Bench, plan_of
from ncclx_py.simulate.recorded import Recorded, read, together
from ncclx_py.simulate.score import Point, Summary, as_text, summarise
from ncclx_py.simulate.shared import call_seconds
from ncclx_py.units import parse_size

_OF_THE_MACHINE = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_LOUD = 0.1  # share of the processors


def measure(args: argparse.Namespace, sizes: Sequence[int]) -> Recorded:
    """All of it `args.runs` times, one after the other. Raises RuntimeError when a job on the emulated hosts fails."""
    used = _OF_THE_MACHINE.read_text(encoding="utf-8").strip() if args.congestion == "host" else args.congestion
    with tempfile.TemporaryDirectory() as folder:
        return together([_run(args, sizes, Bench(args.congestion, Path(folder)), used) for _ in range(args.runs)])


def _run(args: argparse.Namespace, sizes: Sequence[int], bench: Bench, congestion: str) -> Recorded:
    hosts, links, points = {}, {}, []
    for shape in args.shapes.split(","):
        _say(f"{shape}: calls between links that are not shaped")
        hosts[shape] = bench.machine(shape)
        for rate in args.rates.split(","):
            name = f"{shape} {rate}"
            _say(f"{name}: streams")
            links[name] = bench.cluster(shape, rate)
            _say(f"{name}: algorithms")
            points += bench.points(shape, rate, args.collectives.split(","), sizes, args.iters)
    return Recorded(congestion, bench.others(), hosts, links, tuple(points))


def _say(what: str) -> None:
    print(f"… {what}", file=sys.stderr, flush=True)


def predict(recorded: Recorded) -> tuple[dict[str, Machine], tuple[Point, ...]]:
    """The machine of each shape, and all points with the seconds that a call takes, as it is timed."""
    machines = {shape: hosts.calibrated() for shape, hosts in recorded.hosts.items()}
    points = []
    for point in recorded.points:
        links = recorded.links[point.cluster]
        topology, machine = links.between(recorded.hosts[links.hosts].topology, machines[links.hosts])
        seconds = call_seconds(plan_of(point, topology), 4, Cluster(topology), machine)
        points.append(replace(point, predicted_s=seconds))
    return machines, tuple(points)


def _write(path: Path | None, found: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    args, sizes = _arguments(argv)
    try:
        recorded = read(args.replay) if args.replay else measure(args, sizes)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not args.replay:
        _write(args.json, recorded.to_json())  # a measurement outlives what comes next
        _say("predictions")
    machines, points = predict(recorded)
    summary: Summary = summarise(points)
    print(as_text(points, summary))
    print(
        f"TCP's congestion control on the hosts: {recorded.congestion}; {100 * recorded.others:.0f} % of the ", end=""
    )
    print("processors went to others during the measurement" + (": not quiet" if recorded.others > _LOUD else ""))
    found = replace(recorded, points=points).to_json()
    calibrated = {shape: asdict(machine) for shape, machine in machines.items()}
    _write(args.json, {"summary": asdict(summary), "calibrated": calibrated, **found})
    return 0


def _arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Sequence[int]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shapes", default="2x4,4x2", metavar="HxG,…", help="clusters (default 2x4,4x2)")
    parser.add_argument(
        "--rates", default="200mbit,1gbit", metavar="RATE,…", help="of each NIC (default 200mbit,1gbit)"
    )
    parser.add_argument("--collectives", default="all_reduce,all_to_all", metavar="C,…")
    parser.add_argument("--sizes", default="64KiB,4MiB,8", metavar="FIRST,LAST,FACTOR", help="default 64KiB,4MiB,8")
    parser.add_argument("--iters", type=int, default=9, metavar="N", help="samples of each point and run (default 9)")
    parser.add_argument(
        "--runs",
        type=int,
        default=2,
        metavar="N",
        help="complete measurements, which are compared with each other (default 2)",
    )
    parser.add_argument(
        "--congestion",
        default=CONGESTION,
        metavar="NAME",
        help=f"TCP's congestion control on the hosts; host: this machine's own (default {CONGESTION})",
    )
    parser.add_argument(
        "--replay", type=Path, nargs="+", metavar="FILE", help="measure nothing: predict what files of --json recorded"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured, predictions and summary")
    args = parser.parse_args(argv)
    sizes = args.sizes.split(",")
    if len(sizes) != 3:
        parser.error(f"--sizes {args.sizes}: give first, last and factor, as in 64KiB,4MiB,8.")
    if args.iters < 1:
        parser.error(f"--iters {args.iters}: at least one.")
    if args.runs < 1:
        parser.error(f"--runs {args.runs}: at least one.")
    try:
        return args, sizes_between(parse_size(sizes[0]), parse_size(sizes[1]), float(sizes[2]))
    except ValueError as error:
        parser.error(f"--sizes {args.sizes}: {error}")


if __name__ == "__main__":
    sys.exit(main())
