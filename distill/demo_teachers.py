"""Many teachers in one job: train two experts, warm up a student on both tasks, teach it by both and by either alone.

    torchrun --standalone --nproc-per-node 2 -m distill.demo_teachers

Each stage is an ordinary ``distill train`` run; everything lands in ``outputs/teachers``, and a table of all of them is printed.
``both`` is the recipe ``conf/experiment/multi_teacher.yaml``; ``sums_alone`` and ``start_alone`` are the same with one of the two
teachers for all samples. A demo that was interrupted continues where it stopped; a finished one starts afresh.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.assembly import assemble
from distill.cli import run_command
from distill.config import load_config
from distill.demo import run_stages
from distill.eval import measure, table
from distill.progress import console, say
from distill.runs import write_json

FOLDER = Path("outputs/teachers")
TASKS = ("sums", "start")
EXPERTS = {  # an expert sees its own task only, in the alphabet of both
    "sums": ["data.parts.start.share=0"],
    "start": [
        "data.parts.sums.share=0",
        "train.batch_size=64",
        "train.micro_batch_size=32",  # two ranks, as the README starts it
        "train.steps=1600",
        "train.stop_at=0.97",
        "eval.every=100",
    ],
}
STAGES = (*TASKS, "warmup", "both", "sums_alone", "start_alone")


def recipe(stage: str) -> list[str]:
    """The overrides that make one stage."""
    chosen = [f"run.dir={FOLDER / stage}", "data=mixed"]
    if stage in EXPERTS:
        return ["experiment=demo_teacher", *chosen, "rollout.max_new_tokens=32", *EXPERTS[stage]]
    if stage == "warmup":  # until it does better than guessing on both
        size = ["model.student.init.hidden_size=48", "model.student.init.intermediate_size=144"]
        return [
            "experiment=demo_warmup",
            *chosen,
            *size,
            "rollout.max_new_tokens=32",
            "train.steps=1600",
            "train.stop_at=0.5",
        ]
    alone = stage.removesuffix("_alone")
    chosen = ["experiment=multi_teacher", *chosen]
    if alone == stage:
        return chosen
    other = next(task for task in TASKS if task != alone)
    return [*chosen, f"~teacher.many.{other}", f"+teacher.many.{alone}.tags=[{other}]"]


def run(overrides: list[str]) -> dict[str, Any]:
    """Run all stages on this job's ranks; ``overrides`` apply to each. Returns (and writes) the summary."""
    return run_stages(FOLDER, {stage: recipe(stage) for stage in STAGES}, evaluate_stage, report, overrides)


def evaluate_stage(stage: str) -> dict[str, Any]:
    """The same held-out problems of both tasks for every model."""
    path = f"model.student.path={FOLDER / stage}/final"
    config = load_config(
        "eval", ["experiment=demo_eval", "data=mixed", "rollout.max_new_tokens=32", "eval.samples=0", path]
    )
    return measure(config, assemble(config))


def report(summary: dict[str, Any], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table and what it says; write ``summary.json``."""
    write_json(FOLDER / "summary.json", summary)
    console.print(table(results))
    by_task = {task: {stage: results[stage][f"pass_at_1/{task}"] for stage in STAGES} for task in TASKS}
    for task, passed in by_task.items():
        say(
            f"{task}: both teachers {passed['both']:.1%}, its own alone {passed[f'{task}_alone']:.1%}, "
            f"the other alone {next(passed[f'{t}_alone'] for t in TASKS if t != task):.1%}, before {passed['warmup']:.1%}"
        )
    say(
        f"{summary['seconds']:.0f} s on {summary['world_size']} ranks ({summary['backend']}); summary: {FOLDER}/summary.json"
    )


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command("demo", __doc__ or "", run, arguments)


if __name__ == "__main__":
    sys.exit(main())
