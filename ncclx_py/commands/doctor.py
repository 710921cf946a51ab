"""``ncclx doctor``: what is wrong with the nodes of a job, before it starts; run as the job is, on all of them at once.

srun --ntasks-per-node 1 ncclx doctor                                  # in an allocation: one process per node
ncclx launch torchrun --nnodes 2 … -- -m ncclx_py doctor               # or one per rank
ncclx doctor --json                                                    # this machine alone

Rank 0 prints. Exit status: 0 nothing failed, 1 a check failed (with --strict also for a warning), 2 bad usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from ncclx_py.doctor import gather
from ncclx_py.doctor.checks import examine, worst
from ncclx_py.doctor.facts import Facts, collect
from ncclx_py.doctor.job import OK, WARN, Job
from ncclx_py.doctor.machine import Machine
from ncclx_py.doctor.report import as_json, as_text
from ncclx_py.environment import Launch, read_launch

NAME = "doctor"
HELP = (
    "check the nodes of a job before it starts: versions, network, limits, GPUs, clocks; run it on all of them at once"
)

_COLLECTING, _CONNECTING = 0.3, 0.6  # shares of the timeout that have passed when these must be done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="for everything together (default 60)")
    parser.add_argument("--store", metavar="HOST:PORT", help="where the ranks meet (default: the launcher's master)")
    parser.add_argument(
        "--run-folder", type=Path, default=Path("outputs"), metavar="DIR", help="where the run will write"
    )
    parser.add_argument("--strict", action="store_true", help="a warning fails, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    start = time.monotonic()
    try:
        if not 1 <= args.timeout <= 3600:
            raise ValueError(f"--timeout {args.timeout:g}: give seconds, from 1 to 3600.")
        launch = read_launch(os.environ)
        where = _where(args.store, launch)
    except ValueError as error:
        print(f"ncclx doctor: error: {error}", file=sys.stderr)
        return 2
    master = where and where[0]
    facts = collect(Machine(os.environ), launch, master, args.run_folder, _COLLECTING * args.timeout)
    until = start + args.timeout
    if where is None:
        return _judge(args, Job(1, {0: facts}))
    try:
        store = gather.connect(where, launch.rank == 0, start + _CONNECTING * args.timeout, os.environ)
        if launch.rank:
            return _follow(gather.hand_in(store, facts, until), launch)
    except gather.StoreError as error:
        status = _alone(args, facts, launch, where, str(error))
        if gather.left_behind():
            sys.stderr.flush()
            os._exit(status)
        return status
    return _lead(args, store, facts, where, until)


def _where(text: str | None, launch: Launch) -> tuple[str, int] | None:
    """Where the ranks meet; None for a rank alone. Raises ValueError."""
    if text is None:
        return None if launch.size == 1 else gather.meeting_point(launch, os.environ)
    host, _, port = text.rpartition(":")
    if not host:
        raise ValueError(f"--store {text!r}: write HOST:PORT.")
    where = host, gather.port_number(port, "--store")
    return None if launch.size == 1 else where


def _lead(args: argparse.Namespace, store: object, facts: Facts, where: tuple[str, int], until: float) -> int:
    gathered = gather.collect_all(store, facts, facts["size"], until)
    job = Job(
        facts["size"],
        gathered.facts,
        gathered.silent,
        gathered.clocks,
        store=f"{where[0]}:{where[1]}",
        round_trip=gathered.round_trip,
    )
    status = _judge(args, job)
    gather.finish(store, gathered, "failed" if status else "passed", until)
    return status


def _judge(args: argparse.Namespace, job: Job) -> int:
    results = examine(job)
    print(json.dumps(as_json(job, results), indent=2) if args.json else as_text(job, results), flush=True)
    return 0 if worst(results) in ((OK,) if args.strict else (OK, WARN)) else 1


def _follow(told: dict[str, object], launch: Launch) -> int:
    """Rank 0 speaks for all, so that a rank that was heard has nothing to add."""
    silent = told.get("silent")
    if isinstance(silent, list) and launch.rank in silent:
        print(f"ncclx doctor: rank {launch.rank} came too late: raise --timeout.", file=sys.stderr)
        return 1
    return 0


def _alone(args: argparse.Namespace, facts: Facts, launch: Launch, where: tuple[str, int], why: str) -> int:
    """The ranks could not meet: the first rank of each node says why, and what is wrong with its node."""
    if launch.local_rank:
        print(f"ncclx doctor: rank {launch.rank}: {why}", file=sys.stderr)
        return 1
    print(f"ncclx doctor: rank {launch.rank} on {facts['host']} speaks for its node only", file=sys.stderr)
    unheard = {rank: "there is no store to meet at" for rank in range(launch.size) if rank != launch.rank}
    job = Job(launch.size, {launch.rank: facts}, unheard, store=f"{where[0]}:{where[1]}", store_error=why)
    return _judge(args, job)
