"""``ncclx bench``: collectives timed side by side, checked in the same run, with their lower bound.

ncclx bench all_reduce --emulate 2x4 --rate 200mbit              # on emulated hosts (needs root)
torchrun --nproc-per-node 4 -m ncclx_py bench all_reduce         # on the ranks of a job
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ncclx_py.bench import mpi, session
from ncclx_py.bench.plot import draw
from ncclx_py.bench.rows import RAW, Row, as_table, ordered, read_json, write_json
from ncclx_py.bench.settings import COLLECTIVES, DTYPES, GROUP_BACKENDS, MPI_BACKENDS, OPS, Settings, sizes_between
from ncclx_py.commands.launch import add_link_arguments, shape_of
from ncclx_py.launch.emulate import Cluster
from ncclx_py.launch.ranks import Interrupted, describe, prefixed, raise_on_signals
from ncclx_py.units import parse_size

NAME = "bench"
HELP = "time collectives side by side, check their results, and compare them with the lower bound"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "collectives", nargs="+", metavar="COLLECTIVE", choices=COLLECTIVES, help=", ".join(COLLECTIVES)
    )
    parser.add_argument("-b", "--begin", default="1KiB", metavar="SIZE", help="the smallest size (default 1KiB)")
    parser.add_argument("-e", "--end", default="4MiB", metavar="SIZE", help="the largest size (default 4MiB)")
    parser.add_argument("-f", "--factor", type=float, default=8, help="between sizes (default 8)")
    parser.add_argument("--iters", type=int, default=5, metavar="N", help="samples of each backend (default 5)")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="calls before (default 1)")
    parser.add_argument(
        "--check", action=argparse.BooleanOptionalAction, default=True, help="compare results with fp64"
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--op", default="sum", choices=OPS)
    known = ",".join(GROUP_BACKENDS + MPI_BACKENDS)
    parser.add_argument(
        "--backends", default="ncclx,gloo", metavar="LIST", help=f"side by side: {known} (default ncclx,gloo)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is a device and no --emulate"
    )
    parser.add_argument("--window", action="store_true", help="tensors of ncclx live where peers can read them")
    parser.add_argument(
        "--skew", type=float, default=0.8, help="all_to_all_v: share of a host's rows on one rank (default 0.8)"
    )
    parser.add_argument("--tcp", action=argparse.BooleanOptionalAction, default=True, help="a raw TCP transfer beside")
    parser.add_argument(
        "--timeout", type=float, default=120, metavar="S", help="deadline of one collective (default 120)"
    )
    parser.add_argument(
        "--emulate", action="append", metavar="CLUSTER", help="run on emulated hosts, as 2x4 or 4+2; repeat"
    )
    parser.add_argument("--placement", metavar="LIST", help="of the emulated ranks: block,cyclic (default block)")
    add_link_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, but for raw TCP")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time over size, with the bound, as PNG")


def run(args: argparse.Namespace) -> int:
    settings = _settings(args)
    if args.emulate:
        try:
            with raise_on_signals():
                rows = _emulated(args, settings)
        except Interrupted as stop:
            print(f"ncclx bench: {stop}: the ranks were ended and the hosts removed", file=sys.stderr)
            return 128 + stop.signum
    else:
        _refuse_links(args, settings)
        rows = session.run(settings, _note)
        if os.environ["RANK"] != "0":
            return _status(rows)
    rows = ordered(rows)
    print(as_table(rows))
    if args.json is not None:
        write_json([row for row in rows if row.backend != RAW], args.json)
    if args.plot is not None:
        draw(rows, args.plot)
    return _status(rows)


def _settings(args: argparse.Namespace) -> Settings:
    cuda = not args.emulate and torch.cuda.is_available()
    return Settings(
        tuple(dict.fromkeys(args.collectives)),
        sizes_between(parse_size(args.begin), parse_size(args.end), args.factor),
        tuple(dict.fromkeys(args.backends.split(","))),
        args.iters,
        args.warmup,
        args.check,
        args.dtype,
        args.op,
        skew=args.skew,
        device=args.device or ("cuda" if cuda else "cpu"),
        window=args.window,
        tcp=args.tcp,
        timeout=args.timeout,
    )


def _emulated(args: argparse.Namespace, settings: Settings) -> list[Row]:
    shapes = [
        shape_of(cluster, args, placement)
        for cluster in args.emulate
        for placement in (args.placement or "block").split(",")
    ]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="ncclx-bench-") as folder:
        for shape in shapes:
            with Cluster(shape) as cluster:
                if settings.group_backends:
                    rows += _on_ranks(cluster, settings, Path(folder, "rows.json"))
                for backend in settings.mpi_backends:
                    rows += mpi.measure(cluster, settings, backend, _note)
    return rows


def _on_ranks(cluster: Cluster, settings: Settings, file: Path) -> list[Row]:
    """Runs the session on all ranks of the cluster. Raises RuntimeError when a rank fails; its output was shown."""
    program = ["-m", "ncclx_py.bench.session", settings.to_json(), str(file)]
    outcome = cluster.run(program, show=_show)
    if outcome.failed is not None:
        raise RuntimeError(f"rank {outcome.failed} failed with {describe(outcome.status)}; its output is above")
    return read_json(file)


def _show(rank: int, line: str, error: bool) -> None:
    if rank == 0 and not error:
        _note(line)
    else:
        prefixed(rank, line, True)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _refuse_links(args: argparse.Namespace, settings: Settings) -> None:
    """Raises ValueError for options that only emulated hosts obey."""
    given = [name for name in ("rate", "rails", "spine", "placement") if getattr(args, name) is not None]
    given += [f"backends {name}" for name in settings.mpi_backends]
    if given:
        raise ValueError(
            f"--{', --'.join(given)} works only with --emulate: a running job has its links and placement."
        )


def _status(rows: Sequence[Row]) -> int:
    return 1 if any(row.correct is False for row in rows) else 0
