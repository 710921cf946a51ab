"""One SLURM for all tests of this folder, and the launcher that talks to it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import load

HERE = Path(__file__).parent
slurm = load(HERE / "cluster.py", "slurm_cluster")


@dataclass
class Launched:
    """``ncclx launch slurm --wait`` at work."""

    process: subprocess.Popen[str]
    folder: Path  # of the test
    said: Path  # its stderr
    shown: Path  # its stdout

    @property
    def logs(self) -> Path:
        (logs,) = (self.folder / "logs").iterdir()
        return logs

    @property
    def number(self) -> int:
        self.until(lambda: "its logs go to" in self.said.read_text(), 60)
        found = re.search(r"job (\d+); its logs", self.said.read_text())
        assert found is not None
        return int(found[1])

    def until(self, done: Callable[[], Any], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, self.everything()
            assert self.process.poll() is None, self.everything()
            time.sleep(0.02)

    def end(self, seconds: float = 120) -> tuple[int, dict[str, Any]]:
        """Its exit status, and what ``--json`` wrote."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.everything()) from None
        record = self.folder / "record.json"
        return status, json.loads(record.read_text()) if record.exists() else {}

    def everything(self) -> str:
        files = [self.said, *sorted(self.folder.glob("logs/**/*.log")), *sorted(self.folder.glob("logs/**/rank-*"))]
        return "\n".join(f"---- {file}\n{file.read_text()[-3000:]}" for file in files)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    why = slurm.missing()
    if why:
        pytest.skip(f"SLURM: {why}")
    with slurm.Cluster(nodes=2, cpus=2) as running:
        yield running


@pytest.fixture
def launch(cluster: Any, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """``launch(["2x2", "--time", "5"], "script.py", "argument")``; nothing of the job may be left at the end of a test."""
    started: list[Launched] = []
    shared = set(os.listdir("/dev/shm"))

    def start(options: list[str], *program: str, folder: Path = tmp_path) -> Launched:
        folder.mkdir(exist_ok=True)
        words = [
            sys.executable,
            "-m",
            "ncclx_py",
            "launch",
            "slurm",
            *options,
            "--wait",
            "--log-dir",
            str(folder / "logs"),
        ]
        words += ["--json", str(folder / "record.json"), "--", *program]
        said, shown = folder / "said.txt", folder / "shown.txt"
        with said.open("w") as errors, shown.open("w") as output:
            process = subprocess.Popen(words, env=cluster.env, stdout=output, stderr=errors, text=True)
        started.append(Launched(process, folder, said, shown))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
            cluster.ask(["scancel", "--user=root"])
    end = time.monotonic() + 20
    while (left := [cluster.ask(["squeue", "--noheader"]).split(), cluster.steps()]) != [[], []]:
        assert time.monotonic() < end, f"left behind: {left}"
        time.sleep(0.1)
    assert not {name for name in set(os.listdir("/dev/shm")) - shared if name.startswith("ncclx")}
