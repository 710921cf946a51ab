"""How one shard lies in its file: safetensors, a pair of name and tensor per sequence, readable by any program that knows them.

    8 bytes        length N of the header, little-endian
    N bytes        JSON, padded with blanks: {"KEY.hidden": {"dtype": "BF16", "shape": [t, H], "data_offsets": [0, 2·t·H]}, …}
    data           the tensors of one sequence after those of another

N is fixed when the file is begun, with room for MAX_RECORDS sequences, so that data are appended while sequences are scored and
the header is written when the shard is sealed. ``__metadata__`` holds what the cache contains and each sequence's CRC-32.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from distill.teachers.cache.keys import KEY_BYTES

T = TypeVar("T")

MAX_RECORDS = 1024  # sequences of one shard
SHARD_BYTES = 256 << 20  # of data, after which a shard is sealed
_ENTRY = 152  # bytes of header for one tensor, at most
NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int32: "I32",
}


class Record(NamedTuple):
    """One sequence in a shard."""

    key: bytes
    tokens: int
    offset: int  # of its data in the file
    check: int  # CRC-32 of its data


@dataclass(frozen=True)
class Layout:
    """The tensors of one sequence: ``shapes`` as ``wire.tensor_shapes`` gives them."""

    shapes: Mapping[str, tuple[torch.dtype, int | None]]

    @property
    def token_bytes(self) -> int:
        return sum(dtype.itemsize * (columns or 1) for dtype, columns in self.shapes.values())

    def empty(self, tokens: int, pinned: bool = False) -> dict[str, torch.Tensor]:
        """Tensors for ``tokens`` positions, not initialised."""
        return {
            name: torch.empty((tokens,) if columns is None else (tokens, columns), dtype=dtype, pin_memory=pinned)
            for name, (dtype, columns) in self.shapes.items()
        }

    def header_bytes(self, contents: str) -> int:
        """N for a shard that says ``contents``."""
        room = len(json.dumps(contents)) + 256 + MAX_RECORDS * (9 + _ENTRY * len(self.shapes))
        return -(-room // 4096) * 4096 - 8

    def header(self, records: Sequence[Record], contents: str, size: int) -> bytes:
        """The first ``size + 8`` bytes of a sealed shard."""
        checks = " ".join(f"{record.check:08x}" for record in records)
        entries: dict[str, Any] = {"__metadata__": {"contents": contents, "checks": checks}}
        for record in records:
            begin = record.offset - size - 8
            for name, (dtype, columns) in self.shapes.items():
                shape = [record.tokens] if columns is None else [record.tokens, columns]
                end = begin + record.tokens * (columns or 1) * dtype.itemsize
                entries[f"{record.key.hex()}.{name}"] = {
                    "dtype": NAMES[dtype],
                    "shape": shape,
                    "data_offsets": [begin, end],
                }
                begin = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        assert len(text) <= size, "room for MAX_RECORDS sequences was reserved"
        return size.to_bytes(8, "little") + text.ljust(size)

    def parse(self, text: bytes, data_at: int, file_bytes: int) -> tuple[list[Record], str]:
        """Records and contents from a header's JSON, whose data begin at ``data_at`` of ``file_bytes``.

        Raises ValueError for anything but a header that ``header`` made of tensors that fill the file without a gap.
        """
        entries = json.loads(text)
        metadata = entries.pop("__metadata__")
        checks = [int(check, 16) for check in metadata["checks"].split()]
        records, offset, named = [], data_at, iter(entries.items())
        for check in checks:
            first, entry = next(named)
            key, tokens = bytes.fromhex(first.partition(".")[0]), entry["shape"][0]
            if len(key) != KEY_BYTES or type(tokens) is not int or tokens < 1:
                raise ValueError(f"{first[:80]!r} is not a sequence")
            records.append(Record(key, tokens, offset, check))
            offset += tokens * self.token_bytes
            for _ in range(len(self.shapes) - 1):
                next(named)
        if offset != file_bytes:
            raise ValueError(f"its sequences end at byte {offset}, and it has {file_bytes}")
        if self.header(records, metadata["contents"], data_at - 8)[8:] != text:
            raise ValueError("its entries are not those of its sequences")
        return records, metadata["contents"]


def read_header(layout: Layout, path: Path) -> tuple[list[Record], str]:
    """The records of a sealed shard and what its cache contains. Raises OSError, or ValueError with the reason."""
    text, size = _header_text(path)
    return _read(lambda: layout.parse(text, len(text) + 8, size))


def read_contents(path: Path) -> str:
    """What a shard of any layout says its cache contains. Raises OSError or ValueError."""
    text, _ = _header_text(path)
    return _read(lambda: str(json.loads(text)["__metadata__"]["contents"]))


def _header_text(path: Path) -> tuple[bytes, int]:
    """The header's JSON and the file's size."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"its header of {length} bytes does not fit into its {size} bytes")
        return file.read(length), size


def _read(found: Callable[[], T]) -> T:
    try:
        return found()
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration, RecursionError, AssertionError) as error:
        raise ValueError(f"its header is not that of a shard ({type(error).__name__}: {str(error)[:100]})") from None
