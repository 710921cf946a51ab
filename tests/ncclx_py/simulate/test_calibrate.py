"""What a machine costs, found again from calls that a known machine was played to take."""

from __future__ import annotations

import pytest

from ncclx_py.plans.algorithms.registry import build
from ncclx_py.plans.problems import uniform
from ncclx_py.plans.topology import Link, Topology
from ncclx_py.simulate.calibrate import Shot, calibrate
from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.machine import Machine
from ncclx_py.simulate.shared import call_seconds

pytestmark = pytest.mark.unit

TRUE = Machine(2, local=9e-5, remote=3e-5, wake=2e-5, call=2e-4, copy=3e-10, wire=2e-9)
TOPOLOGY = Topology((0, 0, 1, 1), 1, Link(2e-4, 1e9), Link(2e-4, 1e9))


def shots(machine: Machine, sizes: tuple[int, ...]) -> list[Shot]:
    wide = Topology(TOPOLOGY.host_of, 1, TOPOLOGY.intra, Link(2e-4, 1e15))
    found = []
    for collective, names in (
        ("all_reduce", ("ring", "leader", "halving_doubling")),
        ("all_to_all", ("bruck", "two_level")),
    ):
        for name in names:
            for size in sizes:
                plan = build(uniform(collective, 4, size, 4), TOPOLOGY, name, {})  # type: ignore[arg-type]
                found.append(Shot(plan, call_seconds(plan, 4, Cluster(wide), machine)))
    return found


def test_costs_are_found_again_although_a_shot_is_wrong() -> None:
    known = shots(TRUE, (4 << 10, 1 << 20))
    known[3] = Shot(known[3].plan, 4 * known[3].seconds)  # somebody else had the processor
    found = calibrate(known, TOPOLOGY, 2)
    for shot in shots(TRUE, (64 << 10,)):  # at a size that it has not seen
        again = call_seconds(
            shot.plan, 4, Cluster(Topology(TOPOLOGY.host_of, 1, TOPOLOGY.intra, Link(2e-4, 1e15))), found
        )
        assert again == pytest.approx(shot.seconds, rel=0.1)
    assert found.call == pytest.approx(TRUE.call, rel=0.5)
    assert found.wire == pytest.approx(TRUE.wire, rel=0.5)


def test_nothing_to_calibrate_with_is_an_error() -> None:
    with pytest.raises(ValueError, match="no timed call"):
        calibrate([], TOPOLOGY, 2)
