"""``kill -9`` at any moment and the same command again: the same losses to the bit, every sample once."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import Rank, RankPool

pytestmark = pytest.mark.dist

STEPS = 10
SCHEDULE = [f"train.steps={STEPS}", "checkpoint.every=2", "eval.every=5", "eval.examples=4"]


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
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(log.parent)}
    with log.open("ab") as output:
        return subprocess.Popen(
            [*command, *arguments], stdout=output, stderr=output, env=environment, start_new_session=True
        )


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


def process(_: Rank) -> int:
    return os.getpid()


@contextmanager
def killed_after(rows_written: int, folder: Path, pids: list[int]) -> Iterator[None]:
    """SIGKILL to these processes a moment after the run in a folder has logged so many steps, which it must do in the block."""
    over = threading.Event()

    def kill() -> None:
        while lines(folder) < rows_written:
            if over.wait(0.005):
                return
        time.sleep(random.Random(str(folder)).uniform(0, 0.1))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        over.set()
        killer.join()


def run_killed(rows_written: int, overrides: list[str], folder: Path, make_trainers: Callable[[int], RankPool]) -> None:
    """The run on two ranks of its own, killed after so many rows."""
    with make_trainers(2) as victims, killed_after(rows_written, folder, victims.run(process)):
        victims.run(run_here, overrides, dying={0, 1}, deadline=120)
    assert lines(folder) >= rows_written
    assert not (folder / "final").exists(), "it was quicker than the kill"


def check_same(broken: Path, whole: Path) -> None:
    assert figures(broken) == figures(whole)
    assert [row.get("data/samples", 0.0) for row in rows(broken)] == [16.0 * step for step in range(STEPS + 1)]
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (broken, whole)]
    assert weights[0] == weights[1]


def test_killed_jobs_continue_to_the_same_losses(
    base_overrides: list[str], two_ranks: RankPool, make_trainers: Callable[[int], RankPool], tmp_path: Path
) -> None:
    """As a user would: torchrun, two kills, the same command until it is done, and once more."""
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    common = [*base_overrides, "method=gkd", "engine.zero_stage=2", *SCHEDULE]
    arguments = [*common, f"run.dir={broken}"]
    job = start(arguments, log)
    deadline = time.monotonic() + 120
    while lines(broken) < 3:
        assert job.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.005)
    kill_all(job)
    run_killed(6, arguments, broken, make_trainers)
    assert start(arguments, log).wait(timeout=200) == 0, log.read_text()[-3000:]
    two_ranks.run(run_here, [*common, f"run.dir={whole}"])
    check_same(broken, whole)
    two_ranks.run(run_here, arguments)  # a finished run stays as it is
    check_same(broken, whole)


@pytest.mark.parametrize(
    "options",
    [
        ["method=sft", "engine.optimizer=muon", "model.lora.enabled=true", "model.lora.dropout=0.1"],
        ["method=off_policy", "engine.dtype=bfloat16"],
        ["method=on_policy", "engine.zero_stage=3", "engine.dtype=bfloat16"],
        [
            "method=opsdc",
            "method.refresh=3",
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
    options: list[str],
    base_overrides: list[str],
    two_ranks: RankPool,
    make_trainers: Callable[[int], RankPool],
    tmp_path: Path,
) -> None:
    """Adapters and dropout, fp32 masters, shards, a renewed and an initial copy of the student, alarms, a pool of
    partial rollouts: one kill each."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    common = [*base_overrides, *options, *SCHEDULE]
    two_ranks.run(run_here, [*common, f"run.dir={whole}"])
    run_killed(4, [*common, f"run.dir={broken}"], broken, make_trainers)
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
