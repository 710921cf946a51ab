"""What the store has decided, one JSON object per line, on disk before anyone learns of it.

A store that is killed at any moment and started again on the same file continues with the same epoch, members and
committed steps. A last line that was cut short was never acted upon, and is removed. The file tells who took part in
which step, too: see `schedule`.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from ncclx_py.elastic.errors import ElasticError

VERSION = 1


class Journal:
    """An append-only file held by one store at a time. Raises ElasticError for one that cannot be used."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ElasticError(
                f"{self.path} is in use by another store; stop that one, or name another --file"
            ) from None
        except OSError as error:
            raise ElasticError(f"{self.path} cannot be written: {error.strerror}; name another --file") from None
        self.events, good = read_events(self.path)
        if good < self.path.stat().st_size:
            os.truncate(self.path, good)
        if not self.events:
            self.append({"event": "start", "version": VERSION})

    def append(self, event: dict[str, Any]) -> None:
        """On disk when this returns. Raises ElasticError on a full disk: nothing may be decided then."""
        line = json.dumps(event).encode() + b"\n"
        try:
            before = os.fstat(self._file.fileno()).st_size
            if self._file.write(line) != len(line):
                os.truncate(self.path, before)
                raise ElasticError(
                    f"{self.path} could not be written (no space left); free some and start the store again"
                )
            os.fdatasync(self._file.fileno())
        except OSError as error:
            raise ElasticError(
                f"{self.path} could not be written ({error.strerror}); free some space and start the store again"
            ) from None

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All whole events of a journal and their length in bytes. Raises ElasticError for a file that is none."""
    events: list[dict[str, Any]] = []
    good = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            event = _event(line)
            if event is None and good + len(line) < path.stat().st_size:
                raise ElasticError(f"{path}:{number}: not a line of a store's journal; name another --file")
            if event is None:
                break
            events.append(event)
            good += len(line)
    if events and events[0].get("version") != VERSION:
        raise ElasticError(f"{path} is not a journal of version {VERSION}; name another --file")
    return events, good


def schedule(path: str | Path) -> dict[int, list[int]]:
    """Step → the replicas whose samples made it, for every committed step. Of a step that a restart from a checkpoint
    repeated, the last time counts."""
    try:
        events, _ = read_events(Path(path))
    except OSError as error:
        raise ElasticError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return {
            int(event["step"]): sorted(map(int, event["members"])) for event in events if event["event"] == "commit"
        }
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ElasticError(f"{path} holds a commit that is damaged ({type(error).__name__}: {error})") from None


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if line.endswith(b"\n") and isinstance(event, dict) and "event" in event else None
