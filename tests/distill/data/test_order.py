"""The order of samples: permutations, epochs, resumption, sharding."""

import itertools
import time
from collections import Counter

import pytest

from distill.data import SampleOrder, shard

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16, 100, 1023, 4097])
def test_every_epoch_is_a_permutation_and_no_two_are_alike(size):
    order = SampleOrder(size, seed=3)
    epochs = [order.indices(e * size, size) for e in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 16:
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0] != SampleOrder(size, seed=4).indices(0, size)


def test_any_cut_gives_the_same_sequence():
    """Resuming at any sample number, in any step size, over epoch borders, from a new object."""
    order = SampleOrder(37, seed=1)
    whole = order.indices(0, 200)
    for start in range(0, 160, 7):
        for count in (0, 1, 5, 40):
            assert SampleOrder(37, seed=1).indices(start, count) == whole[start : start + count]


def test_all_permutations_of_three_are_about_equally_likely():
    seen = Counter(tuple(SampleOrder(3, seed).indices(0, 3)) for seed in range(1200))
    assert len(seen) == 6
    assert sum((n - 200) ** 2 / 200 for n in seen.values()) < 25  # χ² with 5 degrees of freedom: p ≈ 1e-4


def test_neighbours_do_not_stay_neighbours():
    """The mean distance of consecutive draws from range(n) is n/3 for a random permutation."""
    indices = SampleOrder(10_000, seed=0).indices(0, 10_000)
    mean = sum(abs(a - b) for a, b in itertools.pairwise(indices)) / 9_999
    assert mean == pytest.approx(10_000 / 3, rel=0.03)
    fixed = sum(i == index for i, index in enumerate(indices))
    assert fixed < 8  # Poisson with mean 1


def test_huge_datasets_cost_nothing():
    began = time.perf_counter()
    indices = SampleOrder(10**8, seed=0).indices(12345678, 1000)
    assert time.perf_counter() - began < 0.5
    assert len(set(indices)) == 1000
    assert 0 <= min(indices) <= max(indices) < 10**8
    assert max(SampleOrder(2**62, seed=0).indices(2**62 + 5, 50)) < 2**62


def test_order_is_the_same_on_every_machine():
    """Frozen values: a change here would make every checkpoint continue with other samples."""
    assert SampleOrder(1000, seed=7).indices(995, 10) == [114, 499, 763, 656, 842, 879, 262, 653, 259, 763]


def test_without_shuffling_samples_come_as_they_are():
    assert SampleOrder(4, seed=0, shuffle=False).indices(2, 5) == [2, 3, 0, 1, 2]


@pytest.mark.parametrize(("size", "start", "count"), [(0, 0, 1), (-1, 0, 1), (5, -1, 1), (5, 0, -1), (2**63, 0, 1)])
def test_impossible_requests_are_refused(size, start, count):
    with pytest.raises(ValueError, match="sample"):
        SampleOrder(size, seed=0).indices(start, count)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_shards_join_to_the_global_batch(world_size):
    batch = list(range(12))
    assert [item for rank in range(world_size) for item in shard(batch, rank, world_size)] == batch


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"12 samples does not divide among 5 ranks.*such as 15"):
        shard(range(12), 0, 5)
    with pytest.raises(ValueError, match="rank 2 does not exist among 2"):
        shard(range(12), 2, 2)
