"""What a buffer holds, symbolically: which elements of the problem, with the contributions of which ranks.

An element of the problem has an *identity*, an integer. A `Value` stands for consecutive elements, of consecutive
identities and with the same contributions. The cost of every operation depends on the number of pieces, not of elements.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import NamedTuple

DOUBLED = -1  # in place of contributions: some rank's is there twice
MIXED = -2  # in place of contributions: different elements were combined


class Value(NamedTuple):
    """`length` elements of identities `first`, `first` + 1, …; bit r of `ranks` is set when rank r has contributed.

    `ranks` may also be `DOUBLED` or `MIXED`: the elements are wrong, and stay so until they are overwritten.
    """

    length: int
    first: int
    ranks: int


class Contents:
    """The pieces of one buffer in order; what was never written is not covered by any."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._values: list[Value] = []

    def write(self, start: int, stop: int, values: list[Value]) -> None:
        """Stores `values`, whose lengths add up to ``stop - start``."""
        if start == stop:
            return
        low = bisect_right(self._starts, start) - 1
        if low < 0 or self._starts[low] + self._values[low].length <= start:
            low += 1
        high = bisect_left(self._starts, stop)
        before: list[Value] = []
        after: list[Value] = []
        starts: list[int] = []
        if low < high and self._starts[low] < start:
            before = [self._values[low]._replace(length=start - self._starts[low])]
            starts.append(self._starts[low])
        if low < high:
            last_start, last = self._starts[high - 1], self._values[high - 1]
            cut_off = stop - last_start
            if last.length > cut_off:
                after = [Value(last.length - cut_off, last.first + cut_off, last.ranks)]
        position = start
        for value in values:
            starts.append(position)
            position += value.length
        if after:
            starts.append(stop)
        self._starts[low:high] = starts
        self._values[low:high] = before + values + after

    def read(self, start: int, stop: int) -> list[Value]:
        """The values from `start` to `stop`, joined where they go on; raises `Undefined` where nothing was written."""
        found: list[Value] = []
        position = start
        index = max(bisect_right(self._starts, start) - 1, 0)
        while position < stop:
            if index >= len(self._starts):
                raise Undefined(position)
            first, value = self._starts[index], self._values[index]
            if first > position or first + value.length <= position:
                raise Undefined(position)
            skip = position - first
            length = min(value.length - skip, stop - position)
            last = found[-1] if found else None
            if last and last.ranks == value.ranks and last.first + last.length == value.first + skip:
                found[-1] = Value(last.length + length, last.first, last.ranks)
            else:
                found.append(Value(length, value.first + skip, value.ranks))
            position += length
            index += 1
        return found


class Undefined(Exception):
    """Element `args[0]` was read before anything was written there."""


def combined(mine: list[Value], theirs: list[Value]) -> list[Value]:
    """Two runs of equal total length combined element by element."""
    result: list[Value] = []
    a = b = 0  # pieces
    used_a = used_b = 0  # elements used up of each
    while a < len(mine) and b < len(theirs):
        x, y = mine[a], theirs[b]
        length = min(x.length - used_a, y.length - used_b)
        first = x.first + used_a
        result.append(Value(length, first, _together(x.ranks, y.ranks, first == y.first + used_b)))
        used_a, used_b = used_a + length, used_b + length
        if used_a == x.length:
            a, used_a = a + 1, 0
        if used_b == y.length:
            b, used_b = b + 1, 0
    return result


def _together(mine: int, theirs: int, same_element: bool) -> int:
    if mine < 0 or theirs < 0:
        return min(mine, theirs)
    if not same_element:
        return MIXED
    return DOUBLED if mine & theirs else mine | theirs
