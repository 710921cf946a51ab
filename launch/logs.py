"""The logs of a job's ranks, ``rank-R.out`` and ``rank-R.err`` in a folder, read after the fact."""

from __future__ import annotations

import os
from pathlib import Path

from ncclx_py.launch.ranks import LAST_LINES

_READ = 64 * 1024  # bytes from the end of a log that are looked at


def last_lines(folder: Path, rank: int) -> list[str]:
    """The end of what a rank wrote, from its errors or else its output, of its last life."""
    for end in (".err", ".out"):
        files = sorted(folder.rglob(f"rank-{rank}{end}"), key=lambda file: file.stat().st_mtime)
        if files and (lines := tail(files[-1])):
            return lines
    return []


def is_full(folder: Path) -> bool:
    """Whether nothing more can be written there: then the end of a log is missing."""
    space = os.statvfs(folder)
    return space.f_bavail == 0 or (space.f_files > 0 and space.f_favail == 0)


def tail(file: Path) -> list[str]:
    """The last lines of a file."""
    with file.open("rb") as source:
        source.seek(max(0, file.stat().st_size - _READ))
        return source.read().decode(errors="replace").splitlines()[-LAST_LINES:]
