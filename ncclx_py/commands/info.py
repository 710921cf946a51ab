"""``ncclx info``: what is installed, which library serves which device, what the launcher said, and the topology."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ncclx_py.device_facts import host_facts
from ncclx_py.environment import Launch, read_launch
from ncclx_py.installed import versions
from ncclx_py.plans.spec import VARIABLE, resolve
from ncclx_py.plans.spec_file import read_spec
from ncclx_py.transport.identity import rail_names
from ncclx_py.units import format_bandwidth, format_time

NAME = "info"
HELP = "show versions, devices, the library that serves each, the ranks and hosts of this launch, and the topology"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    facts = collect(os.environ)
    print(json.dumps(facts, indent=2) if args.json else as_text(facts))
    return 0


def collect(env: Mapping[str, str]) -> dict[str, Any]:
    """All facts, in the shape that ``--json`` prints. Raises ValueError for a launch or topology file that is wrong."""
    launch = read_launch(env)
    return {
        "versions": versions(),
        "devices": _devices(),
        "serves": _serves(),
        "launch": {name: value for name, value in asdict(launch).items() if name not in ("placement", "components")},
        "topology": _topology(launch, env),
    }


def as_text(facts: dict[str, Any]) -> str:
    """`facts` for people, one line each."""
    lines = ["versions"]
    lines += [f"  {name:<12} {version or 'not installed'}" for name, version in facts["versions"].items()]
    lines.append("devices")
    lines += [f"  {device['device']:<12} {device['name']}{_memory(device)}" for device in facts["devices"]]
    lines.append("collectives of")
    lines += [
        f"  {device + ' tensors':<12} {served['by'] or served['why_not']}" for device, served in facts["serves"].items()
    ]
    launch = facts["launch"]
    lines.append("launch")
    lines.append(f"  {'by':<12} {launch['launcher']}")
    lines.append(f"  {'rank':<12} {launch['rank']} of {launch['size']}, local rank {launch['local_rank']}")
    names = f": {', '.join(launch['host_names'])}" if launch["host_names"] else ""
    per_host = f", ranks on each: {launch['ranks_per_host']}" if launch["ranks_per_host"] else ""
    lines.append(f"  {'hosts':<12} {launch['hosts']}{names}{per_host}")
    if launch["master"]:
        lines.append(f"  {'master':<12} {launch['master']}")
    return "\n".join([*lines, *_topology_text(facts["topology"])])


def _topology(launch: Launch, env: Mapping[str, str]) -> dict[str, Any]:
    """What ``resolve`` makes of the file, this launch and this host's devices; levels in seconds and bytes per second.

    A process group asks its ranks where they are, and takes the speeds of devices from the file only: see ``spec.py``.
    """
    facts = host_facts(env)
    spec = read_spec(env[VARIABLE]) if env.get(VARIABLE) else None
    world = () if launch.launcher == "none" and spec and spec.host_of else launch.host_of()
    devices = {"intra_Bps": facts.intra_bandwidth, "nics_Bps": list(facts.nics)}
    if not world and not (spec and spec.host_of):
        return {"known": False, "devices": devices}
    source = "one process" if launch.launcher == "none" else launch.launcher
    found = resolve(world, len(rail_names(env)), spec, world=source)
    topology = found.topology
    levels = {"intra": topology.intra, "inter": topology.inter}
    return {
        "known": True,
        "hosts": len(topology.hosts),
        "ranks_per_host": [len(ranks) for ranks in topology.hosts],
        "host_of": list(topology.host_of),
        "rails": topology.rails,
        "levels": {name: {"alpha_s": link.alpha, "bandwidth_Bps": link.bandwidth} for name, link in levels.items()},
        "nics_Bps": [list(row) for row in topology.nics],
        "memory_Bps": topology.memory or None,
        "gamma_s_per_B": topology.gamma or None,
        "sources": dict(found.sources),
        "devices": devices,
    }


def _topology_text(topology: dict[str, Any]) -> list[str]:
    lines = ["topology"]
    if not topology["known"]:
        lines.append("  unknown      the launcher does not say which rank is where: give NCCLX_TOPOLOGY")
    else:
        sources = topology["sources"]
        counts = topology["ranks_per_host"]
        each = str(counts[0]) if len(set(counts)) == 1 else "+".join(map(str, counts))
        lines.append(f"  {'hosts':<12} {topology['hosts']} of {each} ranks ({sources['hosts']})")
        lines.append(f"  {'rails':<12} {topology['rails']} ({sources['rails']})")
        for name, per in (("intra", "rank"), ("inter", "NIC")):
            level = topology["levels"][name]
            alpha = f"α {format_time(level['alpha_s'])} ({sources[name + '.alpha']})"
            speed = f"{format_bandwidth(level['bandwidth_Bps'])} per {per} ({sources[name + '.bandwidth']})"
            lines.append(f"  {name:<12} {alpha}, {speed}")
        for host, row in enumerate(topology["nics_Bps"]):
            lines.append(f"  {'NICs':<12} host {host}: {', '.join(map(format_bandwidth, row))} ({sources['nics']})")
        if topology["memory_Bps"]:
            lines.append(f"  {'memory':<12} {format_bandwidth(topology['memory_Bps'])} per host (file)")
    devices = topology["devices"]
    nics = ", ".join(format_bandwidth(speed) if speed else "unknown" for speed in devices["nics_Bps"]) or "none"
    lines.append(f"  {'devices say':<12} NICs {nics}; GPU link {_speed(devices['intra_Bps'])}")
    return lines


def _speed(value: float | None) -> str:
    return format_bandwidth(value) if value else "none"


def _devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = [
        {"device": "cpu", "name": f"{platform.machine()}, {os.cpu_count()} logical cores", "memory_bytes": None}
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append({"device": f"cuda:{index}", "name": properties.name, "memory_bytes": properties.total_memory})
    return found


def _serves() -> dict[str, dict[str, str | None]]:
    import torch
    import torch.distributed as dist

    if not dist.is_nccl_available():
        cuda = {"by": None, "why_not": "none: this torch was built without NCCL"}
    elif not torch.cuda.is_available():
        cuda = {"by": None, "why_not": "none: no CUDA device is visible"}
    else:
        cuda = {"by": "nccl", "why_not": None}
    return {"cpu": {"by": "plans, over shared memory and TCP; messages over sockets", "why_not": None}, "cuda": cuda}


def _memory(device: dict[str, Any]) -> str:
    return f", {device['memory_bytes'] / 2**30:.0f} GiB" if device["memory_bytes"] else ""
