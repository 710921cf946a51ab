"""``ncclx launch``: start a job. ``ncclx launch emulate 4x2 --rate 200mbit -- script.py …`` starts it on an emulated cluster."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from ncclx_py.launch.emulate import Cluster
from ncclx_py.launch.ranks import Interrupted, Outcome, describe, raise_on_signals
from ncclx_py.launch.shape import PLACEMENTS, Shape, parse_ranks, parse_rates, str_ranks
from ncclx_py.units import parse_bandwidth, parse_size

NAME = "launch"
HELP = "start a job"

_EMULATE = "run a torchrun program on emulated hosts: network namespaces with shaped links (needs root)"

_USAGE = "ncclx launch emulate CLUSTER [options] -- (script.py | -m module) [arguments]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ways = parser.add_subparsers(dest="way", metavar="way", required=True)
    emulate = ways.add_parser("emulate", help=_EMULATE, description=_EMULATE.capitalize() + ".", usage=_USAGE)
    emulate.add_argument(
        "cluster", help="hosts and ranks: 4x2 is 4 hosts with 2 ranks each, 4+2 a host of 4 and one of 2"
    )
    add_link_arguments(emulate)
    emulate.add_argument(
        "--placement", choices=PLACEMENTS, default="block", help="how ranks are numbered (default block)"
    )
    emulate.add_argument("--json", type=Path, metavar="FILE", help="write what ran and how it ended")
    emulate.add_argument(
        "program",
        nargs="+",
        help="what would follow torchrun's options: script.py … or -m module …",
    )
    emulate.set_defaults(launch=_emulate)


def add_link_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that describe the links of emulated hosts, for every command that makes some."""
    parser.add_argument(
        "--rate", metavar="RATE", help="of every NIC and direction: 200mbit, or one per rail: 200mbit,100mbit"
    )
    parser.add_argument(
        "--rails", type=int, metavar="N", help="NICs of each host (default: as many as --rate names, or 1)"
    )
    parser.add_argument(
        "--spine", metavar="RATE", help="a shaped link between the two halves of the hosts, shared by all rails"
    )
    parser.add_argument(
        "--burst", default="128kb", metavar="SIZE", help="bytes that may pass a shaped link at once (default 128kb)"
    )


def shape_of(cluster: str, args: argparse.Namespace, placement: str) -> Shape:
    """The shape that the options of `add_link_arguments` describe. Raises ValueError naming the option at fault."""
    spine = None if args.spine is None else parse_bandwidth(args.spine)
    burst = parse_size(args.burst.replace("kb", "KiB"))  # tc's kb
    return Shape(parse_ranks(cluster), parse_rates(args.rate, args.rails), spine, burst, placement)


def run(args: argparse.Namespace) -> int:
    status: int = args.launch(args)
    return status


def _emulate(args: argparse.Namespace) -> int:
    shape = shape_of(args.cluster, args, args.placement)
    started = time.monotonic()
    try:
        with raise_on_signals(), Cluster(shape) as cluster:
            outcome = cluster.run(args.program)
    except Interrupted as stop:
        print(f"ncclx launch: {stop}: the ranks were ended and the hosts removed", file=sys.stderr)
        return 128 + stop.signum
    _report(outcome, shape)
    if args.json is not None:
        args.json.write_text(json.dumps(_record(args, shape, outcome, time.monotonic() - started), indent=2) + "\n")
    return outcome.status


def _report(outcome: Outcome, shape: Shape) -> None:
    if outcome.failed is None:
        return
    rank = outcome.failed
    where = f"rank {rank} (host {shape.host_of[rank]})"
    print(f"ncclx launch: {where} failed first, with {describe(outcome.status)}", file=sys.stderr)
    if outcome.last_lines:
        print("its last lines:", *outcome.last_lines, sep="\n  ", file=sys.stderr)


def _record(args: argparse.Namespace, shape: Shape, outcome: Outcome, seconds: float) -> dict[str, Any]:
    return {
        "program": args.program,
        "cluster": str_ranks(shape.ranks),
        "placement": shape.placement,
        "rates_bytes_per_s": shape.rates,
        "spine_bytes_per_s": shape.spine,
        "burst_bytes": shape.burst,
        "host_of": shape.host_of,
        "status": outcome.status,
        "failed_rank": outcome.failed,
        "statuses": [outcome.statuses.get(rank) for rank in range(shape.size)],
        "seconds": round(seconds, 3),
    }
