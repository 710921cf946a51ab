"""``kill -9`` at any moment and the same command again: the same losses to the bit, every sample once."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness import Rank, RankPool

pytestmark = pytest.mark.dist

STEPS = 14
SCHEDULE = [f"train.steps={STEPS}", "checkpoint.every=3", "eval.every=7", "eval.examples=8"]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A two-rank torchrun job as a user starts it, in a process group of its own."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "distill.train",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(
            [*command, *arguments], stdout=output, stderr=output, env=environment, start_new_session=True
        )


def finish(arguments: list[str], log: Path) -> None:
    assert start(arguments, log).wait(timeout=200) == 0, log.read_text()[-3000:]


def kill_all(job: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the launcher and to every rank (torchrun gives ranks sessions of their own)."""
    ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=False).stdout.split()
    for pid in [job.pid, *map(int, ranks)]:
        os.kill(pid, signal.SIGKILL)
    job.wait()


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def figures(folder: Path) -> list[tuple[Any, ...]]:
    """What must be equal to the bit: everything but times."""
    return [
        tuple(sorted((k, v) for k, v in row.items() if not k.startswith("perf/") and "per_s" not in k))
        for row in rows(folder)
    ]


def run_here(me: Rank, overrides: list[str]) -> None:
    """The same run on a pool of ranks that is up already: much quicker to start than torchrun."""
    import torch

    from distill.config import load_config
    from distill.train import train

    torch.set_num_threads(1)  # as under torchrun: another number of threads rounds differently
    me.init("ncclx")
    train(load_config("config", overrides))


def kill_after(rows_written: int, arguments: list[str], folder: Path, log: Path) -> bool:
    """Start the job and kill all of it a moment after so many steps; False if it was quicker than that."""
    job = start(arguments, log)
    deadline = time.monotonic() + 120
    while lines(folder) < rows_written and job.poll() is None:
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.005)
    time.sleep(random.Random(str(arguments)).uniform(0, 0.1))
    if job.poll() is not None:
        return False
    kill_all(job)
    return True


def check_same(broken: Path, whole: Path) -> None:
    assert figures(broken) == figures(whole)
    assert [row.get("data/samples", 0.0) for row in rows(broken)] == [16.0 * step for step in range(STEPS + 1)]
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (broken, whole)]
    assert weights[0] == weights[1]


def test_killed_jobs_continue_to_the_same_losses(base_overrides: list[str], tmp_path: Path) -> None:
    """As a user would: torchrun, two kills, the same command until it is done, and once more."""
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    common = [*base_overrides, "method=gkd", "engine.zero_stage=2", *SCHEDULE]
    finish([*common, f"run.dir={whole}"], log)
    arguments = [*common, f"run.dir={broken}"]
    assert [kill_after(wanted, arguments, broken, log) for wanted in (4, 9)] == [True, True]
    finish(arguments, log)
    check_same(broken, whole)
    finish(arguments, log)  # a finished run stays as it is
    check_same(broken, whole)


@pytest.mark.parametrize(
    "options",
    [
        ["method=sft", "engine.optimizer=muon", "model.lora.enabled=true", "model.lora.dropout=0.1"],
        ["method=off_policy", "engine.dtype=bfloat16"],
        ["method=on_policy", "engine.zero_stage=3", "engine.dtype=bfloat16"],
        [
            "method=opsdc",
            "method.refresh=5",
            "method.template='1+{prompt}'",
            "monitor.length_growth=1",
            "monitor.baseline_steps=2",
        ],
        [
            "method=gkd",
            "rollout.schedule=sorted",
            "rollout.oversubscribe=2.5",
            "rollout.slots=6",
            "rollout.max_new_tokens=40",
            "rollout.max_staleness=3",
        ],
        ["method=ace", "method.group=8", "method.kl=0.1", "engine.zero_stage=3", "train.aggregation.kind=delta_l"],
    ],
    ids=["lora-muon", "bf16", "bf16-zero3", "self-teacher", "sorted-rollouts", "reference-zero3"],
)
def test_every_kind_of_state_comes_back(
    options: list[str], base_overrides: list[str], two_ranks: RankPool, tmp_path: Path
) -> None:
    """Adapters and dropout, fp32 masters, shards, a renewed and an initial copy of the student, alarms, a pool of
    partial rollouts: one kill each."""
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    common = [*base_overrides, *options, *SCHEDULE]
    two_ranks.run(run_here, [*common, f"run.dir={whole}"])
    assert kill_after(5, [*common, f"run.dir={broken}"], broken, log)
    two_ranks.run(run_here, [*common, f"run.dir={broken}"])
    check_same(broken, whole)


def test_killed_before_the_first_checkpoint(base_overrides: list[str], two_ranks: RankPool, tmp_path: Path) -> None:
    """Nothing to continue from: the run begins anew, and step 0 stands in the metrics once."""
    overrides = [*base_overrides, "method=sft", "eval.every=2", "eval.examples=4", f"run.dir={tmp_path}/run"]
    two_ranks.run(run_here, overrides)
    before = figures(tmp_path / "run")
    for name in ("checkpoints", "final"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "summary.json").unlink()
    two_ranks.run(run_here, overrides)
    assert figures(tmp_path / "run") == before
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3, 4]
