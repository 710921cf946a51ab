"""``ncclx probe``: measures the links of a job, and writes them as a topology file.

ncclx launch emulate 2x4 --rate 200mbit -- -m ncclx_py probe -o cluster.toml
torchrun --nproc-per-node 4 -m ncclx_py probe
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ncclx_py.bench.probing import Measurement, Probed, probe
from ncclx_py.plans.spec_file import write_spec
from ncclx_py.units import format_bandwidth, format_time

NAME = "probe"
HELP = "measure α and bandwidth of the links inside and between hosts, and write a topology file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write a topology file, for NCCLX_TOPOLOGY")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="of each measurement (default 7)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="deadline of one measurement (default 60)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    if args.repeats < 1 or args.timeout <= 0:
        raise ValueError(f"--repeats {args.repeats} --timeout {args.timeout:g}: at least 1, and above 0.")
    found = probe(args.repeats, args.timeout, partial(print, file=sys.stderr, flush=True))
    if os.environ["RANK"] != "0":
        return 0
    print(json.dumps(as_json(found), indent=2) if args.json else as_table(found))
    if args.output is not None:
        comments = ["Measured by ncclx probe.", *(_line(one) for one in found.measurements)]
        args.output.write_text(write_spec(found.topology(), comments), encoding="utf-8")
        print(f"wrote {args.output}", file=sys.stderr)
    return 0


def as_json(found: Probed) -> dict[str, object]:
    """Times in seconds, bandwidths in bytes per second."""
    return {
        "host_of": list(found.host_of),
        "rails": found.rails,
        "intra": asdict(found.intra) if found.intra else None,
        "inter": asdict(found.inter) if found.inter else None,
        "nics_Bps": [list(row) for row in found.nics],
        "measurements": [asdict(one) for one in found.measurements],
    }


def as_table(found: Probed) -> str:
    hosts = found.topology().hosts
    counts = "+".join(str(len(ranks)) for ranks in hosts)
    return "\n".join([f"{len(hosts)} hosts ({counts} ranks), {found.rails} rails", *map(_line, found.measurements)])


def _line(one: Measurement) -> str:
    shown = format_time if one.what.startswith("α") else format_bandwidth
    spread = 100 * (one.greatest - one.least) / one.median
    low, high = shown(one.least), shown(one.greatest)
    return f"{one.what:<36} {shown(one.median):>10}   from {low} to {high}, spread {spread:.0f} %"
