"""Every algorithm, on real processes and faked hosts, over dtypes, reductions and sizes, against results computed
without communication; calls in a row on ranks that come late; memory that may be changed when a call returns."""

from __future__ import annotations

import gc
import os
import random
import time
from pathlib import Path

import pytest
import torch
from harness import Rank, RankPool, load

from ncclx_py.plans.algorithms.registry import ALGORITHMS
from ncclx_py.plans.plan import Problem, Program, Span
from ncclx_py.plans.topology import Topology

cases = load(Path(__file__).with_name("fabric_cases.py"), "fabric_cases")

HOSTS = [(0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 2)]
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
]
COUNTS = [0, 1, 5, 1001]


def problems(collective: str, size: int, count: int) -> list[Problem]:
    """Equal and unequal shares, one of them empty."""
    if collective in ("all_reduce", "broadcast", "reduce"):
        return [Problem(collective, size, count=count, root=count % size)]  # type: ignore[arg-type]
    uneven = tuple((3 * rank + 1) % 4 * count // 3 for rank in range(size))
    if collective == "all_to_all":
        matrix = tuple(tuple(uneven[(a + 2 * b) % size] for b in range(size)) for a in range(size))
        return [
            Problem("all_to_all", size, matrix=((count,) * size,) * size),
            Problem("all_to_all", size, matrix=matrix),
        ]
    return [Problem(collective, size, counts=counts) for counts in ((count,) * size, uneven)]  # type: ignore[arg-type]


def check(node: cases.Node, problem: Problem, name: str, dtype: torch.dtype, reduction: str, salt: int) -> None:
    before, after = cases.case(problem, node.rank, dtype, reduction, salt)
    node.collective(problem, name, {}, before, reduction)
    for key, value in after.items():
        if key == "output" and problem.collective == "reduce" and node.rank != problem.root:
            continue
        assert torch.equal(before[key], value), f"{name} of {problem}, {dtype}, {reduction}: {key} on rank {node.rank}"


def every_algorithm(me: Rank, hosts: tuple[int, ...]) -> list[str]:
    node = cases.node(me, hosts)
    ran = []
    for collective, algorithms in ALGORITHMS.items():
        reduction = "SUM" if "reduce" in collective else ""
        for name, algorithm in algorithms.items():
            for salt, count in enumerate(COUNTS):
                for problem in problems(collective, me.size, count):
                    if not algorithm.refuses(problem, Topology(hosts)):
                        check(node, problem, name, torch.float32, reduction, salt)
                        ran.append(f"{collective} {name}")
    return sorted(set(ran))


@pytest.mark.dist
@pytest.mark.parametrize("hosts", HOSTS)
def test_every_algorithm_is_right(pool: RankPool, hosts: tuple[int, ...]) -> None:
    ran = cases.run(pool, hosts, every_algorithm)
    everything = sorted(f"{collective} {name}" for collective, found in ALGORITHMS.items() for name in found)
    assert ran == [everything] * len(hosts)


def other_worlds(me: Rank, hosts: tuple[int, ...]) -> None:
    node = cases.fresh(me, hosts)
    for name in ALGORITHMS["all_reduce"]:
        check(node, Problem("all_reduce", me.size, count=97), name, torch.int32, "SUM", 1)
    for name, algorithm in ALGORITHMS["all_to_all"].items():
        problem = problems("all_to_all", me.size, 9)[1]
        if not algorithm.refuses(problem, Topology(hosts)):
            check(node, problem, name, torch.int32, "", 2)
    node.close()


@pytest.mark.dist
@pytest.mark.parametrize("hosts", [(0,), (0, 0), (0, 1), (0, 1, 0), (0, 0, 1, 1, 1, 2)])
def test_other_worlds(pool: RankPool, hosts: tuple[int, ...]) -> None:
    cases.run(pool, hosts, other_worlds)


def every_dtype(me: Rank, hosts: tuple[int, ...]) -> None:
    node = cases.node(me, hosts)
    for dtype in DTYPES:
        for reduction in cases.KINDS:
            if reduction in ("BAND", "BOR", "BXOR") and dtype.is_floating_point:
                continue
            for name in ("direct", "ring"):
                check(node, Problem("all_reduce", me.size, count=1001), name, dtype, reduction, 3)


@pytest.mark.dist
@pytest.mark.parametrize("hosts", HOSTS[:2])
def test_every_dtype_and_reduction(pool: RankPool, hosts: tuple[int, ...]) -> None:
    cases.run(pool, hosts, every_dtype)


def one_schedule(me: Rank, hosts: tuple[int, ...]) -> None:
    """The plan is lowered once, and run for dtypes of several sizes."""
    node = cases.node(me, hosts)
    problem = Problem("all_reduce", me.size, count=300)
    program = cases.build_rank(problem, node.fabric.topology, "hierarchical", me.rank, {})
    schedule = node.executor.lower(program, {"data": 300})
    for dtype in (torch.float64, torch.int8, torch.float32, torch.int8):
        before, after = cases.case(problem, me.rank, dtype, "SUM", 4)
        node.again(schedule, before, "SUM")
        assert torch.equal(before["data"], after["data"])


@pytest.mark.dist
def test_a_schedule_serves_all_dtypes(pool: RankPool) -> None:
    cases.run(pool, HOSTS[1], one_schedule)


def larger_than_the_window(me: Rank, hosts: tuple[int, ...]) -> None:
    os.environ["NCCLX_WINDOW_MB"] = "1"
    node = cases.fresh(me, hosts)
    del os.environ["NCCLX_WINDOW_MB"]
    count = (3 << 20) + 1  # 12 MiB
    problem = Problem("all_reduce", me.size, count=count)
    for name in ("direct", "ring", "direct"):
        data = torch.arange(count, dtype=torch.int32) + me.rank
        node.collective(problem, name, {}, {"data": data}, "SUM")
        assert torch.equal(data, torch.arange(count, dtype=torch.int32) * me.size + sum(range(me.size))), name
        data.fill_(55)
    if hosts == (0, 0, 0):
        node.collective(Problem("all_reduce", me.size, count=1), "direct", {}, {"data": torch.zeros(1)}, "SUM")
        pages = _window_bytes()
        assert pages < me.size * (3 << 20), f"the windows still hold {pages} bytes"
    node.close()


def _window_bytes() -> int:
    """The memory that the windows of this host take, of the fabric whose windows take most."""
    sizes = []
    lines = Path("/proc/self/smaps").read_text().splitlines()
    for at, line in enumerate(lines):
        if "memfd:ncclx-house" in line:
            fields = dict(one.split(":", 1) for one in lines[at + 1 : at + 20] if ":" in one)
            sizes.append(int(fields["Rss"].split()[0]) << 10)
    return max(sizes)


@pytest.mark.dist
@pytest.mark.parametrize("hosts", [(0, 0, 0), (0, 0, 1)])
def test_tensors_larger_than_the_window(pool: RankPool, hosts: tuple[int, ...]) -> None:
    cases.run(pool, hosts, larger_than_the_window)


def in_a_row(me: Rank, hosts: tuple[int, ...], naps: float, rounds: int) -> None:
    """Calls without a barrier between them; the input is overwritten as soon as each returns."""
    node = cases.node(me, hosts)
    rng = random.Random(me.rank)
    for salt in range(rounds):
        name = ("direct", "ring", "hierarchical", "leader")[salt % 4]
        count = (1, 1000, 70000)[salt % 3]
        problem = Problem("all_reduce", me.size, count=count)
        before, after = cases.case(problem, me.rank, torch.int32, "SUM", salt)
        if (salt + me.rank) % 2:
            before["data"] = node.fabric.arena.allocate((count,), torch.int32).copy_(before["data"])
        if naps and rng.random() < 0.3:
            time.sleep(rng.random() * naps)
        node.collective(problem, name, {}, before, "SUM")
        assert torch.equal(before["data"], after["data"]), f"{name}, call {salt}"
        before["data"].fill_(77)


@pytest.mark.dist
@pytest.mark.parametrize("hosts", HOSTS[:3])
def test_calls_in_a_row_do_not_mix(pool: RankPool, hosts: tuple[int, ...]) -> None:
    cases.run(pool, hosts, in_a_row, 0.0, 60)
    cases.run(pool, hosts, in_a_row, 0.02, 40)


def far_ahead(me: Rank, hosts: tuple[int, ...]) -> None:
    """Rank 0 only sends: it runs ahead of the others as far as the window lets it, and over each of its tensors."""
    node = cases.node(me, hosts)
    for salt in range(300):
        count = 20000 if salt % 10 == 0 else 3
        problem = Problem("broadcast", me.size, count=count)
        before, after = cases.case(problem, me.rank, torch.int32, "", salt)
        if me.rank == me.size - 1 and salt % 100 == 50:
            time.sleep(0.1)
        node.collective(problem, "tree", {}, before)
        assert torch.equal(before["data"], after["data"]), f"call {salt}"
        before["data"].fill_(77)


@pytest.mark.dist
@pytest.mark.parametrize("hosts", HOSTS[:2])
def test_a_sender_far_ahead_of_its_receivers(pool: RankPool, hosts: tuple[int, ...]) -> None:
    cases.run(pool, hosts, far_ahead)


def reused_arena(me: Rank, hosts: tuple[int, ...]) -> None:
    """Rank 0 sends a tensor of the arena to a receiver that is late, and then overwrites it."""
    node = cases.node(me, hosts)
    program = Program(me.rank)
    if me.rank == 0:
        program.send(Span("data", 0, 5000), 1)
    if me.rank == 1:
        program.recv(Span("data", 0, 5000), 0)
        time.sleep(0.2)
    data = node.fabric.arena.allocate((5000,), torch.float32).fill_(3.0 if me.rank == 0 else 0.0)
    node.run(program.finish(), {"data": data})
    if me.rank == 0:
        data.fill_(9.0)
    assert me.rank != 1 or bool((data == 3.0).all())


@pytest.mark.dist
@pytest.mark.parametrize("hosts", HOSTS[:3])
def test_a_call_returns_when_its_memory_is_no_longer_read(pool: RankPool, hosts: tuple[int, ...]) -> None:
    cases.run(pool, hosts, reused_arena)


def in_order(me: Rank, hosts: tuple[int, ...]) -> None:
    """Rounding shows the order: `ordered` is bit for bit the sum from rank 0 up, in every topology."""
    inputs = [torch.randn(3001, generator=torch.Generator().manual_seed(rank)) * 1000**rank for rank in range(me.size)]
    expected = inputs[0].clone()
    for tensor in inputs[1:]:
        expected += tensor
    node = cases.node(me, hosts)
    data = inputs[me.rank].clone()
    node.collective(Problem("all_reduce", me.size, count=3001), "ordered", {}, {"data": data}, "SUM")
    assert torch.equal(data, expected)


@pytest.mark.dist
@pytest.mark.parametrize("hosts", HOSTS)
def test_the_order_of_a_plan_is_the_order_of_the_sums(pool: RankPool, hosts: tuple[int, ...]) -> None:
    cases.run(pool, hosts, in_order)


def rounded_once(me: Rank, hosts: tuple[int, ...], dtype: torch.dtype, reduction: str, late: bool) -> None:
    """On one host, the sum in single precision, rounded once, also where some come so late that others go ahead."""
    node = cases.node(me, hosts)
    inputs = [
        torch.rand(70001, generator=torch.Generator().manual_seed(rank)).to(dtype) + 0.5 for rank in range(me.size)
    ]
    order = [(me.rank - shift) % me.size for shift in range(me.size)]  # in which `direct` combines
    expected = inputs[me.rank].float()
    for rank in order[1:]:
        expected = expected + inputs[rank] if reduction == "SUM" else expected * inputs[rank]
    problem = Problem("reduce_scatter", me.size, counts=(17500,) * (me.size - 1) + (70001 - 17500 * (me.size - 1),))
    plan = cases.build_rank(problem, node.fabric.topology, "direct", me.rank, {})
    output = torch.zeros(problem.counts[me.rank], dtype=dtype)
    schedule = node.executor.lower(plan, problem.lengths(me.rank), round_once=True)
    if late:
        time.sleep(0.1 * me.rank)
    node.again(schedule, {"input": inputs[me.rank], "output": output}, reduction)
    assert torch.equal(output, expected.split(problem.counts)[me.rank].to(dtype))


@pytest.mark.dist
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("late", [False, True])
def test_half_precision_can_be_rounded_once(pool: RankPool, dtype: torch.dtype, late: bool) -> None:
    cases.run(pool, HOSTS[0], rounded_once, dtype, "SUM", late)
    cases.run(pool, HOSTS[0], rounded_once, dtype, "PRODUCT", late)


def no_garbage(me: Rank, hosts: tuple[int, ...]) -> int:
    node = cases.node(me, hosts)
    problem = Problem("all_reduce", me.size, count=50)
    plan = cases.build_rank(problem, node.fabric.topology, "hierarchical", me.rank, {})
    schedule = node.executor.lower(plan, {"data": 50})
    data = torch.ones(50)
    node.again(schedule, {"data": data}, "SUM")
    gc.collect()
    gc.disable()
    for _ in range(20):
        node.again(schedule, {"data": data}, "SUM")
    found = gc.collect()
    gc.enable()
    return found


@pytest.mark.dist
@pytest.mark.parametrize("hosts", HOSTS[:2])
def test_calls_leave_nothing_for_the_garbage_collector(pool: RankPool, hosts: tuple[int, ...]) -> None:
    """A full collection takes tenths of a second in a process with torch."""
    assert max(cases.run(pool, hosts, no_garbage)) < 20, "an object per call"


def inference(me: Rank, hosts: tuple[int, ...]) -> None:
    """Tensors of inference mode and of autograd leaves, in both orders: addresses come again, views are kept."""
    node = cases.node(me, hosts)
    problem = Problem("all_reduce", me.size, count=50)
    memory = torch.zeros(50)
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            memory.zero_()
            node.collective(problem, "direct", {}, {"data": memory.add_(me.rank)}, "SUM")
            assert memory[0] == sum(range(me.size))
    with torch.inference_mode():
        made = torch.ones(50)
    node.collective(problem, "direct", {}, {"data": made}, "SUM")
    assert made[0] == me.size
    leaf = torch.ones(50, requires_grad=True)
    node.collective(problem, "direct", {}, {"data": leaf}, "SUM")
    assert leaf[0] == me.size


@pytest.mark.dist
def test_inference_mode_and_leaves(pool: RankPool) -> None:
    cases.run(pool, HOSTS[1], inference)
