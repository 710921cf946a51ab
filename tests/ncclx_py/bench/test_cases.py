"""The values that benchmarks send and what they expect back, against plain indexing of all ranks' inputs; and that errors show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ncclx_py.bench.cases import Case, Tensors, weights
from ncclx_py.bench.settings import COLLECTIVES, Settings
from ncclx_py.plans.topology import Topology

pytestmark = pytest.mark.unit

TOPOLOGY = Topology((0, 0, 0, 1, 1))
SIZE = TOPOLOGY.size


@pytest.mark.parametrize("nbytes", [1, 333, 4096])
@pytest.mark.parametrize(
    ("dtype", "op"),
    [
        ("float32", "sum"),
        ("bfloat16", "sum"),
        ("float16", "avg"),
        ("int8", "sum"),
        ("float64", "max"),
        ("int64", "min"),
    ],
)
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_what_the_collective_ought_to_give_is_right_and_anything_else_is_wrong(
    collective: str, dtype: str, op: str, nbytes: int
) -> None:
    cases, tensors = _filled(
        collective, nbytes, Settings((collective,), (nbytes,), ("ncclx",), dtype=dtype, op=op, root=2)
    )
    _communicate(cases, tensors)
    assert [case.wrong(held) for case, held in zip(cases, tensors)] == [0] * SIZE
    for case, held in zip(cases, tensors):
        if case.collective == "reduce" and case.rank != 2:
            continue
        for at in {0, held.result.numel() - 1}:
            held.result[at] += 2
            assert case.wrong(held) == 1
            held.result[at] -= 2


@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter", "reduce"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_missing_or_doubled_contribution_is_noticed(collective: str, dtype: str) -> None:
    for factor in (0, 2):
        cases, tensors = _filled(collective, 1024, Settings((collective,), (1024,), ("ncclx",), dtype=dtype))
        tensors[3].given.mul_(factor)
        _communicate(cases, tensors)
        assert cases[0].wrong(tensors[0]) > 0


def test_a_block_from_the_wrong_rank_is_noticed() -> None:
    for collective in ("all_gather", "all_to_all"):
        cases, tensors = _filled(collective, 4096, Settings((collective,), (4096,), ("ncclx",)))
        _communicate(cases, tensors)
        result = tensors[1].result
        blocks = list(result.chunk(SIZE))
        result.copy_(torch.cat([blocks[1], blocks[0], *blocks[2:]]))
        assert cases[1].wrong(tensors[1]) > 0


@pytest.mark.parametrize("collective", ["all_to_all", "all_to_all_v"])
def test_blocks_that_were_meant_for_another_rank_are_noticed(collective: str) -> None:
    cases, tensors = _filled(collective, 4096, Settings((collective,), (4096,), ("ncclx",)))
    _communicate(cases, tensors)
    assert all(case.wrong(tensors[(case.rank + 1) % SIZE]) > 0 for case in cases)


def test_sizes_count_as_in_nccl_tests() -> None:
    settings = Settings(("all_reduce",), (1000,))
    sizes = {name: Case(name, SIZE, 0, TOPOLOGY, 1000, settings).bytes for name in COLLECTIVES}
    assert {sizes[name] for name in ("all_reduce", "broadcast", "reduce")} == {1000}
    assert {sizes[name] for name in ("all_gather", "reduce_scatter", "all_to_all", "all_to_all_v")} == {1000}
    assert Case("all_gather", SIZE, 0, TOPOLOGY, 999, settings).bytes == 980  # 49 floats of each of 5 ranks
    assert Case("all_to_all", SIZE, 0, TOPOLOGY, 1, settings).bytes == 4 * SIZE


def test_the_first_rank_of_each_host_holds_the_skewed_share() -> None:
    matrix = Case(
        "all_to_all_v", SIZE, 0, TOPOLOGY, 40_000, Settings(("all_to_all_v",), (40_000,), skew=0.8)
    ).problem.matrix
    rows = [sum(row) for row in matrix]
    assert rows[0] / sum(rows[:3]) == pytest.approx(0.8, abs=0.001)
    assert rows[3] / sum(rows[3:]) == pytest.approx(0.8, abs=0.001)
    assert sum(rows) / SIZE == pytest.approx(10_000, rel=0.001)
    assert all(len(set(row)) == 1 for row in matrix)


def test_weights_differ_as_far_as_the_dtype_is_exact() -> None:
    assert weights(8, 2**24) == list(range(8))
    few = weights(40, 256)
    assert len(few) == 40
    assert 3 * (40 + sum(few)) <= 256
    assert len(set(few)) > 1
    with pytest.raises(ValueError, match="100 ranks"):
        weights(100, 256)


def _filled(collective: str, nbytes: int, settings: Settings) -> tuple[list[Case], list[Tensors]]:
    cases = [Case(collective, SIZE, rank, TOPOLOGY, nbytes, settings) for rank in range(SIZE)]
    tensors = [case.allocate(torch.empty) for case in cases]
    for case, held in zip(cases, tensors):
        case.fill(held)
    return cases, tensors


def _communicate(cases: list[Case], tensors: list[Tensors]) -> None:
    """The collective by its definition, on tensors of all ranks in one process."""
    problem, settings = cases[0].problem, cases[0].settings
    given = [held.given.clone() for held in tensors]
    for case, held in zip(cases, tensors):
        if problem.collective == "all_to_all":
            parts = [given[s].split(list(problem.matrix[s]))[case.rank] for s in range(SIZE)]
            held.result.copy_(torch.cat(parts))
        elif problem.collective == "all_gather":
            held.result.copy_(torch.cat(given))
        elif problem.collective == "broadcast":
            held.result.copy_(given[settings.root])
        elif problem.collective == "reduce_scatter":
            held.result.copy_(_reduce(given, settings.op).split(list(problem.counts))[case.rank])
        elif problem.collective == "all_reduce" or case.rank == settings.root:
            held.result.copy_(_reduce(given, settings.op))


def _reduce(given: list[Tensor], op: str) -> Tensor:
    stacked = torch.stack(given).double()
    return {"sum": stacked.sum(0), "avg": stacked.mean(0), "max": stacked.amax(0), "min": stacked.amin(0)}[op]
