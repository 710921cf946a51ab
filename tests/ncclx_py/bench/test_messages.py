"""The benchmark of messages: what it reports, and that it sees bytes that arrive wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ncclx_py.bench import messages


@pytest.mark.unit
@pytest.mark.parametrize(("sender", "right"), [(1, True), (0, False)])
def test_it_sees_what_arrives_wrong(monkeypatch: pytest.MonkeyPatch, sender: int, right: bool) -> None:
    def exchange(group: Any, out: Tensor, back: Tensor, peer: int) -> None:
        back.copy_((torch.arange(len(back)) * 31 + sender) % 251)

    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    assert messages._block(exchange, None, 300, 2, peer=1)[1] is right


def test_three_ranks_of_which_two_exchange(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    words = ["--standalone", "--nproc-per-node", "3", "-m", "ncclx_py.bench.messages"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *words,
            "--sizes",
            "8,100KiB",
            "--repeats",
            "1",
            "--json",
            file,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(file.read_text())
    assert [(row["bytes"], row["correct"]) for row in rows] == [(8, True), (100 * 1024, True)]
    assert all(seconds > 0 for row in rows for what in ("one_way_s", "both_ways_s") for seconds in row[what].values())
    assert "100 KiB" in done.stdout
