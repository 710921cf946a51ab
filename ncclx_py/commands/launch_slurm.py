"""``ncclx launch slurm``: the job as a batch script, submitted, and followed to its end with ``--wait``.

ncclx launch slurm 2x8 --gpus-per-rank 1 --time 4:00:00 -- -m distill.train …       # 2 nodes with 8 ranks each
ncclx launch slurm 8+4 --dry-run -- script.py                                       # nodes that differ; prints the script
ncclx launch slurm 1x8 --sweep seed=1,2,3 -- -m distill.train run.dir=outputs/{task}    # an array
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
from ncclx_py.launch.inject import Drill
from ncclx_py.launch.ranks import Interrupted, JobError, raise_on_signals
from ncclx_py.launch.shape import PLACEMENTS, str_ranks
from ncclx_py.launch.slurm import RUNTIMES, SIGNALS, SlurmJob, parse_nodes, render
from ncclx_py.launch.slurm_follow import Follower
from ncclx_py.launch.slurm_queue import SlurmError, cancel, submit
from ncclx_py.launch.watched import Watched

_SLURM = "run a torchrun program as a batch job of SLURM, one task per rank"


def add(ways: Any) -> None:
    parser = ways.add_parser(
        "slurm",
        help=_SLURM,
        description=f"{_SLURM[0].upper()}{_SLURM[1:]}.",
        usage=f"ncclx launch slurm CLUSTER [options] {PROGRAM}",
    )
    add = parser.add_argument
    add("cluster", help="nodes and ranks: 2x8 is 2 nodes with 8 ranks each, 8+4 a node of 8 and one of 4")
    add("--dry-run", action="store_true", help="print the batch script, submit nothing")
    add("--wait", action="store_true", help="follow the job to its end; Ctrl-C cancels it")
    add("--name", default="ncclx", help="of the job in the queue")
    add("--time", metavar="LIMIT", help="as for sbatch: minutes, or H:MM:SS, or D-HH:MM")
    add("--partition", metavar="NAME")
    add("--account", metavar="NAME")
    add("--gpus-per-rank", type=int, default=0, metavar="N", help="default 0; each rank sees all GPUs of its node")
    add("--cpus-per-rank", type=int, metavar="N")
    add("--placement", choices=PLACEMENTS, default="block", help="how ranks are numbered (default block)")
    add("--rails", metavar="NAMES", help="interfaces between nodes, one per rail: ib0,ib1 (sets NCCLX_RAILS)")
    add("--signal", choices=SIGNALS, default="USR1", help="that tells the ranks to save and stop (default USR1)")
    add("--grace", type=int, default=120, metavar="S", help="seconds before the time limit for that (default 120)")
    add("--requeues", type=int, default=100, metavar="N", help="restarts after such stops, at most (default 100)")
    add(
        "--sweep", action="append", default=[], metavar="NAME=V,V", help="an array over these values; repeat for a grid"
    )
    add("--at-once", type=int, metavar="N", help="tasks of the array that run at the same time")
    add("--container", metavar="IMAGE", help="run the ranks in it: for pyxis REGISTRY#IMAGE:TAG or a .sqsh file")
    add("--runtime", choices=RUNTIMES, help="that starts containers (default pyxis)")
    add("--mount", action="append", default=[], metavar="PATH", help="for the container to see, or PATH:WHERE; repeat")
    add("--python", metavar="PATH", help="interpreter on the nodes (default: this one; in a container: python)")
    add(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="of shell, before all else: 'module load cuda'; repeat",
    )
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="one more for sbatch, as exclusive or mem=0; repeat",
    )
    add_log_folder(parser, "on a file system that all nodes share; ")
    add_shared_arguments(parser)
    parser.set_defaults(launch=_slurm)


def _slurm(args: argparse.Namespace) -> int:
    ranks = parse_nodes(args.cluster)
    if args.json is not None and not args.wait:
        raise JobError("--json writes how the job ended: give --wait too.")
    if args.inject and args.sweep:
        raise JobError("--inject goes with one job, not with --sweep.")
    check_record(args.json)
    faults = read_faults(args.inject, sum(ranks))
    if args.sweep and not any("{task}" in word for word in args.program):
        print(
            "ncclx launch: no {task} in the program: all tasks of the array write where the program says",
            file=sys.stderr,
        )
    if args.dry_run:
        print(render(_job(args, ranks, args.log_dir / "DRY-RUN", Drill(faults))), end="")
        return 0
    _job(args, ranks, args.log_dir, Drill(faults))  # refuses what cannot work before a folder is made
    _check_program(args)
    folder = make_folder(args.log_dir, None).absolute()
    with Drill(faults, folder=folder / "faults") as drill:
        job = _job(args, ranks, folder, drill)
        script = folder / "job.sbatch"
        try:
            script.write_text(render(job), encoding="utf-8")
        except OSError as error:
            raise JobError(f"--log-dir: {script} cannot be written: {error.strerror}; choose another folder.") from None
        try:
            number = submit(script)
        except SlurmError as error:
            raise SlurmError(f"{error}\nThe script is {script}.") from None
        print(
            f"ncclx launch: job {number}; its logs go to {folder}; scancel {number} ends it",
            file=sys.stderr,
            flush=True,
        )
        if not args.wait:
            print(number)
            return 0
        return _wait(args, job, number, drill)


def _check_program(args: argparse.Namespace) -> None:
    """A script that is not there would fail only when its turn comes; in a container it may be elsewhere."""
    script = Path(args.program[0])
    if args.program[0] != "-m" and not args.container and not script.is_file():
        raise JobError(f"{script}: no such file in {Path.cwd()}; give a script, or -m MODULE.")


def _job(args: argparse.Namespace, ranks: tuple[int, ...], folder: Path, drill: Drill) -> SlurmJob:
    given = {field.name for field in fields(SlurmJob)} & set(vars(args))
    options = {name: getattr(args, name) for name in given}
    job = SlurmJob(
        ranks=ranks, folder=folder, options=args.sbatch, mounts=args.mount, exports=drill.environment(), **options
    )
    job.tasks  # noqa: B018  (raises where a sweep is malformed)
    return job


def _wait(args: argparse.Namespace, job: SlurmJob, number: int, drill: Drill) -> int:
    watched = Watched(job.folder, os.environ)
    started = time.monotonic()
    try:
        with raise_on_signals():
            end = Follower(number, job).to_the_end()
    except Interrupted as stop:
        cancel(number)
        print(f"ncclx launch: {stop}: job {number} was cancelled; its logs are in {job.folder}", file=sys.stderr)
        return 128 + stop.signum
    if watched.environment():  # the ranks write into the folder of their life
        watched.traces = end.life.folder / "trace"
    where = "" if end.life.node is None else f" (node {end.life.node})"
    if end.status and end.outcome.failed is None:
        print(f"ncclx launch: job {number} did not complete: {', '.join(end.states.values())}", file=sys.stderr)
        print(f"the end of {job.log}:", *end.log, sep="\n  ", file=sys.stderr)
    verdict = report(end.outcome, where, drill, watched)
    if args.json is not None:
        facts = {"job": number, "cluster": str_ranks(job.ranks), "states": end.states, "logs": str(end.life.folder)}
        facts |= record(args, end.outcome, drill, verdict, time.monotonic() - started) | {"status": end.status}
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return end.status
