"""One shard while it is written, after a kill, and when it is checked.

    NAME.part          safetensors with an empty header; the data of one sequence after those of another
    NAME.journal       one JSON line per sequence, written after its data; a last line with the file's SHA-256 seals the shard
    NAME.safetensors   the shard once it is sealed; the journal goes when the index lists it

A kill leaves at most one sequence without its line, or with half of one: ``repair`` cuts that off and seals the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from distill.errors import CacheError
from distill.runs import sync_folder
from distill.teachers.cache.layout import MAX_RECORDS, Layout, Record
from distill.wire import travels


@travels
@dataclass(frozen=True, slots=True)
class Shard:
    """What the index says about one sealed shard."""

    file: str  # name in the folder of shards
    bytes: int
    sha256: str
    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Leftover:
    """What is good of a shard whose writer was killed: its records, and the bytes of the journal that name them."""

    records: list[Record]
    journal_bytes: int


class ShardWriter:
    """A shard that grows. Raises CacheError where the disk does not take what is written."""

    def __init__(self, path: Path, layout: Layout, contents: str, left: Leftover | None = None) -> None:
        """``path``: the shard's final name; ``left``: goes on where a killed writer has ended."""
        self.path, self._layout, self._contents = path, layout, contents
        self._size = layout.header_bytes(contents)
        self._part, self._journal_path = part_of(path), journal_of(path)
        self.records: list[Record] = [] if left is None else list(left.records)
        self._end = self._size + 8 + sum(record.tokens for record in self.records) * layout.token_bytes
        try:
            self._data = self._part.open("xb" if left is None else "r+b", buffering=0)
            self._journal = self._journal_path.open("ab", buffering=0)
            if left is None:
                self._write(self._data.fileno(), layout.header([], contents, self._size), 0)
            else:
                self._data.truncate(self._end)
                self._journal.truncate(left.journal_bytes)
        except OSError as error:
            refuse(self._part, error)

    @property
    def data_bytes(self) -> int:
        return self._end - self._size - 8

    def add(self, key: bytes, tensors: Mapping[str, Tensor]) -> None:
        """Append one sequence: its tensors, ``[t, columns]`` or ``[t]`` on the CPU. The kernel has it when this returns."""
        check, offset, end = 0, self._end, self._end
        tokens = len(next(iter(tensors.values())))
        assert len(self.records) < MAX_RECORDS
        try:
            for name in self._layout.shapes:
                data = raw(tensors[name])
                check = zlib.crc32(data, check)
                self._write(self._data.fileno(), data, end)
                end += len(data)
            assert end - offset == tokens * self._layout.token_bytes
            self._note({"key": key.hex(), "tokens": tokens, "check": check})
        except OSError as error:
            os.truncate(self._part, offset)
            refuse(self._part, error)
        self.records.append(Record(key, tokens, offset, check))
        self._end = end

    def seal(self) -> Shard:
        """Give the file its header and its final name."""
        try:
            self._write(self._data.fileno(), self._layout.header(self.records, self._contents, self._size), 0)
            os.fsync(self._data.fileno())
            digest = sha256_of(self._part)
            self._note({"sha256": digest, "bytes": self._end})
            os.fsync(self._journal.fileno())
            self._part.rename(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            refuse(self._part, error)
        self.close()
        return shard_of(self.path, self._end, digest, self.records)

    def close(self) -> None:
        """Let go of the files as they are; ``recover`` seals what is in them."""
        self._data.close()
        self._journal.close()

    def _note(self, line: dict[str, Any]) -> None:
        self._write(self._journal.fileno(), json.dumps(line).encode() + b"\n", None)

    @staticmethod
    def _write(descriptor: int, data: bytes | memoryview, offset: int | None) -> None:
        """All of ``data``: a disk that is almost full takes part of it and fails at the next write."""
        rest = memoryview(data)
        while rest:
            done = os.write(descriptor, rest) if offset is None else os.pwrite(descriptor, rest, offset)
            rest, offset = rest[done:], None if offset is None else offset + done


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, not copied where they lie in one piece."""
    return memoryview(tensor.contiguous().view(torch.uint8).numpy().reshape(-1).data)


def shard_of(path: Path, size: int, digest: str, records: list[Record]) -> Shard:
    return Shard(path.name, size, digest, len(records), sum(record.tokens for record in records))


def part_of(path: Path) -> Path:
    return path.with_suffix(".part")


def journal_of(path: Path) -> Path:
    return path.with_suffix(".journal")


def sha256_of(path: Path) -> str:
    """Of a whole file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse(path: Path, error: OSError) -> NoReturn:
    """Raise the error of a disk that does not take what is written."""
    raise CacheError(
        f"{path} could not be written ({error.strerror}); free some space and run the same command again: the sequences that "
        "are there are kept"
    ) from None
