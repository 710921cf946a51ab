"""Random access to a cache: any sequence by its key, read from its shard into the place where it is wanted.

Nothing is mapped (a file that is cut short while it is mapped kills the process) and no shard is loaded: each sequence is one read,
and its checksum is compared. In memory is 32 bytes per sequence of the cache.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import load
from torch import Tensor

from distill.errors import CacheError
from distill.teachers.cache.index import HEAD, SHARDS, check_shard, read_index
from distill.teachers.cache.keys import KEY_BYTES
from distill.teachers.cache.layout import read_header
from distill.teachers.cache.shard import Shard, raw
from distill.teachers.signals import Head

OPEN_FILES = 64


class CacheReader:
    """A complete cache. Raises CacheError, naming the file, for one that has been damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self.layout = self.index.contents.layout
        tables = [self._table(number, shard) for number, shard in enumerate(self.index.shards)]
        table = np.concatenate([np.empty(0, _ROW), *tables])
        self._rows = table[np.argsort(table["key"], kind="stable")]
        self._keys = np.ascontiguousarray(self._rows["key"])
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def entries(self) -> list[tuple[bytes, int]]:
        """Key and supervised tokens of every sequence, in the order of the keys."""
        return [(bytes(row["key"]).ljust(KEY_BYTES, b"\0"), int(row["tokens"])) for row in self._rows]

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def read(self, wanted: Sequence[tuple[bytes, int]], pinned: bool = False) -> dict[str, Tensor]:
        """Tensors of these sequences (key, T_i), one behind another: ``[ΣT_i, columns]`` or ``[ΣT_i]``, on the CPU.

        Raises KeyError with the position in ``wanted`` of a sequence that is not there, and CacheError for a damaged shard.
        """
        tensors = self.layout.empty(sum(tokens for _, tokens in wanted), pinned)
        begin = 0
        for position, (key, tokens) in enumerate(wanted):
            row = self._find(key)
            if row is None or row["tokens"] != tokens:
                raise KeyError(position)
            part = slice(begin, begin + tokens)
            self._read_into({name: tensor[part] for name, tensor in tensors.items()}, row, key)
            begin += tokens
        return tensors

    def head(self) -> Head:
        """The teacher's head, on the CPU, of a cache of hidden states."""
        contents, path = self.index.contents, self.folder / HEAD
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != contents.head:
                raise ValueError("does not have the checksum that it was written with")
        except (OSError, ValueError) as error:
            raise CacheError(f"{path}: {error}; write it again: {self.index.command}") from None
        tensors = load(data)
        return Head(tensors["weight"], tensors.get("bias"), contents.scale, contents.softcap)

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _table(self, number: int, shard: Shard) -> np.ndarray:
        """One row per sequence of a shard."""
        path = self.folder / SHARDS / shard.file
        try:
            size = path.stat().st_size
            if size != shard.bytes:
                raise ValueError(f"it has {size} bytes instead of {shard.bytes}")
            records, contents = read_header(self.layout, path)
            check_shard(self.index.contents, contents)
            if len(records) != shard.sequences:
                raise ValueError(f"it has {len(records)} sequences instead of {shard.sequences}")
        except (OSError, ValueError) as error:
            raise self._damaged(path, str(getattr(error, "strerror", None) or error)) from None
        return np.array([(r.key, number, r.tokens, r.offset, r.check) for r in records], _ROW)

    def _find(self, key: bytes) -> np.void | None:
        place = int(np.searchsorted(self._keys, np.bytes_(key)))
        return self._rows[place] if place < len(self._keys) and self._keys[place] == key.rstrip(b"\0") else None

    def _read_into(self, tensors: Mapping[str, Tensor], row: np.void, key: bytes) -> None:
        offset, check = int(row["offset"]), 0
        path = self.folder / SHARDS / self.index.shards[row["shard"]].file
        try:
            file = self._file(int(row["shard"]), path)
            for tensor in tensors.values():
                target = raw(tensor)
                offset += _fill(file, target, offset)
                check = zlib.crc32(target, check)
        except OSError as error:
            raise self._damaged(path, str(error.strerror)) from None
        if check != row["check"]:
            raise self._damaged(path, f"sequence {key.hex()} does not have the checksum that it was written with")

    def _file(self, number: int, path: Path) -> int:
        """A descriptor of a shard; those used last stay open."""
        if number not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[number] = os.open(path, os.O_RDONLY)
        self._files.move_to_end(number)
        return self._files[number]

    def _damaged(self, path: Path, reason: str) -> CacheError:
        return CacheError(f"{path} is damaged: {reason}; score its sequences again: {self.index.command}")


def _fill(file: int, target: memoryview, offset: int) -> int:
    """Read into ``target`` from ``offset`` on; returns its size. Where the file ends before, the checksum will tell."""
    rest = target
    while rest:
        done = os.preadv(file, [rest], offset + len(target) - len(rest))
        if not done:
            break
        rest = rest[done:]
    return len(target)


_ROW = np.dtype([("key", f"S{KEY_BYTES}"), ("shard", "<i4"), ("tokens", "<i4"), ("offset", "<i8"), ("check", "<u4")])
