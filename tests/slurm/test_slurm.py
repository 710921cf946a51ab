"""``ncclx launch slurm`` on a real SLURM: ranks and hosts, failures, preemption and requeue, arrays, cancelled jobs."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import RankPool, load

pytestmark = pytest.mark.slurm

models = load(Path(__file__).parents[1] / "distill" / "conftest.py", "tiny_models")
resume = load(Path(__file__).parents[1] / "distill" / "test_resume.py", "resume_checks")

WHO = """
import json, os, sys
import torch, torch.distributed as dist
import ncclx_py
from ncclx_py.environment import read_launch
launch = read_launch(os.environ)
dist.init_process_group("ncclx")
total = torch.full((1 << 20,), float(dist.get_rank()))
dist.all_reduce(total)
facts = {"host_of": launch.host_of(), "names": launch.host_names, "by": launch.launcher, "sum": total[-1].item()}
facts |= {name: os.environ[name] for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "NCCLX_HOST_ID", "NCCLX_RAILS")}
print(json.dumps(facts | {"words": sys.argv[1:], "why": list(map(str, ncclx_py.explain()))}))
dist.destroy_process_group()
"""
BREAK = """
import os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist, ncclx_py
dist.init_process_group("ncclx", timeout=timedelta(seconds=60))
rank = dist.get_rank()
for step in range(1000):
    if step == 5 and rank == 2:
        print("this is what broke", file=sys.stderr)
        os._exit(7)
    dist.all_reduce(torch.ones(10))
"""
SLEEP = """
import os, pathlib, subprocess, sys, time
import torch, torch.distributed as dist, ncclx_py
dist.init_process_group("ncclx")
dist.all_reduce(torch.ones(10))
child = subprocess.Popen(["sleep", "1000"])
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(f"{os.getpid()} {child.pid} ")
if dist.get_rank() == 0:
    time.sleep(1000)
