"""Runs a job through torch's elastic launcher, with the logs of each rank in a folder.

    outcome = launch(Job(program=["train.py", "--steps", "3"], nproc_per_node="2"), Path("outputs/launch/first"), env)
    outcome.status, outcome.failed, outcome.last_lines       # as for emulated hosts, see ranks.py

torch does the rendezvous, the restarts and the ends of the ranks; this adds a log file per rank and stream
(``rank-3.out``, ``rank-3.err``) and finds the rank that failed first. ``ncclx launch torchrun`` is this on the command line.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ncclx_py.launch.ends import Ends
from ncclx_py.launch.logs import last_lines
from ncclx_py.launch.ranks import GRACE, Interrupted, JobError, Outcome, tied
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

_PREFIX = "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"


@dataclass(frozen=True)
class Job:
    """What torchrun is to run; the options have torchrun's names and, where None, its defaults.

    `program` is a script or ``-m module``, and its arguments. Raises JobError for numbers that are none, or cannot be.
    """

    program: Sequence[str]
    nproc_per_node: str = "1"
    nnodes: str = "1"
    node_rank: int | None = None
    rdzv_backend: str | None = None
    rdzv_endpoint: str | None = None
    rdzv_id: str | None = None
    rdzv_conf: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    max_restarts: int | None = None

    def __post_init__(self) -> None:
        if self.nproc_per_node not in ("auto", "cpu", "gpu") and not re.fullmatch(r"[1-9]\d{0,5}", self.nproc_per_node):
            raise JobError(f"--nproc-per-node {self.nproc_per_node!r}: give a number, or auto, cpu or gpu.")
        if not re.fullmatch(r"[1-9]\d{0,5}(:[1-9]\d{0,5})?", self.nnodes):
            raise JobError(f"--nnodes {self.nnodes!r}: give a number, or MIN:MAX.")
        least, _, most = self.nnodes.partition(":")
        if most and int(most) < int(least):
            raise JobError(f"--nnodes {self.nnodes!r}: the smaller number comes first.")
        ranges = {"node_rank": int(most or least) - 1, "master_port": 65535, "max_restarts": 1_000_000}
        for name, last in ranges.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value <= last:
                raise JobError(f"--{name.replace('_', '-')} {value}: from 0 to {last}.")

    @property
    def ranks(self) -> int | None:
        """How many there are in all, None where only the rendezvous will tell."""
        known = self.nproc_per_node.isdigit() and self.nnodes.isdigit()
        return int(self.nproc_per_node) * int(self.nnodes) if known else None

    @property
    def alone(self) -> bool:
        """Whether the job has one node and brings its own rendezvous."""
        return self.nnodes in ("1", "1:1") and self.rdzv_backend is None and self.master_addr is None

    def arguments(self) -> list[str]:
        """The command line for torchrun."""
        given = [(field.name, getattr(self, field.name)) for field in fields(self) if field.name != "program"]
        options = [f"--{name.replace('_', '-')}={value}" for name, value in given if value is not None]
        return [*options, *self.program]


class RankLogs(DefaultLogsSpecs):
    """``rank-R.out`` and ``rank-R.err`` in one folder; `ranks` are those that were started here, by local rank.

    A restart goes to ``restart-N/`` in the folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), redirects=Std.ALL, tee=Std.ALL)
        self.folder = folder
        self.ranks: dict[int, int] = {}

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        restart = envs[0].get("TORCHELASTIC_RESTART_COUNT", "0") if envs else "0"
        folder = self.folder if restart == "0" else self.folder / f"restart-{restart}"
        folder.mkdir(parents=True, exist_ok=True)
        self.ranks = {local: int(env.get("RANK", local)) for local, env in envs.items()}
        names = {local: str(folder / f"rank-{rank}") for local, rank in self.ranks.items()}
        outs, errs = ({local: name + end for local, name in names.items()} for end in (".out", ".err"))
        errors = {local: f"{name}.error.json" for local, name in names.items()}
        for local, env in envs.items():
            env["TORCHELASTIC_ERROR_FILE"] = errors[local]
        filtered = [str(folder / f"filtered.{end}") for end in ("out", "err")]
        return LogsDest(outs, errs, dict(outs), dict(errs), errors, *filtered)


def launch(job: Job, logs: Path, env: Mapping[str, str]) -> tuple[Outcome, RankLogs]:
    """Runs the job of this node to its end; the ranks inherit this process's environment, changed by `env`.

    Returns how it ended, for the ranks of this node, and their logs. Raises Interrupted when a signal ends it, and JobError
    for options that torch refuses.
    """
    args = _parsed(job)
    specs = RankLogs(logs)
    before = dict(os.environ)
    os.environ.setdefault(_PREFIX, "[${rank}] ")
    os.environ.update(env)
    ends = Ends()
    try:
        config, entrypoint, arguments = torchrun.config_from_args(args)
        config.logs_specs = specs
        # torch would leave the ranks behind when this process is killed.
        python, *words = tied([str(entrypoint), *arguments])
        with ends:
            elastic_launch(config, python)(*words)
    except ChildFailedError as error:
        return _outcome(error, specs, ends.place), specs
    except SignalException as stop:
        raise Interrupted(int(stop.sigval)) from None
    except ValueError as error:  # of the launcher's own: what ranks raise comes as a ChildFailedError
        raise JobError(f"torchrun refuses the job: {error}") from None
    finally:
        os.environ.clear()
        os.environ.update(before)
    return Outcome(dict.fromkeys(specs.ranks.values(), 0)), specs


def _parsed(job: Job) -> argparse.Namespace:
    args: argparse.Namespace = torchrun.get_args_parser().parse_args(job.arguments())
    if job.alone:  # what torchrun --standalone does
        args.rdzv_backend, args.rdzv_endpoint = "c10d", "localhost:0"
        args.rdzv_id = args.rdzv_id if job.rdzv_id else str(uuid.uuid4())
    if args.master_port is None:
        args.master_port = 29500
    if hasattr(args, "shutdown_timeout"):
        args.shutdown_timeout = int(GRACE)
    return args


def _outcome(error: ChildFailedError, logs: RankLogs, place: Mapping[int, int]) -> Outcome:
    """The failures of this node. torch tells who failed, not in which order: `place` is that of each process as they ended.
    Of one moment, a rank that was asked to end comes last."""
    failures = {int(rank): failure for rank, failure in error.failures.items()}
    first = min(
        failures,
        key=lambda rank: (
            place.get(failures[rank].pid, len(place)),
            failures[rank].exitcode == -signal.SIGTERM,
            rank,
        ),
    )
    statuses = {rank: _status(failure.exitcode) for rank, failure in failures.items()}
    return Outcome(statuses, first, last_lines(logs.folder, first))


def _status(exitcode: int) -> int:
    return 128 - exitcode if exitcode < 0 else exitcode
