"""What one rank sees of its node, as plain data (dicts, lists, text, numbers) that fits into JSON.

    facts = collect(Machine(os.environ), launch, "n0", Path("outputs"), seconds=18.0)
    facts["limits"]["open_files"], facts["errors"]                      # sections that failed or hung, and why

Every rank has ``versions``, ``variables`` and ``limits``. The first rank of each node also has what is the node's:
``network``, ``names``, ``memory``, ``disks`` and ``gpus``, so that what is sent grows with nodes rather than with ranks.
Sizes are in bytes; None stands for "the system does not say". Nothing here judges: that is `checks`.
"""

from __future__ import annotations

import os
import platform
import resource
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ncclx_py.device_facts import default_interface
from ncclx_py.doctor.gpus import gpus
from ncclx_py.doctor.known import PREFIXES, SECRET
from ncclx_py.doctor.machine import Machine, within
from ncclx_py.environment import Launch
from ncclx_py.installed import versions
from ncclx_py.transport.identity import host_id

FORMAT = 1  # of these facts: a node with another one has another version of the project
LONGEST = 256  # characters of a value from the environment, or of an error
MOST = 64  # interfaces, variables, GPUs, … of one node
_SHARE = 0.8  # of the time, for what may hang, so that its section still ends in time

Facts = dict[str, Any]


def collect(machine: Machine, launch: Launch, master: str | None, run_folder: Path, seconds: float) -> Facts:
    """The facts of this rank, after at most `seconds`; what takes longer is named in ``errors``. `master` is the host where
    the ranks meet, None for a rank alone."""
    tasks: dict[str, Callable[[], Any]] = {
        "versions": partial(_versions, machine),
        "variables": partial(_variables, machine),
        "limits": partial(_limits, machine),
    }
    if launch.local_rank == 0:
        tasks |= {
            "network": partial(_network, machine),
            "names": partial(_names, machine, master, seconds * _SHARE),
            "memory": partial(_memory, machine),
            "disks": partial(_disks, run_folder),
            "gpus": partial(gpus, machine, seconds * _SHARE),
        }
    sections, errors = within(seconds, tasks)
    return {
        "format": FORMAT,
        "rank": launch.rank,
        "local_rank": launch.local_rank,
        "size": launch.size,
        "host": machine.host_name()[:LONGEST],
        "machine": host_id(machine.env),
        "errors": {name: text[:LONGEST] for name, text in errors.items()},
        **sections,
    }


def _versions(machine: Machine) -> dict[str, str | None]:
    driver = machine.read("/proc/driver/nvidia/version")
    words = driver.split() if driver else []
    number = next((word for word in words if word[0].isdigit() and "." in word), None)
    return {**versions(), "driver": number, "kernel": platform.release()}


def _variables(machine: Machine) -> dict[str, str]:
    ours = sorted(name for name in machine.env if name.startswith(PREFIXES))
    return {name: "(set)" if name in SECRET else machine.env[name][:LONGEST] for name in ours[: 2 * MOST]}


def _limits(machine: Machine) -> dict[str, Any]:
    """Soft limits of this process; None is unlimited. ``task_room``: how many tasks its control groups still allow."""
    kinds = {
        "open_files": resource.RLIMIT_NOFILE,
        "locked_memory": resource.RLIMIT_MEMLOCK,
        "processes": resource.RLIMIT_NPROC,
    }
    found: dict[str, Any] = {}
    for name, kind in kinds.items():
        soft, hard = resource.getrlimit(kind)
        found[name] = None if soft == resource.RLIM_INFINITY else soft
        found[f"{name}_hard"] = None if hard == resource.RLIM_INFINITY else hard
    if os.geteuid() == 0:
        found["processes"] = None  # the kernel does not hold root to it
    rooms = [most - (machine.number(f"{folder}/pids.current") or 0) for folder, most in _limited(machine, "pids.max")]
    return {**found, "task_room": min(rooms, default=None)}


def _network(machine: Machine) -> dict[str, Any]:
    ipv4 = machine.ipv4()
    ipv6 = {
        line.split()[5]: True
        for line in (machine.read("/proc/self/net/if_inet6") or "").splitlines()
        if len(line.split()) == 6 and line.split()[3] == "00"  # of global scope
    }
    folder = "/sys/class/net"
    interfaces = {}
    for name in machine.names(folder)[:MOST]:
        speed = machine.number(f"{folder}/{name}/speed")
        interfaces[name] = {
            "state": machine.read(f"{folder}/{name}/operstate"),
            "mtu": machine.number(f"{folder}/{name}/mtu"),
            "speed": speed * 1e6 / 8 if speed and speed > 0 else None,
            "ipv4": ipv4.get(name),
            "ipv6": name in ipv6,
        }
    default = default_interface(machine.root / "proc/self/net/route")
    return {
        "interfaces": interfaces,
        "default": default or None,
        "infiniband": _infiniband(machine),
        "congestion": machine.read("/proc/sys/net/ipv4/tcp_congestion_control"),
        "slow_start_after_idle": machine.number("/proc/sys/net/ipv4/tcp_slow_start_after_idle"),
    }


