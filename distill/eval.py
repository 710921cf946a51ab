"""``distill eval [key=value …]``, the same as ``python -m distill.eval``: what a model can do, as a table and as JSON.

    distill eval model.student.path=outputs/student/final model.teacher.path=outputs/train/final data=running_sum
    distill eval model.student.path=FOLDER data=gsm8k data.path=FOLDER eval.samples=8 'eval.k=[1,8]' --json -

Greedy pass@1 and, with ``eval.samples``, sampled pass@1 and unbiased pass@k; mean length; with a teacher, the KL to it on
held-out references. Problems come from the start of the test split.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from distill.assembly import Parts, assemble
from distill.cli import run_command
from distill.config import RunConfig, load_config
from distill.distributed import all_or_nothing, process_group, rank, world_size
from distill.errors import ConfigError, DistillError
from distill.evaluation import Evaluator
from distill.models import causal_lm, count_parameters
from distill.progress import StepProgress, console


def evaluate(config: RunConfig) -> dict[str, Any]:
    """Measure ``model.student``; returns its figures. All ranks call it together."""
    with process_group(config.comm):
        with all_or_nothing(DistillError):
            if config.rollout.name != "builtin":
                raise ConfigError(
                    f"rollout={config.rollout.name}: evaluation decodes in this process; use rollout=builtin"
                )
            parts = assemble(config)
        figures = measure(config, parts)
        if rank() == 0:
            console.print(table({config.model.student.path or "model": figures}))
        return figures


def measure(config: RunConfig, parts: Parts) -> dict[str, Any]:
    """Figures of the parts' student over the first ``eval.examples`` test problems, with a progress bar."""
    model = causal_lm(parts.student).eval()
    evaluator = Evaluator(config, parts.held_out, parts.tokenizer, progress=lambda done: progress.update(done, {}))
    problems = evaluator.problems(config.eval.examples)
    responses = len(problems[rank() :: world_size()]) * (1 + config.eval.samples)
    with StepProgress("evaluate", responses, 0, max(responses // 4, 1)) as progress:
        figures = evaluator.measure(model, parts.teacher)
    return {"parameters": count_parameters(model), "examples": len(problems), **figures}


def table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """Figures × models, for a person."""
    rows = list(dict.fromkeys(name for figures in models.values() for name in figures))
    shown = Table("", *models)
    for row in rows:
        shown.add_row(row.replace("_", " "), *[_cell(figures.get(row)) for figures in models.values()])
    return shown


def _cell(value: float | int | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command("eval", __doc__ or "", lambda overrides: evaluate(load_config("eval", overrides)), arguments)


if __name__ == "__main__":
    sys.exit(main())
