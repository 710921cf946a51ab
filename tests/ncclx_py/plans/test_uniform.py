"""The figures of large uniform clusters, against the general ones on clusters small enough for those."""

from __future__ import annotations

import pytest

from ncclx_py.plans.bounds import even_all_to_all_bound, lower_bound
from ncclx_py.plans.cost_all_to_all import Traffic
from ncclx_py.plans.problems import uniform
from ncclx_py.plans.spec_file import place
from ncclx_py.plans.topology import Topology
from ncclx_py.plans.uniform import LARGE, UniformWires, is_uniform, wires
from ncclx_py.plans.wires import Wires

pytestmark = pytest.mark.unit

WORLDS = {
    "4x4, 4 rails": Topology(place([4] * 4, "block"), 4),
    "8x2": Topology(place([2] * 8, "block")),
    "16x8, 2 rails": Topology(place([8] * 16, "block"), 2, memory=3e10),
    "32x1": Topology(place([1] * 32, "block")),
    "one host": Topology((0,) * 8),
}


@pytest.mark.parametrize("world", WORLDS)
def test_one_host_stands_for_all(world: str) -> None:
    topology = WORLDS[world]
    exact, short = Wires(topology), UniformWires(topology)
    for mine, theirs in (
        (short.partners, exact.partners),
        (short.shifts[:-1], exact.shifts[:-1]),  # the last reaches around half the ring
        (short.halving[0], exact.halving[0]),
    ):
        assert [tuple(map(float, one)) for one in mine] == [pytest.approx(tuple(one)) for one in theirs]
    assert short.halving[1] == exact.halving[1]
    assert short.ring_step(1e6) == pytest.approx(exact.ring_step(1e6))
    if len(topology.hosts) > 1:
        assert short.cut == pytest.approx(exact.cut)
        assert short.columns == pytest.approx(exact.columns)
        crossed, inside, busiest = exact.trees
        assert short.trees[2] == pytest.approx(busiest)
        assert abs(short.trees[0] - crossed) <= 1
        assert abs(short.trees[1] - inside) <= 1


@pytest.mark.parametrize("world", WORLDS)
def test_even_traffic_without_a_matrix(world: str) -> None:
    topology = WORLDS[world]
    problem = uniform("all_to_all", topology.size, 64 * topology.size * 4, 4)
    assert tuple(Traffic.even(256, topology)) == pytest.approx(tuple(Traffic.of(problem, topology, 4)))
    exact, short = lower_bound(problem, topology, 4), even_all_to_all_bound(256, topology)
    assert (short.seconds, short.name) == (pytest.approx(exact.seconds), exact.name)


def test_hosts_that_differ_are_not_uniform() -> None:
    assert not is_uniform(Topology(place([4, 2], "block")))
    assert not is_uniform(Topology(place([2, 2], "cyclic")))
    assert not is_uniform(Topology(place([2, 2], "block"), nics=((1e9,), (5e8,))))
    assert is_uniform(Topology(place([2, 2], "block"), nics=((1e9,), (1e9,))))


def test_large_worlds_take_the_short_way() -> None:
    assert isinstance(wires(Topology(place([8] * (LARGE // 8), "block"))), UniformWires)
    assert not isinstance(wires(Topology(place([8] * 4, "block"))), UniformWires)
