"""A verdict as text for a person (the verdict, then the evidence, then what to do) and as JSON."""

from __future__ import annotations

from typing import Any

from ncclx_py.watch.model import Job, plural
from ncclx_py.watch.verdict import Verdict


def as_text(job: Job, verdict: Verdict) -> str:
    """A few lines, the most important first."""
    lines = [f"{verdict.word}: {verdict.summary}"]
    facts = [
        ("ranks", plural(verdict.ranks) if verdict.ranks else ""),
        (
            "collective",
            f"{verdict.collective}{f', {verdict.place}' if verdict.place else ''}" if verdict.collective else "",
        ),
        ("call site", verdict.call_site),
        ("waiting", plural(verdict.waiting) if verdict.waiting else ""),
    ]
    lines += [f"  {name:<11} {value}" for name, value in facts if value]
    if verdict.evidence:
        lines.append("evidence")
        lines += [f"  - {line}" for line in verdict.evidence]
    if verdict.remedy:
        lines += ["what to do", f"  {verdict.remedy}"]
    lines.append(f"judged from the dumps of {len(job.ranks)} of {job.world_size} ranks")
    return "\n".join(lines)


def as_json(job: Job, verdict: Verdict) -> dict[str, Any]:
    """Everything that the text says, for programs."""
    return {
        **verdict.to_json(),
        "world_size": job.world_size,
        "dumps": len(job.ranks),
        "missing": job.missing,
        "complaints": job.complaints,
    }
