"""The order of samples: exact, resumable at any sample, the same for any number of ranks, with no state.

Sample number i (0, 1, 2, … over all epochs) maps to a dataset index by arithmetic alone. To resume, a run needs to
remember how many samples it has consumed and nothing else; to shard, each rank takes its slice of the same global
batch. Example::

    order = SampleOrder(len(task), seed=1)
    indices = order.indices(start=step * 32, count=32)
    mine = shard(indices, rank, world_size)
"""

import hashlib
from collections.abc import Sequence
from math import isqrt
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Words = NDArray[np.uint64]

MAX_SIZE = 2**62
_ROUNDS = 8


class SampleOrder:
    """A fresh permutation of ``range(size)`` for each epoch, seeded by (seed, epoch), computed in O(1) memory.

    The permutation is a Feistel network on Z_a × Z_b (a·b just above ``size``; Black & Rogaway, "Ciphers with
    arbitrary finite domains", 2002): each round adds a keyed hash of one half to the other, which is a bijection
    whatever the hash. Values that land outside ``range(size)`` walk on through the network until they are inside,
    which keeps it a bijection of the range.
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True) -> None:
        if not 1 <= size <= MAX_SIZE:
            raise ValueError(f"cannot order {size} samples: the dataset must have 1 to {MAX_SIZE}")
        self.size = size
        self.seed = seed
        self.shuffle = shuffle

    def indices(self, start: int, count: int) -> list[int]:
        """Dataset indices of ``count`` samples from ``start`` on, across epochs. Raises ValueError below zero."""
        if start < 0 or count < 0:
            raise ValueError(f"sample numbers start at 0 and counts too: got start={start}, count={count}")
        result: list[int] = []
        while count:
            epoch, offset = divmod(start, self.size)
            length = min(count, self.size - offset)
            result.extend(self._slice(epoch, offset, length))
            start, count = start + length, count - length
        return result

    def epoch(self, start: int) -> float:
        """How many epochs have been consumed before sample ``start``."""
        return start / self.size

    def _slice(self, epoch: int, offset: int, length: int) -> list[int]:
        if not self.shuffle:
            return list(range(offset, offset + length))
        values = np.arange(offset, offset + length, dtype=np.uint64)
        keys = _round_keys(self.seed, epoch)
        outside = np.ones(length, dtype=bool)
        while outside.any():
            values[outside] = _feistel(values[outside], self.size, keys)
            outside = values >= self.size
        return [int(value) for value in values]


def shard(global_batch: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """The contiguous slice of ``global_batch`` that belongs to ``rank``.

    Raises:
        ValueError: ``rank`` is not one of the ranks, or the batch does not divide among them.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} does not exist among {world_size} ranks")
    share, rest = divmod(len(global_batch), world_size)
    if rest:
        raise ValueError(
            f"a global batch of {len(global_batch)} samples does not divide among {world_size} ranks: "
            f"use a multiple of {world_size}, such as {(share + 1) * world_size}"
        )
    return global_batch[rank * share : (rank + 1) * share]


def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    digest = hashlib.shake_256(f"distill/order/{seed}/{epoch}".encode()).digest(8 * _ROUNDS)
    return [np.uint64(int.from_bytes(digest[8 * i : 8 * i + 8], "big")) for i in range(_ROUNDS)]


def _feistel(values: Words, size: int, keys: list[np.uint64]) -> Words:
    """One pass through the network on [0, a·b), a·b ≥ size."""
    a = max(isqrt(size - 1) + 1, 2)
    b = max(-(-size // a), 2)
    left, right = values // np.uint64(b), values % np.uint64(b)
    for number, key in enumerate(keys):
        if number % 2:
            right = (right + _mix(left ^ key) % np.uint64(b)) % np.uint64(b)
        else:
            left = (left + _mix(right ^ key) % np.uint64(a)) % np.uint64(a)
    return left * np.uint64(b) + right


def _mix(words: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea & Flood, 2014): every input bit reaches every output bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
