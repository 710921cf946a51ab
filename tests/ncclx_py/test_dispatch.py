"""Mixture-of-experts dispatch on real ranks, hosts as a topology says, against the same layer in one process in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from math import comb

import pytest
import torch
import torch.distributed as dist
from harness import Rank, RankPool
from torch import Tensor

from ncclx_py.dispatch import Dispatcher, Traffic
from ncclx_py.plans.topology import Topology

pytestmark = pytest.mark.dist

WORLD = 4
HOSTS = {
    "one": (0, 0, 0, 0),
    "2x2": (0, 0, 1, 1),
    "cyclic": (0, 1, 0, 1),
    "3+1": (0, 0, 0, 1),
    "1+3": (0, 1, 1, 1),
    "4x1": (0, 1, 2, 3),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(WORLD) as ranks:
        yield ranks


def batch(rank: int, rows: int, experts: int, choices: int, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, the experts of each (all different), and their weights."""
    generator = torch.Generator().manual_seed(100 + rank)
    scores = torch.rand(rows, experts, generator=generator)
    ids = scores.topk(choices, dim=1).indices if rows else torch.zeros(0, choices, dtype=torch.long)
    return (
        torch.randn(rows, width, generator=generator, dtype=torch.float64),
        ids,
        torch.rand(rows, choices, generator=generator, dtype=torch.float64),
    )


