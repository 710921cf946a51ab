"""``ncclx info``: what is installed, which library serves which device, and what the launcher said."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from dataclasses import asdict
from typing import Any

from ncclx_py.environment import Launch, read_launch

NAME = "info"
HELP = "show versions, devices, the library that serves each, and the ranks and hosts of this launch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    facts = collect(read_launch(os.environ))
    print(json.dumps(facts, indent=2) if args.json else as_text(facts))
    return 0


def collect(launch: Launch) -> dict[str, Any]:
    """All facts, in the shape that ``--json`` prints."""
    return {"versions": _versions(), "devices": _devices(), "serves": _serves(), "launch": asdict(launch)}


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
    return "\n".join(lines)


def _versions() -> dict[str, str | None]:
    import torch

    import ncclx_py

    return {
        "ncclx_py": ncclx_py.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": _nccl_version(),
        "triton": _package_version("triton"),
    }


def _nccl_version() -> str | None:
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available()):
        return None
    return ".".join(str(part) for part in torch.cuda.nccl.version())


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


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
    return {"cpu": {"by": "gloo", "why_not": None}, "cuda": cuda}


def _memory(device: dict[str, Any]) -> str:
    return f", {device['memory_bytes'] / 2**30:.0f} GiB" if device["memory_bytes"] else ""
