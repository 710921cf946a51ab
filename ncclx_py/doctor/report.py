"""What the checks found, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ncclx_py.doctor.checks import Result, worst
from ncclx_py.doctor.job import FAIL, LISTED, OK, WARN, Job

_WIDTH = 12


def as_text(job: Job, results: Sequence[Result]) -> str:
    """One line per check; below it one per finding, with the ranks concerned and the remedy."""
    hosts, ranks = len(job.hosts), job.size
    lines = [f"{ranks} rank{'s' * (ranks != 1)} on {hosts} host{'s' * (hosts != 1)}"]
    for result in results:
        lines.append(f"{result.level:<5} {result.check:<{_WIDTH}} {result.note if result.level == OK else ''}".rstrip())
        for finding in sorted(result.findings, key=lambda one: one.level != FAIL)[:LISTED]:
            lines.append(f"      {finding.level}: {finding.text}")
            lines.append(f"        where   {job.where(finding.ranks)}")
            lines.append(f"        remedy  {finding.remedy}")
        if len(result.findings) > LISTED:
            lines.append(f"      and {len(result.findings) - LISTED} more: see --json")
    return "\n".join([*lines, summary(results)])


def summary(results: Sequence[Result]) -> str:
    counts = {level: sum(result.level == level for result in results) for level in (OK, WARN, FAIL)}
    return f"{len(results)} checks: {counts[OK]} ok, {counts[WARN]} with warnings, {counts[FAIL]} failed"


def as_json(job: Job, results: Sequence[Result]) -> dict[str, Any]:
    """`verdict` is the worst level; every finding has all its ranks, and their hosts."""
    host_of = {rank: host.name for host in job.hosts for rank in host.ranks}
    return {
        "verdict": worst(list(results)),
        "size": job.size,
        "hosts": {host.name: list(host.ranks) for host in job.hosts},
        "silent": {str(rank): why for rank, why in sorted(job.silent.items())},
        "checks": [
            {
                "check": result.check,
                "level": result.level,
                "note": result.note,
                "findings": [
                    {
                        "level": one.level,
                        "text": one.text,
                        "ranks": list(one.ranks),
                        "hosts": sorted({host_of[rank] for rank in one.ranks if rank in host_of}),
                        "remedy": one.remedy,
                    }
                    for one in result.findings
                ],
            }
            for result in results
        ],
    }
