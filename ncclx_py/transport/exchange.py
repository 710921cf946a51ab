"""What every rank of a group says, made known to all of them through the store, with few messages.

    texts = exchange(store, "cards", rank, size, mine, timeout)      # all ranks; one text per rank, in order of rank

Every rank writes its own text and reads one book that rank 0 has made of all of them: three messages a rank, whatever the
size of the group, where reading every rank's text would be `size` values for each, and size² in all. The book holds a run of
equal texts once, and is compressed: what differs from rank to rank is all that costs.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Sequence
from datetime import timedelta
from itertools import groupby
from typing import Any

from ncclx_py.errors import CollectiveError

_BATCH = 1024  # texts that rank 0 asks for in one message
_LONGEST = 1 << 30  # bytes of a book


def exchange(store: Any, what: str, rank: int, size: int, mine: str, timeout: timedelta) -> list[str]:
    """What each rank of the group has given as `what`. `store` belongs to this group, and `what` to this exchange.

    Raises CollectiveError, which names the ranks that are missing, when some have not come before `timeout` has passed.
    """
    until = time.monotonic() + timeout.total_seconds()
    keys, book = [f"{what}/{other}" for other in range(size)], f"{what}/all"
    store.set(keys[rank], mine)
    try:
        if rank == 0:
            texts = _gather(store, keys, until)
            store.set(book, pack(texts))
            return texts
        store.wait([book], _left(until))
        packed = store.get(book)
    except RuntimeError as error:  # c10d's timeout is one too
        raise CollectiveError(_who_is_missing(store, keys, rank, timeout)) from error
    texts = unpack(packed, size)
    if texts[rank] != mine:
        raise CollectiveError(
            f"Rank {rank} of {size}: the store still holds {what!r} of an earlier group of the same name. Give each group "
            "a store, or a prefix, of its own."
        )
    return texts


def pack(texts: Sequence[str]) -> bytes:
    """Texts in order of rank, as rank 0 writes them."""
    runs = [[text, len(list(run))] for text, run in groupby(texts)]
    return zlib.compress(json.dumps(runs, separators=(",", ":")).encode(), 1)


def unpack(packed: bytes, size: int) -> list[str]:
    """The texts of `pack`. Raises ValueError where they are not those of `size` ranks."""
    try:
        opened = zlib.decompressobj()
        runs = json.loads(opened.decompress(packed, _LONGEST))
        texts = [text for text, count in runs for _ in range(count)] if sum(run[1] for run in runs) == size else []
    except (zlib.error, ValueError, TypeError, LookupError) as error:
        raise ValueError(f"what rank 0 wrote for all ranks cannot be read: {error}.") from error
    if len(texts) != size:
        raise ValueError(f"what rank 0 wrote for all ranks is not for {size} ranks: do all of them agree on the size?")
    return texts


def _gather(store: Any, keys: list[str], until: float) -> list[str]:
    texts: list[str] = []
    for first in range(0, len(keys), _BATCH):
        batch = keys[first : first + _BATCH]
        store.wait(batch, _left(until))
        texts += [bytes(text).decode() for text in store.multi_get(batch)]
    return texts


def _who_is_missing(store: Any, keys: list[str], rank: int, timeout: timedelta) -> str:
    missing = _unset(store, keys, 0, len(keys))
    whose = (
        f"ranks {missing} did not come to make the group"
        if missing
        else "all ranks came to make the group, but rank 0 did not tell what they said"
    )
    return (
        f"Rank {rank} of {len(keys)}: {whose} within {timeout.total_seconds():g} s. See their logs, or pass a longer "
        "timeout."
    )


def _unset(store: Any, keys: list[str], first: int, last: int) -> list[int]:
    """The ranks from `first` to before `last` whose keys are not set, found by halving: few are missing, of many."""
    if store.check(keys[first:last]):
        return []
    if last - first == 1:
        return [first]
    middle = (first + last) // 2
    return _unset(store, keys, first, middle) + _unset(store, keys, middle, last)


def _left(until: float) -> timedelta:
    """At least a millisecond: some stores wait for ever when they get nothing."""
    return timedelta(seconds=max(0.001, until - time.monotonic()))
