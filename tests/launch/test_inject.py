"""Links that break on purpose on emulated hosts, when they are told to, and what the launcher says of faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ncclx_py.launch.emulate import Cluster
from ncclx_py.launch.inject import Drill
from ncclx_py.launch.network import EmulationError

from ncclx_py.faults.notes import claim
from ncclx_py.faults.spec import FOLDER, VARIABLE, parse

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="emulated clusters need root")


class Links:
    """Remembers what was done to links."""

    def __init__(self) -> None:
        self.done: list[tuple[Any, ...]] = []

    def break_link(self, host: int, rail: int | None) -> None:
        self.done.append(("break", host, rail))

    def slow_link(self, host: int, rail: int | None) -> None:
        self.done.append(("slow", host, rail))

    def mend_link(self, host: int, rail: int | None) -> None:
        self.done.append(("mend", host, rail))


@pytest.mark.unit
def test_links_break_when_their_rank_says_so_and_are_mended_in_time() -> None:
    links = Links()
    faults = [
        parse("drop-link:host=1,rail=0,step=3,for=0.1"),
        parse("halve-rate:rank=1,seconds=0.05"),
        parse("drop-link:host=0,seconds=1000"),
        parse("kill:rank=7,step=1"),
    ]
    with Drill(faults, links, host_of=[0, 0, 1, 1]) as drill:
        env = drill.environment()
        assert env[VARIABLE].startswith(
            "drop-link:rank=2,rail=0,step=3"
        )  # the first rank of that host waits for the step
        _until(lambda: ("slow", 0, None) in links.done)
        assert ("break", 1, 0) not in links.done
        claim(Path(env[FOLDER]), 0, {"rank": 2, "step": 3, "call": 9})
        _until(lambda: ("mend", 1, 0) in links.done)
    assert links.done == [("slow", 0, None), ("break", 1, 0), ("mend", 1, 0)]
    assert not Path(env[FOLDER]).exists()
    assert drill.report({0, 1, 2, 3}) == [
        "the fault drop-link:host=1,rail=0,step=3,for=0.1 came true on rank 2, in step 3, at its collective 9",
        "the fault halve-rate:rank=1,seconds=0.05 came true",
        "the fault drop-link:host=0,seconds=1000 never came true: the job ended before",
        "the fault kill:rank=7,step=1 was up to another launcher, which has rank 7",
    ]


@pytest.mark.net
@needs_root
def test_a_link_is_dead_slow_and_whole_again() -> None:
    with Cluster([1, 1], rate="200mbit,100mbit") as cluster:
        net = cluster.network
        net.break_link(1, 0)
        assert [_state(net.switch, f"h1r{rail}") for rail in (0, 1)] == ["DOWN", "UP"]
        net.slow_link(1)
        assert [_rate(net.host(1), f"eth{rail}") for rail in (0, 1)] == [12_500_000, 6_250_000]
        assert _rate(net.switch, "h1r1") == 6_250_000
        assert _rate(net.host(0), "eth0") == 25_000_000
        net.mend_link(1)
        assert [_state(net.switch, f"h1r{rail}") for rail in (0, 1)] == ["UP", "UP"]
        assert _rate(net.host(1), "eth0") == _rate(net.switch, "h1r0") == 25_000_000
        with pytest.raises(EmulationError, match="There is no rail 2: the hosts have 2"):
            net.break_link(0, 2)


@pytest.mark.net
@needs_root
def test_the_matrix_finds_a_dead_rank_and_goes_on_where_it_was(tmp_path: Path) -> None:
    record = tmp_path / "matrix.json"
    row = {"case": "drop-link-0", "kind": "drop-link", "happened": True, "right_rank": True, "right_cause": True}
    record.write_text(json.dumps({"rows": [row | {"after_deadline_s": 1.5}]}))
    words = [
        sys.executable,
        "-m",
        "ncclx_py.bench.faults",
        "--cluster",
        "2x2",
        "--kinds",
        "kill,drop-link",
        "--placements",
        "1",
    ]
    words += ["--healthy", "1", "--replays", "10", "--json", str(record)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    assert [row["case"] for row in found["rows"]] == ["drop-link-0", "kill-0"]
    assert (found["right"], found["cases"], found["replays"], found["false_alarms"]) == (2, 2, 10, [])


def _until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not done():
        assert time.monotonic() < until
        time.sleep(0.01)


def _state(namespace: str, interface: str) -> str:
    found = subprocess.run(
        ["ip", "-j", "-n", namespace, "link", "show", "dev", interface], capture_output=True, text=True, check=True
    )
    flags = json.loads(found.stdout)[0]["flags"]
    return "UP" if "UP" in flags else "DOWN"


def _rate(namespace: str, interface: str) -> int:
    found = subprocess.run(
        ["tc", "-j", "-n", namespace, "qdisc", "show", "dev", interface], capture_output=True, text=True, check=True
    )
    return int(json.loads(found.stdout)[0]["options"]["rate"])
