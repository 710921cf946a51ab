"""What a rank collects: from a file system and commands that the test makes up, and from this machine."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import load

from ncclx_py.doctor.facts import collect
from ncclx_py.doctor.gpus import parse_cards, parse_links
from ncclx_py.doctor.machine import Machine, Output, within
from ncclx_py.environment import Launch

pytestmark = pytest.mark.unit

healthy = load(Path(__file__).with_name("healthy.py"), "doctor_healthy")

FILES = {
    "sys/class/net/eth0/operstate": "up\n",
    "sys/class/net/eth0/mtu": "9000\n",
    "sys/class/net/eth0/speed": "100000\n",
    "sys/class/net/ib0/operstate": "down\n",
    "sys/class/net/ib0/mtu": "2044\n",
    "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
    "sys/class/infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)\n",
    "sys/class/infiniband/mlx5_0/ports/1/link_layer": "InfiniBand\n",
    "proc/self/net/if_inet6": "fe80000000000000000000000000000a 02 40 20 80 eth0\n"
    "fd00000000000000000000000000000a 03 40 00 80 ib0\n",
    "proc/self/net/route": "Iface\tDestination\tGateway\neth0\t00000000\t0100000A\n",
    "proc/self/cgroup": "0::/slurm/job7\n",
    "proc/meminfo": "MemTotal: 1024 kB\nMemAvailable: 512 kB\nHugePages_Total: 0\n",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n",
    "proc/driver/nvidia/gpus/0000:01:00.0/information": "",
    "sys/fs/cgroup/slurm/job7/memory.max": "max\n",
    "sys/fs/cgroup/slurm/memory.max": "1000\n",
    "sys/fs/cgroup/slurm/memory.current": "400\n",
    "sys/fs/cgroup/slurm/memory.stat": "anon 1\ninactive_file 150\nactive_file 9\n",
    "sys/fs/cgroup/slurm/job7/cpu.max": "250000 100000\n",
    "sys/fs/cgroup/slurm/cpu.max": "max 100000\n",
    "sys/fs/cgroup/slurm/job7/pids.max": "100\n",
    "sys/fs/cgroup/slurm/job7/pids.current": "30\n",
    "dev/shm/keep": "",
}
CARDS = """0, NVIDIA H100 80GB HBM3, 580.65.06, 81559, 4, 0, 16, 16
1, NVIDIA H100 80GB HBM3, 580.65.06, 81559, 900, [N/A], 8, 16
"""
LINKS = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)
\t Link 0: 26.562 GB/s
\t Link 1: 26.562 GB/s
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)
\t Link 0: 26.562 GB/s
\t Link 1: <inactive>
"""


def machine(root: Path, env: dict[str, str] | None = None, **more: Any) -> Machine:
    for name, text in FILES.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def answer(words: Sequence[str], seconds: float) -> Output:
        assert words[0] == "nvidia-smi"
        return Output(0, LINKS if "nvlink" in words else CARDS)

    ways: dict[str, Any] = {
        "run": answer,
        "resolve": {"n1": ["10.0.0.2"], "n0": ["10.0.0.1"]}.__getitem__,
        "ipv4": lambda: {"eth0": "10.0.0.2"},
        "host_name": lambda: "n1",
        "gpus": lambda: 2,
    }
    return Machine(env or {}, root, **{**ways, **more})


def test_the_facts_of_a_node(tmp_path: Path) -> None:
    env = {"NCCL_ALGO": "Ring", "NCCLX_ELASTIC_TOKEN": "hush", "PATH": "/bin", "NCCL_DEBUG": "x" * 5000}
    launch = Launch("torchrun", 2, 4, 0, 2, [2, 2])
    facts = collect(machine(tmp_path, env), launch, "n0", tmp_path / "not yet" / "there", 20.0)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["errors"] == {}
    assert (facts["rank"], facts["host"], facts["size"]) == (2, "n1", 4)
    assert facts["variables"] == {"NCCL_ALGO": "Ring", "NCCLX_ELASTIC_TOKEN": "(set)", "NCCL_DEBUG": "x" * 256}
    assert facts["versions"]["driver"] == "580.65.06"
    assert facts["versions"]["kernel"] == os.uname().release
    network = facts["network"]
    assert network["interfaces"] == {
        "eth0": {"state": "up", "mtu": 9000, "speed": 12.5e9, "ipv4": "10.0.0.2", "ipv6": False},
        "ib0": {"state": "down", "mtu": 2044, "speed": None, "ipv4": None, "ipv6": True},
    }
    assert network["default"] == "eth0"
    assert network["infiniband"] == {
        "mlx5_0:1": {"state": "ACTIVE", "rate": "400 Gb/sec (4X NDR)", "kind": "InfiniBand"}
    }
    assert facts["names"] == {"host": "n1", "master_host": "n0", "own": ["10.0.0.2"], "master": ["10.0.0.1"]}
    memory = facts["memory"]
    assert (memory["total"], memory["available"]) == (2**20, 2**19)
    assert (memory["group_room"], memory["group_limit"], memory["cpu_quota"]) == (750, 1000, 2.5)
    assert facts["limits"]["task_room"] == 70
    assert facts["disks"]["run folder"]["path"].endswith("not yet/there")
    assert facts["disks"]["run folder"]["write_error"] is None
    assert not (tmp_path / "not yet").exists()
    cards = facts["gpus"]["cards"]
    assert [(card["links"], card["links_down"], card["pcie_width"]) for card in cards] == [(2, 0, 16), (1, 1, 8)]
    assert cards[1]["memory_errors"] is None
    assert facts["gpus"]["present"] == 1


