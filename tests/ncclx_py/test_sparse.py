"""Sums of sparse tensors, against those of the dense ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import Rank, RankPool, load

from ncclx_py import CollectiveError

failing = load(Path(__file__).with_name("test_failures.py"), "failures").failing

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


def sparse_sums(me: Rank) -> str:
    """Against the sum of the dense tensors."""
    me.init(fresh=True)
    for number, (shape, sparse_dims, dtype) in enumerate(
        [
            ((50,), 1, torch.float32),
            ((20, 3), 1, torch.float64),
            ((6, 7, 2), 2, torch.int64),
            ((9, 2), 1, torch.float16),
        ]
    ):
        tensors = []
        for rank in range(me.size):
            torch.manual_seed(number * 10 + rank)
            entries = 0 if rank == 1 else 5 * rank + 1  # with repeated indices
            indices = torch.stack([torch.randint(0, length, (entries,)) for length in shape[:sparse_dims]])
            values = torch.randint(-4, 5, (entries, *shape[sparse_dims:])).to(dtype)
            tensors.append(torch.sparse_coo_tensor(indices, values, shape, check_invariants=True))
        expected = sum(tensor.to_dense().double() for tensor in tensors)
        mine = tensors[me.rank]
        work = dist.all_reduce(mine, async_op=bool(number % 2))
        if work is not None:
            work.get_future().wait()
        assert mine.is_coalesced()
        assert torch.equal(mine.to_dense().double(), expected), (number, mine, expected)
    with pytest.raises((TypeError, CollectiveError), match="only be summed"):
        dist.all_reduce(torch.eye(2).to_sparse(), op=dist.ReduceOp.MAX)
    return failing(lambda: dist.all_reduce(torch.eye(2 + me.rank // 3).to_sparse()))[1]


def test_sparse_sums_are_those_of_dense_tensors(pool: RankPool) -> None:
    for message in pool.run(sparse_sums):
        assert "rank 0 gives a sparse float32 of shape [2, 2]" in message
        assert "rank 3 gives a sparse float32 of shape [3, 3]" in message
