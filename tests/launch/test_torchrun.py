"""``ncclx launch torchrun`` as a person uses it: logs per rank, who failed first, a verdict, faults on purpose, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ncclx_py.launch.ends import Ends

from ncclx_py import cli

JOB = """
import os, sys, time
rank = int(os.environ["RANK"])
print("out of", rank, os.environ["TORCHELASTIC_RESTART_COUNT"], sys.argv[1:])
print("err of", rank, file=sys.stderr)
"""
ONE_AFTER_THE_OTHER = """
from pathlib import Path
mine = Path(sys.argv[1])
if rank == 1:
    mine.write_text(str(os.getpid()))
    time.sleep(0.3)
else:
    while not mine.exists() or not mine.read_text():
        time.sleep(0.01)
    other = Path("/proc", mine.read_text(), "stat")
    while other.exists() and ") Z " not in other.read_text():
        time.sleep(0.001)
    time.sleep(1)
print("no", rank, file=sys.stderr)
sys.exit(3 + rank)
"""
GROUP = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist, ncclx_py
dist.init_process_group("ncclx", timeout=timedelta(seconds=60))
for step in range(1, 50):
    ncclx_py.mark_step(step)
    dist.all_reduce(torch.ones(10))
"""


def launch(
    folder: Path, options: list[str], script: str, *arguments: str
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Runs a script; returns what the launcher said and the folder of its logs."""
    (folder / "job.py").write_text(script)
    words = [sys.executable, "-m", "ncclx_py", "launch", "torchrun", "--log-dir", str(folder / "logs"), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, "--", str(folder / "job.py"), *arguments], capture_output=True, text=True, timeout=120, env=env
    )
    (logs,) = (folder / "logs").iterdir()
    return done, logs


@pytest.mark.dist
def test_every_rank_has_its_logs(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    done, logs = launch(tmp_path, ["--nproc-per-node", "2", "--json", str(record)], JOB, "--steps", "3")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[{rank}] out of {rank} 0 ['--steps', '3']" for rank in (0, 1)]
    for rank in (0, 1):
        assert (logs / f"rank-{rank}.out").read_text() == f"out of {rank} 0 ['--steps', '3']\n"
        assert (logs / f"rank-{rank}.err").read_text() == f"err of {rank}\n"
    assert str(logs) in done.stderr
    written = json.loads(record.read_text())
    assert (written["status"], written["failed_rank"], written["statuses"]) == (0, None, [0, 0])


@pytest.mark.dist
def test_the_rank_that_failed_first_is_named_with_its_last_lines(tmp_path: Path) -> None:
    """Rank 0 fails too, a moment after rank 1 has gone: torch's launcher looks ten times a second, and may see both at once."""
    done, _ = launch(tmp_path, ["--nproc-per-node", "2"], JOB + ONE_AFTER_THE_OTHER, str(tmp_path / "pid"))
    assert done.returncode == 4
    assert "rank 1 failed first, with exit status 4\nits last lines:\n  err of 1\n  no 1\n" in done.stderr


@pytest.mark.dist
def test_a_restart_has_logs_of_its_own(tmp_path: Path) -> None:
    restarted, logs = launch(tmp_path, ["--max-restarts", "1"], JOB + "sys.exit(5)\n")
    assert restarted.returncode == 5
    assert (logs / "restart-1" / "rank-0.out").read_text() == "out of 0 1 []\n"


@pytest.mark.dist
def test_a_drill_ends_in_a_verdict_and_says_what_came_true(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    faults = ["--inject", "kill:rank=1,step=20", "--inject", "nan:rank=0,call=4000"]
    done, logs = launch(tmp_path, ["--nproc-per-node", "2", *faults, "--json", str(record)], GROUP)
    assert done.returncode == 128 + signal.SIGKILL, done.stderr
    assert "rank 1 failed first, with SIGKILL" in done.stderr
    assert "RANK_CRASHED" in done.stderr
    assert "the fault kill:rank=1,step=20 came true on rank 1, in step 20" in done.stderr
    assert "the fault nan:rank=0,call=4000 never came true: rank 0 may have made fewer than 4000" in done.stderr
    written: dict[str, Any] = json.loads(record.read_text())
    assert (written["verdict"]["ranks"], written["verdict"]["cause"]) == ([1], "crashed")
    assert [fault["happened"] is not None for fault in written["faults"]] == [True, False]
    assert list((logs / "trace").glob("trace-rank-0.jsonl"))


@pytest.mark.dist
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_ranks(signum: int, tmp_path: Path) -> None:
    """One that the launcher hears, and one that ends it without a word."""
    (tmp_path / "job.py").write_text(
        f"{JOB}\nopen(f'{tmp_path}/pid{{rank}}', 'w').write(str(os.getpid()))\ntime.sleep(1000)\n"
    )
    words = [sys.executable, "-m", "ncclx_py", "launch", "torchrun", "--log-dir", str(tmp_path / "logs")]
    launcher = subprocess.Popen(
        [*words, "--nproc-per-node", "2", "--", str(tmp_path / "job.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    files, until = [tmp_path / f"pid{rank}" for rank in (0, 1)], time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < until
        time.sleep(0.05)
    launcher.send_signal(signum)
    _, errors = launcher.communicate(timeout=60)
    if signum == signal.SIGTERM:
        assert launcher.returncode == 128 + signal.SIGTERM
        assert "received SIGTERM: the ranks were ended" in errors
    while any(_runs(int(file.read_text())) for file in files):
        assert time.monotonic() < until
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.unit
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--inject", "explode:rank=1,step=2"], "'explode' is no kind of fault"),
        (["--inject", "kill:rank=2,step=2", "--nproc-per-node", "2"], "rank 2 is not one of this job's, 0 to 1"),
        (["--inject", "drop-link:host=0,step=2"], "use ncclx launch emulate"),
        (["--nproc-per-node", "many"], "--nproc-per-node 'many': give a number"),
        (["--nnodes", "two"], "--nnodes 'two': give a number"),
        (["--nnodes", "3:2"], "--nnodes '3:2': the smaller number comes first"),
        (["--nnodes", "2", "--node-rank", "2"], "--node-rank 2: from 0 to 1"),
        (["--master-port", "65536"], "--master-port 65536: from 0 to 65535"),
        (["--max-restarts", "-1"], "--max-restarts -1: from 0 to"),
    ],
)
def test_bad_input_starts_nothing(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["launch", "torchrun", "--log-dir", str(tmp_path / "logs"), *options, "--", "job.py"])
    assert status == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


@pytest.mark.unit
def test_children_are_ordered_as_they_end() -> None:
    with Ends() as ends:
        children = [subprocess.Popen(["sleep", str(seconds)]) for seconds in (0.5, 0.3, 0.7)]
        for child in children:
            child.wait()
        time.sleep(0.1)
    mine = sorted((child.pid for child in children), key=lambda pid: ends.place[pid])
    assert mine == [children[1].pid, children[0].pid, children[2].pid]
