"""How gloo's ranks find each other with few requests: a store that answers gloo from the book of `exchange`.

    native = dist.ProcessGroupGloo(MeetingStore(store, rank, size, timeout), rank, size, timeout)

gloo has each rank publish its address and read that of every other: two requests for each peer, size² in all. This store
turns the publishing into one exchange (three requests a rank), and answers what is read from what that brought. It is asked
only while the group is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ncclx_py.transport.exchange import exchange


class MeetingStore(dist.Store):
    """`store` belongs to this group. `set` waits until all ranks have come; it raises CollectiveError, which names those that
    have not, once `timeout` has passed."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__()
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        self._known: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        """`key` is a prefix, a slash and the rank, on all ranks."""
        prefix = key.removesuffix(f"/{self._rank}")
        mine = bytes(value, "utf-8") if isinstance(value, str) else bytes(value)
        texts = exchange(self._store, f"gloo/{prefix}", self._rank, self._size, mine.hex(), self._timeout)
        self._known.update({f"{prefix}/{rank}": bytes.fromhex(text) for rank, text in enumerate(texts)})

    def get(self, key: str) -> bytes:
        return self._known[key]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self._known[key] for key in keys]

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self._known for key in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        missing = [key for key in keys if key not in self._known]
        if missing:
            raise RuntimeError(
                f"gloo asks for {missing[0]!r}, which no rank publishes: this version of torch is not known."
            )

    def has_extended_api(self) -> bool:
        return False
