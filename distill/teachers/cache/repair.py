"""Shards that a killed run has left, that no index knows, or whose bytes have changed: what is good of them is kept.

``recover`` and ``adopt`` raise ValueError or OSError for a shard that has to go; the caller names it and removes it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distill.teachers.cache.keys import KEY_BYTES
from distill.teachers.cache.layout import Layout, Record, read_contents, read_header
from distill.teachers.cache.shard import Leftover, Shard, ShardWriter, journal_of, part_of, sha256_of, shard_of

_PIECE = 1 << 22  # bytes read at a time


def verify(path: Path, shard: Shard) -> str | None:
    """What is wrong with a sealed shard; None: nothing. Reads all of it."""
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            return f"has {size} bytes instead of {shard.bytes}"
        return None if sha256_of(path) == shard.sha256 else "does not have the checksum that it was written with"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def recover(path: Path, layout: Layout, contents: str) -> Shard | None:
    """What a killed run has left of the shard ``path``, sealed; None where no whole sequence is left.

    Sequences are kept up to the first whose data are not those of its line in the journal.
    """
    lines = list(_lines(journal_of(path)))
    part = part_of(path)
    if lines and "sha256" in lines[-1][0]:
        return _sealed(path, lines)
    left = _good(part, layout, contents, lines) if part.exists() else None
    if left is None or not left.records:
        remove(path)
        return None
    return ShardWriter(path, layout, contents, left).seal()


def adopt(path: Path, layout: Layout, agrees: Callable[[str], None]) -> Shard:
    """A sealed shard that no index and no journal knows; ``agrees`` raises where its contents are those of another cache."""
    agrees(read_contents(path))
    records, _ = read_header(layout, path)
    with path.open("rb") as file:
        for record in records:
            if _check(file.fileno(), record.offset, record.tokens * layout.token_bytes) != record.check:
                raise ValueError(f"sequence {record.key.hex()} does not have the checksum that it was written with")
    return shard_of(path, path.stat().st_size, sha256_of(path), records)


def remove(path: Path) -> None:
    """Delete a shard and whatever belongs to it."""
    for file in (path, part_of(path), journal_of(path)):
        file.unlink(missing_ok=True)


def _sealed(path: Path, lines: list[tuple[dict[str, Any], int]]) -> Shard:
    """A shard that was sealed and not yet listed. Raises ValueError where it is not what its journal says."""
    if not path.exists() and part_of(path).exists():
        part_of(path).rename(path)
    seal = lines[-1][0]
    tokens = sum(line["tokens"] for line, _ in lines[:-1])
    shard = Shard(path.name, seal["bytes"], seal["sha256"], len(lines) - 1, tokens)
    reason = verify(path, shard)
    if reason is not None:
        raise ValueError(f"it {reason}")
    return shard


def _good(part: Path, layout: Layout, contents: str, lines: list[tuple[dict[str, Any], int]]) -> Leftover:
    """The records of an unsealed shard whose data are there and right."""
    left = Leftover([], 0)
    with part.open("rb") as file:
        size, offset = file.seek(0, os.SEEK_END), layout.header_bytes(contents) + 8
        for line, journal_bytes in lines:
            bytes_ = line["tokens"] * layout.token_bytes
            if offset + bytes_ > size or _check(file.fileno(), offset, bytes_) != line["check"]:
                break
            left.records.append(Record(bytes.fromhex(line["key"]), line["tokens"], offset, line["check"]))
            left = Leftover(left.records, journal_bytes)
            offset += bytes_
    return left


def _lines(journal: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The journal's lines, each with the bytes of the file up to its end, up to the first that is not one."""
    if not journal.exists():
        return
    end = 0
    with journal.open("rb") as file:
        for text in file:
            line = _line(text)
            if line is None:
                return
            end += len(text)
            yield line, end
            if "sha256" in line:
                return


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text) if text.endswith(b"\n") else None
        if not isinstance(line, dict):
            return None
        if set(line) == {"sha256", "bytes"}:
            return line if isinstance(line["sha256"], str) and type(line["bytes"]) is int else None
        good = len(bytes.fromhex(line["key"])) == KEY_BYTES and type(line["check"]) is int
        return line if good and type(line["tokens"]) is int and line["tokens"] > 0 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _check(descriptor: int, offset: int, count: int) -> int:
    """CRC-32 of ``count`` bytes of a file, read piece by piece."""
    check, end = 0, offset + count
    while offset < end:
        piece = os.pread(descriptor, min(_PIECE, end - offset), offset)
        if not piece:
            raise ValueError("it is cut short")
        check, offset = zlib.crc32(piece, check), offset + len(piece)
    return check
