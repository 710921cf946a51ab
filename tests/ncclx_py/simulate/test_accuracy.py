"""How predictions are compared with measurements: figures worked out by hand."""

from __future__ import annotations

import pytest

from ncclx_py.plans.spec_file import place
from ncclx_py.plans.table import Row
from ncclx_py.plans.topology import Link, Topology
from ncclx_py.simulate.accuracy import Point, predict, summarise

pytestmark = pytest.mark.unit


def point(algorithm: str, measured: float, predicted: float, size: int = 1024) -> Point:
    return Point("2x2 200mbit", "all_reduce", size, algorithm, {}, measured, predicted)


def test_errors_and_winners() -> None:
    points = [
        point("ring", 1.0, 1.1),  # 10 % off; predicted winner, but 4 % behind the best
        point("leader", 0.96, 1.2),  # 25 %
        point("direct", 2.0, 1.9),  # 5 %
        point("ring", 1.0, 1.0, 2048),  # right, and the winner
        point("leader", 3.0, 1.5, 2048),  # 50 %
        point("ring", 1.0, 1.0, 4096),  # alone: no contest
    ]
    found = summarise(points)
    assert found.points == 6
    assert found.median_error == pytest.approx((0.05 + 0.1) / 2)
    assert found.p90_error == pytest.approx(0.5)
    assert (found.contests, found.winners, found.near_winners) == (2, 1, 2)


def test_ranks_that_share_cores_take_longer_over_what_they_do_themselves() -> None:
    topology = Topology(place([4, 4], "block"), 1, Link(1e-4, 1e9), Link(2e-4, 1e8))
    row = Row("all_reduce", 4096, "", "hierarchical", {}, 1.0, True)
    alone, crowded = predict(row, topology, 8), predict(row, topology, 2)
    assert alone < crowded <= 4 * alone
    large = Row("all_reduce", 64 << 20, "", "hierarchical", {}, 1.0, True)
    assert predict(large, topology, 2) == pytest.approx(predict(large, topology, 8), rel=0.01)  # bytes decide
