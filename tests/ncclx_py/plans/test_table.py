"""Tables of measured times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ncclx_py.plans.cost import estimate
from ncclx_py.plans.problems import uniform
from ncclx_py.plans.table import Corrections, Row, Table, read_table, signature
from ncclx_py.plans.topology import Topology

pytestmark = pytest.mark.unit

TOPOLOGY = Topology((0, 0, 1), 2)
ROW: dict[str, Any] = {
    "collective": "all_reduce",
    "bytes": 1 << 20,
    "topology": signature(TOPOLOGY),
    "algorithm": "pipelined",
    "parameters": {"chunks": 4},
    "median_s": 0.5,
    "correct": True,
}


def modelled(size: int, algorithm: str = "pipelined", **parameters: int) -> float:
    return estimate(uniform("all_reduce", 3, size, 4), TOPOLOGY, 4, algorithm, parameters)


def test_signature() -> None:
    assert signature(TOPOLOGY) == "hosts 2+1, rails 2"


def test_a_table_is_read_back(tmp_path: Path) -> None:
    table = Table((Row(**ROW), Row(**{**ROW, "correct": False})))
    path = tmp_path / "table.json"
    path.write_text(table.to_json())
    assert read_table(path).rows == table.rows


def test_ratios_are_interpolated_over_the_logarithm_of_the_size_and_held_at_the_ends() -> None:
    rows = tuple(
        Row(**{**ROW, "bytes": size, "median_s": factor * modelled(size, chunks=4)})
        for size, factor in ((1 << 16, 8.0), (1 << 20, 2.0))
    )
    corrections = Corrections(Table(rows), TOPOLOGY)
    sizes = (1 << 10, 1 << 16, 1 << 18, 1 << 20, 1 << 24)
    found = [corrections.ratio("all_reduce", "pipelined", {"chunks": 4}, size) for size in sizes]
    assert found == pytest.approx([8, 8, 4, 2, 2])
    assert corrections.ratio("all_reduce", "pipelined", {"chunks": 2}, 1 << 18) == pytest.approx(4)
    assert corrections.ratio("all_reduce", "ring", {}, 1 << 18) is None
    assert corrections.ratio("broadcast", "chain", {"chunks": 4}, 1 << 18) is None


def test_parameters_have_ratios_of_their_own() -> None:
    rows = tuple(
        Row(**{**ROW, "parameters": {"chunks": chunks}, "median_s": factor * modelled(1 << 20, chunks=chunks)})
        for chunks, factor in ((2, 3.0), (8, 12.0))
    )
    corrections = Corrections(Table(rows), TOPOLOGY)
    found = [corrections.ratio("all_reduce", "pipelined", {"chunks": chunks}, 1 << 20) for chunks in (2, 8, 4)]
    assert found == pytest.approx([3, 12, 6])


def test_rows_of_other_topologies_say_nothing() -> None:
    corrections = Corrections(Table((Row(**ROW),)), Topology((0, 0, 0)))
    assert not corrections.covers("all_reduce")
    assert corrections.unmeasured("all_reduce", "ring", 5) == ""


BAD: list[tuple[Any, str]] = [
    ("[", "is not JSON"),
    ("[]", "must be an object"),
    ({"format": 2, "rows": []}, "must be an object"),
    ({"format": 1, "rows": {}}, "must be an object"),
    ([3], "row 0: it must have exactly the keys"),
    ([{**ROW, "extra": 1}], "row 0: it must have exactly the keys"),
    ([ROW, {key: value for key, value in ROW.items() if key != "bytes"}], "row 1: it must have exactly the keys"),
    ([{**ROW, "bytes": "1MiB"}], "bytes = '1MiB' has the wrong type"),
    ([{**ROW, "bytes": True}], "bytes = True has the wrong type"),
    ([{**ROW, "correct": 1}], "correct = 1 has the wrong type"),
    ([{**ROW, "algorithm": "magic"}], "no algorithm 'magic'"),
    ([{**ROW, "collective": "all_shrug"}], "no algorithm 'pipelined' for 'all_shrug'"),
    ([{**ROW, "parameters": {"depth": 2}}], "parameter depth = 2; it has chunks"),
    ([{**ROW, "parameters": {"chunks": 0}}], "parameter chunks = 0"),
    ([{**ROW, "bytes": 0}], "must be above zero"),
    ([{**ROW, "median_s": 0.0}], "must be above zero"),
    ([{**ROW, "median_s": float("nan")}], "must be above zero"),
]


@pytest.mark.parametrize(("content", "words"), BAD)
def test_a_wrong_table_is_refused_with_its_name_and_row(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "table.json"
    whole = {"format": 1, "rows": content} if isinstance(content, list) else content
    path.write_text(whole if isinstance(whole, str) else json.dumps(whole))
    with pytest.raises(ValueError, match=words) as caught:
        read_table(path)
    assert "table.json" in str(caught.value)


def test_a_missing_table_is_named() -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json cannot be read"):
        read_table("nowhere.json")
