"""One pool of ranks for all tests of this folder: starting Python and torch takes longer than most of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    with RankPool(6) as ranks:
        yield ranks
