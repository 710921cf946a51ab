"""``ncclx launch slurm`` on a real SLURM: ranks and hosts, failures, arrays, cancelled jobs; ``ncclx doctor`` in an allocation."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.local_ranks import free_port

pytestmark = pytest.mark.slurm

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


def test_an_array_runs_every_combination(launch: Callable[..., Any], tmp_path: Path) -> None:
    sweep = ["--sweep", "word=even,odd one", "--sweep", "n=1,2", "--sbatch", "oversubscribe"]
    job = launch(["1x1", "--name", "a sweep", *sweep], script(tmp_path, TASK), "dir={task}")
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


def test_the_doctor_sees_every_node_of_an_allocation(cluster: Any, tmp_path: Path) -> None:
    """Both nodes at once; one has a variable that the other lacks, and is named. (This machine cannot resolve their names.)"""
    odd = "[[ $SLURMD_NODENAME == n2 ]] && export NCCL_IB_TC=106; export NCCLX_HOST_ID=$SLURMD_NODENAME"
    words = [sys.executable, "-m", "ncclx_py", "doctor", "--json", "--store", f"127.0.0.1:{free_port()}"]
    command = f"{odd}; exec {' '.join(words)} --run-folder {tmp_path}"
    srun = ["srun", "--nodes", "2", "--ntasks-per-node", "1", "bash", "-c", command]
    done = subprocess.run(srun, env=cluster.env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1, done.stderr
    seen = json.loads(done.stdout)
    assert (len(seen["hosts"]), seen["silent"]) == (2, {})
    checks = {check["check"]: check for check in seen["checks"]}
    assert (checks["ranks"]["level"], checks["clocks"]["level"], checks["variables"]["level"]) == ("ok", "ok", "fail")
    (finding,) = checks["variables"]["findings"]
    assert (finding["ranks"], "NCCL_IB_TC" in finding["text"]) == ([1], True)
