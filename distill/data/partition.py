"""Train and test kept apart by construction: the text of a problem itself decides which side it belongs to.

A problem's keyed hash is a number in [0, 1); problems below the test share can only ever be test problems. Two splits
drawn this way share no problem whatever their seeds, sizes and options are, also across runs: a teacher trained with
one seed and a student evaluated with another stay clean. Nothing has to be stored or compared.
"""

import hashlib
from typing import Literal

Split = Literal["train", "test"]

TEST_SHARE = 0.1
_KEY = b"distill/split/1"


def unit_hash(text: str | bytes) -> float:
    """A number in [0, 1) that depends on ``text`` alone, the same on every machine and Python version."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    digest = hashlib.blake2b(data, digest_size=8, key=_KEY).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def split_of(text: str | bytes, test_share: float = TEST_SHARE) -> Split:
    """The split that a problem with this text belongs to."""
    return "test" if unit_hash(text) < test_share else "train"
