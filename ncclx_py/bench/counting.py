"""A store that counts what passes through it: messages, keys and bytes, seen from one rank.

store = CountingStore(TCPStore(...))
dist.init_process_group("ncclx", store=store, rank=rank, world_size=size)
store.messages, store.keys, store.sent, store.received
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class CountingStore(dist.Store):
    """Hands every request to `inner`. `messages` counts requests, `keys` the keys they name, `sent` and `received` the bytes of
    values."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self._inner = inner
        self.messages = self.keys = self.sent = self.received = 0

    def set(self, key: str, value: str | bytes) -> None:
        self._count(1, sent=len(value))
        self._inner.set(key, value)

    def get(self, key: str) -> bytes:
        value = bytes(self._inner.get(key))
        self._count(1, received=len(value))
        return value

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        values = [bytes(value) for value in self._inner.multi_get(list(keys))]
        self._count(len(values), received=sum(map(len, values)))
        return values

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._count(len(keys))
        self._inner.wait(list(keys), *([] if timeout is None else [timeout]))

    def check(self, keys: Sequence[str]) -> bool:
        self._count(len(keys))
        return bool(self._inner.check(list(keys)))

    def add(self, key: str, value: int) -> int:
        self._count(1)
        return int(self._inner.add(key, value))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self._count(1, sent=len(desired))
        return bytes(self._inner.compare_set(key, expected, desired))

    def delete_key(self, key: str) -> bool:
        self._count(1)
        return bool(self._inner.delete_key(key))

    def append(self, key: str, value: str | bytes) -> None:
        self._count(1, sent=len(value))
        self._inner.append(key, value)

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        self._count(len(keys), sent=sum(map(len, values)))
        self._inner.multi_set(list(keys), list(values))

    def has_extended_api(self) -> bool:
        return bool(self._inner.has_extended_api())

    def set_timeout(self, timeout: timedelta) -> None:
        self._inner.set_timeout(timeout)

    def _count(self, keys: int, sent: int = 0, received: int = 0) -> None:
        self.messages += 1
        self.keys += keys
        self.sent += sent
        self.received += received
