"""A job for SLURM as a batch script that a person can read: ``templates/job.sbatch`` filled in.

    job = SlurmJob(program=["-m", "distill.train", "method=gkd"], ranks=(8, 8), folder=Path("outputs/launch/first"), time="4:00:00")
    print(render(job))                   # `slurm_queue.py` submits it

One task per rank. A cluster whose nodes have different numbers of ranks becomes a heterogeneous job, with one component for
each run of equal nodes. What a rank is told comes from SLURM's variables when it starts, so the script is right for
whatever nodes the job gets.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, product
from pathlib import Path

from ncclx_py.launch.ranks import JobError
from ncclx_py.launch.shape import PLACEMENTS, str_ranks

TEMPLATE = Path(__file__).with_name("templates") / "job.sbatch"
AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the exit status of a program that wants to be started again
SIGNALS = ("USR1", "USR2")
RUNTIMES = ("pyxis", "apptainer")
_MOST_NODES, _MOST_TASKS = 200_000, 10_000


@dataclass(frozen=True)
class SlurmJob:
    """What is to run where. Raises JobError naming the option that cannot work.

    `program` is a script or ``-m module`` with its arguments; `ranks` one number per node; `folder` for logs, on a file
    system that all nodes share. `time` is SLURM's limit; `grace` seconds before it the ranks get `signal`. `sweep` holds
    ``name=value,value`` texts: an array job with one task per combination, each given as ``name=value`` after the program,
    in which ``{task}`` stands for the number of the task. `exports` are variables, `setup` lines of shell, `options` more for
    sbatch (``exclusive``, ``mem=0``).
    """

    program: Sequence[str]
    ranks: tuple[int, ...]
    folder: Path
    name: str = "ncclx"
    placement: str = "block"
    gpus_per_rank: int = 0
    cpus_per_rank: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    signal: str = "USR1"
    grace: int = 120
    requeues: int = 100
    container: str | None = None
    runtime: str = "pyxis"
    python: str | None = None
    rails: str | None = None
    sweep: Sequence[str] = ()
    at_once: int | None = None
    setup: Sequence[str] = ()
    options: Sequence[str] = ()
    exports: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of = {"placement": PLACEMENTS, "signal": SIGNALS, "runtime": RUNTIMES}
        for name, known in one_of.items():
            if getattr(self, name) not in known:
                raise JobError(f"--{name} {getattr(self, name)!r}: one of {', '.join(known)}.")
        least = {"gpus_per_rank": 0, "cpus_per_rank": 1, "grace": 1, "requeues": 0, "at_once": 1}
        for name, low in least.items():
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise JobError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {low}.")
        if self.placement == "cyclic" and len(self.components) > 1:
            raise JobError(
                "--placement cyclic: SLURM numbers the components of a heterogeneous job one after the other."
            )
        if self.sweep and len(self.components) > 1:
            raise JobError("--sweep: SLURM has no arrays of heterogeneous jobs; give every node as many ranks.")
        given = (*self.options, self.name, self.time, self.partition, self.account)
        for text in given:
            if text is not None and (not text.strip() or "\n" in text):
                raise JobError(f"{text!r} cannot be an option of sbatch: it is empty or has several lines.")

    @property
    def components(self) -> list[tuple[int, int]]:
        """(nodes, ranks on each) of each run of equal nodes."""
        return [(len(list(same)), count) for count, same in groupby(self.ranks)]

    @property
    def tasks(self) -> list[list[str]]:
        """The arguments that each task of the array adds to the program; empty without a sweep."""
        axes = []
        for text in self.sweep:
            name, equals, values = text.partition("=")
            if not (name and equals and values):
                raise JobError(f"--sweep {text!r}: write NAME=VALUE,VALUE.")
            axes.append([f"{name}={value}" for value in values.split(",")])
        tasks = [list(values) for values in product(*axes)] if axes else []
        if len(tasks) > _MOST_TASKS:
            raise JobError(f"--sweep: {len(tasks)} combinations are more than {_MOST_TASKS}.")
        return tasks

    @property
    def log(self) -> Path:
        """The output of the batch script; of an array, of the task ``%a``."""
        return self.folder / ("job-%a.log" if self.sweep else "job.log")


def parse_nodes(text: str) -> tuple[int, ...]:
    """Ranks of each node: ``2x8`` (2 nodes with 8 each), ``8+4``, ``2x8+1x4``. Raises JobError."""
    ranks: list[int] = []
    for part in text.split("+"):
        match = re.fullmatch(r"(?:([1-9]\d{0,5})x)?([1-9]\d{0,5})", part)
        if match is None or len(ranks) + int(match[1] or 1) > _MOST_NODES:
            raise JobError(f"{text!r} is not a cluster: write NODESxRANKS as in 2x8, or 8+4 for nodes that differ.")
        ranks += [int(match[2])] * int(match[1] or 1)
    return tuple(ranks)


def render(job: SlurmJob) -> str:
    """The batch script."""
    values = {
        "title": " ".join(f"{str_ranks(job.ranks)}: {shlex.join(job.program)}".split()),
        "directives": "\n".join(_directives(job)),
        "setup": "".join(f"\n{line}" for line in job.setup) + ("\n" if job.setup else ""),
        "program": _words(job),
        "sweep": _sweep(job),
        "folder": shlex.quote(str(job.folder.absolute())),
        "exports": "\n".join(f"export {name}={shlex.quote(value)}" for name, value in _exports(job).items()),
        "signal": job.signal,
        "signal_note": _signal_note(job),
        "srun": _srun(job),
        "requeues": str(job.requeues),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def _directives(job: SlurmJob) -> list[str]:
    shared = [
        f"job-name={job.name}",
        f"output={job.log.absolute()}",
        "open-mode=append",
        f"chdir={Path.cwd()}",
        "requeue",
    ]
    if job.time is not None:
        shared += [f"signal=B:{job.signal}@{job.grace}"]
    if job.sweep:
        last = f"{len(job.tasks) - 1}"
        shared.append(f"array=0-{last}" + (f"%{job.at_once}" if job.at_once else ""))
    each = [f"{name}={value}" for name in ("time", "partition", "account") if (value := getattr(job, name)) is not None]
    each += [option.removeprefix("--") for option in job.options]
    lines = [f"#SBATCH --{option}" for option in shared]
    for number, (nodes, count) in enumerate(job.components):
        wanted = [f"nodes={nodes}", f"ntasks-per-node={count}"]
        wanted += [f"gpus-per-node={count * job.gpus_per_rank}"] if job.gpus_per_rank else []
        wanted += [f"cpus-per-task={job.cpus_per_rank}"] if job.cpus_per_rank else []
        lines += ["#SBATCH hetjob"] if number else []
        lines += [f"#SBATCH --{option}" for option in [*wanted, *each]]
    return lines


def _words(job: SlurmJob) -> str:
    python = job.python or ("python" if job.container else sys.executable)
    words = [python, "-u", *job.program]
    if job.container and job.runtime == "apptainer":
        nvidia = ["--nv"] if job.gpus_per_rank else []
        words = ["apptainer", "exec", *nvidia, "--bind", f"{job.folder.absolute()},{Path.cwd()}", job.container, *words]
    return shlex.join(words)


def _sweep(job: SlurmJob) -> str:
    """Shell that gives each task of an array its arguments."""
    if not job.sweep:
        return ""
    cases = [f"{number}) program+=({shlex.join(words)}) ;;" for number, words in enumerate(job.tasks)]
    inserted = 'program=("${program[@]//\\{task\\}/$SLURM_ARRAY_TASK_ID}")'
    return "\n".join(["case $SLURM_ARRAY_TASK_ID in", *cases, "esac", inserted, ""])


def _exports(job: SlurmJob) -> dict[str, str]:
    rails = {} if job.rails is None else {"NCCLX_RAILS": job.rails}
    return {"NCCLX_STOP_SIGNAL": job.signal, **rails, **job.exports}


def _signal_note(job: SlurmJob) -> str:
    if job.time is None:
        return f"SIG{job.signal} to this script (scancel --batch --signal={job.signal}) goes on to the ranks."
    return f"{job.grace} s before the time limit SLURM sends SIG{job.signal} to this script; it goes on to the ranks."


def _srun(job: SlurmJob) -> str:
    options = ["--kill-on-bad-exit=1", f"--distribution={job.placement}"]
    options += [f"--cpus-per-task={job.cpus_per_rank}"] if job.cpus_per_rank else []  # not inherited since SLURM 22.05
    options += [f"--het-group=0-{len(job.components) - 1}"] if len(job.components) > 1 else []
    if job.container and job.runtime == "pyxis":
        folders = dict.fromkeys((str(job.folder.absolute()), str(Path.cwd())))
        options += [f"--container-image={job.container}", f"--container-workdir={Path.cwd()}"]
        options += ["--container-mounts=" + ",".join(f"{folder}:{folder}" for folder in folders)]
    return shlex.join(options)
