"""One rank of one run, in a process of its own: train and measure the model, or write records; then ``outcome.json``.

The process is forked from a server that has imported torch once (see ``processes``); everything it prints goes to the job's log.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from copy import deepcopy
from multiprocessing.connection import Connection
from typing import Any

from omegaconf import OmegaConf

from distill.compare.plan import Job
from distill.config import RunConfig, check_config
from distill.errors import DistillError
from distill.record_run import RecordsSection


def run_rank(job: Job, environment: Mapping[str, str], report: Connection) -> None:
    """The body of the process. Sends one message for a person through ``report`` where the run fails, and exits with 1."""
    threading.Thread(target=_die_with_comparison, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the comparison ends its runs itself
    os.environ.update(environment)
    with job.log.open("ab", buffering=0) as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    try:
        import torch

        torch.set_num_threads(1)
        if job.records is None:
            train_and_measure(job)
        else:
            write_records(job, job.records)
    except BaseException as error:
        report.send((isinstance(error, DistillError) and error.on_every_rank, explain(error)))
        if isinstance(error, DistillError):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # not through the interpreter's end, where a broken process group could wait for its peers


def _die_with_comparison() -> None:
    """A comparison that is killed takes its runs along: they continue with the next one. (The parent in the kernel's sense is the
    server, which lives as long as any of its children: PR_SET_PDEATHSIG would not do.)
    """
    comparison = multiprocessing.parent_process()
    assert comparison is not None
    comparison.join()
    os.kill(os.getpid(), signal.SIGKILL)


def explain(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, DistillError):
        return str(error)
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def train_and_measure(job: Job) -> None:
    """All ranks of the run call it together."""
    from distill.assembly import assemble
    from distill.compare.state import finish
    from distill.distributed import process_group, rank
    from distill.eval import measure
    from distill.train import train

    with process_group(job.config.comm):
        train(job.config)
        config = final_evaluation(job)
        figures = measure(config, assemble(config))
        if rank() == 0:
            finish(job, figures)


def write_records(job: Job, section: RecordsSection) -> None:
    """All ranks of the run call it together. Figures: those of `distill rollout`, and what a run's spendings are called."""
    from distill.compare.state import finish
    from distill.distributed import process_group, rank
    from distill.records import RecordFolder
    from distill.rollout import rollout

    began = time.monotonic()
    with process_group(job.config.comm):
        figures = rollout(job.config, section)
        figures.pop("steps", None)  # of trajectories: in a table of runs the word stands for optimizer steps
        if rank() == 0:
            student = teacher = 0
            for one in RecordFolder(job.folder.path).read():
                student += one["student_tokens"]
                teacher += one["prompt_length"] + one["student_tokens"] + one["teacher_tokens"]
            spent = {"student_tokens": student, "teacher_tokens": teacher, "spent_tokens": student + teacher}
            finish(job, {**figures, **spent, "seconds": round(time.monotonic() - began, 2)})


def final_evaluation(job: Job) -> RunConfig:
    """The run's own configuration with its trained model as the student: same lengths, same teacher for the KL, and the
    same task unless the comparison names another.
    """
    values: dict[str, Any] = deepcopy(job.config.resolved)
    values["model"]["student"] = {"path": str(job.folder.final)}
    values["model"]["reference"] = {}
    values["model"]["lora"] = {}
    values["method"] = {"name": "sft"}
    values["eval"] = {key: value for key, value in job.evaluation.items() if key != "data"}
    values["data"] = job.evaluation.get("data", values["data"])
    return check_config(OmegaConf.create(values))
