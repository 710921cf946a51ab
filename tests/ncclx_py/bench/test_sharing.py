"""The streams of the sharing probe: who sends to whom, and that both ends agree."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ncclx_py.bench.sharing import one_each, patterns, stream_plan, weights
from ncclx_py.plans.topology import Topology
from ncclx_py.simulate.fair import FairFlows

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("host_of", "per_nic"),
    [
        ((0, 0, 1, 1, 2, 2, 3, 3), [1, 2, 3, 12]),
        ((0, 0, 0, 0, 1, 1, 1, 1), [1, 4, 16]),
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


def test_every_rank_has_its_like_on_the_next_host() -> None:
    assert one_each(Topology((0, 0, 1, 1, 2))) == [((0, 2), (1, 3)), ((2, 4),), ((4, 0),)]


def test_weights_are_found_again_from_when_streams_end() -> None:
    assert weights([4 / 3, 2.0]) == pytest.approx(
        [0.75, 0.25]
    )  # the second has a third by then, and then all of the pipe
    assert weights([3.0, 3.0, 3.0]) == pytest.approx([1 / 3] * 3)
    true = np.array([0.2, 0.45, 0.05, 0.3])
    flows = FairFlows(np.array([10.0, np.inf]), 1, 1e-9, np.zeros(2, np.bool_), 0.0)
    flows.open(np.arange(4), np.zeros((4, 1), np.int64), np.ones((4, 1)), true, np.full(4, 25.0))
    flows.settle(0)
    ends = np.zeros(4)
    while (window := flows.next_end()) < 1 << 60:
        owners, times = flows.close(window)
        ends[owners] = times
        flows.settle(window)
    assert weights(ends.tolist()) == pytest.approx(true.tolist())