def _infiniband(machine: Machine) -> dict[str, dict[str, Any]]:
    """The ports of RDMA devices, as ``mlx5_0:1``."""
    folder, found = "/sys/class/infiniband", {}
    for device in machine.names(folder)[:MOST]:
        for port in machine.names(f"{folder}/{device}/ports")[:4]:
            where = f"{folder}/{device}/ports/{port}"
            state = machine.read(f"{where}/state") or ""
            rate = machine.read(f"{where}/rate")
            found[f"{device}:{port}"] = {
                "state": state.rpartition(" ")[2] or None,
                "rate": rate,
                "kind": machine.read(f"{where}/link_layer"),
            }
    return found


def _names(machine: Machine, master: str | None, seconds: float) -> dict[str, Any]:
    """What names stand for here: this host's own, and the master's. A list of addresses, or the error as text."""
    own = machine.host_name()
    wanted = {"own": own, **({"master": master} if master else {})}
    found, errors = within(seconds, {name: partial(machine.resolve, host) for name, host in wanted.items()})
    return {"host": own, "master_host": master, **{n: found.get(n, errors.get(n, "")[:LONGEST]) for n in wanted}}


def _memory(machine: Machine) -> dict[str, Any]:
    lines = (machine.read("/proc/meminfo") or "").splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) == 3}
    groups = [(most - _held(machine, folder), most) for folder, most in _limited(machine, "memory.max")]
    quotas = [_quota(machine, f"{folder}/cpu.max") for folder in _groups(machine)]
    shared = machine.root / "dev/shm"
    return {
        "total": sizes.get("MemTotal"),
        "available": sizes.get("MemAvailable"),
        "group_room": min(groups)[0] if groups else None,
        "group_limit": min(groups)[1] if groups else None,
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_quota": min((quota for quota in quotas if quota), default=None),
        "shared": _space(shared) if shared.is_dir() else None,
        "memfd": _memfd(),
    }


def _groups(machine: Machine) -> list[str]:
    """The folders of this process's control groups (version 2), from its own upwards."""
    lines = (machine.read("/proc/self/cgroup") or "").splitlines()
    path = next((line[3:] for line in lines if line.startswith("0::")), None)
    if path is None:
        return []
    parts = [part for part in path.split("/") if part and part != ".."]
    return ["/".join(["/sys/fs/cgroup", *parts[:depth]]) for depth in range(len(parts), -1, -1)]


def _limited(machine: Machine, name: str) -> list[tuple[str, int]]:
    """The control groups that limit `name`, and their limits; "max" is none."""
    found = [(folder, machine.number(f"{folder}/{name}")) for folder in _groups(machine)]
    return [(folder, most) for folder, most in found if most is not None]


def _held(machine: Machine, folder: str) -> int:
    """Bytes that a control group cannot give back: without the cached files that nobody used of late."""
    lines = (machine.read(f"{folder}/memory.stat") or "").splitlines()
    cached = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return (machine.number(f"{folder}/memory.current") or 0) - cached


def _quota(machine: Machine, path: str) -> float | None:
    words = (machine.read(path) or "").split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0].isdigit() else None


def _memfd() -> str | None:
    """Why memory that is shared by its descriptor cannot be had, None where it can."""
    try:
        descriptor = os.memfd_create("ncclx-doctor", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, 4096)
            os.pwrite(descriptor, b"\1", 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        return str(error)
    return None


def _disks(run_folder: Path) -> dict[str, dict[str, Any]]:
    return {"run folder": _disk(run_folder.absolute()), "temporary": _disk(Path(tempfile.gettempdir()))}


def _disk(folder: Path) -> dict[str, Any]:
    """Room where `folder` is, or will be made, and why nothing can be written there."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return {"path": str(folder)[-LONGEST:], **_space(there), "write_error": _write_error(there)}


def _space(folder: Path) -> dict[str, Any]:
    facts = os.statvfs(folder)
    return {
        "bytes": facts.f_blocks * facts.f_frsize,
        "free": facts.f_bavail * facts.f_frsize,
        "files_free": facts.f_favail if facts.f_files else None,
    }


def _write_error(folder: Path) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"ncclx doctor")
            file.flush()
    except OSError as error:
        return str(error)[:LONGEST]
    return None
