"""What the ranks of a group agree on before their plans: here, what the hosts' devices report."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest

from ncclx_py.errors import CollectiveError
from ncclx_py.plans.spec import Facts
from ncclx_py.plans.topology import Topology
from ncclx_py.runtime import basis

pytestmark = pytest.mark.unit

HOSTS = (0, 0, 1, 1)
REPORTS = {0: 2.5e9, 1: 9.9e9, 2: 1.25e9, 3: 9.9e9}  # by rank; only a host's first rank is heard


def topologies(monkeypatch: pytest.MonkeyPatch, hosts: tuple[int, ...], env: Mapping[str, str]) -> list[Topology]:
    """The topology that each rank arrives at."""
    said = []
    for rank in range(len(hosts)):
        monkeypatch.setattr(basis, "_own_facts", lambda env, gpus, rank=rank: Facts(None, (REPORTS[rank],), "devices"))
        said.append(basis.says(rank, env))
    return [agreed(rank, hosts, env, said).topology for rank in range(len(hosts))]


def agreed(rank: int, hosts: tuple[int, ...], env: Mapping[str, str], said: list[Any]) -> basis.Basis:
    """What a rank arrives at; without files nothing is asked of the store, so there is none."""
    member = basis.Membership("test", rank, tuple(range(len(hosts))), True)
    return basis.agree(member, None, timedelta(seconds=20), env, hosts, 1, said)


def test_all_ranks_take_the_nic_speeds_that_the_hosts_report(monkeypatch: pytest.MonkeyPatch) -> None:
    found = topologies(monkeypatch, HOSTS, {})
    assert len(found) == 4
    for topology in found:
        assert [topology.nic(host, 0) for host in (0, 1)] == [2.5e9, 1.25e9]


def test_one_host_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    found = topologies(monkeypatch, (0, 0), {})
    assert [topology.inter.bandwidth for topology in found] == [Topology((0, 0)).inter.bandwidth] * 2


def test_groups_on_the_same_ground_share_what_has_been_chosen() -> None:
    said = [basis.says(rank, {}) for rank in range(4)]
    first, second = (agreed(rank, HOSTS, {}, said) for rank in (0, 1))
    assert first.tuner is second.tuner
    assert agreed(0, (0, 0, 0, 1), {}, said).tuner is not first.tuner
    env = {"NCCLX_DETERMINISTIC": "1"}
    ordered = agreed(0, HOSTS, env, [basis.says(rank, env) for rank in range(4)])
    assert ordered.tuner is not first.tuner
    assert ordered.tuner.deterministic


@pytest.mark.parametrize("odd", [0, 2])
def test_an_error_or_a_difference_is_the_same_on_all_ranks(odd: int) -> None:
    def texts(env: Mapping[str, str]) -> set[str]:
        said = [basis.says(rank, env if rank == odd else {}) for rank in range(4)]
        found = set()
        for rank in range(4):
            with pytest.raises(CollectiveError) as caught:
                agreed(rank, HOSTS, env if rank == odd else {}, said)
            found.add(str(caught.value))
        return found

    (wrong,) = texts({"NCCLX_LOG": "yes"})
    assert f"rank {odd} reports: NCCLX_LOG='yes' is neither 0 nor 1" in wrong
    (differs,) = texts({"NCCLX_RULES": "/somewhere"})
    others = ", ".join(str(rank) for rank in range(4) if rank != odd)
    assert "disagree about NCCLX_RULES" in differs
    assert f"ranks {others} have none" in differs
    assert f"ranks {odd} have set" in differs


def test_only_what_rank_0_has_verified_counts() -> None:
    said = [basis.says(rank, {}) for rank in range(2)]
    said[0][3], said[1][3] = ["a", "b"], ["c"]
    assert [agreed(rank, (0, 0), {}, said).verified for rank in range(2)] == [{"a", "b"}] * 2
