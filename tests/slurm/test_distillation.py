"""One distillation job on 4 ranks through all three launchers: torchrun, emulated hosts and a real SLURM, which preempts it.

With NCCLX_DETERMINISTIC sums are added in the order of ranks on any topology, so that all losses must be equal to the bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import load

pytestmark = [pytest.mark.slurm, pytest.mark.net]

models = load(Path(__file__).parents[1] / "distill" / "conftest.py", "tiny_models")
resume = load(Path(__file__).parents[1] / "distill" / "test_resume.py", "resume_checks")
STEPS, ORDERED = 6, "NCCLX_DETERMINISTIC=1"


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """What stands after ``--`` in each of the launches, but for the folder of the run."""
    student, teacher = (models.save_tiny(tmp_path / name, seed) for name, seed in (("student", 1), ("teacher", 2)))
    words = ["-m", "distill.train", "model=hf", f"model.student.path={student}", f"model.teacher.path={teacher}"]
    words += ["method=gkd", "data.min_terms=2", "data.max_terms=6", f"train.steps={STEPS}", "train.batch_size=16"]
    words += ["train.micro_batch_size=4", "train.max_length=64", "rollout.max_new_tokens=20", "engine.lr=0.003"]
    return [
        *words,
        "run.tensorboard=false",
        "model.teacher_dtype=float32",
        "checkpoint.every=1000",
        "engine.zero_stage=2",
    ]


@pytest.mark.timeout(600)
def test_one_job_has_the_same_losses_through_every_launcher(
    launch: Callable[..., Any], cluster: Any, job: list[str], tmp_path: Path
) -> None:
    """The one on SLURM is told to stop in step 3, saves, is requeued and continues; nobody disturbs the others."""
    preempted, *undisturbed = (tmp_path / name for name in ("slurm", "torchrun", "emulate"))
    with _started(["torchrun", "--nproc-per-node", "4"], job, undisturbed[0]):  # while SLURM's job waits in its queue
        _preempted(launch, cluster, job, preempted)
    with _started(["emulate", "2x2", "--rate", "1gbit"], job, undisturbed[1]):
        pass
    assert [row["step"] for row in resume.rows(preempted)] == list(range(1, STEPS + 1))
    for other in undisturbed:
        assert resume.figures(preempted) == resume.figures(other), other.name
        weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (preempted, other)]
        assert weights[0] == weights[1], other.name


def _preempted(launch: Callable[..., Any], cluster: Any, job: list[str], folder: Path) -> None:
    """The job on 2 nodes with 2 ranks each, stopped once by the signal that SLURM sends before it takes the nodes away."""
    hold = "delay:rank=0,step=3,for=4"  # long enough for the signal to arrive in this step
    options = ["--inject", hold, "--setup", f"export {ORDERED}"]
    running = launch(["2x2", *options], *job, f"run.dir={folder}", folder=folder.with_name("launch"))
    number = running.number
    running.until(lambda: resume.lines(folder) >= 2, 180)
    cluster.ask(["scancel", "--batch", "--signal=USR1", str(number)])
    status, record = running.end(180)
    assert (status, set(record["states"].values())) == (0, {"COMPLETED"}), running.everything()
    assert record["statuses"] == [0, 0, 0, 0]
    assert record["logs"].endswith("restart-1")
    ends = [(running.logs / f"rank-{rank}.end").read_text().split() for rank in range(4)]
    assert [(status, node) for status, _, node in ends] == [("75", "n1"), ("75", "n1"), ("75", "n2"), ("75", "n2")]
    assert "told to stop after step 3" in (running.logs / "rank-0.err").read_text()
    assert "from step 3" in (running.logs / "restart-1" / "rank-0.err").read_text() + running.shown.read_text()


@contextmanager
def _started(launcher: list[str], job: list[str], folder: Path) -> Iterator[None]:
    """The job through another launcher, done when the block is left."""
    logs = ["--log-dir", str(folder.with_name(f"{folder.name}-logs"))]
    words = [sys.executable, "-m", "ncclx_py", "launch", *launcher, *logs, "--", *job, f"run.dir={folder}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **dict([ORDERED.split("=")])}
    output = folder.with_suffix(".txt")
    with output.open("w") as said, subprocess.Popen(words, stdout=said, stderr=said, env=env) as running:
        try:
            yield
            assert running.wait(timeout=180) == 0, output.read_text()[-5000:]
        finally:
            running.terminate()  # the ranks and the hosts go with it
