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
_MOST_GRACE = 65535  # seconds, see sbatch(1)


@dataclass(frozen=True)
class SlurmJob:
    """What is to run where. Raises JobError naming the option that cannot work.

    `program` is a script or ``-m module`` with its arguments; `ranks` one number per node; `folder` for logs, on a file
    system that all nodes share. `time` is SLURM's limit; `grace` seconds before it the ranks get `signal`. `sweep` holds
    ``name=value,value`` texts: an array job with one task per combination, each given as ``name=value`` after the program,
    in which ``{task}`` stands for the number of the task. `mounts` are folders that a container sees besides this one and
    that of the logs, ``PATH`` or ``PATH:WHERE``. `exports` are variables, `setup` lines of shell, `options` more for sbatch
    (``exclusive``, ``mem=0``).
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
    runtime: str | None = None
    mounts: Sequence[str] = ()
    python: str | None = None
    rails: str | None = None
    sweep: Sequence[str] = ()
    at_once: int | None = None
    setup: Sequence[str] = ()
    options: Sequence[str] = ()
    exports: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of = {"placement": PLACEMENTS, "signal": SIGNALS, "runtime": (*RUNTIMES, None)}
        for name, known in one_of.items():
            if getattr(self, name) not in known:
                raise JobError(f"--{name} {getattr(self, name)!r}: one of {', '.join(filter(None, known))}.")
        least = {"gpus_per_rank": 0, "cpus_per_rank": 1, "grace": 1, "requeues": 0, "at_once": 1}
        for name, low in least.items():
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise JobError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {low}.")
        if len(self.components) > 1:
            self._check_components()
        needed = {"at_once": "sweep", "runtime": "container", "mounts": "container"}
        for name, other in needed.items():
            if getattr(self, name) and not getattr(self, other):
                given = name.replace("_", "-").removesuffix("s")
                raise JobError(f"--{given} is for a job with --{other}; give that too, or leave --{given} out.")
        self._check_texts()
        self._check_time()

    def _check_components(self) -> None:
        if self.placement == "cyclic":
            raise JobError(
                "--placement cyclic: SLURM numbers the components of a heterogeneous job one after the other."
            )
        if self.sweep:
            raise JobError("--sweep: SLURM has no arrays of heterogeneous jobs; give every node as many ranks.")

    def _check_texts(self) -> None:
        one = {name: getattr(self, name) for name in ("name", "partition", "account", "container", "python", "rails")}
        several = {"sbatch": self.options, "mount": self.mounts}
        texts = [*one.items(), *((name, text) for name, values in several.items() for text in values)]
        for name, text in texts:
            if text is not None and (not text.strip() or "\n" in text):
                raise JobError(f"--{name} {text!r} cannot be an option: it is empty or has several lines.")
            if name in ("name", "partition", "account") and text is not None and re.search(r"""["'\\]""", text):
                raise JobError(
                    f"--{name} {text!r} has a quote or a backslash, which sbatch takes for its own; leave it out."
                )
        for path in (self.folder.absolute(), Path.cwd()):
            if "%" in str(path) or '"' in str(path) or "\\" in str(path):
                raise JobError(
                    f"{str(path)!r} has a %, a quote or a backslash, which sbatch takes for its own; rename it."
                )

    def _check_time(self) -> None:
        """SLURM would take a grace longer than the limit, and signal the job as soon as it starts, time after time."""
        if self.time is None:
            return
        limit = seconds_of(self.time)
        if limit is not None and self.grace >= limit:
            raise JobError(
                f"--grace {self.grace} s is not less than --time {self.time} ({limit} s): the ranks would be told to stop at "
                "once; give more time or less grace."
            )
        if self.grace > _MOST_GRACE:
            raise JobError(f"--grace {self.grace}: SLURM signals at most {_MOST_GRACE} s before the limit.")

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


