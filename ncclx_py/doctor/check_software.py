"""Checks of what is installed and of the environment's variables."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from ncclx_py.doctor.job import FAIL, WARN, Finding, Job, differing
from ncclx_py.doctor.known import HARMLESS, INTERFACES, OURS, PERSONAL, THEIRS

# Collectives of different versions of these do not understand each other, or kernels and optimizers differ in their results.
_MUST_AGREE = ("ncclx_py", "torch", "cuda", "nccl", "triton", "deepspeed")
_SHOULD_AGREE = ("driver", "kernel")
_CLOSE = 0.85  # how alike a name must be to one that is known (difflib's ratio) to be taken for a typing error


def versions(job: Job) -> list[Finding]:
    """Versions that are not the same on all ranks."""
    parts = job.sections("versions")
    found: list[Finding] = []
    for name in (*_MUST_AGREE, *_SHOULD_AGREE):
        remedy = f"Install the same {name} everywhere: one container image, or one environment on a shared file system."
        if name in _SHOULD_AGREE:
            remedy = f"Ask for nodes with the same {name}, or have it upgraded on those that differ."
        level = FAIL if name in _MUST_AGREE else WARN
        values = {rank: part.get(name) or "none" for rank, part in parts.items()}
        found += differing(job, values, level, name, remedy)
    pythons = {rank: str(part.get("python")) for rank, part in parts.items()}
    minors = {version.rpartition(".")[0] for version in pythons.values()}
    remedy = (
        "Start every rank with the same interpreter: name it in full, or activate the same environment on all nodes."
    )
    return found + differing(job, pythons, FAIL if len(minors) > 1 else WARN, "python", remedy)


def variables(job: Job) -> list[Finding]:
    """NCCL's, gloo's, torch's and our variables: values that differ, names nobody reads, interfaces that are not there."""
    parts = job.sections("variables")
    names = sorted({name for part in parts.values() for name in part})
    found: list[Finding] = []
    for name in names:
        found += _misspelt(name, tuple(rank for rank, part in parts.items() if name in part))
        if name not in PERSONAL:
            values = {rank: part.get(name) for rank, part in parts.items()}
            level = WARN if name in INTERFACES or name.startswith(HARMLESS) else FAIL
            remedy = f"Set {name} in the job script (torchrun and srun pass it on), not in the profile of one node."
            if name in INTERFACES:
                remedy += " Where nodes name their interfaces differently on purpose, this is well."
            found += differing(job, values, level, name, remedy, _shown)
    return found + _missing_interfaces(job) + _missing_adapters(job)


def _shown(value: Any) -> str:
    return "unset" if value is None else repr(value)


def _misspelt(name: str, ranks: tuple[int, ...]) -> list[Finding]:
    if name in OURS or name in THEIRS:
        return []
    close = difflib.get_close_matches(name, sorted(OURS | THEIRS), 1, _CLOSE)
    if close:
        remedy = f"Is {close[0]} meant? Set that one and unset {name}."
    elif name.startswith("NCCLX_"):
        remedy = f"Unset {name}, or look up the name in docs: known are {', '.join(sorted(OURS))}."
    else:
        return []  # there are more variables of NCCL and its plugins than anyone documents
    level = FAIL if name.startswith("NCCLX_") else WARN
    return [Finding(level, f"{name} is set, but nothing reads a variable of that name", ranks, remedy)]


def _missing_interfaces(job: Job) -> list[Finding]:
    found = []
    for host in job.hosts:
        there = list(host.section("network").get("interfaces", {}))
        if not there:
            continue
        variables = host.section("variables")
        for name in INTERFACES:
            for missing in _absent(name, variables, there):
                text = f"{name}={variables[name]} names {missing!r}, which is no interface"
                remedy = f"Set {name} to what is there: {', '.join(there)}."
                found.append(Finding(FAIL, text, host.ranks, remedy))
    return found


def _absent(name: str, variables: Mapping[str, str], there: list[str]) -> Iterator[str]:
    """The names in a variable that no interface has; NCCL's are prefixes, unless they begin with an equals sign, and a
    caret in front leaves interfaces out, so that it need not name any."""
    value = variables.get(name, "")
    if name.startswith("NCCL_"):
        if value.startswith("^"):
            return
        exact = value.startswith("=")
        for part in filter(None, value.lstrip("=").split(",")):
            if not any(one == part if exact else one.startswith(part) for one in there):
                yield part
    else:
        yield from (part for part in map(str.strip, value.split(",")) if part and part not in there)


def _missing_adapters(job: Job) -> list[Finding]:
    found = []
    for host in job.hosts:
        value = host.section("variables").get("NCCL_IB_HCA", "")
        ports = host.section("network").get("infiniband", {})
        devices = sorted({port.partition(":")[0] for port in ports})
        if not value or value.startswith("^"):
            continue
        for part in filter(None, value.lstrip("=").split(",")):
            device = part.partition(":")[0]
            if not any(one == device if value.startswith("=") else one.startswith(device) for one in devices):
                text = f"NCCL_IB_HCA={value} names {part!r}, which is no RDMA device"
                remedy = f"Set NCCL_IB_HCA to what is there: {', '.join(devices) or 'nothing; unset it'}."
                found.append(Finding(FAIL, text, host.ranks, remedy))
    return found
