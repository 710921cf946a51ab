"""What the environment asks of plans. All ranks of a group must be asked the same: they compare at its creation.

- ``NCCLX_VERIFY``: "first" (the default: a plan is verified when its algorithm first runs at a size class), "always"
  (every plan that is built), "never".
- ``NCCLX_PLAN``: a plan file, used for the problem that it is for.
- ``NCCLX_LOG=1``: rank 0 prints every new decision.
- ``NCCLX_DETERMINISTIC=1``, or ``torch.use_deterministic_algorithms(True)`` before the group is made: reductions in
  the order of ranks.

The tuner and the topology read ``NCCLX_TABLE``, ``NCCLX_RULES``, ``NCCLX_ALGO`` and ``NCCLX_TOPOLOGY`` themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

_VERIFY = ("first", "always", "never")
_FLAGS = ("", "0", "1")
_FILES = ("NCCLX_PLAN", "NCCLX_TOPOLOGY", "NCCLX_TABLE", "NCCLX_RULES", "NCCLX_ALGO")


@dataclass(frozen=True)
class Settings:
    """See the module. Raises ValueError from `read_settings` for a value that is none of those."""

    verify: str = "first"
    plan: str = ""
    log: bool = False
    deterministic: bool = False


def read_settings(env: Mapping[str, str]) -> Settings:
    verify = env.get("NCCLX_VERIFY", "") or "first"
    if verify not in _VERIFY:
        raise ValueError(f"NCCLX_VERIFY={verify!r} is none of {', '.join(_VERIFY)}.")
    for name in ("NCCLX_LOG", "NCCLX_DETERMINISTIC"):
        if env.get(name, "") not in _FLAGS:
            raise ValueError(f"{name}={env[name]!r} is neither 0 nor 1.")
    deterministic = env.get("NCCLX_DETERMINISTIC") == "1" or torch.are_deterministic_algorithms_enabled()
    return Settings(verify, env.get("NCCLX_PLAN", ""), env.get("NCCLX_LOG") == "1", deterministic)


def files_named(env: Mapping[str, str]) -> dict[str, str]:
    """Which of the variables that name files, or rules, are set: "set" or "", by name."""
    return {name: "set" if env.get(name) else "" for name in _FILES}


def told_first(settings: Settings, env: Mapping[str, str]) -> dict[str, str]:
    """What must be equal on all ranks and is known before any file is read, by the name of the variable that decides it."""
    return {
        "NCCLX_VERIFY": settings.verify,
        "NCCLX_DETERMINISTIC": str(int(settings.deterministic)),
        **files_named(env),
    }


def told_of_files(settings: Settings, tuner_digest: str) -> dict[str, str]:
    """The same of what files and rules come to."""
    return {
        "NCCLX_PLAN": _content(settings.plan),
        "NCCLX_TOPOLOGY, NCCLX_TABLE, NCCLX_RULES or NCCLX_ALGO": hashlib.blake2b(
            tuner_digest.encode(), digest_size=8
        ).hexdigest(),
    }


def differences(parts: Sequence[Mapping[str, str]]) -> str:
    """What the ranks disagree about: "" where nothing, else the variable and who has what."""
    for name in parts[0]:
        by_value: dict[str, list[int]] = {}
        for rank, part in enumerate(parts):
            by_value.setdefault(part[name], []).append(rank)
        if len(by_value) > 1:
            sides = "; ".join(f"ranks {_listed(ranks)} have {value or 'none'}" for value, ranks in by_value.items())
            return f"The ranks disagree about {name}: {sides}. Give all ranks the same variables and files."
    return ""


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _content(path: str) -> str:
    """A digest of a file's content: hosts may keep it in different places."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest() if path else ""