def seconds_of(limit: str) -> int | None:
    """A time limit in sbatch's words: MINUTES, M:SS, H:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; None without limit. Raises JobError."""
    if limit.lower() in ("infinite", "unlimited"):
        return None
    match = re.fullmatch(r"(?:(\d{1,5})-)?(\d{1,7})(?::(\d{1,6}))?(?::(\d{1,6}))?", limit)
    if match is None:
        raise JobError(
            f"--time {limit!r} is no time limit: write minutes, H:MM:SS or D-HH:MM, as in 30, 4:00:00, 1-12:00."
        )
    days, parts = match[1], [int(part) for part in match.groups()[1:] if part is not None]
    if days is not None:  # D-H, D-H:M, D-H:M:S
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:  # M, M:S, H:M:S
        hours, minutes, seconds = parts if len(parts) == 3 else (0, *parts, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


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
        f"job-name={_quoted(job.name)}",
        f"output={_quoted(str(job.log.absolute()))}",
        "open-mode=append",
        f"chdir={_quoted(str(Path.cwd()))}",
        "requeue",
        f"signal=B:{job.signal}@{job.grace}",
    ]
    if job.sweep:
        last = f"{len(job.tasks) - 1}"
        shared.append(f"array=0-{last}" + (f"%{job.at_once}" if job.at_once else ""))
    given = {name: getattr(job, name) for name in ("time", "partition", "account")}
    each = [f"{name}={_quoted(value)}" for name, value in given.items() if value is not None]
    each += [_option(text.removeprefix("--")) for text in job.options]
    lines = [f"#SBATCH --{option}" for option in shared]
    for number, (nodes, count) in enumerate(job.components):
        wanted = [f"nodes={nodes}", f"ntasks-per-node={count}"]
        wanted += [f"gpus-per-node={count * job.gpus_per_rank}"] if job.gpus_per_rank else []
        wanted += [f"cpus-per-task={job.cpus_per_rank}"] if job.cpus_per_rank else []
        lines += ["#SBATCH hetjob"] if number else []
        lines += [f"#SBATCH --{option}" for option in [*wanted, *each]]
    return lines


def _quoted(value: str) -> str:
    """As sbatch reads the words of a directive."""
    return value if re.fullmatch(r"[\w./:,@%+-]+", value) else f'"{value}"'


def _option(text: str) -> str:
    """What was given for sbatch, which may have quotes already."""
    name, equals, value = text.partition("=")
    return text if not equals or '"' in text or "'" in text else f"{name}={_quoted(value)}"


def _words(job: SlurmJob) -> str:
    python = job.python or ("python" if job.container else sys.executable)
    words = [python, "-u", *job.program]
    if job.container and job.runtime == "apptainer":
        nvidia = ["--nv"] if job.gpus_per_rank else []
        mounts = ["--bind", ",".join(_mounts(job)), "--pwd", str(Path.cwd())]
        words = ["apptainer", "exec", *nvidia, *mounts, job.container, *words]
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
    limit = "the time limit" if job.time is not None else "the partition's time limit, if it has one,"
    return f"{job.grace} s before {limit} SLURM sends SIG{job.signal} to this script; it goes on to the ranks."


def _srun(job: SlurmJob) -> str:
    options = ["--kill-on-bad-exit=1", f"--distribution={job.placement}"]
    options += [f"--cpus-per-task={job.cpus_per_rank}"] if job.cpus_per_rank else []  # not inherited since SLURM 22.05
    options += [f"--het-group=0-{len(job.components) - 1}"] if len(job.components) > 1 else []
    if job.container and job.runtime != "apptainer":
        options += [f"--container-image={job.container}", f"--container-workdir={Path.cwd()}"]
        options += ["--container-mounts=" + ",".join(_mounts(job))]
    return shlex.join(options)


def _mounts(job: SlurmJob) -> list[str]:
    """Folders of the node that the container sees, as both runtimes read them: PATH:WHERE."""
    folders = dict.fromkeys((str(job.folder.absolute()), str(Path.cwd()), *job.mounts))
    return [folder if ":" in folder else f"{folder}:{folder}" for folder in folders]
