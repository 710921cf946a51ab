"""SLURM's queue through its own commands: submit, look, cancel.

    number = submit(script)
    states = look(number)                 # {"17": "RUNNING"}, one entry per task of an array or component; empty once forgotten
    cancel(number)

Every call has a deadline; a command that is missing or fails raises SlurmError with what it said.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)
_DEADLINE = 60.0  # seconds for one answer of SLURM's controller


class SlurmError(RuntimeError):
    """SLURM did not do what it was asked."""


def submit(script: Path) -> int:
    """The number of the job that SLURM makes of a batch script."""
    answer = _ask(["sbatch", "--parsable", str(script)])
    match = re.match(r"(\d+)(;|$)", answer.strip())
    if match is None:
        raise SlurmError(f"sbatch answered {answer[:200]!r}, which is no job number.")
    return int(match[1])


def look(number: int) -> dict[str, tuple[str, str]]:
    """State and reason of each part of a job, keyed by its number; empty where SLURM knows the job no more."""
    try:
        answer = _ask(["scontrol", "--oneliner", "show", "job", str(number)])
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    parts = {}
    for line in answer.splitlines():
        facts = dict(re.findall(r"(\w+)=(\S*)", line))
        if "JobId" in facts:
            parts[_name(facts)] = (facts.get("JobState", ""), facts.get("Reason", ""))
    return parts


def cancel(number: int) -> None:
    """Ends a job; one that has ended already is no error."""
    with contextlib.suppress(SlurmError):
        _ask(["scancel", str(number)])


def _name(facts: dict[str, str]) -> str:
    task = facts.get("ArrayTaskId")
    return f"{facts['ArrayJobId']}_{task}" if task else facts["JobId"]


def _ask(words: Sequence[str]) -> str:
    try:
        answer = subprocess.run(
            words, capture_output=True, text=True, timeout=_DEADLINE, stdin=subprocess.DEVNULL, check=False
        )
    except FileNotFoundError:
        raise SlurmError(f"{words[0]} is not installed here: start from a login node of the cluster.") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]} got no answer from SLURM in {_DEADLINE:g} s.") from None
    if answer.returncode:
        said = (answer.stderr.strip() or answer.stdout.strip() or f"exit status {answer.returncode}")[-2000:]
        raise SlurmError(f"{words[0]} failed: {said}")
    return answer.stdout
