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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ncclx_py.bench.settings import sizes_between
from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.machine import Machine
from ncclx_py.simulate.measured import Bench, Hosts, Links, plan_of
from ncclx_py.simulate.score import Point, Summary, as_text, summarise
from ncclx_py.simulate.shared import call_seconds
from ncclx_py.units import parse_size

_CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_LOUD = 0.1  # share of the processors


@dataclass(frozen=True)
class Recorded:
    """All that was measured: `hosts` by shape, `links` by cluster; `others` is the share of the processors that others took."""

    congestion: str
    others: float
    hosts: dict[str, Hosts] = field(default_factory=dict)
    links: dict[str, Links] = field(default_factory=dict)
    points: tuple[Point, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "congestion_control": self.congestion,
            "others": self.others,
            "hosts": {name: one.to_json() for name, one in self.hosts.items()},
            "links": {name: asdict(one) for name, one in self.links.items()},
            "points": [asdict(point) for point in self.points],
        }


def measure(args: argparse.Namespace, sizes: Sequence[int]) -> Recorded:
    """Raises RuntimeError when a job on the emulated hosts fails."""
    congestion = None if args.congestion == "host" else args.congestion
    hosts, links, points = {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(congestion, Path(folder))
        for shape in args.shapes.split(","):
            _say(f"{shape}: calls between links that are not shaped")
            hosts[shape] = bench.machine(shape)
            for rate in args.rates.split(","):
                name = f"{shape} {rate}"
                _say(f"{name}: streams")
                links[name] = bench.cluster(shape, rate)
                _say(f"{name}: algorithms")
                points += bench.points(shape, rate, args.collectives.split(","), sizes, args.iters)
        others = bench.others()
    used = congestion or _CONGESTION.read_text(encoding="utf-8").strip()
    return Recorded(used, others, hosts, links, tuple(points))


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


def read(files: Sequence[Path]) -> Recorded:
    """What files of ``--json`` hold, as one. Raises ValueError where one is none."""
    parts = [_read(path) for path in files]
    if len({part.congestion for part in parts}) > 1:
        raise ValueError(f"--replay: {', '.join(map(str, files))} were measured with different congestion controls.")
    hosts: dict[str, Hosts] = {}
    for part in parts:
        for shape, one in part.hosts.items():
            known = hosts.get(shape)
            hosts[shape] = one if known is None else known.with_calls_of(one)
    return Recorded(
        parts[0].congestion,
        max(part.others for part in parts),
        hosts,
        {name: one for part in parts for name, one in part.links.items()},
        tuple(point for part in parts for point in part.points),
    )


def _read(path: Path) -> Recorded:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        points = tuple(Point(**{**one, "samples": tuple(one["samples"])}) for one in found["points"])
        if not points:
            raise ValueError(f"--replay {path} holds no points: measure again.")
        hosts = {name: Hosts.from_json(one) for name, one in found["hosts"].items()}
        links = {name: Links.from_json(one) for name, one in found["links"].items()}
        if (
            not {point.cluster for point in points} <= links.keys()
            or not {one.hosts for one in links.values()} <= hosts.keys()
        ):
            raise KeyError("links or hosts of a point")
        return Recorded(str(found["congestion_control"]), float(found["others"]), hosts, links, points)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--replay {path} cannot be read: {error}.") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--replay {path} is not what --json writes (with the probed hosts): {error!r} is missing or wrong. "
            "Measure again."
        ) from error


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
    parser.add_argument("--iters", type=int, default=9, metavar="N", help="samples of each point (default 9)")
    parser.add_argument(
        "--congestion",
        default="reno",
        metavar="NAME",
        help="TCP's congestion control on the hosts; host: this machine's own (default reno, which every Linux has)",
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
    try:
        return args, sizes_between(parse_size(sizes[0]), parse_size(sizes[1]), float(sizes[2]))
    except ValueError as error:
        parser.error(f"--sizes {args.sizes}: {error}")


if __name__ == "__main__":
    sys.exit(main())