def expert_matrix(expert: int, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(expert)
    return torch.randn(width, width, generator=generator, dtype=torch.float64)


def apply_expert(expert: int, rows: Tensor) -> Tensor:
    return torch.tanh(rows @ expert_matrix(expert).to(rows.dtype))


def layer(dispatcher: Dispatcher, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    sent = dispatcher.dispatch(rows, ids, weights)
    first = dispatcher.rank * dispatcher.local_experts
    parts = zip(range(first, first + dispatcher.local_experts), sent.rows.split(sent.counts))
    return dispatcher.combine(torch.cat([apply_expert(expert, part) for expert, part in parts]), sent)


def reference(rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The same layer, expert by expert and row by row, in one process."""
    results = []
    for row in range(len(rows)):
        terms = [
            weights[row, choice] * apply_expert(int(ids[row, choice]), rows[row]) for choice in range(ids.shape[1])
        ]
        results.append(torch.stack(terms).sum(0))
    return torch.stack(results) if results else rows * 1.0


def compare(
    me: Rank, host_of: tuple[int, ...], counts: list[int], experts: int, choices: int, backend: str = "gloo"
) -> dict[str, float]:
    """The largest deviation of the result and of the gradients from the reference."""
    me.init(backend)
    dispatcher = Dispatcher(None, Topology(host_of), experts)
    rows, ids, weights = batch(me.rank, counts[me.rank], experts, choices)
    found = [tensor.clone().requires_grad_() for tensor in (rows, weights)]
    wanted = [tensor.clone().requires_grad_() for tensor in (rows, weights)]
    slope = torch.linspace(-1, 1, rows.numel(), dtype=torch.float64).reshape(rows.shape)
    result = layer(dispatcher, found[0], ids, found[1])
    (result * slope).sum().backward()
    answer = reference(wanted[0], ids, wanted[1])
    (answer * slope).sum().backward()
    pairs = {"result": (result, answer)}
    for name, mine, theirs in zip(("rows", "weights"), found, wanted):
        assert mine.grad is not None
        pairs[name] = (mine.grad, torch.zeros_like(theirs) if theirs.grad is None else theirs.grad)
    return {name: float((a - b).abs().max()) if a.numel() else 0.0 for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("host_of", HOSTS.values(), ids=HOSTS)
def test_result_and_gradients_are_those_of_one_process(pool: RankPool, host_of: tuple[int, ...]) -> None:
    for deviations in pool.run(compare, host_of, [7, 5, 9, 6], 12, 3):
        assert max(deviations.values()) < 1e-12, deviations


@pytest.mark.parametrize(
    ("counts", "experts", "choices"),
    [([0, 5, 0, 1], 4, 2), ([0, 0, 0, 0], 4, 1), ([8, 0, 0, 0], 8, 8), ([3, 3, 3, 3], 4, 1)],
    ids=["some ranks without rows", "no rows at all", "all experts", "one expert per row"],
)
def test_uneven_loads(pool: RankPool, counts: list[int], experts: int, choices: int) -> None:
    for deviations in pool.run(compare, HOSTS["2x2"], counts, experts, choices):
        assert max(deviations.values()) < 1e-12, deviations


def test_over_the_ncclx_backend(pool: RankPool) -> None:
    for deviations in pool.run(compare, HOSTS["3+1"], [7, 0, 9, 6], 12, 3, "ncclx"):
        assert max(deviations.values()) < 1e-12, deviations


def repeated_choice(me: Rank) -> float:
    me.init("gloo")
    rows, _, weights = batch(me.rank, 4, 8, 2)
    ids = torch.full((4, 2), (me.rank * 3) % 8)
    result = layer(Dispatcher(None, Topology(HOSTS["2x2"]), 8), rows, ids, weights)
    return float((result - reference(rows, ids, weights)).abs().max())


def test_a_row_may_name_an_expert_twice(pool: RankPool) -> None:
    assert max(pool.run(repeated_choice)) < 1e-12


def crossing(me: Rank, host_of: tuple[int, ...], number: int, experts: int, choices: int) -> tuple[Traffic, int, bool]:
    """(the traffic of one forward and backward pass, the bytes of one row, whether row copies were right at the receiver)"""
    me.init("gloo")
    dispatcher = Dispatcher(None, Topology(host_of), experts)
    rows, ids, weights = batch(me.rank, number, experts, choices)
    rows = rows.to(torch.bfloat16).requires_grad_()
    result = layer(dispatcher, rows, ids, weights.float())
    forward = dispatcher.traffic.row_bytes
    result.float().sum().backward()
    return dispatcher.traffic, rows[0].numel() * 2, dispatcher.traffic.row_bytes == 2 * forward


@pytest.mark.parametrize("shape", ["2x2", "cyclic", "4x1"])
def test_one_copy_per_destination_host_crosses(pool: RankPool, shape: str) -> None:
    """Against the arithmetic for top-8 of 64 experts chosen evenly, and against one copy per expert."""
    experts, choices, number = 64, 8, 400
    hosts = max(HOSTS[shape]) + 1
    results = pool.run(crossing, HOSTS[shape], number, experts, choices)
    expected_hosts = hosts * (1 - comb(experts - experts // hosts, choices) / comb(experts, choices))
    expected = number * WORLD * expected_hosts * (hosts - 1) / hosts
    rows = sum(traffic.rows for traffic, _, _ in results)
    copies = sum(traffic.copies for traffic, _, _ in results)
    assert rows == pytest.approx(expected, rel=0.02)
    assert copies / rows == pytest.approx(choices / expected_hosts, rel=0.03)
    row_bytes = results[0][1]
    # Out and back, and the same in the backward pass.
    assert sum(traffic.row_bytes for traffic, _, _ in results) == 4 * rows * row_bytes
    assert all(symmetric for _, _, symmetric in results)


def exact_rows(me: Rank) -> tuple[int, int]:
    me.init("gloo")
    dispatcher = Dispatcher(None, Topology(HOSTS["2x2"]), 4)
    ids = torch.tensor([[2, 3], [0, 1], [1, 2]])  # as seen from host 0: both there, none there, one there
    dispatcher.dispatch(torch.ones(3, 2), ids, torch.ones(3, 2))
    return dispatcher.traffic.rows, dispatcher.traffic.copies


def test_crossing_rows_are_counted_exactly(pool: RankPool) -> None:
    assert pool.run(exact_rows) == [(2, 3), (2, 3), (2, 3), (2, 3)]


def half_precision(me: Rank) -> tuple[bool, float]:
    me.init("gloo")
    rows, ids, weights = batch(me.rank, 16, 16, 4)
    dispatcher = Dispatcher(None, Topology(HOSTS["2x2"]), 16)
    short = rows.to(torch.bfloat16)
    result = layer(dispatcher, short, ids, weights.float())
    exact = reference(short.double(), ids, weights.float().double())
    return result.dtype == torch.bfloat16, float((result.double() - exact).abs().max() / exact.abs().max())


def test_bfloat16_is_summed_in_float32(pool: RankPool) -> None:
    for same_type, deviation in pool.run(half_precision):
        assert same_type
        assert deviation < 2**-6


def many_small_terms(me: Rank) -> float:
    me.init("gloo")
    dispatcher = Dispatcher(None, Topology(HOSTS["2x2"]), 64)
    ids = torch.arange(16).unsqueeze(0)  # the experts of rank 0
    sent = dispatcher.dispatch(torch.ones(1, 1, dtype=torch.bfloat16), ids, torch.ones(1, 16))
    outputs = torch.ones_like(sent.rows)
    outputs[: sum(sent.counts[:1])] = 256  # by the first expert; next to it, 1 is less than half a step of bfloat16
    return dispatcher.combine(outputs, sent).item()


def test_small_terms_are_not_lost_on_a_rank(pool: RankPool) -> None:
    assert pool.run(many_small_terms) == [272.0] * WORLD  # 271, rounded once


def found_hosts(me: Rank) -> tuple[int, ...]:
    import os

    me.init("gloo")
    os.environ["NCCLX_HOST_ID"] = f"host {me.rank % 2}"
    try:
        return Dispatcher(None, None, 4).topology.host_of
    finally:
        del os.environ["NCCLX_HOST_ID"]


def test_without_a_topology_hosts_are_asked_for(pool: RankPool) -> None:
    assert pool.run(found_hosts) == [(0, 1, 0, 1)] * WORLD


def refused(me: Rank) -> list[str]:
    me.init("gloo")
    good = Dispatcher(None, Topology(HOSTS["2x2"]), 4)
    ids, weights, rows = torch.tensor([[0, 4]]), torch.ones(1, 2), torch.ones(1, 3)
    calls = [
        lambda: Dispatcher(dist.group.WORLD, Topology((0, 0)), 4),
        lambda: Dispatcher(None, Topology(HOSTS["2x2"]), 6),
        lambda: good.dispatch(rows, ids, weights),
        lambda: good.dispatch(rows, ids, torch.ones(1, 3)),
    ]
    messages = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_does_not_fit_is_named(pool: RankPool) -> None:
    for messages in pool.run(refused):
        assert messages == [
            "the topology has 2 ranks, the group 4; they must be the same",
            "6 experts cannot be divided evenly among 4 ranks",
            "expert_ids run from 0 to 4; the experts are 0 to 3",
            "rows must be [T, H], expert_ids and weights [T, k]; they are [1, 3], [1, 2] and [1, 3]",
        ]
