"""The fused-linear divergence under DDP and DeepSpeed ZeRO-3, whose shards are gathered only while forward runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.dist
WORKER = Path(__file__).with_name("engine_worker.py")


@pytest.mark.parametrize(("engine", "gradient"), [("ddp", "recompute"), ("zero3", "recompute"), ("zero3", "forward")])
def test_gradients_are_those_of_one_process(engine, gradient, tmp_path):
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                str(WORKER),
                engine,
                str(rank),
                str(tmp_path / "s"),
                str(tmp_path / "o"),
                gradient,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"},
        )
        for rank in range(2)
    ]
    logs = [worker.communicate(timeout=150)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(logs)[-4000:]
    for rank in range(2):
        expected, actual = torch.load(tmp_path / f"o.{rank}")
        assert len(expected) == len(actual) == 3
        for want, got in zip(expected, actual, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
