"""What the record of collectives costs a training step: ``torchrun --standalone --nproc-per-node 2 -m distill.bench.recording``.

    … -m distill.bench.recording --json recording.json                        # the demo's first stage, 120 steps
    … -m distill.bench.recording --steps 40 engine.zero_stage=3 engine.optimizer=adamw      # any key=value of the run

Two figures of one run, on rank 0:

    counted    calls recorded in a step × what recording one costs (``python -m ncclx_py.watch.bench``) / seconds of a step
    measured   steps with recording and without it take turns (off, on, on, off, …) on all ranks; the median of their differences

The second holds all that recording does, but its noise is larger than the first figure: it comes with the interval in which
95 of 100 resamplings of the pairs lie. Exit status 1 where the counted share is above ``--limit``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.config import CommConfig, load_config
from distill.distributed import from_rank_0, process_group, rank, world_size
from distill.progress import say
from distill.runs import write_json
from distill.train import train
from distill.trainer import Trainer
from ncclx_py.watch.bench import record
from ncclx_py.watch.trace import TRACE

RECIPE = (
    "experiment=demo_teacher",
    "train.stop_at=null",
    "eval.every=0",
    "checkpoint.every=1000000",
    "run.tensorboard=false",
)
WARMUP = 8  # first steps, not counted; a multiple of four, the length of a turn
RESAMPLINGS = 2000


class Steps:
    """In the place of ``Trainer.step``: every other step without recording, each timed and its calls counted."""

    def __init__(self) -> None:
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.calls: list[int] = []
        self._step, self._number = Trainer.step, 0

    def __call__(self, trainer: Trainer) -> Any:
        on = self._number % 4 in (1, 2)
        record(on)
        before, began = _recorded(), time.perf_counter()
        try:
            return self._step(trainer)
        finally:
            if self._number >= WARMUP:
                self.seconds[on].append(time.perf_counter() - began)
                if on:
                    self.calls.append(_recorded() - before)
            self._number += 1
            record(True)


def _recorded() -> int:
    """Calls that this process has recorded so far."""
    calls = TRACE.calls()
    return calls[-1].number + 1 if calls else 0


def cost_of_a_call() -> float:
    """Seconds, measured by a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "ncclx_py.watch.bench", "--calls", "5000", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if not ended.stdout.strip():  # exit status 1 only says that a call costs more than that command allows
        raise SystemExit(f"error: {' '.join(command[1:])} failed:\n{ended.stderr[-2000:]}")
    return float(json.loads(ended.stdout)["cost_s"])


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Where the median lies in 95 of 100 resamplings."""
    draw = random.Random(1)
    medians = sorted(statistics.median(draw.choices(differences, k=len(differences))) for _ in range(RESAMPLINGS))
    return medians[RESAMPLINGS // 40], medians[-RESAMPLINGS // 40]


def figures(steps: Steps, cost_s: float) -> dict[str, Any]:
    """What stands in the JSON file; shares are of a step without recording."""
    off, on = steps.seconds[False], steps.seconds[True]
    step_s, calls = statistics.median(off), statistics.mean(steps.calls)
    differences = [after - before for before, after in zip(off, on)]
    low, high = interval(differences)
    return {
        "ranks": world_size(),
        "pairs": len(differences),
        "step_s": step_s,
        "calls_per_step": calls,
        "cost_per_call_s": cost_s,
        "counted_share": calls * cost_s / step_s,
        "measured_share": statistics.median(differences) / step_s,
        "measured_share_95": [low / step_s, high / step_s],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parse(argv)
    steps = Steps()
    with tempfile.TemporaryDirectory(prefix="bench-recording-") as mine, process_group(CommConfig()):
        cost_s = from_rank_0(cost_of_a_call() if rank() == 0 else None)
        folder = from_rank_0(mine)
        config = load_config(
            "config", [*RECIPE, f"train.steps={options.steps}", *options.overrides, f"run.dir={folder}/run"]
        )
        setattr(Trainer, "step", lambda trainer: steps(trainer))  # noqa: B010 - a plain assignment is an error to the type checker
        train(config)
        found = figures(steps, cost_s)
        report(found, options.json)
    return int(found["counted_share"] > options.limit)


def report(found: dict[str, Any], json_file: str | None) -> None:
    """One line for a person, the figures for programs; on rank 0."""
    low, high = found["measured_share_95"]
    say(
        f"{found['calls_per_step']:.1f} calls a step × {found['cost_per_call_s'] * 1e6:.2f} µs = {found['counted_share']:.3%} of a "
        f"step of {found['step_s'] * 1e3:.1f} ms; measured {found['measured_share']:+.2%} (95 %: {low:+.2%} … {high:+.2%}, "
        f"{found['pairs']} pairs)"
    )
    if json_file and rank() == 0:
        write_json(Path(json_file), found)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m distill.bench.recording",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run that is measured")
    parser.add_argument("--steps", type=int, default=120, help=f"of the run, more than {WARMUP + 4} (default 120)")
    parser.add_argument("--limit", type=float, default=0.01, help="of the counted share (default 0.01)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    options = parser.parse_args(argv)
    if options.steps < WARMUP + 4:
        parser.error(f"--steps {options.steps}: {WARMUP + 4} or more, of which the first {WARMUP} are not counted")
    return options


if __name__ == "__main__":
    sys.exit(main())
