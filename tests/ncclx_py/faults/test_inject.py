"""Faults inside real ranks: each happens where it was asked for, once, to that rank only."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Rank, RankPool

import ncclx_py
from ncclx_py import faults
from ncclx_py.faults.inject import Injector
from ncclx_py.faults.notes import claim, claimed
from ncclx_py.faults.spec import FOLDER, VARIABLE, InjectError, parse

WORLD = 3


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(WORLD) as ranks:
        yield ranks


def job(me: Rank, fault: str, notes: str = "", steps: int = 4) -> dict[str, Any]:
    """Two collectives a step; tells the error, the sums of the step in which it came, seconds, and calls of each group."""
    faults.disarm()
    os.environ.update({VARIABLE: fault, FOLDER: notes, "NCCLX_NAN_CHECK": "1"})
    me.init(fresh=True)
    dist.barrier()  # call 1
    dist.group.WORLD.set_timeout(timedelta(seconds=1.5))
    began, results, error = time.monotonic(), [], ""
    try:
        for step in range(1, steps + 1):
            ncclx_py.mark_step(step)
            total, parts = torch.full((5,), float(me.rank)), torch.zeros(2 * WORLD)
            dist.all_reduce(total)
            dist.all_gather_into_tensor(parts, torch.full((2,), float(me.rank)))
            results.append([total.tolist()[0], parts.tolist()])
    except RuntimeError as failure:
        error = str(failure)
    seconds, kind = time.monotonic() - began, type(dist.group.WORLD).__name__
    if error:
        dist.group.WORLD.abort()
    me.leave()
    for name in (VARIABLE, FOLDER, "NCCLX_NAN_CHECK"):
        os.environ.pop(name)
    return {"results": results, "error": error, "seconds": seconds, "group": kind}


@pytest.mark.dist
def test_only_ranks_with_a_fault_get_another_kind_of_group(pool: RankPool) -> None:
    answers = pool.run(job, "nan:rank=1,step=99")
    assert [answer["group"] for answer in answers] == ["NcclxProcessGroup", "InjectedGroup", "NcclxProcessGroup"]
    assert [answer["error"] for answer in answers] == [""] * WORLD
    assert answers[1]["results"] == [[3.0, [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]]] * 4


@pytest.mark.dist
@pytest.mark.parametrize(
    ("fault", "culprit", "others"),
    [
        ("skip:rank=1,step=3", "", "all_gather"),
        ("wrong-size:rank=1,call=4", "rank", "all_reduce of 10"),
        ("wrong-order:rank=1,step=2", "all_gather", "all_gather"),
        ("nan:rank=1,step=3", "the input of rank 1 holds a NaN at element 0 of 5", ""),
    ],
)
def test_a_broken_collective_is_broken_for_all(pool: RankPool, fault: str, culprit: str, others: str) -> None:
    answers = pool.run(job, fault)
    at = 1 if "step=2" in fault or "call" in fault else 2  # steps that were whole before
    for rank, answer in enumerate(answers):
        assert len(answer["results"]) == at, (rank, answer)
        assert answer["error"]
        assert (culprit if rank == 1 else others) in answer["error"]


@pytest.mark.dist
def test_a_delay_is_as_long_as_asked_and_noted(pool: RankPool, tmp_path: Path) -> None:
    answers = pool.run(job, "delay:rank=2,step=2,for=0.7", str(tmp_path))
    assert [answer["error"] for answer in answers] == [""] * WORLD
    assert all(answer["seconds"] >= 0.7 for answer in answers)
    note = claimed(tmp_path, 0)
    assert note is not None
    assert (note["rank"], note["step"], note["call"]) == (2, 2, 3)
    again = pool.run(job, "delay:rank=2,step=2,for=60", str(tmp_path))  # as in a rank that was restarted
    assert [answer["error"] for answer in again] == [""] * WORLD


@pytest.mark.dist
def test_a_killed_rank_is_killed_by_a_timer_too(pool: RankPool) -> None:
    answers = pool.run(job, "kill:rank=0,seconds=0.2", "", 2_000_000, dying={0})
    assert all("rank 0 is gone" in answer["error"] for answer in answers[1:])


@pytest.mark.unit
def test_faults_of_a_call_count_the_calls_of_their_group(tmp_path: Path) -> None:
    numbered = [(0, parse("skip:rank=0,call=2,group=pair")), (1, parse("skip:rank=0,step=5"))]
    injector = Injector(numbered, 0, tmp_path)
    seen = []
    for names in (["0", "world"], ["1", "pair"], ["0", "world"], ["1", "pair"], ["1", "pair"]):
        injector.before_call(names)
        seen.append(injector.of_call(names, lambda fault: True))
    assert seen == ["", "", "", "skip", ""]
    injector.step(5)
    injector.before_call(["0"])
    assert injector.of_call(["0"], lambda fault: False) == ""  # does not suit this one: it waits
    injector.before_call(["0"])
    assert injector.of_call(["0"], lambda fault: True) == "skip"
    assert json.loads((tmp_path / "fault-1.json").read_text())["step"] == 5


@pytest.mark.unit
def test_a_note_is_left_once(tmp_path: Path) -> None:
    assert claim(tmp_path, 3, {"rank": 1, "step": 2, "call": 3})
    assert not claim(tmp_path, 3, {"rank": 2, "step": 2, "call": 3})
    note = claimed(tmp_path, 3)
    assert note is not None
    assert note["rank"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["fault-3.json"]


@pytest.mark.unit
def test_malformed_faults_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "kill:rank=0")
    with pytest.raises(InjectError, match="exactly one of step, call, seconds"):
        ncclx_py.mark_step(1)
