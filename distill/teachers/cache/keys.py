"""The name of a sequence in a cache: a hash of what its scores depend on, and of nothing else.

A causal teacher's scores follow from the ids that it read, up to the last supervised token, and from which of them are
supervised. How the sequence was laid out, which rank held it, which example it came from and what follows the last supervised
token do not matter, so a text is scored once however often and wherever it appears.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np

from distill.data.batch import TokenBatch

KEY_BYTES = 16

Keys = list[
    tuple[bytes, int] | None
]  # of the sequences of a batch: key and supervised tokens; None: no supervised token


def batch_keys(batch: TokenBatch) -> Keys:
    """Of each of the batch's S sequences, in order."""
    ids, positions, index = (t.cpu().numpy() for t in (batch.input_ids, batch.position_ids, batch.target_index))
    count = len(batch.example_ids)
    ends = np.searchsorted(batch.sequence_index.cpu().numpy(), np.arange(count), side="right")
    found: Keys = []
    for begin, end in pairwise([0, *ends]):
        if begin == end:
            found.append(None)
            continue
        row, columns = index[begin, 0], index[begin:end, 1]
        start = columns[0] - positions[row, columns[0]]
        found.append((key_of(ids[row, start : columns[-1] + 2], columns - start + 1), int(end - begin)))
    return found


def key_of(ids: np.ndarray, places: np.ndarray) -> bytes:
    """The key of ``ids`` (int64, the last one supervised) whose supervised tokens stand at ``places`` (int64, ascending)."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES, person=b"distill cache 1")
    digest.update(len(ids).to_bytes(8, "little"))
    digest.update(ids.astype("<i8").tobytes())
    digest.update(places.astype("<i8").tobytes())
    return digest.digest()
