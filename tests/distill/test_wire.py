"""What ranks tell each other arrives as it was, and bytes from others can become nothing but plain values."""

from __future__ import annotations

import json
import math
import pickle
import random
import re
import struct
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from harness import Rank, RankPool

from distill.wire import WireError, decode, encode, travels

pytestmark = pytest.mark.unit


@travels
class Colour(Enum):
    RED = "red"


@travels
@dataclass
class Fact:
    number: int
    notes: dict[int, tuple[float, ...]] = field(default_factory=dict)
    colour: Colour | None = None


@dataclass
class Secret:
    command: str


def some(draw: random.Random, depth: int = 4) -> Any:
    """A random value of every kind that travels."""
    plain = [
        None, True, False, 0, -(1 << 70), "", "é\n\ud83d", b"", b"\x00\xff", Path("a/b"), Colour.RED,
        struct.unpack("d", draw.randbytes(8))[0], math.inf, -0.0, 5e-324,
    ]  # fmt: skip
    if depth == 0:
        return draw.choice(plain)
    size = draw.randrange(4)
    return draw.choice(
        [
            lambda: draw.choice(plain),
            lambda: [some(draw, depth - 1) for _ in range(size)],
            lambda: tuple(some(draw, depth - 1) for _ in range(size)),
            lambda: {draw.randrange(9) for _ in range(size)},
            lambda: {(draw.randrange(9), "k"): some(draw, depth - 1) for _ in range(size)},
            lambda: Fact(draw.randrange(9), {3: (draw.random(),)}, draw.choice([None, Colour.RED])),
        ]
    )()


def test_values_come_back_as_they_were() -> None:
    draw = random.Random(5)
    for _ in range(2000):
        value = some(draw)
        found = decode(encode(value))
        assert repr(found) == repr(value)  # of the same types; and NaN is not equal to itself
        assert type(found) is type(value)


def test_only_what_is_marked_travels() -> None:
    for value in (Secret("rm"), object(), 1j, [Secret("x")], {"x": print}, frozenset()):
        with pytest.raises(WireError, match="cannot travel"):
            encode(value)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff", b"{", b"[" * 100_000, b"{}", b'{"a":1,"b":2}', b'{"dict":[[[],1]]}', b'{"dict":[[1]]}', b'{"dict":7}',
        b'{"bytes":"?"}', b'{"path":7}', b'{"os.system":["true"]}', pickle.dumps(1),
        json.dumps({f"{Secret.__module__}.Secret": ["true"]}).encode(),
        json.dumps({f"{Fact.__module__}.Fact": [1]}).encode(),
        json.dumps({f"{Fact.__module__}.Fact": 7}).encode(),
        json.dumps({f"{Colour.__module__}.Colour": "blue"}).encode(),
    ],
)  # fmt: skip
def test_other_bytes_are_an_error(data: bytes) -> None:
    with pytest.raises(WireError):
        decode(data)


def agree(me: Rank) -> tuple[list[Any], Any, list[Any]]:
    from distill.distributed import from_rank_0, gathered

    me.init("ncclx")
    mine = {"rank": me.rank, "long": "x" * (1000 * me.rank), "where": Path("a")}
    return gathered(mine), from_rank_0(mine if me.rank == 0 else None), gathered(None)


@pytest.mark.dist
def test_ranks_gather_values_of_different_lengths(two_ranks: RankPool) -> None:
    everyone = [{"rank": rank, "long": "x" * (1000 * rank), "where": Path("a")} for rank in range(2)]
    assert two_ranks.run(agree) == [(everyone, everyone[0], [None, None])] * 2


def test_no_module_unpickles_what_peers_or_files_say() -> None:
    """torch's own calls for objects do; weights are loaded with ``weights_only``."""
    packages = ["distill", "distill.kernels", "ncclx_py", "ncclx_py.launch"]
    folders = {folder for name in packages for folder in import_module(name).__path__}
    files = [file for folder in folders for file in Path(folder).rglob("*.py")]
    assert len(files) > 300
    unsafe = re.compile(
        r"pickle\.loads?\(|_object\((?=\w+, )|_object_list\(|weights_only=False|torch\.load\((?![^)]*weights_only)"
    )
    found = [f"{file}: {match[0]}" for file in files for match in unsafe.finditer(file.read_text())]
    assert found == []
