"""The whole path in one job: train a teacher, warm up a smaller student, distil, measure all three, print the table.

    make demo          # or: torchrun --standalone --nproc-per-node 2 -m distill.demo

Each stage is an ordinary ``distill train`` run of a recipe in ``conf/experiment/``; everything lands in ``outputs/demo``. A demo
that was interrupted continues where it stopped; a finished one starts afresh.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.assembly import assemble
from distill.cli import run_command
from distill.config import load_config
from distill.distributed import process_group, rank, world_size
from distill.eval import measure, table
from distill.progress import console, say
from distill.runs import write_json
from distill.train import train

FOLDER = Path("outputs/demo")
STAGES = ("teacher", "warmup", "student")


def run(overrides: list[str]) -> dict[str, Any]:
    """Run all stages on this job's ranks; ``overrides`` apply to each. Returns (and writes) the summary."""
    began = time.perf_counter()
    first = load_config("config", ["experiment=demo_teacher", *overrides])
    with process_group(first.comm):
        if rank() == 0 and (FOLDER / "summary.json").exists():
            shutil.rmtree(FOLDER)
        for stage in STAGES:
            say(f"\n[bold]{stage}[/bold]")
            train(load_config("config", [*recipe(stage), *overrides]))
        say("\n[bold]evaluation[/bold]")
        results = {stage: evaluate_stage(stage) for stage in STAGES}
        summary = {
            "backend": first.comm.backend,
            "world_size": world_size(),
            "seconds": round(time.perf_counter() - began, 1),
            **results,
        }
        if rank() == 0:
            report(summary, results)
    return summary


def recipe(stage: str) -> list[str]:
    """The overrides that make one stage of the demo."""
    chosen = [f"experiment=demo_{stage}", f"run.dir={FOLDER / stage}"]
    if stage == "student":
        chosen += [f"model.student.path={FOLDER}/warmup/final", f"model.teacher.path={FOLDER}/teacher/final"]
    return chosen


def evaluate_stage(stage: str) -> dict[str, Any]:
    """The same held-out problems for every model, KL to the teacher included."""
    config = load_config(
        "eval",
        [
            "experiment=demo_eval",
            f"model.student.path={FOLDER / stage}/final",
            f"model.teacher.path={FOLDER}/teacher/final",
        ],
    )
    return measure(config, assemble(config))


def report(summary: dict[str, Any], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table and where things are; write ``summary.json``."""
    write_json(FOLDER / "summary.json", summary)
    console.print(table(results))
    gain = 100 * (results["student"]["pass_at_1"] - results["warmup"]["pass_at_1"])
    console.print(
        f"distillation gained {gain:+.1f} points of pass@1 in {summary['seconds']:.0f} s on {summary['world_size']} ranks "
        f"({summary['backend']})\nsummary: {FOLDER}/summary.json   models: {FOLDER}/{{{','.join(STAGES)}}}/final   "
        f"pictures: {FOLDER}/*/curves.png"
    )


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command("demo", __doc__ or "", run, arguments)


if __name__ == "__main__":
    sys.exit(main())
