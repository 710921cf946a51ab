"""The key-value storage by itself: writes, growth, moves and rewinds against plain lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.rollouts.cache import KVCache

pytestmark = pytest.mark.unit

HEADS, SIZE = 3, 4


def vectors(cache: KVCache, places: list[int], counts: list[int], seed: int) -> list[torch.Tensor]:
    """Write random keys and values for a ragged chunk; returns the keys per row [count, heads, size]."""
    tokens = [np.full(count, 5, dtype=np.int64) for count in counts]
    chunk = cache.chunk(np.array(places), tokens, torch.device("cpu"))
    keys = torch.randn(sum(counts), HEADS, SIZE, generator=torch.Generator().manual_seed(seed))
    for layer in range(2):
        cache.write(layer, chunk, keys + layer, -keys[..., :2] - layer)
    cache.lengths[places] += counts
    return list(keys.split(counts))


def held(cache: KVCache, place: int) -> torch.Tensor:
    """Keys of the last layer for one place [length, heads, size], checked against its values."""
    length = int(cache.lengths[place])
    chunk = cache.chunk(np.array([place]), [np.zeros(1, dtype=np.int64)], torch.device("cpu"))
    keys, values = cache.read(1, chunk)
    keys, values = keys[0, :, :length].transpose(0, 1) - 1, values[0, :, :length].transpose(0, 1) + 1
    torch.testing.assert_close(keys[..., :2], -values)
    return keys


def test_rows_survive_growth_moves_swaps_and_rewinds() -> None:
    cache = KVCache(2, 4, 64, block=4)
    a, b, c = vectors(cache, [0, 1, 2], [3, 1, 5], 0)
    torch.testing.assert_close(held(cache, 1), b)
    more = vectors(cache, [2, 0], [9, 1], 1)  # out of order, and past the first block
    a, c = torch.cat([a, more[1]]), torch.cat([c, more[0]])
    assert cache.capacity >= 14
    cache.swap(0, 2)
    cache.move(1, 3)
    for place, rows in ((0, c), (1, b), (2, a), (3, b)):
        torch.testing.assert_close(held(cache, place), rows)
    cache.rewind(0, 6)
    (new,) = vectors(cache, [0], [2], 2)
    torch.testing.assert_close(held(cache, 0), torch.cat([c[:6], new]))


def test_adjoining_places_are_read_without_a_copy_and_others_by_one() -> None:
    cache = KVCache(2, 4, 64)
    rows = vectors(cache, [0, 1, 2, 3], [2, 2, 2, 2], 0)
    device, one = torch.device("cpu"), np.zeros(1, dtype=np.int64)
    view, _ = cache.read(0, cache.chunk(np.array([1, 2]), [one, one], device))
    copy, _ = cache.read(0, cache.chunk(np.array([2, 0]), [one, one], device))
    whole, _ = cache.read(0, cache.chunk(np.arange(4), [one] * 4, device))
    assert view.data_ptr() == whole[1].data_ptr()
    torch.testing.assert_close(copy[0, :, :2].transpose(0, 1), rows[2])
    torch.testing.assert_close(copy[1, :, :2].transpose(0, 1), rows[0])


def test_mask_shows_each_query_its_past_and_itself() -> None:
    cache = KVCache(1, 2, 64)
    cache.lengths[:] = [2, 0]
    chunk = cache.chunk(np.arange(2), [np.zeros(2, dtype=np.int64), np.zeros(3, dtype=np.int64)], torch.device("cpu"))
    mask = chunk.mask(torch.float32, -1.0)[:, 0]
    expected = [[[0, 0, 0, -1], [0, 0, 0, 0], [0, 0, 0, 0]], [[0, -1, -1, -1], [0, 0, -1, -1], [0, 0, 0, -1]]]
    assert mask.tolist() == expected
    assert chunk.extent == 4
    assert chunk.positions.tolist() == [2, 3, 0, 1, 2]


def test_pad_and_pack_are_inverse() -> None:
    cache = KVCache(1, 3, 64)
    chunk = cache.chunk(np.arange(3), [np.arange(n) for n in (2, 4, 1)], torch.device("cpu"))
    grid = chunk.pad(chunk.ids + 1)
    assert grid.tolist() == [[1, 2, 0, 0], [1, 2, 3, 4], [1, 0, 0, 0]]
    assert torch.equal(chunk.pack(grid), chunk.ids + 1)


def test_limits_are_errors() -> None:
    cache = KVCache(1, 2, 8)
    with pytest.raises(ValueError, match=r"9 tokens does not fit.*limit is 8"):
        cache.reserve(9)
    cache.lengths[0] = 3
    with pytest.raises(ValueError, match="cannot rewind place 0 to 4 tokens: it holds 3"):
        cache.rewind(0, 4)
