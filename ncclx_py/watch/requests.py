"""Requests for dumps, as a file in the folder that they go to: every rank's watcher sees it within a second."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

NAME = "dump-request.json"


def ask(folder: Path, who: str, automatic: bool) -> int:
    """Asks every rank that writes into `folder` for a dump; `automatic`: because a rank has failed. Returns the time of the
    request, in ns since the epoch. Raises OSError where the folder cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    now = time.time_ns()
    temporary = folder / f".request-{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        temporary.write_text(json.dumps({"time_ns": now, "who": who, "automatic": automatic}) + "\n", encoding="utf-8")
        temporary.replace(folder / NAME)
    finally:
        temporary.unlink(missing_ok=True)
    return now


def last(folder: Path) -> int:
    """When the last request was made, in ns, as the file system has it; 0 where there is none."""
    try:
        return os.stat(folder / NAME).st_mtime_ns
    except OSError:
        return 0


def details(folder: Path) -> tuple[str, bool]:
    """Who made it, and whether that was a rank that failed."""
    try:
        found = json.loads((folder / NAME).read_bytes()[:10_000])
        return str(found["who"])[:500], bool(found["automatic"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "a request", False
