"""``ncclx launch``: start a job, and say who broke it when it fails.

ncclx launch torchrun --nproc-per-node 4 -- script.py …           # through torch's elastic launcher
ncclx launch slurm 2x8 --time 4:00:00 -- script.py …              # as a batch job of SLURM
ncclx launch emulate 4x2 --rate 200mbit -- script.py …            # on an emulated cluster (needs root)
ncclx launch emulate 2x2 --inject kill:rank=3,step=20 -- …        # a drill: see docs/faults.md
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from ncclx_py.commands import launch_slurm
from ncclx_py.commands.launch_report import (
    PROGRAM,
    add_log_folder,
    add_shared_arguments,
    check_record,
    make_folder,
    read_faults,
    record,
    report,
)
from ncclx_py.faults.spec import InjectError
from ncclx_py.launch.emulate import Cluster
from ncclx_py.launch.inject import Drill
from ncclx_py.launch.ranks import Interrupted, JobError, prefixed, raise_on_signals
from ncclx_py.launch.shape import CONGESTION, PLACEMENTS, Shape, parse_ranks, parse_rates, str_ranks
from ncclx_py.launch.watched import Watched, written_to
from ncclx_py.units import parse_bandwidth, parse_size

NAME = "launch"
HELP = "start a job"

_EMULATE = "run a torchrun program on emulated hosts: network namespaces with shaped links (needs root)"
_TORCHRUN = "run a program through torch's elastic launcher, with a log per rank"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ways = parser.add_subparsers(dest="way", metavar="way", required=True)
    emulate = ways.add_parser(
        "emulate",
        help=_EMULATE,
        description=_EMULATE.capitalize() + ".",
        usage=f"ncclx launch emulate CLUSTER [options] {PROGRAM}",
    )
    emulate.add_argument(
        "cluster", help="hosts and ranks: 4x2 is 4 hosts with 2 ranks each, 4+2 a host of 4 and one of 2"
    )
    add_link_arguments(emulate)
    emulate.add_argument(
        "--placement", choices=PLACEMENTS, default="block", help="how ranks are numbered (default block)"
    )
    emulate.add_argument("--log-dir", type=Path, metavar="DIR", help="write rank-R.out, rank-R.err and traces there")
    add_shared_arguments(emulate)
    emulate.set_defaults(launch=_emulate)
    _add_torchrun(ways)
    launch_slurm.add(ways)


def _add_torchrun(ways: Any) -> None:
    torchrun = ways.add_parser(
        "torchrun",
        help=_TORCHRUN,
        description=_TORCHRUN.capitalize() + ".",
        usage=f"ncclx launch torchrun [options] {PROGRAM}",
    )
    torchrun.add_argument("--nproc-per-node", default="1", metavar="N", help="ranks of this node, or auto, cpu, gpu")
    torchrun.add_argument("--nnodes", default="1", metavar="N", help="nodes, or MIN:MAX (default 1)")
    torchrun.add_argument("--node-rank", type=int, metavar="N", help="of this node, where --master-addr is given")
    torchrun.add_argument("--rdzv-backend", metavar="NAME", help="c10d or static")
    torchrun.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where the nodes meet")
    torchrun.add_argument("--rdzv-id", metavar="ID", help="the name of the job, the same on all nodes")
    torchrun.add_argument("--rdzv-conf", metavar="K=V,…", help="more for the rendezvous")
    torchrun.add_argument("--master-addr", metavar="HOST", help="of the first node, for a static rendezvous")
    torchrun.add_argument("--master-port", type=int, metavar="PORT")
    torchrun.add_argument("--max-restarts", type=int, metavar="N", help="of all ranks after a failure (default 0)")
    add_log_folder(torchrun)
    add_shared_arguments(torchrun)
    torchrun.set_defaults(launch=_torchrun)


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
    parser.add_argument(
        "--congestion",
        default=CONGESTION,
        metavar="NAME",
        help=f"TCP's congestion control on the hosts; host: the machine's own (default {CONGESTION}, which every Linux has)",
    )


def shape_of(cluster: str, args: argparse.Namespace, placement: str) -> Shape:
    """The shape that the options of `add_link_arguments` describe. Raises ValueError naming the option at fault."""
    spine = None if args.spine is None else parse_bandwidth(args.spine)
    burst = parse_size(args.burst.replace("kb", "KiB"))  # tc's kb
    rates = parse_rates(args.rate, args.rails)
    congestion = None if args.congestion == "host" else args.congestion
    return Shape(parse_ranks(cluster), rates, spine, burst, placement, congestion)


def run(args: argparse.Namespace) -> int:
    try:
        status: int = args.launch(args)
    except (InjectError, JobError) as error:
        print(f"ncclx launch: error: {error}", file=sys.stderr)
        return 2
    return status


def _emulate(args: argparse.Namespace) -> int:
    try:
        shape = shape_of(args.cluster, args, args.placement)
    except ValueError as error:
        raise JobError(str(error)) from None
    check_record(args.json)
    faults = read_faults(args.inject, shape.size, shape)
    folder = None if args.log_dir is None else make_folder(args.log_dir, None)
    watched = Watched(folder, os.environ)
    started = time.monotonic()
    try:
        with raise_on_signals(), Cluster(shape) as cluster, Drill(faults, cluster.network, shape.host_of) as drill:
            show = prefixed if folder is None else written_to(folder, prefixed)
            outcome = cluster.run(args.program, env={**watched.environment(), **drill.environment()}, show=show)
    except Interrupted as stop:
        print(f"ncclx launch: {stop}: the ranks were ended and the hosts removed", file=sys.stderr)
        return 128 + stop.signum
    host = "" if outcome.failed is None else f" (host {shape.host_of[outcome.failed]})"
    verdict = report(outcome, host, drill, watched)
    if args.json is not None:
        facts = _emulated_record(args, shape) | record(args, outcome, drill, verdict, time.monotonic() - started)
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return outcome.status


def _torchrun(args: argparse.Namespace) -> int:
    from ncclx_py.launch import torchrun  # torch's launcher takes a second to import

    options = {field.name: getattr(args, field.name) for field in fields(torchrun.Job)}
    job = torchrun.Job(**options)
    check_record(args.json)
    faults = read_faults(args.inject, job.ranks)
    folder = make_folder(args.log_dir, args.rdzv_id)
    watched = Watched(folder, os.environ)
    print(f"ncclx launch: logs in {folder}", file=sys.stderr)
    started = time.monotonic()
    try:
        with Drill(faults) as drill:
            env = {**watched.environment(), **drill.environment()}
            outcome, logs = torchrun.launch(job, folder, env)
    except Interrupted as stop:
        print(f"ncclx launch: {stop}: the ranks were ended; their logs are in {folder}", file=sys.stderr)
        return 128 + stop.signum
    verdict = report(outcome, "", drill, watched, logs.ranks.values())
    if args.json is not None:
        facts = {"logs": str(folder)} | record(args, outcome, drill, verdict, time.monotonic() - started)
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return outcome.status


def _emulated_record(args: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    return {
        "cluster": str_ranks(shape.ranks),
        "placement": shape.placement,
        "rates_bytes_per_s": shape.rates,
        "spine_bytes_per_s": shape.spine,
        "burst_bytes": shape.burst,
        "congestion": shape.congestion,
        "host_of": shape.host_of,
    }
