"""What every rank of a group says, made known to all of them through the store, with few messages.

    said = Exchange(store, "cards", rank, size, [host, port], timeout)     # all ranks; publishes, and returns at once
    rows = said.rows()                                                     # waits: what each rank said, in order of rank

A rank says a list of JSON values, as many as the others. It writes them as a text of its own and reads one book that rank 0
has made of all of them: three messages a rank, whatever the size of the group, where reading every rank's text would be `size`
values for each, and size² in all. The book goes field by field, holds a run of equal values once, and is compressed: what
differs from rank to rank is all that costs.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Sequence
from datetime import timedelta
from itertools import groupby, repeat
from typing import Any

import torch.distributed as dist

from ncclx_py.errors import CollectiveError

_BATCH = 1024  # texts that rank 0 asks for in one message
_LONGEST = 1 << 30  # bytes of a book
_MOST = 1 << 24  # ranks

Row = Sequence[Any]


class Exchange:
    """One exchange among all ranks of a group. `store` belongs to this group, and `what` to this exchange."""

    def __init__(self, store: Any, what: str, rank: int, size: int, mine: Row, timeout: timedelta) -> None:
        """Publishes `mine`."""
        self._until = time.monotonic() + timeout.total_seconds()
        self._store, self._what, self._rank, self._size, self._timeout = store, what, rank, size, timeout
        self._book = f"{what}/all"
        self._mine = _text(mine)
        store.set(f"{what}/{rank}", self._mine)

    def rows(self) -> list[Row]:
        """What each rank of the group has given.

        Raises CollectiveError, which names the ranks that are missing, when some have not come before the timeout has passed
        that runs since this rank published.
        """
        try:
            if self._rank == 0:
                rows = self._gathered()
                self._store.set(self._book, pack(rows))
                return rows
            self._store.wait([self._book], _left(self._until))
            packed = _read(self._store, self._book)
        except RuntimeError as error:  # c10d's timeout is one too
            raise CollectiveError(self._who_is_missing()) from error
        rows = unpack(packed, self._size)
        if _text(rows[self._rank]) != self._mine:
            raise CollectiveError(
                f"Rank {self._rank} of {self._size}: the store still holds {self._what!r} of an earlier group of the same name. "
                "Give each group a store, or a prefix, of its own."
            )
        return rows

    def _gathered(self) -> list[Row]:
        texts = [self._mine]
        for first in range(1, self._size, _BATCH):
            batch = self._keys(first, min(first + _BATCH, self._size))
            self._store.wait(batch, _left(self._until))
            values = self._store.multi_get(batch) if len(batch) > 1 else [_read(self._store, batch[0])]
            texts += [bytes(value).decode() for value in values]
        rows: list[Row] = json.loads(f"[{','.join(texts)}]")
        return rows

    def _keys(self, first: int, last: int) -> list[str]:
        return [f"{self._what}/{rank}" for rank in range(first, last)]

    def _who_is_missing(self) -> str:
        missing = self._unset(0, self._size)
        whose = (
            f"ranks {missing} did not come to make the group"
            if missing
            else "all ranks came to make the group, but rank 0 did not tell what they said"
        )
        return (
            f"Rank {self._rank} of {self._size}: {whose} within {self._timeout.total_seconds():g} s. See their logs, or pass a "
            "longer timeout."
        )

    def _unset(self, first: int, last: int) -> list[int]:
        """The ranks from `first` to before `last` whose keys are not set, found by halving: few are missing, of many."""
        if self._store.check(self._keys(first, last)):
            return []
        if last - first == 1:
            return [first]
        middle = (first + last) // 2
        return self._unset(first, middle) + self._unset(middle, last)


def exchange(store: Any, what: str, rank: int, size: int, mine: Row, timeout: timedelta) -> list[Row]:
    """Publishes and waits in one."""
    return Exchange(store, what, rank, size, mine, timeout).rows()


def pack(rows: Sequence[Row]) -> bytes:
    """Rows in order of rank, as rank 0 writes them."""
    fields = []
    for field in zip(*rows):
        runs = [(value, len(list(run))) for value, run in groupby(field)]
        fields.append([list(field), []] if len(runs) == len(field) else [list(part) for part in zip(*runs)])
    return zlib.compress(_text(fields).encode(), 1)


def unpack(packed: bytes, size: int) -> list[Row]:
    """The rows of `pack`. Raises ValueError where they are not those of `size` ranks."""
    try:
        opened = zlib.decompressobj()
        fields = json.loads(opened.decompress(packed, _LONGEST))
        columns = [_column(values, counts) for values, counts in fields]
    except (zlib.error, ValueError, TypeError, LookupError) as error:
        raise ValueError(f"what rank 0 wrote for all ranks cannot be read: {error}.") from error
    if not columns or any(len(column) != size for column in columns):
        raise ValueError(f"what rank 0 wrote for all ranks is not for {size} ranks: do all of them agree on the size?")
    return list(zip(*columns))


def _column(values: list[Any], counts: list[int]) -> list[Any]:
    """Values, each as often as it stands in a row; without counts, once."""
    if not counts:
        return list(values)
    if sum(counts) > _MOST:
        raise ValueError(f"it is for {sum(counts)} ranks")
    return [one for value, count in zip(values, counts) for one in repeat(value, count)]


def _read(store: Any, key: str) -> bytes:
    """A value that is there. TCPStore's own `get` asks whether it is, and then for it; this asks once, and changes nothing."""
    inner = store
    while isinstance(inner, dist.PrefixStore):
        inner = inner.underlying_store
    return bytes(store.compare_set(key, "-", "-") if isinstance(inner, dist.TCPStore) else store.get(key))


def _text(values: Any) -> str:
    return json.dumps(values, separators=(",", ":"))


def _left(until: float) -> timedelta:
    """At least a millisecond: some stores wait for ever when they get nothing."""
    return timedelta(seconds=max(0.001, until - time.monotonic()))