def test_the_facts_have_the_shape_that_the_checks_are_tested_on(tmp_path: Path) -> None:
    facts = collect(machine(tmp_path), Launch("torchrun", 0, 4, 0, 2), "n0", tmp_path, 20.0)
    expected = healthy.rank_facts(0, 0, 0)
    assert facts.keys() == expected.keys()
    for name in ("versions", "limits", "network", "names", "memory", "gpus"):
        assert facts[name].keys() == expected[name].keys(), name
    assert facts["gpus"]["cards"][0].keys() == expected["gpus"]["cards"][0].keys()
    for here, there in (("network", "interfaces"), ("disks", "run folder"), ("memory", "shared")):
        one, other = facts[here][there], expected[here][there]
        if there == "interfaces":
            one, other = one["eth0"], other["eth0"]
        assert one.keys() == other.keys()
    second = collect(machine(tmp_path), Launch("torchrun", 1, 4, 1, 2), "n0", tmp_path, 20.0)
    assert second.keys() == healthy.rank_facts(1, 0, 1).keys()


def test_what_hangs_or_fails_is_named_and_the_rest_is_there(tmp_path: Path) -> None:
    never = threading.Event()

    def hung(words: Sequence[str], seconds: float) -> Output:
        never.wait(60)
        raise AssertionError

    def unknown(name: str) -> list[str]:
        raise OSError(-2, "Name or service not known")

    facts = collect(machine(tmp_path, run=hung, resolve=unknown), Launch("none"), None, tmp_path, 3.0)
    never.set()
    assert facts["errors"] == {"gpus": "no answer after 3.0 s"}
    assert "gpus" not in facts
    assert "Name or service not known" in facts["names"]["own"]
    assert facts["network"]["default"] == "eth0"


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (Output(None), "not installed"),
        (Output(9, "Failed to initialize NVML: Driver/library version mismatch"), "exit status 9): Failed"),
        (Output(0, "No devices were found"), "No devices"),
    ],
)
def test_a_driver_without_answers(tmp_path: Path, output: Output, words: str) -> None:
    facts = collect(machine(tmp_path, run=lambda *_: output), Launch("none"), None, tmp_path, 20.0)
    assert words in facts["gpus"]["error"]
    assert facts["gpus"]["present"] == 1


def test_a_machine_without_gpus_or_cgroups(tmp_path: Path) -> None:
    bare = Machine({}, tmp_path, run=lambda *_: Output(None), ipv4=dict, gpus=lambda: 0)
    facts = collect(bare, Launch("none"), None, tmp_path, 20.0)
    assert facts["errors"] == {}
    assert facts["gpus"] == {"present": 0, "cards": [], "torch": 0, "error": None}
    assert facts["network"] == {
        "interfaces": {},
        "default": None,
        "infiniband": {},
        "congestion": None,
        "slow_start_after_idle": None,
    }
    assert facts["memory"]["shared"] is None
    assert facts["memory"]["group_limit"] is facts["limits"]["task_room"] is None


def test_odd_output_of_the_tool() -> None:
    assert parse_cards("No devices were found\n1, two\n") == []
    assert parse_links("Unable to retrieve NVLink information") == {}
    results, errors = within(5.0, {"good": lambda: 1, "bad": lambda: 1 // 0})
    assert results == {"good": 1}
    assert "ZeroDivisionError" in errors["bad"]
