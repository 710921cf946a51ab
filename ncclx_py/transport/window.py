"""A rank's window: memory that the other ranks of its host read, and the words by which they tell each other when.

It is a part of the memory of the host (see `house`), sparse and as large as the machine's memory. Layout:

    page 0      word 0: length of the abort text, 0 while all is well; the text from byte 64
                word 1: 1 while the owner sleeps and wants to be woken (see `bells`)
    page 1 …    the last `CALLS` calls: text and length
    …           one channel block per (neighbour, lane), see `channels`
    data_start  what is sent: copies of user memory (the mirror) and the scratch of plans

Every word has one writer. Words that peers wait for only grow. A writer's stores are seen in their order: x86 does so by
itself, elsewhere `fence` sees to it.
"""

from __future__ import annotations

import mmap
import platform
import threading
from collections.abc import Callable

from ncclx_py.transport.memory import Mapping, bytes_at
from ncclx_py.transport.signature import RECORD_BYTES

LANES = 64
CALLS = 64
RING = 64  # messages of a channel that are on their way at one time
BLOCK_WORDS = 16 + 4 * RING  # posted, consumed (on a cache line each), then (where, bytes, digest, call) per message
PAGE = mmap.PAGESIZE
ASLEEP = 1  # the word

_TEXT_AT, _TEXT_BYTES = 64, PAGE - 64
_CALLS_AT = PAGE
_CALL_BYTES = 128
_BLOCKS_AT = _CALLS_AT + CALLS * _CALL_BYTES


def _lock_cycle() -> None:
    for _ in range(2):
        with _FENCE:
            pass


_FENCE = threading.Lock()
fence: Callable[[], None] | None = None if platform.machine() in ("x86_64", "AMD64", "i686") else _lock_cycle


class Window:
    """One rank's window as mapped here, by its owner or by a neighbour. `address` is where it starts in this process."""

    def __init__(self, memory: Mapping, start: int, size: int, neighbours: int) -> None:
        """`size` bytes of `memory` from `start` on, on a host with so many ranks (its owner included)."""
        self.data_start = data_start(neighbours)
        self._map, self._start = memory, start
        self.size, self.address = size, memory.address + start
        self._bytes = bytes_at(self.address, self.size).cast("B")
        self.words = self._bytes[: self.data_start].cast("Q")

    def abort_text(self) -> str:
        """Why the owner has aborted; "" while it has not."""
        length = self.words[0]
        return bytes(self._bytes[_TEXT_AT : _TEXT_AT + length]).decode(errors="replace") if length else ""

    def set_abort_text(self, text: str) -> None:
        encoded = text.encode()[:_TEXT_BYTES]
        self._bytes[_TEXT_AT : _TEXT_AT + len(encoded)] = encoded
        if fence:
            fence()
        self.words[0] = len(encoded)

    def call(self, index: int) -> str:
        """The text of the call `index`, if it is one of the last `CALLS`."""
        start = _CALLS_AT + index % CALLS * _CALL_BYTES
        length = min(self.words[start // 8], RECORD_BYTES)
        return bytes(self._bytes[start + 8 : start + 8 + length]).decode(errors="replace")

    def set_call(self, index: int, record: bytes) -> None:
        start = _CALLS_AT + index % CALLS * _CALL_BYTES
        self._bytes[start + 8 : start + 8 + len(record)] = record
        self.words[start // 8] = len(record)

    def give_back(self, start: int, stop: int) -> None:
        """Returns the memory of whole pages between two byte offsets to the system."""
        start, stop = -(-start // PAGE) * PAGE, stop // PAGE * PAGE
        if start < stop:
            self._map.advise(mmap.MADV_REMOVE, self._start + start, stop - start)

    def close(self) -> None:
        """Lets go of the memory, which the house unmaps."""
        self.words.release()
        self._bytes.release()


def block_word(neighbour: int, lane: int) -> int:
    """The index of the first word of a channel block. Ranks are counted within the host."""
    return _BLOCKS_AT // 8 + (neighbour * LANES + lane) * BLOCK_WORDS


def data_start(neighbours: int) -> int:
    return -(-(_BLOCKS_AT + 8 * BLOCK_WORDS * LANES * neighbours) // PAGE) * PAGE
