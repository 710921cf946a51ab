"""The facts of a healthy job: two hosts of two ranks, with two GPUs each; the tests break one thing at a time."""

from __future__ import annotations

from typing import Any

GIB = 2**30


def job_facts() -> dict[int, dict[str, Any]]:
    return {rank: rank_facts(rank, rank // 2, rank % 2) for rank in range(4)}


def rank_facts(rank: int, host: int, local_rank: int, size: int = 4) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "format": 1,
        "rank": rank,
        "local_rank": local_rank,
        "size": size,
        "host": f"n{host}",
        "machine": f"boot {host}",
        "errors": {},
        "versions": {
            "ncclx_py": "0.1.0",
            "python": "3.12.3",
            "torch": "2.11.0",
            "cuda": "13.0",
            "nccl": "2.28.9",
            "triton": "3.6.0",
            "deepspeed": "0.19.8",
            "driver": "580.65",
            "kernel": "6.8.0",
        },
        "variables": {
            "NCCLX_RAILS": "eth0,eth1",
            "NCCL_SOCKET_IFNAME": "eth",
            "GLOO_SOCKET_IFNAME": "eth0",
            "NCCL_HOSTID": f"host {host}",
            "NCCL_IB_HCA": "mlx5",
            "MASTER_ADDR": "n0",
        },
        "limits": {
            "open_files": 65536,
            "open_files_hard": 65536,
            "locked_memory": None,
            "locked_memory_hard": None,
            "processes": 100_000,
            "processes_hard": None,
            "task_room": 50_000,
        },
    }
    return facts | (node_facts(host) if local_rank == 0 else {})


def node_facts(host: int) -> dict[str, Any]:
    nic = {"state": "up", "mtu": 9000, "speed": 12.5e9, "ipv6": False}
    disk = {"bytes": 900 * GIB, "free": 500 * GIB, "files_free": 10**7, "write_error": None}
    return {
        "network": {
            "interfaces": {
                "eth0": {**nic, "ipv4": f"10.0.0.{host + 1}"},
                "eth1": {**nic, "ipv4": f"10.0.1.{host + 1}"},
                "lo": {"state": "unknown", "mtu": 65536, "speed": None, "ipv4": "127.0.0.1", "ipv6": False},
            },
            "default": "eth0",
            "infiniband": {"mlx5_0:1": {"state": "ACTIVE", "rate": "400 Gb/sec (4X NDR)", "kind": "InfiniBand"}},
            "congestion": "cubic",
            "slow_start_after_idle": 0,
        },
        "names": {"host": f"n{host}", "master_host": "n0", "own": [f"10.0.0.{host + 1}"], "master": ["10.0.0.1"]},
        "memory": {
            "total": 512 * GIB,
            "available": 500 * GIB,
            "group_room": 250 * GIB,
            "group_limit": 256 * GIB,
            "cpus": 64,
            "cpu_quota": None,
            "shared": {"bytes": 256 * GIB, "free": 256 * GIB, "files_free": None},
            "memfd": None,
        },
        "disks": {"run folder": {"path": "/data/run", **disk}, "temporary": {"path": "/scratch", **disk}},
        "gpus": {
            "present": 2,
            "cards": [card(0), card(1)],
            "torch": 2,
            "visible": None,
            "error": None,
        },
    }


def card(index: int) -> dict[str, Any]:
    return {
        "index": index,
        "name": "NVIDIA H100 80GB HBM3",
        "driver": "580.65",
        "memory": 80 * GIB,
        "memory_used": 4 * 2**20,
        "memory_errors": 0,
        "pcie_width": 16,
        "pcie_width_max": 16,
        "links": 18,
        "links_down": 0,
    }
