"""``ncclx bench`` on real ranks: under torchrun, on emulated hosts, and beside OpenMPI."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ncclx_py.launch.emulate import Cluster

from ncclx_py import cli
from ncclx_py.bench import mpi
from ncclx_py.bench.cases import Case, Tensors
from ncclx_py.bench.settings import COLLECTIVES, Settings

on_emulated_hosts = pytest.mark.skipif(os.geteuid() != 0, reason="emulated clusters need root")


@pytest.mark.dist
def test_every_collective_is_measured_and_right_under_torchrun(tmp_path: Path) -> None:
    rows, output = _bench(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
        [*COLLECTIVES, "-b", "100", "-e", "100", "--iters", "2"],
        tmp_path,
    )
    assert [(row["collective"], row["backend"]) for row in rows] == [
        (name, backend) for name in COLLECTIVES for backend in ("ncclx", "gloo")
    ]
    for row in rows:
        assert row["correct"] is True, row
        assert 0 < row["median_s"] < 10
        assert (row["hosts"], row["ranks_per_host"], row["interbw_GBps"]) == (1, 2, 0.0)
        assert bool(row["algorithm"]) == (row["backend"] == "ncclx")
    assert output.splitlines()[0].startswith("collective")


@pytest.mark.unit
@pytest.mark.parametrize(("check", "verdict", "status"), [(True, False, 1), (False, None, 0)])
def test_a_wrong_result_is_reported_and_fails_the_command(
    check: bool, verdict: bool | None, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def spoil(case: Case, tensors: Tensors, group: Any) -> None:
        tensors.result[0] += 1

    monkeypatch.setattr(Case, "call", spoil)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port))):
        monkeypatch.setenv(name, value)
    file = tmp_path / "rows.json"
    words = ["bench", "all_reduce", "-e", "1KiB", "--backends", "gloo", "--iters", "1", "--json", str(file)]
    assert cli.main([*words, "--check" if check else "--no-check"]) == status
    assert [row["correct"] for row in json.loads(file.read_text())] == [verdict]


@pytest.mark.net
@on_emulated_hosts
def test_clusters_and_placements_run_one_after_another_into_one_table(tmp_path: Path) -> None:
    options = ["--emulate", "2x2", "--emulate", "2+1", "--rate", "1gbit", "--placement", "block,cyclic", "--iters", "1"]
    plot = ["--plot", str(tmp_path / "plot.png")]
    rows, output = _bench(
        [sys.executable, "-m"], ["all_reduce", "-b", "64KiB", "-e", "64KiB", *options, *plot], tmp_path
    )
    assert [(row["ranks_per_host"], row["placement"], row["backend"]) for row in rows] == [
        (ranks, placement, backend)
        for ranks in (2, [2, 1])
        for placement in ("block", "cyclic")
        for backend in ("ncclx", "gloo")
    ]
    assert {row["correct"] for row in rows} == {True}
    bound = 65536 / 125e6  # 2(N−1)/N · n at 1 Gbit/s, N = 2
    assert [row["bound_s"] for row in rows] == pytest.approx([bound] * len(rows))
    assert len(output.splitlines()) == 1 + len(rows) + 4
    assert output.count("stream (host 0 to host 1") == 4  # the raw transfers
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.net
@on_emulated_hosts
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="OpenMPI is not installed (openmpi-bin libopenmpi-dev)")
def test_openmpi_is_measured_on_the_same_hosts_and_its_results_are_checked() -> None:
    settings = Settings(tuple(COLLECTIVES), (3000, 131_072), ("openmpi",), iters=2)
    lines: list[str] = []
    with Cluster([2, 1], rate="1gbit", placement="cyclic") as cluster:
        rows = mpi.measure(cluster, settings, "openmpi-han", lines.append)
    assert [(row.collective, row.correct) for row in rows] == [(name, True) for name in COLLECTIVES for _ in range(2)]
    assert {(row.backend, row.placement) for row in rows} == {("openmpi-han", "cyclic")}
    assert all(0 < row.median_s < 10 and row.bound_s > 0 for row in rows)
    assert len(lines) == len(rows)


@pytest.mark.unit
def test_without_openmpi_the_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match=r"mpirun and mpicc.*libopenmpi-dev"):
        mpi.measure(Cluster([1, 1]), Settings(("all_reduce",), (4,)), "openmpi", print)
    with pytest.raises(ValueError, match="float32"):
        mpi.measure(Cluster([1, 1]), Settings(("all_reduce",), (4,), dtype="int32"), "openmpi", print)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "No launcher started this process"),
        (["--rate", "1gbit"], "--rate works only with --emulate"),
        (
            ["--placement", "cyclic", "--backends", "openmpi"],
            "--placement, --backends openmpi works only with --emulate",
        ),
        (["-b", "many"], "'many' is not a size"),
        (["-b", "8KiB", "-e", "1KiB"], "Sizes from 8192 to 1024"),
        (["--backends", "ncclx,ucx"], "backend 'ucx'"),
        (["--emulate", "two"], "'two' is not a cluster"),
        (["--emulate", "2x2", "--placement", "odd"], "placement 'odd'"),
    ],
)
def test_wrong_options_are_named(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["bench", "all_reduce", *words]) == 1
    assert complaint in capsys.readouterr().err


def _bench(launcher: list[str], options: list[str], folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Rows and standard output of one run that succeeds."""
    file = folder / "rows.json"
    words = [*launcher, "ncclx_py", "bench", *options, "--json", str(file)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout
