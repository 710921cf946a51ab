"""Records of trajectories on disk: JSON lines with a key, written so that a kill at any moment loses and repeats nothing.

    DIR/parts/rank_00000.jsonl    what each rank has written so far, one line per trajectory, as they end
    DIR/records.jsonl             all of them in the order of their keys, once a run is complete

A record's key is (``item``, ``sample``): the index of the example in its split, and which of its trajectories. A line is appended
by one unbuffered write; a last line that a kill or a full disk cut short is removed before the next run goes on. What is
generated follows from the key and the weights, so the order of lines and the number of ranks do not matter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from distill.errors import CheckpointError
from distill.runs import sync_folder

Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Line:
    """Where a record stands."""

    file: Path
    offset: int
    length: int  # bytes, line end included


class RecordFolder:
    """The records of one run. One process may `recover` and `merge`; each rank appends to its own part."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.parts = self.path / "parts"
        self.merged = self.path / "records.jsonl"

    def recover(self) -> set[Key]:
        """The keys that are already there; removes last lines cut short, so that appending is safe again.

        Raises CheckpointError for a line in the middle that is not a record.
        """
        self.parts.mkdir(parents=True, exist_ok=True)
        return set(self._index(repair=True))

    def open_part(self, rank: int) -> RecordPart:
        """This rank's file, for appending."""
        return RecordPart(self.parts / f"rank_{rank:05d}.jsonl")

    def merge(self) -> None:
        """Gather all parts in ``records.jsonl``, ordered by key and each key once, then remove them."""
        lines = self._index(repair=True)
        partial = self.merged.with_name(f".{self.merged.name}.partial")
        try:
            with partial.open("wb") as target:
                for _, line in sorted(lines.items()):
                    target.write(_read(line))
                target.flush()
                os.fsync(target.fileno())
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CheckpointError(_full(self.merged, error)) from None
        partial.replace(self.merged)
        sync_folder(self.path)
        for part in self.parts.glob("rank_*.jsonl"):
            part.unlink()
        self.parts.rmdir()

    def read(self) -> Iterator[dict[str, Any]]:
        """All records of a complete run, in order."""
        with self.merged.open("rb") as file:
            for line in file:
                yield json.loads(line)

    def _index(self, repair: bool) -> dict[Key, _Line]:
        files = [self.merged, *sorted(self.parts.glob("rank_*.jsonl"))]
        found: dict[Key, _Line] = {}
        for file in files:
            if file.exists():
                for key, line in _lines(file, repair):
                    found.setdefault(key, line)
        return found


class RecordPart:
    """One rank's file. Use it in a ``with`` block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; the kernel has it when this returns. Raises CheckpointError on a full disk."""
        rest = memoryview(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        try:
            while rest:  # a disk that is almost full takes part of it and fails at the next write
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise CheckpointError(_full(self._path, error)) from None

    def __enter__(self) -> RecordPart:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _full(path: Path, error: OSError) -> str:
    return (
        f"{path} could not be written ({error.strerror}); free some space and run the same command again: the records "
        "that are there are kept"
    )


def _read(line: _Line) -> bytes:
    with line.file.open("rb") as file:
        file.seek(line.offset)
        return file.read(line.length)


def _lines(file: Path, repair: bool) -> Iterator[tuple[Key, _Line]]:
    offset, size = 0, file.stat().st_size
    with file.open("rb") as source:
        for number, raw in enumerate(source, 1):
            last = offset + len(raw) == size
            key = _key(raw) if raw.endswith(b"\n") else None
            if key is None and not (last and repair):
                raise CheckpointError(
                    f"{file}:{number}: not a record; remove this line to have it made again, or choose another run.dir"
                )
            if key is None:
                break
            yield key, _Line(file, offset, len(raw))
            offset += len(raw)
    if offset < size:
        os.truncate(file, offset)


def _key(raw: bytes) -> Key | None:
    try:
        record = json.loads(raw)
        return int(record["item"]), int(record["sample"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
