"""Every check, on the facts of a healthy job with one fault in them: that fault is the only finding."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ncclx_py.launch
import pytest
from harness import load

import ncclx_py
from ncclx_py.doctor import known
from ncclx_py.doctor.checks import examine, worst
from ncclx_py.doctor.job import Clock, Job
from ncclx_py.doctor.report import as_json, as_text

pytestmark = pytest.mark.unit

healthy = load(Path(__file__).with_name("healthy.py"), "doctor_healthy")
GIB = 2**30

NIC = "network interfaces eth1 "
CARD = "gpus cards 1 "
# check, level, ranks, words of the text, {ranks: {path: value}}; paths are keys with blanks between, "-" drops the key
FAULTS: list[tuple[str, str, str, str, str, Any]] = [
    ("versions", "fail", "3", "torch differs: 2.11.0 on n0, rank 2; 2.13.0 on rank 3", "3 versions torch", "2.13.0"),
    ("versions", "fail", "23", "nccl differs", "23 versions nccl", "2.30.1"),
    ("versions", "fail", "1", "triton differs: 3.6.0 on n1, rank 0; none on rank 1", "1 versions triton", None),
    ("versions", "warn", "23", "driver differs", "23 versions driver", "570.10"),
    ("versions", "warn", "23", "kernel differs", "23 versions kernel", "5.15"),
    ("versions", "warn", "1", "python differs", "1 versions python", "3.12.1"),
    ("versions", "fail", "1", "python differs", "1 versions python", "3.11.9"),
    ("variables", "fail", "23", "NCCL_ALGO differs: unset on n0; 'Ring' on n1", "23 variables NCCL_ALGO", "Ring"),
    ("variables", "fail", "2", "NCCLX_RULES differs", "2 variables NCCLX_RULES", "/a"),
    ("variables", "warn", "3", "NCCL_DEBUG differs", "3 variables NCCL_DEBUG", "INFO"),
    ("variables", "warn", "0123", "NCCL_SOKET_IFNAME is set", "0123 variables NCCL_SOKET_IFNAME", "eth0"),
    ("variables", "fail", "0123", "NCCLX_RAIL is set", "0123 variables NCCLX_RAIL", "eth0"),
    ("variables", "fail", "0123", "names 'ib'", "0123 variables NCCL_SOCKET_IFNAME", "ib,eth"),
    ("variables", "fail", "0123", "names 'eth2'", "0123 variables NCCLX_RAILS", "eth0,eth2"),
    ("variables", "fail", "0123", "names 'eth'", "0123 variables GLOO_SOCKET_IFNAME", "eth"),
    ("variables", "fail", "0123", "names 'irdma0:1'", "0123 variables NCCL_IB_HCA", "irdma0:1"),
    ("names", "fail", "23", "does not resolve", "2 names own", "gaierror: -2"),
    ("names", "fail", "23", "loopback (127.0.1.1)", "2 names own", ["127.0.1.1"]),
    ("names", "fail", "23", "10.9.9.9, which no interface", "2 names own", ["10.9.9.9"]),
    ("names", "fail", "23", "the master n0 cannot be resolved", "2 names master", "gaierror: -3"),
    ("names", "warn", "23", "address of the master differs", "2 names master", ["10.0.0.7"]),
    ("interfaces", "fail", "23", "eth1 is down", "2 " + NIC + "state", "down"),
    ("interfaces", "fail", "23", "eth1 has no address", "2 " + NIC + "ipv4", None),
    ("interfaces", "fail", "23", "MTU of eth1 differs: 9000 on n0; 1500 on n1", "2 " + NIC + "mtu", 1500),
    ("interfaces", "warn", "23", "speed of eth1 differs: 12.5 GB/s on n0", "2 " + NIC + "speed", 1.25e9),
    (
        "rails",
        "fail",
        "23",
        "active RDMA ports differs: 1 on n0; 0 on n1",
        "2 network infiniband mlx5_0:1 state",
        "DOWN",
    ),
    ("rails", "warn", "23", "rate of RDMA ports", "2 network infiniband mlx5_0:1 rate", "100 Gb/sec"),
    ("limits", "fail", "3", "open files (ulimit -n) may be only 255", "3 limits open_files", 255),
    ("limits", "warn", "3", "needs rather 260", "3 limits open_files", 259),
    ("limits", "fail", "3", "processes (ulimit -u), per rank, may be only 31", "3 limits processes", 63),
    ("limits", "warn", "3", "pids.max", "3 limits task_room", 255),
    ("limits", "fail", "2", "locked memory", "2 limits locked_memory", 8 * 2**20),
    ("memory", "fail", "23", "memfd_create", "2 memory memfd", "Operation not permitted"),
    ("memory", "fail", "23", "no /dev/shm", "2 memory shared", None),
    ("memory", "fail", "23", "less than 64 MiB free, for 2 ranks", "2 memory shared free", 64 * 2**20 - 1),
    ("memory", "warn", "23", "less than 512 MiB free", "2 memory shared free", 512 * 2**20 - 1),
    (
        "memory",
        "fail",
        "23",
        "less than 1 GiB per rank is left of the memory of the control group",
        "2 memory group_room",
        2 * GIB - 1,
    ),
    ("memory", "fail", "23", "of the machine", "2 memory available", 2 * GIB - 1),
    ("memory", "warn", "23", "memory differs: 256 GiB on n0; 64 GiB on n1", "2 memory group_limit", 64 * GIB),
    ("memory", "warn", "23", "number of CPUs differs: 64 on n0; 8 on n1", "2 memory cpu_quota", 8.0),
    ("disks", "fail", "23", "run folder /data/run: Read-only", "2 disks run folder write_error", "Read-only"),
    ("disks", "fail", "23", "temporary /scratch has less than 1 GiB free", "2 disks temporary free", GIB - 1),
    ("disks", "warn", "23", "less than 10 GiB free", "2 disks temporary free", 10 * GIB - 1),
    ("disks", "fail", "23", "less than 1000 more files", "2 disks temporary files_free", 999),
    ("gpus", "fail", "23", "GPU 1 had 2 uncorrectable", "2 " + CARD + "memory_errors", 2),
    ("gpus", "warn", "23", "more than 1 GiB of GPU 1 is in use", "2 " + CARD + "memory_used", GIB + 1),
    ("gpus", "warn", "23", "8 PCIe lanes of 16", "2 " + CARD + "pcie_width", 8),
    ("gpus", "fail", "23", "GPU 1 has 17 NVLinks up, others have 18", "2 " + CARD + "links", 17),
    ("gpus", "fail", "23", "torch sees none", "2 gpus torch", 0),
    ("gpus", "warn", "23", "2 ranks share 1 GPUs", "2 gpus torch", 1),
]


def examined(facts: dict[int, dict[str, Any]], **more: Any) -> list[tuple[str, str, tuple[int, ...], str]]:
    findings = []
    for result in examine(Job(4, facts, store="n0:29500", **more)):
        assert all(one.remedy for one in result.findings)
        findings += [(result.check, one.level, one.ranks, one.text) for one in result.findings]
    return findings


def injected(where: str, value: Any) -> dict[int, dict[str, Any]]:
    facts = healthy.job_facts()
    ranks, _, path = where.partition(" ")
    for rank in ranks:
        at: Any = facts[int(rank)]
        keys = path.replace("run folder", "run_folder").split()
        for key in keys[:-1]:
            at = at[int(key)] if isinstance(at, list) else at[key.replace("_folder", " folder")]
        at[keys[-1]] = value
    return facts


def test_a_healthy_job_passes() -> None:
    job = Job(4, healthy.job_facts(), store="n0:29500", clocks={2: Clock(0.01, 0.001)})
    results = examine(job)
    assert [one for result in results for one in result.findings] == []
    assert worst(results) == "ok"
    text = as_text(job, results)
    assert text.startswith("4 ranks on 2 hosts")
    for words in ("4 of 4 answered", "torch 2.11.0", "eth0, eth1, MTU 9000", "2 per host", "4 x NVIDIA H100"):
        assert words in text


@pytest.mark.parametrize(("check", "level", "ranks", "words", "where", "value"), FAULTS)
def test_a_fault_is_the_only_finding(check: str, level: str, ranks: str, words: str, where: str, value: Any) -> None:
    (found,) = examined(injected(where, value))
    assert found[:3] == (check, level, tuple(map(int, ranks)))
    assert words in found[3]


def test_cards_that_are_missing_or_cannot_be_asked() -> None:
    facts = healthy.job_facts()
    facts[2]["gpus"]["cards"].pop()
    assert [one[:3] for one in examined(facts)] == [("gpus", "fail", (2, 3))]
    facts[2]["gpus"].update(cards=[], error="nvidia-smi (exit status 9): couldn't communicate with the driver")
    (found,) = examined(facts)
    assert found[:3] == ("gpus", "fail", (2, 3))
    assert "communicate" in found[3]
    facts[2]["gpus"].update(
        cards=[{**healthy.card(0), "name": "B200"}, {**healthy.card(1), "name": "B200"}], error=None
    )
    assert [one[1:3] for one in examined(facts)] == [("warn", (2, 3))]


def test_what_just_suffices_is_no_fault() -> None:
    for where, value in (
        ("3 limits open_files", 520),
        ("3 limits task_room", 256),
        ("2 limits locked_memory", GIB),
        ("2 memory shared free", GIB // 2),
        ("2 memory group_room", 2 * GIB),
        ("2 disks temporary free", 10 * GIB),
        ("2 disks temporary files_free", 1000),
        ("2 " + CARD + "memory_used", GIB),
        ("2 " + NIC + "speed", None),
    ):
        assert examined(injected(where, value)) == [], where


def test_gpus_that_are_hidden_on_purpose() -> None:
    for where, value in (("2 gpus visible", ""), ("0123 versions cuda", None)):
        facts = injected(where, value)
        facts[2]["gpus"]["torch"] = 0
        assert [one[:3] for one in examined(facts)] == [("gpus", "warn", (2, 3))]


def test_no_gpu_at_all_is_no_fault() -> None:
    facts = healthy.job_facts()
    for rank in (0, 2):
        facts[rank]["gpus"] = {"present": 0, "cards": [], "torch": 0, "error": None}
    assert examined(facts) == []
    facts[0]["gpus"] = healthy.node_facts(0)["gpus"]
    assert [one[:3] for one in examined(facts)] == [("gpus", "fail", (2, 3))]


def test_rails_that_differ_in_number_or_family() -> None:
    facts = healthy.job_facts()
    for each in facts.values():
        each["variables"]["NCCLX_RAILS"] = "eth0,eth1" if each["host"] == "n0" else "eth0"
    assert {one[:3] for one in examined(facts)} == {("variables", "warn", (2, 3)), ("rails", "fail", (2, 3))}
    facts = healthy.job_facts()
    for name in ("eth0", "eth1"):
        facts[2]["network"]["interfaces"][name].update(ipv4=None, ipv6=True)
    facts[2]["names"]["own"] = ["fd00::2"]
    (found,) = examined(facts)
    assert found[:3] == ("rails", "fail", (2, 3))
    assert "IPv4 on n0; IPv6 on n1" in found[3]
    facts = healthy.job_facts()
    for rank, each in facts.items():
        for name in ("NCCLX_RAILS", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            each["variables"].pop(name)
        if rank == 2:
            each["network"]["default"] = None
    assert [one[:3] for one in examined(facts)] == [("rails", "fail", (2, 3))]


def test_tcp_between_hosts_where_nothing_faster_is() -> None:
    def examined_with(rdma: bool, *hosts: tuple[str, int | None]) -> list[tuple[Any, ...]]:
        facts = healthy.job_facts()
        for rank, (control, slow_start) in zip((0, 2), hosts):
            network = facts[rank]["network"]
            network.update(congestion=control, slow_start_after_idle=slow_start)
            if not rdma:
                network["infiniband"]["mlx5_0:1"]["state"] = "DOWN"
        return examined(facts)

    assert examined_with(False, ("cubic", 0), ("cubic", 0)) == []
    assert examined_with(False, ("bbr", 1), ("bbr", 1)) == []
    assert examined_with(False, ("cubic", None), ("cubic", None)) == []
    assert examined_with(True, ("cubic", 1), ("bbr", 1)) == []
    (found,) = examined_with(False, ("cubic", 0), ("reno", 1))[1:]
    assert found[:3] == ("tcp", "warn", (2, 3))
    (found,) = examined_with(False, ("cubic", 0), ("bbr", 1))
    assert found[:3] == ("tcp", "warn", (2, 3))
    assert "TCP's congestion control differs: cubic on n0; bbr on n1" in found[3]


def test_prefixes_and_exclusions_of_nccl() -> None:
    for value in ("^docker,lo", "=eth0,eth1", "eth", "e"):
        assert examined(injected("0123 variables NCCL_SOCKET_IFNAME", value)) == []
    (found,) = examined(injected("0123 variables NCCL_SOCKET_IFNAME", "=eth"))
    assert "names 'eth'" in found[3]


@pytest.mark.parametrize(
    ("clock", "level"),
    [
        (Clock(0.5, 0.45), None),
        (Clock(0.5, 0.1), "warn"),
        (Clock(-3.0, 0.1), "fail"),
        (Clock(-2.05, 0.1), "warn"),
    ],
)
def test_clocks_are_judged_by_what_is_certain(clock: Clock, level: str | None) -> None:
    found = examined(healthy.job_facts(), clocks={2: clock})
    assert [one[:3] for one in found] == ([("clocks", level, (2, 3))] if level else [])


def test_silent_ranks_are_named_and_those_of_another_version_left_out() -> None:
    facts = healthy.job_facts()
    del facts[3]
    assert examined(facts, silent={3: "it did not come"}) == [("ranks", "fail", (3,), "no facts: it did not come")]
    facts = healthy.job_facts()
    facts[3] = {"format": 2, "rank": 3, "host": "n1", "machine": "boot 1"}
    assert [one[:3] for one in examined(facts)] == [("ranks", "fail", (3,))]
    facts = healthy.job_facts()
    del facts[2]["disks"]
    facts[2]["errors"]["disks"] = "no answer after 18.0 s"
    (found,) = examined(facts)
    assert found == ("ranks", "fail", (2,), "disks: no answer after 18.0 s")


def test_the_store_and_a_job_on_one_host() -> None:
    (found,) = examined(healthy.job_facts(), store_error="refused")
    assert found == ("store", "fail", (0, 1, 2, 3), "refused")
    facts = {rank: healthy.rank_facts(rank, 0, rank) for rank in range(4)}
    facts[0]["names"]["own"] = ["127.0.1.1"]
    facts[0]["network"]["interfaces"]["eth0"]["state"] = "down"
    assert [one[:2] for one in examined(facts)] == [("gpus", "warn")]  # four ranks, two GPUs; nothing leaves the host


def test_a_thousand_hosts_with_one_fault_make_a_short_report() -> None:
    facts = {rank: healthy.rank_facts(rank, rank, 0, size=1000) for rank in range(1000)}
    for rank in range(1000):
        facts[rank]["disks"]["temporary"]["free"] = 1000 * rank  # each host another figure
        facts[rank]["network"]["interfaces"]["eth0"]["ipv4"] = f"10.0.{rank // 250}.{rank % 250}"
        facts[rank]["names"]["own"] = [f"10.0.{rank // 250}.{rank % 250}"]
        if rank >= 500:
            facts[rank]["versions"]["torch"] = "2.13.0"
    job = Job(1000, facts, store="n0:29500")
    results = examine(job)
    text = as_text(job, results)
    assert len(text) < 4000
    assert "n509 and 490 more" in text
    assert "where   all ranks" in text
    record = as_json(job, results)
    (disk,) = next(one for one in record["checks"] if one["check"] == "disks")["findings"]
    assert len(disk["ranks"]) == len(disk["hosts"]) == 1000
    assert record["verdict"] == "fail"


def test_two_hosts_of_one_name_are_told_apart() -> None:
    facts = healthy.job_facts()
    for each in facts.values():
        each["host"] = "localhost"
    facts[2]["memory"]["cpus"] = 8
    (found,) = examined(facts)
    assert "64 on localhost (rank 0); 8 on localhost (rank 2)" in found[3]


def test_all_variables_of_ours_are_known() -> None:
    """Each name in the sources is in the list; otherwise it would be reported as misspelt."""
    folders = [Path(ncclx_py.__file__).parent, Path(next(iter(ncclx_py.launch.__path__)))]
    files = [file for folder in folders for file in folder.rglob("*.py") if "doctor" not in file.parts]
    text = "".join(file.read_text() for file in files)
    names = set(re.findall(r"\bNCCLX_[A-Z_]*[A-Z]\b", text))
    assert len(names) > 10
    assert names <= known.OURS
