"""The hash that keeps train and test apart, in all processes and on all machines."""

import pytest

from distill.data.partition import split_of, unit_hash

pytestmark = pytest.mark.unit


def test_the_hash_is_frozen():
    """Another hash would put yesterday's training problems into today's test set."""
    assert unit_hash("9-9+8+7+7-2=") == unit_hash(b"9-9+8+7+7-2=") == 0.705571717202318
    assert [n for n in range(60) if split_of(str(n)) == "test"] == [19, 25, 30, 31, 34, 42, 53]
    assert unit_hash("\ud800") != unit_hash("?")


def test_shares_are_as_asked():
    values = [unit_hash(str(number)) for number in range(20_000)]
    assert 0 <= min(values) < 0.001
    assert 0.999 < max(values) < 1
    for share in (0.05, 0.1, 0.5):
        assert sum(split_of(str(n), share) == "test" for n in range(20_000)) / 20_000 == pytest.approx(share, abs=0.01)
    assert split_of("x", 0.0) == "train"
    assert split_of("x", 1.0) == "test"
