"""How gloo's ranks find each other: what all see, and that nobody asks more of the store in a larger group."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ncclx_py.bench.counting import CountingStore
from ncclx_py.bench.startup import MemoryStore
from ncclx_py.errors import CollectiveError
from ncclx_py.runtime.meeting import MeetingStore

pytestmark = pytest.mark.unit


def together(size: int, act: Any) -> list[Any]:
    """act(rank) in a thread per rank; its results, or the errors in their place."""
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = act(rank)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


@pytest.mark.parametrize("size", [2, 24])
def test_everybody_reads_what_each_published_with_three_requests(size: int) -> None:
    shared = MemoryStore()
    counted = [CountingStore(shared) for _ in range(size)]

    def meet(rank: int) -> list[bytes]:
        store = MeetingStore(counted[rank], rank, size, timedelta(seconds=20))
        store.set(f"0/{rank}", bytes([rank, 255, 0]))
        store.wait([f"0/{other}" for other in range(size)])
        return [store.get(f"0/{other}") for other in range(size)]

    assert together(size, meet) == [[bytes([rank, 255, 0]) for rank in range(size)]] * size
    assert {store.messages for store in counted[1:]} == {3}


def test_gloo_itself_connects_over_it() -> None:
    """Three ranks as threads: each sends its number to the next."""
    shared = MemoryStore()

    def ring(rank: int) -> float:
        store = MeetingStore(CountingStore(shared), rank, 3, timedelta(seconds=20))
        gloo = dist.ProcessGroupGloo(store, rank, 3, timedelta(seconds=20))
        got = torch.zeros(1)
        sent = gloo.send([torch.tensor([float(rank)])], (rank + 1) % 3, 7)
        gloo.recv([got], (rank + 2) % 3, 7).wait()
        sent.wait()
        gloo.shutdown()
        return got.item()

    assert together(3, ring) == [2.0, 0.0, 1.0]


def test_who_does_not_come_is_named() -> None:
    shared = MemoryStore()

    def meet(rank: int) -> None:
        if rank != 1:
            MeetingStore(CountingStore(shared), rank, 3, timedelta(seconds=0.2)).set(f"0/{rank}", b"here")

    found = together(3, meet)
    for rank in (0, 2):
        assert isinstance(found[rank], CollectiveError)
        assert "ranks [1] did not come to make the group within 0.2 s" in str(found[rank])


def test_what_gloo_may_not_ask_is_an_error_and_no_hang() -> None:
    with pytest.raises(RuntimeError, match="which no rank publishes"):
        MeetingStore(MemoryStore(), 0, 2, timedelta(seconds=1)).wait(["else/0"])
