"""The streams of the sharing probe: who sends to whom, and that both ends agree."""

from __future__ import annotations

from collections import Counter

import pytest

from ncclx_py.bench.sharing import patterns, stream_plan
from ncclx_py.plans.topology import Topology

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("host_of", "per_nic"),
    [
        ((0, 0, 1, 1, 2, 2, 3, 3), [1, 3, 12]),
        ((0, 0, 0, 0, 1, 1, 1, 1), [1, 16]),
        ((0, 1), [1]),
        ((0, 0, 0, 1), [1, 3]),
    ],
)
def test_more_and_more_streams_per_nic(host_of: tuple[int, ...], per_nic: list[int]) -> None:
    topology = Topology(host_of)
    found = []
    for streams in patterns(topology):
        assert all(host_of[source] != host_of[target] for source, target in streams)
        out, into = (Counter(host_of[pair[end]] for pair in streams) for end in (0, 1))
        assert set(out) == set(into) == set(host_of)  # every NIC is busy in both directions
        found.append(max(out.values()))
        ends: list[Counter[tuple[int, int, int]]] = [Counter(), Counter()]
        for rank in range(len(host_of)):
            for step in stream_plan(rank, streams, 8).steps:
                assert step.peer is not None
                pair = (rank, step.peer) if step.op == "send" else (step.peer, rank)
                ends[step.op != "send"][(*pair, step.lane)] += 1
        assert ends[0] == ends[1]
        assert sorted(pair[:2] for pair in ends[0]) == sorted(streams)
    assert found == per_nic