dist.barrier()
"""
TASK = """
import sys
print(sys.argv[1:])
sys.exit(4 if "word=odd one" in sys.argv else 0)
"""


def script(folder: Path, text: str) -> str:
    (folder / "job.py").write_text(text)
    return str(folder / "job.py")


def test_nodes_with_different_numbers_of_ranks(launch: Callable[..., Any], tmp_path: Path) -> None:
    """A heterogeneous job: 2 ranks on one node, 1 on the other; words reach the program as they were written."""
    words = ["two words", "it's", '"$HOME"', "a\nb", "{task}", "*"]
    job = launch(["2+1", "--rails", "lo"], script(tmp_path, WHO), *words)
    status, record = job.end()
    assert (status, record["statuses"], record["failed_rank"]) == (0, [0, 0, 0], None), job.everything()
    assert list(record["states"].values()) == ["COMPLETED", "COMPLETED"]
    facts = [json.loads((job.logs / f"rank-{rank}.out").read_text()) for rank in range(3)]
    for fact in facts:
        assert (fact["by"], fact["host_of"], fact["sum"]) == ("slurm", [0, 0, 1], 3.0)
        assert (fact["words"], fact["names"]) == (words, [facts[0]["NCCLX_HOST_ID"], facts[2]["NCCLX_HOST_ID"]])
        assert ": pipelined" in fact["why"][0]  # of both levels: the plans saw two hosts
    assert [fact["LOCAL_RANK"] for fact in facts] == ["0", "1", "0"]
    assert [fact["LOCAL_WORLD_SIZE"] for fact in facts] == ["2", "2", "1"]
    assert facts[0]["NCCLX_HOST_ID"] != facts[2]["NCCLX_HOST_ID"]
    assert f"[0] {json.dumps(facts[0])}" in job.shown.read_text()


def test_the_rank_that_failed_is_named_with_its_last_lines(launch: Callable[..., Any], tmp_path: Path) -> None:
    job = launch(["2x2"], script(tmp_path, BREAK))
    status, record = job.end()
    said = job.said.read_text()
    assert (status, record["failed_rank"], record["statuses"][2]) == (7, 2, 7), job.everything()
    assert "rank 2 (node n2) failed first, with exit status 7" in said
    assert "this is what broke" in said
    assert record["verdict"]["ranks"] == [2], said
    assert "rank-2 failed first, with exit status 7 on node n2" in (job.logs / "job.log").read_text()


@pytest.mark.timeout(600)
def test_a_preempted_training_goes_on_to_the_same_losses(
    launch: Callable[..., Any], cluster: Any, tmp_path: Path
) -> None:
    """Told to stop in step 4, it saves, is requeued, and ends with the figures of a run that nobody disturbed."""
    student, teacher = (models.save_tiny(tmp_path / name, seed) for name, seed in (("student", 1), ("teacher", 2)))
    train = ["-m", "distill.train", "model=hf", f"model.student.path={student}", f"model.teacher.path={teacher}"]
    train += ["method=gkd", "data.min_terms=2", "data.max_terms=6", "train.steps=8", "train.batch_size=16"]
    train += ["train.micro_batch_size=4", "train.max_length=64", "rollout.max_new_tokens=20", "engine.lr=0.003"]
    train += ["run.tensorboard=false", "model.teacher_dtype=float32", "checkpoint.every=1000"]

    broken, whole = tmp_path / "broken", tmp_path / "whole"
    hold = "delay:rank=0,step=4,for=4"  # long enough for the signal to arrive in this step
    job = launch(["2x1", "--inject", hold], *train, f"run.dir={broken}", folder=tmp_path / "a")
    number = job.number
    job.until(lambda: (broken / "metrics.jsonl").exists() and resume.lines(broken) >= 3, 180)
    cluster.ask(["scancel", "--batch", "--signal=USR1", str(number)])
    status, record = job.end(180)
    assert (status, set(record["states"].values())) == (0, {"COMPLETED"}), job.everything()
    assert record["statuses"] == [0, 0]
    assert record["logs"].endswith("restart-1")
    assert (job.logs / "rank-1.end").read_text().startswith("75 ")
    assert "told to stop after step 4" in (job.logs / "rank-0.err").read_text()
    assert "from step 4" in (job.logs / "restart-1" / "rank-0.err").read_text() + job.shown.read_text()

    with RankPool(2, preload=models.TRAINER) as pool:
        pool.run(resume.run_here, [*train[2:], f"run.dir={whole}"], deadline=180)
    assert resume.figures(broken) == resume.figures(whole)
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (broken, whole)]
    assert weights[0] == weights[1]


def test_an_array_runs_every_combination(launch: Callable[..., Any], tmp_path: Path) -> None:
    sweep = ["--sweep", "word=even,odd one", "--sweep", "n=1,2", "--sbatch", "oversubscribe"]
    job = launch(["1x1", *sweep], script(tmp_path, TASK), "dir={task}")
    status, record = job.end()
    shown = [(job.logs / f"task-{task}" / "rank-0.out").read_text().strip() for task in range(4)]
    grid = [(word, n) for word in ("even", "odd one") for n in (1, 2)]
    assert shown == [str([f"dir={task}", f"word={word}", f"n={n}"]) for task, (word, n) in enumerate(grid)]
    assert sorted(record["states"].values()) == ["COMPLETED", "COMPLETED", "FAILED", "FAILED"]
    assert (status, record["logs"]) == (4, str(job.logs / "task-2"))


def test_a_cancelled_job_leaves_nothing(launch: Callable[..., Any], tmp_path: Path) -> None:
    """Ctrl-C in the launcher: no process of any rank is left (the fixture looks at the queue, SLURM's own, and memory)."""
    pids = tmp_path / "pids"
    pids.mkdir()
    job = launch(["2x2"], script(tmp_path, SLEEP), str(pids))
    job.until(lambda: len([file for file in pids.iterdir() if file.read_text().endswith(" ")]) == 4, 90)
    job.process.send_signal(signal.SIGINT)
    status, _ = job.end()
    assert status == 130
    assert f"job {job.number} was cancelled" in job.said.read_text()
    left = [Path("/proc") / pid for file in pids.iterdir() for pid in file.read_text().split()]
    assert len(left) == 8
    end = time.monotonic() + 20
    while alive := [path for path in left if path.exists() and ") Z " not in (path / "stat").read_text()]:
        assert time.monotonic() < end, f"{alive} still run"
        time.sleep(0.1)
