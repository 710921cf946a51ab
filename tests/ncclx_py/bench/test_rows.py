"""What is computed from times: bandwidths, bounds and percentiles; and how rows are written, read, ordered and drawn."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from ncclx_py.bench.plot import draw
from ncclx_py.bench.rows import (
    Row,
    Subject,
    as_table,
    busbw_factor,
    crossing_bytes,
    ordered,
    placement_of,
    read_json,
    write_json,
)
from ncclx_py.bench.settings import Settings, sizes_between
from ncclx_py.bench.timing import Times, percentile, times_of
from ncclx_py.plans.plan import Problem
from ncclx_py.plans.topology import Link, Topology

pytestmark = pytest.mark.unit

FIELDS = (
    "collective bytes backend placement hosts ranks_per_host rails algorithm reason median_s p95_s algbw_GBps busbw_GBps "
    "interbw_GBps bound_s pct_of_bound correct"
)
MIB = 1 << 20
LINK = Link(alpha=1e-4, bandwidth=25e6)  # 200 Mbit/s


def test_a_row_of_an_all_reduce_on_two_hosts_of_four() -> None:
    topology = Topology((0,) * 4 + (1,) * 4, inter=LINK)
    problem = Problem("all_reduce", 8, count=4 * MIB)
    row = Subject("all_reduce", 16 * MIB, problem, topology, 4).row("ncclx", Times(0.75, 0.7, 0.8), True, "ring", "why")
    assert (row.hosts, row.ranks_per_host, row.rails, row.placement) == (2, 4, 1, "block")
    assert (row.median_s, row.p95_s, row.algorithm, row.reason, row.correct) == (0.75, 0.8, "ring", "why", True)
    assert row.bound_s == pytest.approx(16 * MIB / 25e6)  # 2(N−1)/N · n over one NIC
    assert row.pct_of_bound == pytest.approx(100 * 16 * MIB / 25e6 / 0.75)
    assert row.algbw_GBps == pytest.approx(16 * MIB / 0.75 / 1e9)
    assert row.busbw_GBps == pytest.approx(2 * 7 / 8 * 16 * MIB / 0.75 / 1e9)
    assert row.interbw_GBps == pytest.approx(16 * MIB / 0.75 / 1e9)


def test_the_bound_is_that_of_bandwidth_and_not_of_latency() -> None:
    topology = Topology((0, 1), inter=Link(alpha=10.0, bandwidth=25e6))
    row = Subject("all_reduce", 4, Problem("all_reduce", 2, count=1), topology, 4).row("gloo", Times(1, 1, 1), None)
    assert row.bound_s == pytest.approx(4 / 25e6)


def test_what_has_to_cross_is_that_of_the_busiest_host() -> None:
    for hosts, ranks in ((2, 4), (4, 2), (3, 1)):
        size = hosts * ranks
        topology = Topology(tuple(rank // ranks for rank in range(size)))
        assert crossing_bytes(Problem("all_reduce", size, count=600), topology, 4) == 4 * 600 * 2 * (hosts - 1) / hosts
        uniform = Problem("all_to_all", size, matrix=((5,) * size,) * size)
        assert crossing_bytes(uniform, topology, 4) == 4 * 5 * ranks * (size - ranks)
    uneven = Topology((0, 0, 0, 1))
    assert crossing_bytes(Problem("all_gather", 4, counts=(10,) * 4), uneven, 1) == 30
    assert crossing_bytes(Problem("all_reduce", 4, count=10), Topology((0,) * 4), 4) == 0


def test_rails_share_what_crosses() -> None:
    topology = Topology((0, 0, 1, 1), rails=2, inter=LINK)
    row = Subject("all_reduce", 4000, Problem("all_reduce", 4, count=1000), topology, 4).row("x", Times(1, 1, 1), None)
    assert row.interbw_GBps == pytest.approx(2000 / 1e9)
    assert row.bound_s == pytest.approx(4000 / 50e6)


def test_busbw_factors_are_those_of_nccl_tests() -> None:
    assert busbw_factor("all_reduce", 8) == 2 * 7 / 8
    assert {busbw_factor(name, 4) for name in ("reduce_scatter", "all_gather", "all_to_all", "all_to_all_v")} == {3 / 4}
    assert {busbw_factor(name, 4) for name in ("broadcast", "reduce")} == {1.0}


def test_the_median_is_of_the_slowest_rank_and_percentiles_are_of_all() -> None:
    times = times_of([[1.0, 9.0, 2.0], [4.0, 1.0, 3.0]])
    assert (times.median, times.p50, times.p95) == (4.0, 2.5, 9.0)
    assert [percentile(range(1, 101), percent) for percent in (0, 50, 95, 100)] == [1, 50, 95, 100]
    assert percentile([7.0], 95) == 7.0


@pytest.mark.parametrize(
    ("host_of", "placement"),
    [
        ((0, 0, 1, 1), "block"),
        ((0, 0, 0), "block"),
        ((0, 1, 0, 1), "cyclic"),
        ((0, 1, 0, 0), "cyclic"),
        ((0, 1, 1, 0), "mixed"),
    ],
)
def test_placements_are_recognised(host_of: tuple[int, ...], placement: str) -> None:
    assert placement_of(host_of) == placement


def test_rows_are_written_with_exactly_the_published_fields_and_read_back(tmp_path: Path) -> None:
    rows = [_row(), _row(ranks_per_host=[4, 2], correct=None)]
    file = tmp_path / "rows.json"
    write_json(rows, file)
    assert [list(entry) for entry in json.loads(file.read_text())] == [FIELDS.split()] * 2
    assert FIELDS.split() == [field.name for field in fields(Row)]
    assert read_json(file) == rows
    file.write_text('[{"collective": "all_reduce"}]')
    with pytest.raises(ValueError, match=r"rows\.json is not a list of benchmark rows"):
        read_json(file)


def test_rows_of_one_size_stand_together_whoever_was_measured_last() -> None:
    rows = [_row(bytes=1), _row(bytes=2), _row(placement="cyclic"), _row(bytes=1, backend="openmpi")]
    assert [(row.placement, row.bytes, row.backend) for row in ordered(rows)] == [
        ("block", 1, "ncclx"),
        ("block", 1, "openmpi"),
        ("block", 2, "ncclx"),
        ("cyclic", 1024, "ncclx"),
    ]


def test_the_table_says_what_is_wrong_and_why_an_algorithm_ran() -> None:
    lines = as_table([_row(), _row(correct=False, reason="model: 1 ms", hosts=1, interbw_GBps=0.0)]).splitlines()
    assert len({line.index("algorithm") if "algorithm" in line else line.index("ring") for line in lines}) == 1
    assert "yes" in lines[1]
    assert "NO" in lines[2]
    assert lines[2].endswith("ring (model: 1 ms)")


def test_a_plot_is_a_png_with_a_panel_for_each_collective_and_placement(tmp_path: Path) -> None:
    rows = [_row(bytes=size, collective=name) for size in (1, 8) for name in ("all_reduce", "all_gather")]
    file = tmp_path / "plot.png"
    draw([*rows, *(_row(placement="cyclic", bound_s=0.0, collective=row.collective) for row in rows)], file)
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 10_000


def test_sizes_are_a_geometric_series_that_includes_its_ends() -> None:
    assert sizes_between(1024, 1 << 20, 32) == (1024, 32768, 1 << 20)
    assert sizes_between(10, 10, 2) == (10,)
    assert sizes_between(1, 3, 1.1) == (1, 2, 3)
    for wrong in ((0, 4, 2), (8, 4, 2), (1, 4, 1)):
        with pytest.raises(ValueError, match=r"Sizes from|-f 1"):
            sizes_between(*wrong)


def test_settings_travel_as_json_and_refuse_what_cannot_be_measured() -> None:
    settings = Settings(("all_reduce", "reduce"), (1, 2), ("gloo",), op="max", skew=0.5)
    assert Settings.from_json(settings.to_json()) == settings
    for changes, complaint in (
        ({"collectives": ("scan",)}, "collective 'scan' is none of all_reduce"),
        ({"backends": ("ucx",)}, "backend 'ucx' is none of ncclx, gloo, nccl, openmpi"),
        ({"iters": 0}, "0 iterations"),
        ({"skew": 1.5}, r"skew 1\.5"),
        ({"op": "avg"}, "gloo has no avg"),
        ({"backends": ("nccl",)}, "nccl carries no CPU tensors"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Settings(**{"collectives": ("all_reduce",), "sizes": (1,), **changes})


def _row(**changes: object) -> Row:
    values = ("all_reduce", 1024, "ncclx", "block", 2, 4, 1, "ring", "", 1e-3, 2e-3, 1.0, 1.75, 0.5, 5e-4, 50.0, True)
    return Row(**{**dict(zip(FIELDS.split(), values, strict=True)), **changes})
