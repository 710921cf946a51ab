"""``distill train [key=value …]``, the same as ``python -m distill.train``: train a student, alone or from a teacher.

    distill train experiment=demo_teacher run.dir=outputs/teacher         # a tiny model learns the embedded task
    torchrun --nproc-per-node 2 -m distill.train experiment=demo_teacher method=gkd \\
        model.teacher.path=outputs/teacher/final run.dir=outputs/student  # and teaches another, on two ranks

Start the same command again after a crash: it continues from the last checkpoint to the same losses. At SIGUSR1 it saves a
checkpoint and leaves with exit status 75, see ``distill.stopping``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import ncclx_py
from distill.cli import run_command
from distill.config import RunConfig, defaults_of, load_config
from distill.distributed import all_or_nothing, from_rank_0, process_group, rank, world_size
from distill.errors import CheckpointError, ConfigError, DistillError
from distill.metrics import read_metrics
from distill.plots import plot_curves
from distill.progress import say
from distill.runs import RunFolder, write_json
from distill.stopping import listen

# The engine takes seconds to import: a wrong key and --help do not wait for it.
if TYPE_CHECKING:
    from distill.assembly import Parts
    from distill.trainer import Trainer


def train(config: RunConfig) -> dict[str, Any]:
    """Run to the end; returns the summary that also stands in ``summary.json``. All ranks call it together.

    On the ranks that teach (``teacher.placement=separate``) it serves the others to their end, and returns nothing.
    """
    if config.teacher.placement != "separate":
        return _train(config)
    from distill.teachers.separate.meeting import check_separate, serve
    from distill.teachers.separate.roles import joined_job

    check_separate(config)
    ncclx_py.trace_into(RunFolder(config.run.dir, None).path / "trace")
    with joined_job(config) as job:
        return serve(config, job) if job.seats.teaches else _train(config)


def _train(config: RunConfig) -> dict[str, Any]:
    from distill.assembly import assemble
    from distill.engine import accumulation_steps

    replicas = config.engine.replicas
    folder = RunFolder(config.run.dir, replicas.id if replicas.enabled else None)
    ncclx_py.trace_into(folder.replica / "trace")
    with process_group(config.comm):
        if not replicas.enabled:
            accumulation_steps(config.train, world_size())  # an impossible batch is refused before anything is loaded
        with all_or_nothing(DistillError):
            parts = assemble(config)
        with all_or_nothing(CheckpointError if folder.config.exists() else ConfigError):
            if rank() == 0:
                folder.enter(config.resolved, config.run.resume, partial(defaults_of, config))
        try:
            finished = from_rank_0(folder.result() if rank() == 0 else None)
            if finished is not None:
                say(f"{folder.path} holds a finished run; choose another run.dir to train anew")
                return finished
            return _train_in(folder, config, parts)
        finally:
            folder.leave()


def _train_in(folder: RunFolder, config: RunConfig, parts: Parts) -> dict[str, Any]:
    from distill.trainer import Trainer

    began = time.perf_counter()
    trainer = Trainer(config, parts, folder)
    with closing(trainer):
        return _run(trainer, folder, config, parts, began)


def _run(trainer: Trainer, folder: RunFolder, config: RunConfig, parts: Parts, began: float) -> dict[str, Any]:
    if trainer.resume():
        say(f"continuing {folder.path} from step {trainer.done}")
    say(
        f"{config.method['name']} on {config.data.name}: {trainer.engine.parameters:,} parameters, "
        f"{world_size()} ranks on {config.comm.backend}, ZeRO-{config.engine.zero_stage}, {config.engine.dtype}, "
        f"loss from {trainer.path}"
    )
    measured = trainer.run()
    summary = {
        "backend": config.comm.backend,
        "world_size": world_size(),
        "steps": trainer.done,
        "seconds": round(time.perf_counter() - began, 2),
        "parameters": trainer.engine.parameters,
        "loss_path": str(trainer.path),
        "tokens": trainer.tokens.state(),
        "final": str(folder.final),
        **measured,
    }

    def write() -> None:
        from distill.export import export_student

        export_student(trainer.engine, parts.tokenizer, folder.final)
        if rank() == 0:
            plot_curves(read_metrics(folder.metrics), folder.curves, str(folder.path))
            write_json(folder.summary, summary)

    trainer.replicas.conclude(write)
    say(f"model: {folder.final}   figures: {folder.metrics}   picture: {folder.curves}")
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""

    def body(overrides: list[str]) -> dict[str, Any]:
        listen()
        return train(load_config("config", overrides))

    return run_command("train", __doc__ or "", body, arguments)


if __name__ == "__main__":
    sys.exit(main())
