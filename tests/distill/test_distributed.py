"""Starting and leaving the process group of a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness import Rank, run_ranks

from distill.errors import DistillError
from distill.local_ranks import free_port
from distill.rendezvous import meet

pytestmark = pytest.mark.dist


def two_runs_in_one_process(me: Rank, overrides: list[str]) -> list[int]:
    """As in a notebook: each run makes and leaves its own world."""
    import torch.distributed as dist

    from distill.config import load_config
    from distill.train import train

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    steps = []
    for number in range(2):
        steps.append(train(load_config("config", [*overrides, f"run.dir={me.folder}/run{number}"]))["steps"])
        assert not dist.is_initialized()
    return steps


def test_a_process_can_train_twice(base_overrides: list[str]) -> None:
    options = ["method=off_policy", "train.steps=2", "engine.zero_stage=2"]
    assert run_ranks(two_runs_in_one_process, 1, [*base_overrides, *options], deadline=120) == [[2, 2]]


def failing(me: Rank) -> str:
    """Rank 1 fails alone; both ranks must hear of it."""
    from distill.distributed import all_or_nothing
    from distill.errors import DataError

    me.init("ncclx")
    try:
        with all_or_nothing(DataError):
            if me.rank == 1:
                raise OSError(28, "No space left on device")
    except DataError as error:
        return f"{error} {error.on_every_rank}"
    return "went on"


def test_what_fails_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    messages = run_ranks(failing, 2, deadline=60)
    assert messages == ["OSError: [Errno 28] No space left on device (rank 1) True"] * 2


def meeting(me: Rank, port: int, numbers: list[int], ranks: int) -> object:
    """Two meetings of some ranks of a job, the second only where they came to the first: the outcome of the last."""
    told = {"RANK": numbers[me.rank], "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})
    try:
        meet(timeout_s=20.0 if len(numbers) == ranks else 2.0)
        return meet(timeout_s=20.0)[1:]
    except DistillError as error:
        return f"{error} {error.exit_status} {error.on_every_rank}"


def test_ranks_that_do_not_come_are_named() -> None:
    assert run_ranks(meeting, 2, free_port(), [0, 1], 2) == [(0, 2), (1, 2)]
    keeper, other = run_ranks(meeting, 2, free_port(), [0, 2], 5)
    assert "waited 2 s (comm.timeout_s) for ranks 1, 3, 4, which did not come" in keeper
    assert keeper.endswith("1 False")
    assert "which did not come" in other or "has left" in other
    for outcome in run_ranks(meeting, 2, port := free_port(), [1, 2], 3):
        assert f"could not reach rank 0 at 127.0.0.1:{port} within 2 s" in outcome
    (refused,) = run_ranks(meeting, 1, port, [3], 3)
    assert "RANK=3, WORLD_SIZE=3, MASTER_ADDR='127.0.0.1'" in refused
    assert refused.endswith("2 False")
