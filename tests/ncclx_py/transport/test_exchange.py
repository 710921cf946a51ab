"""What ranks tell each other through the store: right, in a constant number of messages, and with errors that name ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from ncclx_py.bench.counting import CountingStore
from ncclx_py.errors import CollectiveError
from ncclx_py.transport.exchange import exchange, pack, unpack

pytestmark = pytest.mark.unit
SOON = timedelta(seconds=20)


def together(
    size: int, text: Callable[[int], str], store: Any, absent: tuple[int, ...] = (), timeout: Any = SOON
) -> Any:
    """What each rank gets or raises, the ranks being threads, and their stores; None for those that are absent."""
    found: list[Any] = [None] * size
    stores = [CountingStore(store) for _ in range(size)]

    def join(rank: int) -> None:
        try:
            found[rank] = exchange(stores[rank], "cards", rank, size, [text(rank), [1, None]], timeout)
        except (CollectiveError, ValueError) as error:
            found[rank] = error

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size) if rank not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, stores


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_everybody_gets_what_everybody_gave(size: int) -> None:
    found, _ = together(size, lambda rank: f'{{"é\\"": {rank // 3}}}', dist.HashStore())
    assert [list(map(tuple, rows)) for rows in found] == [
        [(f'{{"é\\"": {rank // 3}}}', [1, None]) for rank in range(size)]
    ] * size


def test_messages_of_a_rank_do_not_grow_with_the_group() -> None:
    counts = []
    for size in (4, 64):
        _, stores = together(size, lambda rank: "same", dist.HashStore())
        counts.append({(store.messages, store.keys) for store in stores[1:]})
        assert stores[0].messages <= 4
        assert all(store.received < 64 for store in stores[1:])  # equal texts are sent once
    assert counts == [{(3, 3)}] * 2


def test_the_missing_are_named_by_all_who_came() -> None:
    found, _ = together(9, str, dist.HashStore(), absent=(3, 7), timeout=timedelta(seconds=0.3))
    for rank in (0, 1, 8):
        assert f"Rank {rank} of 9: ranks [3, 7] did not come to make the group within 0.3 s" in str(found[rank])


def test_an_absent_first_rank_is_named() -> None:
    found, _ = together(4, str, dist.HashStore(), absent=(0,), timeout=timedelta(seconds=0.3))
    assert all("ranks [0] did not come" in str(error) for error in found[1:])


def test_a_first_rank_that_died_before_it_answered_is_named() -> None:
    store = dist.HashStore()
    store.set("cards/0", "0")
    found, _ = together(3, str, store, absent=(0,), timeout=timedelta(seconds=0.3))
    assert all("but rank 0 did not tell what they said" in str(error) for error in found[1:])


def test_what_an_earlier_group_left_in_the_store_is_refused() -> None:
    store = dist.HashStore()
    store.set("cards/all", pack([["a"], ["b"], ["c"]]))
    assert "earlier group of the same name" in str(together(3, str, store, absent=(0, 2))[0][1])


@pytest.mark.parametrize(
    "packed", [b"", b"nonsense", pack([["a"]]), pack([["a"]] * 3)[:-6], pack([]), pack([["a"], ["b"], ["c"], ["d"]])]
)
def test_a_book_that_is_damaged_or_for_another_size_is_an_error(packed: bytes) -> None:
    with pytest.raises(ValueError, match="what rank 0 wrote"):
        unpack(packed, 3)
