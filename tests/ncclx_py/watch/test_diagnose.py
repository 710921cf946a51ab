"""``ncclx diagnose``: exit status, text, JSON, picture; and the verdict on real ranks that really hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import Rank, RankPool

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import Call, Cluster, End, Job, Step

from ncclx_py.cli import main

pytestmark = pytest.mark.dist


def imitated(folder: Path, faulty: bool) -> None:
    body: list[Step] = [Call("world")] * 9
    programs = [[*body, End("outside")] if faulty and rank == 2 else [*body, Call("world")] for rank in range(4)]
    job = Job(Cluster(2, 2, {"world": [0, 1, 2, 3]}), programs)
    job.dump(folder, job.run() + 30, "demand")


@pytest.mark.unit
def test_the_exit_status_says_healthy_faulty_or_nothing_to_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imitated(tmp_path / "good", False)
    imitated(tmp_path / "bad", True)
    (tmp_path / "empty").mkdir()
    assert main(["diagnose", str(tmp_path / "good")]) == 0
    assert capsys.readouterr().out.startswith("ALL_GOOD: ")
    assert main(["diagnose", str(tmp_path / "bad")]) == 1
    text = capsys.readouterr().out
    assert text.startswith("JOB_STUCK_OUTSIDE_NCCL: rank 2 did not join all_reduce (collective 10 of group 'world')")
    assert text.index("evidence") < text.index("what to do")
    for arguments in (["empty"], ["nowhere"], ["--live", "nowhere"], ["--live", "--wait", "0.3", "empty"]):
        assert main(["diagnose", *arguments[:-1], str(tmp_path / arguments[-1])]) == 2, arguments
        assert "ncclx diagnose: error: " in capsys.readouterr().err
    assert main(["diagnose", "--wait", "0", str(tmp_path / "bad")]) == 2


@pytest.mark.unit
def test_json_has_what_programs_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imitated(tmp_path, True)
    assert main(["diagnose", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "JOB_STUCK_OUTSIDE_NCCL"
    assert found["ranks"] == [2]
    assert found["collective"] == "all_reduce of 1000 x float32 (sum)"
    assert found["call_site"] == "/app/data.py:33 load"
    assert found["remedy"]
    assert any("ranks 0, 1, 3 wait" in line for line in found["evidence"])


@pytest.mark.unit
def test_the_picture_shows_each_rank_and_call(tmp_path: Path) -> None:
    """The cell of the call that rank 2 has not made is white, those of the ranks that wait in it are not."""
    from matplotlib.image import imread

    imitated(tmp_path, True)
    picture = tmp_path / "calls.png"
    assert main(["diagnose", str(tmp_path), "--picture", str(picture), "--chrome", str(tmp_path / "calls.json")]) == 1
    pixels = (imread(str(picture))[..., :3] * 255).round().astype(int)
    running = (np.abs(pixels - np.array([0xF2, 0xB1, 0x34])).sum(axis=-1) < 8).any(axis=1)
    bands = np.flatnonzero(np.diff(running[: int(len(running) * 0.85)].astype(int)) == 1)
    assert len(bands) >= 2  # ranks 0 and 1 above rank 2, rank 3 below it
    assert json.loads((tmp_path / "calls.json").read_text())
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", *[".jsonl"] * 4, ".png"]


# Real ranks


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)


def slumber(seconds: float) -> None:
    time.sleep(seconds)


def hangs(me: Rank, folder: str, how: str, victim: int) -> None:
    os.environ["NCCLX_TRACE_DIR"] = folder
    me.init("ncclx", fresh=True, timeout=timedelta(seconds=2.5))
    for _ in range(2):
        dist.all_reduce(torch.ones(10))
        dist.all_gather_into_tensor(torch.zeros(30), torch.ones(10))
    if me.rank == victim and how == "outside":
        slumber(5.0)
    if me.rank == victim and how == "crashed":
        os.kill(os.getpid(), signal.SIGKILL)
    if me.rank == victim and how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        if not (me.rank == victim and how == "skipped"):
            dist.all_reduce(torch.ones(9 if me.rank == victim and how == "size" else 10))
        dist.all_gather_into_tensor(torch.zeros(30), torch.ones(10))
    except RuntimeError:
        time.sleep(1.0)  # the others' watchers see it meanwhile


@pytest.mark.parametrize("how", ["outside", "skipped", "size", "crashed", "stopped"])
def test_real_hangs_are_judged_right(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dying = {1} if how in ("crashed", "stopped") else set()
    with RankPool(3) as pool:
        if how == "stopped":  # the pool waits for a rank that cannot answer: it is ended once the others have dumped
            thread = threading.Thread(target=end_when_dumped, args=(pool, tmp_path, {0, 2}))
            thread.start()
        pool.run(hangs, str(tmp_path), how, 1, deadline=60, dying=dying)
    main(["diagnose", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["cause"], found["ranks"]) == (how, [1]), found
    assert found["collective"].startswith("all_reduce of 10 x float32")
    if how == "outside":
        assert found["call_site"].endswith(" slumber")


def end_when_dumped(pool: RankPool, folder: Path, ranks: set[int]) -> None:
    wait_for(lambda: all((folder / f"trace-rank-{rank}.jsonl").exists() for rank in ranks), 40)
    time.sleep(0.5)
    pool._children[1].process.kill()


def test_a_job_that_nobody_runs_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "missing" / "trace"
    assert main(["diagnose", "--live", str(folder), "--wait", "0.2"]) == 2
    told = capsys.readouterr().err
    assert f"{folder}: no rank wrote a dump within 0.2 s" in told
    assert "was not there" in told
    assert not folder.parent.exists()


LIVE = """
    import os, sys, time, torch, torch.distributed as dist, ncclx_py
    rank = int(sys.argv[1])
    store = dist.FileStore(sys.argv[2], 2)
    dist.init_process_group("ncclx", store=store, rank=rank, world_size=2)
    dist.barrier()
    def dawdle():
        time.sleep(60)
    if rank == 1:
        dawdle()
    dist.all_reduce(torch.ones(4))
"""


def test_a_job_that_still_runs_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """First its slow rank is found at work, then the other is stopped, and says nothing any more."""
    folder = tmp_path / "trace"  # not there before the first dump
    script = tmp_path / "job.py"
    script.write_text("\n".join(line[4:] for line in LIVE.splitlines()))
    env = {
        **os.environ,
        "NCCLX_TRACE_DIR": str(folder),
        "OMP_NUM_THREADS": "1",
        "LOCAL_WORLD_SIZE": "2",
        "WORLD_SIZE": "2",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", str(script), str(rank), str(tmp_path / "store")],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        status = 2
        until = time.monotonic() + 60
        while status != 1 and time.monotonic() < until:  # until both have come to the call
            time.sleep(0.5)
            status = main(["diagnose", "--live", str(folder), "--json", "--patience", "0.5", "--wait", "3"])
            text = capsys.readouterr().out
        found = json.loads(text)
        assert (found["cause"], found["ranks"], found["call_site"].split()[-1]) == ("outside", [1], "dawdle"), found
        ranks[1].send_signal(signal.SIGSTOP)
        assert main(["diagnose", "--live", str(folder), "--json", "--patience", "0.5", "--wait", "2"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert (found["cause"], found["ranks"]) == ("stopped", [1]), found
    finally:
        for process in ranks:
            process.kill()
            process.wait()
