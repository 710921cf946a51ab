"""The whole path in one job: train a teacher, warm up a smaller student, distil it with MOTAB, measure all, print the table.

    make demo          # or: torchrun --standalone --nproc-per-node 2 -m distill.demo

Each stage is an ordinary ``distill train`` run of a recipe in ``conf/experiment/``; everything lands in ``outputs/demo``. Beside
the student stands a control: the same warm-up and as many more steps, of plain fine-tuning on the references, without a
teacher. A demo that was interrupted continues where it stopped; a finished one starts afresh.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill.assembly import assemble
from distill.cli import run_command
from distill.config import load_config
from distill.distributed import process_group, rank, world_size
from distill.engine import accumulation_steps
from distill.eval import measure, table
from distill.progress import console, say
from distill.runs import write_json
from distill.train import train

FOLDER = Path("outputs/demo")
STAGES = ("teacher", "warmup", "student", "control")


def run(overrides: list[str]) -> dict[str, Any]:
    """Run all stages on this job's ranks; ``overrides`` apply to each. Returns (and writes) the summary."""
    return run_stages(FOLDER, {stage: recipe(stage) for stage in STAGES}, evaluate_stage, report, overrides)


def run_stages(
    folder: Path,
    recipes: Mapping[str, list[str]],
    evaluate: Callable[[str], dict[str, Any]],
    report: Callable[[dict[str, Any], dict[str, Any]], None],
    overrides: list[str],
) -> dict[str, Any]:
    """Train each stage by its recipe, then ``evaluate`` each; rank 0 reports. A folder with a finished demo starts afresh.

    Raises ConfigError before the first stage where a later one cannot be divided over this job's ranks.
    """
    began = time.perf_counter()
    configs = {stage: load_config("config", [*recipe, *overrides]) for stage, recipe in recipes.items()}
    first = next(iter(configs.values()))
    with process_group(first.comm):
        for config in configs.values():
            accumulation_steps(config.train, world_size())
        if rank() == 0 and (folder / "summary.json").exists():
            shutil.rmtree(folder)
        for stage, config in configs.items():
            say(f"\n[bold]{stage}[/bold]")
            train(config)
        say("\n[bold]evaluation[/bold]")
        results = {stage: evaluate(stage) for stage in recipes}
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
    if stage in ("student", "control"):
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
    before = results["warmup"]["pass_at_1"]
    gain, control = (100 * (results[stage]["pass_at_1"] - before) for stage in ("student", "control"))
    console.print(
        f"distillation (MOTAB) gained {gain:+.1f} points of pass@1, the control without a teacher {control:+.1f}, in "
        f"{summary['seconds']:.0f} s on {summary['world_size']} ranks ({summary['backend']})\n"
        f"summary: {FOLDER}/summary.json   models: {FOLDER}/{{{','.join(STAGES)}}}/final   pictures: {FOLDER}/*/curves.png"
    )


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command("demo", __doc__ or "", run, arguments)


if __name__ == "__main__":
    sys.exit(main())
