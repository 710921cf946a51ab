"""The house: the memory that the ranks of one host share, one memfd for all of them, which each maps once.

It is sparse: only what is touched exists. No name is left behind by ``kill -9``, and its one descriptor is closed as soon
as it is mapped. Layout, for `ranks` ranks of which each has a place:

    head      a word per rank: 1 once it has aborted the group (its text is in its window), so that one look tells of all
    windows   one per rank, see `window`
    arenas    one per rank, see `arena`

One mapping for all ranks, where there were two for each neighbour, is what lets a host have many ranks and many groups.
"""

from __future__ import annotations

import os

from ncclx_py.transport.arena import Arena
from ncclx_py.transport.memory import Mapping, bytes_at
from ncclx_py.transport.window import PAGE, Window, data_start

_MOST = 1 << 44  # bytes of all windows, and of all arenas: address space, of which x86-64 and arm64 have 2^47 and more


class House:
    """The shared memory as mapped here."""

    def __init__(self, descriptor: int, ranks: int) -> None:
        """Maps `descriptor`, which stays open. Raises OSError where there is no room for it."""
        self._ranks = ranks
        self._map = Mapping(descriptor)
        head, words = _head(ranks), data_start(ranks)
        self._arena = (self._map.size - head - ranks * words) // (2 * ranks)
        self._window = words + self._arena
        self._windows, self._arenas = head, head + ranks * self._window
        self.aborted = bytes_at(self._map.address, 8 * ranks).cast("B").cast("Q")
        self._mine: Arena | None = None

    def window(self, place: int) -> Window:
        return Window(self._map, self._windows + place * self._window, self._window, self._ranks)

    def arena(self, place: int) -> Arena:
        """For reading in it."""
        return Arena(self._map, self._arenas + place * self._arena, self._arena)

    def own_arena(self, place: int) -> Arena:
        """For allocating in it; its part of the map lasts as long as its tensors."""
        self._mine = self.arena(place)
        return self._mine

    def close(self) -> None:
        """Let go of all windows first."""
        self.aborted.release()
        if self._mine is None:
            self._map.close()
            return
        start, stop = self._mine.start, self._mine.start + self._mine.size
        self._map.cut(0, start)
        self._map.cut(stop, self._map.size)
        self._mine.close()


def create(name: str, ranks: int) -> int:
    """The descriptor of new memory for a host with `ranks` ranks: windows and arenas as large as this machine's memory each,
    unless that were more than can be addressed."""
    data = min(physical_memory(), _MOST // ranks) // PAGE * PAGE
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, _head(ranks) + ranks * (data_start(ranks) + 2 * data))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def physical_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _head(ranks: int) -> int:
    return -(-8 * ranks // PAGE) * PAGE
