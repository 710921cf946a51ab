"""Starting and leaving the process group of a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness import Rank, run_ranks

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
