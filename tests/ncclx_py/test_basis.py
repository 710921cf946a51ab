"""What the ranks of a group agree on before their plans: here, what the hosts' devices report."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import timedelta

import pytest
import torch.distributed as dist

from ncclx_py.plans.spec import Facts
from ncclx_py.plans.topology import Topology
from ncclx_py.runtime import basis

pytestmark = pytest.mark.unit

HOSTS = (0, 0, 1, 1)
REPORTS = {0: 2.5e9, 1: 9.9e9, 2: 1.25e9, 3: 9.9e9}  # by rank; only a host's first rank is heard


def topologies(monkeypatch: pytest.MonkeyPatch, hosts: tuple[int, ...], env: Mapping[str, str]) -> list[Topology]:
    """The topology that each rank arrives at, the ranks being threads."""
    store = dist.HashStore()
    here = threading.local()
    monkeypatch.setattr(basis, "host_facts", lambda env, gpus: Facts(None, (REPORTS[here.rank],), "devices"))
    found: list[Topology | None] = [None] * len(hosts)

    def join(rank: int) -> None:
        here.rank = rank
        member = basis.Membership("test", rank, tuple(range(len(hosts))), True)
        found[rank] = basis.agree(member, store, timedelta(seconds=20), env, hosts, 1).topology

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [topology for topology in found if topology is not None]


def test_all_ranks_take_the_nic_speeds_that_the_hosts_report(monkeypatch: pytest.MonkeyPatch) -> None:
    found = topologies(monkeypatch, HOSTS, {})
    assert len(found) == 4
    for topology in found:
        assert [topology.nic(host, 0) for host in (0, 1)] == [2.5e9, 1.25e9]


def test_one_host_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    found = topologies(monkeypatch, (0, 0), {})
    assert [topology.inter.bandwidth for topology in found] == [Topology((0, 0)).inter.bandwidth] * 2
